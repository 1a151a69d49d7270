"""The quick start: its settings, its commands with the slow ones replaced, and the words and picture at its end."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, write_folder
from PIL import Image

from docs import quickstart_result as result
from docs import quickstart_settings
from moco.processes.environment import usable_cores

FIGURES = {"val": 50, "Corruption": 40, "Sketch": 45, "Stylized": 35, "Rendition": 60, "Shape bias": 80}
TWO_ROWS = {"MoCo v2": {"val": [50.0]}, "+ Patch": {"val": [54.0]}}
TWO_ROWS = {"table": TWO_ROWS, "differences": {"+ Patch": {"val": [4.0, 1.0]}}}
PYTHON = f"""#!{sys.executable}
'''Instead of python: records the command, and leaves the files that the real scripts would leave.'''
import os, pathlib, subprocess, sys
from PIL import Image
arguments = sys.argv[1:]
print(*arguments, file=open(os.environ["RECORD"], "a"))
def option(name):
    return pathlib.Path(arguments[arguments.index(name) + 1])
if os.environ.get("FAILS", "nothing fails") in " ".join(arguments):
    sys.exit("it broke")
if arguments[0] == "preprocess/shapes.py":
    for split in "train", "val":
        (option("--out") / split / "disc").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(option("--out") / split / "disc" / "1.png")
elif "--preview" in arguments:
    Image.new("RGB", (216, 200)).save(option("--preview"))
elif arguments[0] == "moco-non-sem-neg.py":
    print("epoch 1 [2/4]  loss 1.0")
elif arguments[0] == "eval_robustness.py":
    option("--json").write_text({json.dumps(json.dumps(TWO_ROWS))})
    print("| model | val |" + chr(10) + "|---|---|" + chr(10) + "val: 1500 images")
elif arguments[0].startswith("docs/"):
    code = subprocess.run([{sys.executable!r}, *arguments]).returncode
    if arguments[0] == "docs/quickstart_settings.py" and "GPUS" in os.environ:
        print(f"gpus={{os.environ['GPUS']}} parallel={{os.environ['GPUS']}}")
    sys.exit(code)
"""


def table(*runs):
    """The --json file's table: a row per argument, whose figures are FIGURES plus each of the numbers in it."""
    add = lambda numbers: {column: [figure + more for more in numbers] for column, figure in FIGURES.items()}
    return {f"row {row}": add(numbers) for row, numbers in enumerate(runs)}


