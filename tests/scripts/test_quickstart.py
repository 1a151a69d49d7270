"""The quick start: its commands, with the slow ones replaced, and the sentences and picture at its end."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPOSITORY
from PIL import Image

from docs import quickstart_result as result

FIGURES = {"val": 50, "Corruption": 40, "Sketch": 45, "Stylized": 35, "Rendition": 60, "Shape bias": 80}
TWO_ROWS = {
    "table": {"MoCo v2": {"val": [50.0]}, "+ Patch": {"val": [54.0]}},
    "differences": {"+ Patch": {"val": [4.0, 1.0]}},
}
PYTHON = f"""#!{sys.executable}
'''Instead of python: records the command, and leaves the files that the real scripts would leave.'''
import os, pathlib, subprocess, sys
arguments = sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    file.write(" ".join(arguments) + chr(10))
def option(name):
    return pathlib.Path(arguments[arguments.index(name) + 1])
if os.environ.get("FAILS", "nothing fails") in " ".join(arguments):
    sys.exit("it broke")
if arguments[0] == "preprocess/shapes.py":
    option("--out").mkdir(parents=True, exist_ok=True)
elif "--preview" in arguments and arguments[0].startswith("moco"):
    from PIL import Image
    Image.new("RGB", (216, 200)).save(option("--preview"))
elif arguments[0] == "moco-non-sem-neg.py":
    (option("--ckpt_path") / "log.jsonl").write_text("{{}}" + chr(10))
    (option("--ckpt_path") / "checkpoint_0019.pth.tar").touch()
elif arguments[0] == "main_lincls.py":
    (option("--ckpt_path") / "checkpoint_robust_0019.pth.tar").touch()
elif arguments[0] == "eval_robustness.py":
    option("--json").write_text({json.dumps(json.dumps(TWO_ROWS))})
    print("| model | val |" + chr(10) + "|---|---|" + chr(10) + "val: 1500 images")
elif arguments[0] == "docs/quickstart_result.py":
    sys.exit(subprocess.run([{sys.executable!r}, *arguments]).returncode)
"""


def table(*runs):
    """The --json file's table: a row per argument, whose figures are FIGURES plus each of the numbers in it."""
    return {
        f"row {row}": {column: [figure + more for more in numbers] for column, figure in FIGURES.items()}
        for row, numbers in enumerate(runs)
    }


def run_quickstart(folder, **settings):
    """(finished process, the commands it gave) of quickstart.sh with PYTHON in the place of python."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "python").write_text(PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    settings |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "RECORD": f"{folder}/record"}
    environment = {**os.environ, **settings, "QUICKSTART_OUT": f"{folder}/out"}
    run = subprocess.run(["bash", "quickstart.sh"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    commands = (folder / "record").read_text().splitlines()
    (folder / "record").unlink()
    return run, commands


def test_every_row_is_trained_and_probed_with_every_seed(tmp_path):
    run, commands = run_quickstart(tmp_path, QUICKSTART_SEEDS="2")
    assert run.returncode == 0, run.stderr
    training = [each for each in commands if each.startswith("moco-non-sem-neg.py") and "--preview" not in each]
    assert len(training) == 8 and sum(command.startswith("main_lincls.py") for command in commands) == 8
    for options in ("--robust none", "--robust patch --alpha 2", "--robust texture --alpha 2"):
        assert sorted(command.split("--seed ")[1][0] for command in training if options in command) == ["0", "1"]
    assert sum(command.endswith("shapes-texture") for command in training) == 2
    (evaluation,) = (command for command in commands if command.startswith("eval_robustness.py"))
    assert f"MoCo v2={tmp_path}/out/plain-0/checkpoint_robust_0019.pth.tar,{tmp_path}/out/plain-1/" in evaluation
    assert (tmp_path / "out" / "table.md").read_text() == "| model | val |\n|---|---|\n"
    assert "+ Patch against MoCo v2: better in 1 of 1 columns" in run.stdout
    assert "Terminated" not in run.stderr
    assert Image.open(tmp_path / "out" / "result.png").size == (1600, 900)


def test_what_is_done_is_not_done_again(tmp_path):
    run_quickstart(tmp_path, QUICKSTART_TEXTURE="0")
    (tmp_path / "out" / "patch2-0" / "done").unlink()  # as if interrupted in the probe
    run, commands = run_quickstart(tmp_path, QUICKSTART_TEXTURE="0")
    assert run.returncode == 0
    assert not any("texture" in command for command in commands)
    again = [command for command in commands if "--resume auto" in command]
    assert len(again) == 1 and again[0].startswith("main_lincls.py") and f"{tmp_path}/out/patch2-0" in again[0]


def test_a_run_that_fails_ends_the_quick_start_with_its_output(tmp_path):
    run, commands = run_quickstart(tmp_path, FAILS="main_lincls.py")
    assert run.returncode == 1
    assert "it broke" in run.stderr and not any(command.startswith("eval_robustness.py") for command in commands)


def test_the_sentences_say_better_worse_and_within_noise():
    found = {
        name: dict.fromkeys(FIGURES, result.Difference(mean, 1.0))
        for name, mean in (("row 1", 5.0), ("row 2", -2.5), ("row 3", 1.9))
    }
    better, worse, noisy, trust = result.sentences(table([0, 1], [5, 6], [-2, -1], [2, 3]), found)
    assert better.startswith("row 1 against row 0: better in 6 of 6 columns; val +5.0±1.0, ")
    assert "better in 0 of 6 columns, worse in 6 (val, Corruption," in worse
    assert "better in 0 of 6 columns, within noise in 6; val +1.9±1.0" in noisy
    assert "over the test images; another seed" in trust
    assert "Means of 3 seeds" in result.sentences(table([0, 1, 2], [5, 6, 7]), found)[-1]


@pytest.mark.parametrize("rows", [([0],), ([0, 3], [1, 2]), ([0],) * 9])
def test_the_picture_shows_every_row_in_its_colour(tmp_path, rows):
    result.draw(table(*rows), [Image.new("RGB", (216, 200), "#123456")] * 2, tmp_path / "result.png")
    pixels = np.asarray(Image.open(tmp_path / "result.png"))
    for colour in [*result.COLOURS[: len(rows)], "#123456"]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).sum() > 100, colour
