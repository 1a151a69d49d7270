"""Random command lines and checkpoints: a script plans its run, or says in one line what is wrong."""

import contextlib
import copy
import io
import os
import random
import runpy
import shutil
import sys

import pytest
import torch
from helpers import EVALUATE, PRETRAIN, PROBE, REPOSITORY, SMALL, SMALL_PROBE, run_script, write_folder

from moco import options

pytestmark = pytest.mark.slow
COMBINATIONS = 120


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data sets and checkpoints, good and bad, by name."""
    root = tmp_path_factory.mktemp("fuzz")
    data, out = write_folder(root / "data", train=8), root / "out"
    write_folder(root / "data-texture", train=8, suffix=".png")
    write_folder(root / "other", classes=("n01", "n07"))
    run_script(PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", out, data)
    pretrained = ["--pretrained", out / "checkpoint_0000.pth.tar"]
    run_script(PROBE, *SMALL_PROBE, "--epochs", 1, "--lr", 0.1, 1, "--ckpt_path", out, data, *pretrained)
    within = torch.load(out / "checkpoint_0000.pth.tar", weights_only=True)
    means = {"names": ["loss"], "sizes": [None], "sums": torch.ones(1, 1), "steps": 1}
    torch.save(within | {"step": 1, "means": means}, root / "within")
    good = (out / "checkpoint_0000.pth.tar").read_bytes()
    (root / "cut.pth.tar").write_bytes(good[: len(good) // 2])
    torch.save({"state_dict": {"fc.weight": 3}}, root / "foreign.pth.tar")
    linear = torch.load(out / "model_best_0000.pth.tar", weights_only=True)
    torch.save({"state_dict": linear["state_dict"], "arch": "resnet10"}, root / "bare.pth.tar")
    (root / "empty").mkdir()
    (root / "no_images" / "train" / "n01").mkdir(parents=True)
    (root / "list.txt").write_text("n01\nn02\n")
    for severity in (1, 2):
        shutil.copytree(data / "val", root / "c" / "fog" / str(severity))
    names = {path.name: str(path) for path in root.iterdir()}
    return names | {
        "probe": str(out / "checkpoint_robust_0000.pth.tar"),
        "pretrained": str(out / "checkpoint_0000.pth.tar"),
        "linear": str(out / "model_best_0000.pth.tar"),
        "nowhere": str(root / "nowhere"),
        "photo": str(data / "val" / "n01" / "n01_0.JPEG"),
        "readme": str(REPOSITORY / "README.md"),
        "new": str(root / "new"),
    }


def outcome(script, arguments):
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return code, stdout.getvalue(), stderr.getvalue()


NUMBERS = {options.unit_float: ["0", "0.9", "1"], options.positive_float: ["0.1", "30"], str: ["1"]}
WRONG = ["", "x", "-1", "0", "1.5", "nan", "1e39", "2147483647", "9" * 30]
BASE = {  # what makes a run small, and where other options may not change it
    PRETRAIN: ["-a", "resnet10", "--image-size", "32", "--patch-ratio", "4", "12", "-b", "8", "--moco-k", "64"],
    PROBE: ["-a", "resnet10", "-b", "8"],
    EVALUATE: [],
}


def actions(script):
    """The options of a script, as argparse knows them."""
    found = []

    def parse_args(parser, **recipes):
        found.extend(a for a in parser._actions if a.option_strings and a.dest not in ("help", "list_released"))
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options.OptionParser, "parse_args", parse_args)
        outcome(script, [])
    return found


def command_line(rng, script, known, files):
    """Random options, most of them with values that suit their type; files may be of any kind."""
    data = ["--val", files["data"], "--pretrained", files["linear"]] if script == EVALUATE else [files["data"]]
    line = [*BASE[script], *data]
    for action in rng.sample(known, rng.randrange(6)):
        line.append(rng.choice(action.option_strings))
        if action.nargs == 0:
            continue
        for _ in range(action.nargs if isinstance(action.nargs, int) else 1):
            right = list(action.choices or NUMBERS.get(action.type, ["1", "8"] if action.type else [*files.values()]))
            line.append(rng.choice(WRONG if rng.random() < 0.1 else right))
    return [*line, "--dry-run"]


@pytest.mark.parametrize("script", BASE)
def test_every_command_line_ends_in_settings_or_one_line(files, script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng, known, codes = random.Random(0), actions(script), []
    for _ in range(COMBINATIONS):
        arguments = command_line(rng, script, known, files)
        code, out, err = outcome(script, arguments)
        codes.append(code)
        err = "".join(line for line in err.splitlines(True) if ": taking " not in line)  # of a run's folder
        if code == 0:
            assert "nothing was" in out and err == "", " ".join(arguments)
        else:
            assert code == 2 and err.count("\n") == 1 and err.startswith(f"{script}: error: "), [*arguments, err]
    assert codes.count(0) > COMBINATIONS / 10 and codes.count(2) > COMBINATIONS / 10
    assert not os.path.exists("ckpts")  # of the folder that the test runs in


# Checkpoints

NAN = float("nan")
ODD_VALUES = [None, True, -1, 0, 1.5, NAN, 2**70, "x", [], {}, [1], {"a": 1}, b"x", torch.ones(2), torch.tensor(NAN)]


def mutated(saved, rng):
    """A copy with one entry dropped, retyped or reshaped, at any depth."""
    value = saved = copy.deepcopy(saved)
    while isinstance(value, dict) and value and (value is saved or rng.random() < 0.7):
        place, name = value, rng.choice(sorted(value, key=str))
        value = place[name]
    kind = rng.randrange(3)
    if kind == 0:
        del place[name]
    elif kind == 1 and isinstance(value, torch.Tensor) and value.dim():
        place[name] = rng.choice([value[:0], value.reshape(-1), value.double(), value.to_sparse(), value.to("meta")])
    else:
        place[name] = rng.choice(ODD_VALUES)
    return saved


@pytest.mark.parametrize("which", ["pretraining", "linear", "evaluation"])
def test_random_contents_are_a_plan_or_one_line(files, tmp_path, which):
    path, data = tmp_path / "random.pth.tar", files["data"]
    file, command = {
        "pretraining": ("within", [PRETRAIN, *SMALL, "--epochs", "5", "--resume", path, data]),
        "linear": ("probe", [PROBE, *SMALL_PROBE, "--lr", "0.1", "1", "--epochs", "5", "--resume", path, data]),
        "evaluation": ("probe", [EVALUATE, "--val", data, "--pretrained", path]),
    }[which]
    saved, rng, codes = torch.load(files[file], weights_only=True), random.Random(0), set()
    for _ in range(COMBINATIONS):
        torch.save(mutated(saved, rng), path)
        code, _, error = outcome(command[0], [*map(str, command[1:]), "--dry-run"])
        assert (code == 0 and not error) or (code == 2 and error.count("\n") == 1 and len(error) < 600), error
        codes.add(code)
    assert codes == {0, 2}