def run_quickstart(folder, *arguments, **settings):
    """(finished process, the commands it gave) of quickstart.sh with PYTHON in the place of python."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "record").write_text("")
    (folder / "bin" / "python").write_text(PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    settings |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "RECORD": f"{folder}/record"}
    command = ["bash", f"{REPOSITORY}/quickstart.sh", *arguments]
    environment = {**os.environ, "QUICKSTART_OUT": f"{folder}/out", **settings}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    commands = (folder / "record").read_text().splitlines()
    return run, commands


def of(commands, script):
    return [each for each in commands if each.startswith(script) and "--preview" not in each]


def test_every_row_is_trained_and_probed_with_every_seed(tmp_path):
    run, commands = run_quickstart(tmp_path, QUICKSTART_SEEDS="2")
    assert run.returncode == 0, run.stderr
    training, out = of(commands, "moco-non-sem-neg.py"), tmp_path / "out"
    assert len(training) == 6 and len(of(commands, "main_lincls.py")) == 6
    for options in ("--robust none", "--robust patch --alpha 2", "--robust texture --alpha 2"):
        assert sorted(command.split("--seed ")[1][0] for command in training if options in command) == ["0", "1"]
    assert sum(command.endswith("shapes-texture") for command in training) == 2
    rows = f"MoCo v2={out}/plain-0/model_best_0199.pth.tar,{out}/plain-1/model_best_0199"
    assert rows in of(commands, "eval_robustness.py")[0]
    assert (out / "table.md").read_text() == "| model | val |\n|---|---|\n"
    assert "+ Patch against MoCo v2: better in 1 of 1 columns" in run.stdout
    assert "Terminated" not in run.stderr and (out / "plain-1" / "pretraining.log").read_text()
    assert Image.open(out / "result.png").size == (1600, 900)
    again = run_quickstart(tmp_path, QUICKSTART_ROWS="plain patch3")[1]  # continues, and draws no preview again
    assert len(again) == 8 and all("--resume auto" in each for each in of(again, "moco-") + of(again, "main_"))


@pytest.mark.parametrize("library", [False, True])
def test_ones_own_images_with_ones_own_options_on_two_gpus(tmp_path, library):
    write_folder(tmp_path / "my data", classes="01", train=1, val=1)
    no_library = {} if library else {"FAILS": "import imagecorruptions"}
    options = ["my data", "--epochs", "3", "--image-size", "48", "--moco-t", "0.1"]
    run, commands = run_quickstart(tmp_path, *options, GPUS="2", **no_library)
    assert run.returncode == 0, run.stderr
    training = of(commands, "moco-non-sem-neg.py")
    assert len(training) == 2 and {command.split("--gpu ")[1][0] for command in training} == {"0", "1"}
    for command in training:
        assert "--image-size 48 --epochs 3" in command and "--moco-t 0.1" in command
        assert command.endswith(f" {tmp_path}/my data")
    assert all("/checkpoint_0002.pth.tar" in command for command in of(commands, "main_lincls.py"))
    assert library == ("--corruption" in of(commands, "eval_robustness.py")[0])
    assert len(of(commands, "preprocess/corruptions.py")) == library != ("pip install imagecor" in run.stderr)


def test_what_goes_wrong_ends_the_quick_start_with_its_words(tmp_path):
    run, commands = run_quickstart(tmp_path, FAILS="main_lincls.py")
    assert run.returncode == 1 and "it broke" in run.stderr and not of(commands, "eval_robustness.py")
    write_folder(tmp_path / "data", classes="01", train=1, val=1)
    for arguments, settings, told in (
        (["nowhere"], {}, "nowhere: no such directory"), (["data", "--ckpt_path=x"], {}, "set by quickstart.sh"),
        (["data"], {}, "holds runs on"), ([], {"QUICKSTART_ROWS": "plain patch"}, "no row patch; there are plain"),
        ([], {"QUICKSTART_SEEDS": "x"}, "x is no number of runs"), ([], {"QUICKSTART_OUT": "a,b"}, "a ; or , in a"),
    ):  # fmt: skip
        run, _ = run_quickstart(tmp_path, *arguments, **settings)
        assert run.returncode == 2 and told in run.stderr, run.stderr


@pytest.mark.parametrize("images, side, gpus, shown", [
    (4000, 64, 0, "-a resnet10_x0_5 --image-size 40 --epochs 11 --batch-size 64 --lr 0.06 --moco-m 0.99"),
    (36, 500, 0, "--image-size 40 --epochs 200 --batch-size 16 --lr 0.015 --moco-m 0.99"),
    (4000, 28, 0, "--image-size 32 --epochs 11"), (1, 64, 0, "--epochs 200 --batch-size 2 "),
    (100_000, 500, 4, "-a resnet50 --image-size 224 --epochs 25 --batch-size 128 --lr 0.06 --moco-m 0.999"),
])  # fmt: skip
def test_settings_follow_from_number_and_size_of_the_images(monkeypatch, tmp_path, images, side, gpus, shown):
    for split in "train", "val":
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (side, 2 * side)).save(tmp_path / split / "a" / "1.png")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    list_images = quickstart_settings.folders.list_images
    many = lambda path: (found := list_images(path))._replace(paths=np.repeat(found.paths, images))  # noqa: E731
    monkeypatch.setattr(quickstart_settings.folders, "list_images", many)
    found = quickstart_settings.settings(str(tmp_path), ["--knn"])
    assert shown in found["settings"] and found["settings"].endswith(" --knn")
    assert found["gpus"] == gpus and found["parallel"] == (gpus or usable_cores() + 1)


def test_the_share_that_is_done_counts_steps(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pretraining.log").write_text("epoch 4 [1/62]  loss\nepoch 5 [31/62]  loss 1\nsaved\n")
    (tmp_path / "run" / "probe.log").write_text("epoch 0 [2/4]  loss 3\nval: epoch 0 [1/2]\n")
    share = (REPOSITORY / "quickstart.sh").read_text().split("share() {")[1].split("\n}\n")[0]
    script = f"out={tmp_path} jobs=(1 2) epochs=10 probe_epochs=20; {share}"
    assert float(subprocess.check_output(["bash", "-c", script])) == pytest.approx((2 * 5.5 + 0.5) / 2 / 40)


def test_the_sentences_say_better_worse_and_within_noise():
    means = {"row 1": 5.0, "row 2": -2.5, "row 3": 1.9}
    found = {name: dict.fromkeys(FIGURES, result.Difference(mean, 1.0)) for name, mean in means.items()}
    better, worse, noisy, trust = result.sentences(table([0, 1], [5, 6], [-2, -1], [2, 3]), found)
    assert better == "row 1 against row 0: better in 6 of 6 columns."
    assert "better in 0 of 6 columns, worse in 6 (val, Corruption," in worse
    assert "better in 0 of 6 columns, within noise in 6." in noisy
    assert "over the test images; another seed" in trust
    assert "Means of 3 seeds" in result.sentences(table([0, 1, 2], [5, 6, 7]), found)[-1]
    lines = result.text(table([0, 1], [5, 6]), {"row 1": found["row 1"]}).splitlines()
    assert max(map(len, lines)) <= 80 and "50.5±0.7" in lines[1] and lines[3].count("+5.0±1.0") == 6


@pytest.mark.parametrize("rows", [([0],), ([0, 3], [1, 2]), ([0],) * 9])
def test_the_picture_shows_every_row_in_its_colour(tmp_path, rows):
    found = {"row 1": {"val": result.Difference(1.0, 3.0)}}
    result.draw(table(*rows), found, [Image.new("RGB", (216, 200), "#123456")] * 2, tmp_path / "result.png")
    pixels = np.asarray(Image.open(tmp_path / "result.png"))
    for colour in [*result.COLOURS[: len(rows)], "#123456"]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).sum() > 100, colour
