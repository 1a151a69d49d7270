"""Random command lines, checkpoints and logs: a script plans its run, or says in one line what is wrong."""

import contextlib
import copy
import io
import json
import os
import random
import runpy
import shutil
import sys

import pytest
import torch
from helpers import EVALUATE, PRETRAIN, PROBE, REPOSITORY, SMALL, SMALL_PROBE, run_script, write_folder

from moco.training import metrics

pytestmark = pytest.mark.slow
COMBINATIONS = 120
NUMBERS = ["", "x", "-1", "1e3", "nan"]  # none of them a whole number of 0 or more
HUGE = "9" * 30
FLOATS = ["", "x", "-1", "nan", "inf", "1e39"]


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
    torch.save({"features": torch.ones(3), "labels": [1, 2]}, root / "features.pth.tar")
    linear = torch.load(out / "model_best_0000.pth.tar", weights_only=True)
    torch.save({"state_dict": linear["state_dict"], "arch": "resnet10"}, root / "bare.pth.tar")
    torch.save({name: value for name, value in linear.items() if name != "wnids"}, root / "unnamed.pth.tar")
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


def bad_checkpoints(f):
    return [f["nowhere"], f["readme"], f["cut.pth.tar"], f["foreign.pth.tar"], f["features.pth.tar"], f["data"]]


def shared(f):
    """{flag: (values that are right where others fit, values that are wrong anywhere)}.

    A list stands for several words.
    """
    return {
        "-j": (["0", "1", "10000"], [HUGE, *NUMBERS]),
        "--epochs": (["5", "300"], ["0", HUGE, *NUMBERS]),
        "--start-epoch": (["0", "1"], ["10000", *NUMBERS]),
        "-b": (["4", "8", "16"], ["0", "17", HUGE, *NUMBERS]),
        "--schedule": ([[], ["1", "2"]], NUMBERS),
        "--momentum": (["0", "0.9", "1"], ["1.1", *FLOATS]),
        "--wd": (["0", "1e-4"], FLOATS),
        "--seed": (["0", "9223372036854775807"], ["9223372036854775808", HUGE, *NUMBERS]),
        "-p": (["1", "2147483647"], ["0", HUGE, *NUMBERS]),
        "--precision": (["fp32", "bf16", "fp16"], ["fp8", ""]),
        "--strict-fp32": ([[]], []),
        "--ckpt_path": ([f["new"], f["out"]], [f["readme"], f["readme"] + "/x", "/proc/self/status/x"]),
        "--max-bad-images": (["0", "5"], NUMBERS),
        "--world-size": (["1", "-1"], ["0", "-2", "x"]),
        "--rank": (["0", "-1"], ["1", "-2", "x"]),
        "--dist-url": (
            ["tcp://localhost:10001"],
            ["localhost", "tcp://", "tcp://a:b", "tcp://a:99999", "http://a:1", ""],
        ),
        "--dist-backend": (["nccl", "gloo"], ["", "carrier_pigeon"]),
        "--multiprocessing-distributed": ([[]], []),
        "--save-steps": (["1"], ["0", *NUMBERS]),
        "--verbose": ([[]], []),
        "--gpu": ([], ["0", "99", HUGE, *NUMBERS]),
        "--nonsense": ([], [[], "1"]),
    }


def pretraining(f):
    options = shared(f) | {
        "-a": (["resnet10", "resnet18", "shufflenet_v2_x0_5"], ["resnet51", "vit_b_16", ""]),
        "--lr": (["0.1", "1e30"], ["0", *FLOATS]),
        "--moco-dim": (["8", "128"], ["0", "2147483647", HUGE, *NUMBERS]),
        "--moco-k": (["1", "64", "4096"], ["0", "2147483647", HUGE, *NUMBERS]),
        "--moco-m": (["0", "0.99", "1"], ["2", *FLOATS]),
        "--moco-t": (["0.07", "0.2"], ["0", *FLOATS]),
        "--mlp": ([[]], []),
        "--cos": ([[]], []),
        "--aug-plus": ([[]], []),
        "--knn": ([[]], []),
        "--compile": ([[]], []),
        "--robust": (
            ["patch", "nonsem", "none"],
            ["texture", "texture_syn", "shapes", ""],
        ),  # these data have no textures
        "--num-nonsem": (["0", "1", "3"], ["2147483647", HUGE, *NUMBERS]),
        "--alpha": (["0", "2"], FLOATS),
        "--patch-ratio": ([["4", "12"], ["8", "8"]], [["12", "4"], ["0", "8"], ["4", "900"], ["4"], ["a", "b"]]),
        "--patch-size": (["32", "1"], ["x"]),
        "--image-size": (["32", "64"], ["0", "2147483647", HUGE, *NUMBERS]),
        "--save-freq": (["1", "50"], ["0", *NUMBERS]),
        "--keep": (["1"], ["0", *NUMBERS]),
        "--knn-freq": (["1"], ["0", *NUMBERS]),
        "--preview": ([f["new"] + ".png"], [f["new"] + ".xyz", f["nowhere"] + "/x.png", f["data"]]),
        "--resume": ([f["pretrained"], "auto", ""], [*bad_checkpoints(f), f["linear"]]),
    }
    base = ["-a", "resnet10", "--image-size", "32", "--patch-ratio", "4", "12", "-b", "8", "--moco-k", "64"]
    return (
        PRETRAIN,
        base,
        options,
        ([f["data"]], [f["nowhere"], f["empty"], f["no_images"], f["readme"], f["data"] + "/train"]),
    )


def probe(f):
    options = shared(f) | {
        "-a": (["resnet10"], ["resnet51", ""]),
        "--lr": (["0.1", ["0.1", "1", "30"]], ["0", ["1", "x", "2"], *FLOATS]),
        "--image-size": (["32", "64"], ["0", "2147483647", HUGE, *NUMBERS]),
        "--pretrained": ([f["pretrained"], f["linear"], ""], [*bad_checkpoints(f), "released:nothing"]),
        "--resume": ([f["linear"], "auto", ""], [*bad_checkpoints(f), f["pretrained"], f["bare.pth.tar"]]),
        "-e": ([[]], []),
        "--export-backbone": ([f["new"] + ".pth"], [f["nowhere"] + "/x.pth", f["data"]]),
    }
    base = ["-a", "resnet10", "-b", "8"]
    return PROBE, base, options, ([f["data"]], [f["nowhere"], f["empty"], f["no_images"], f["readme"]])


def evaluation(f):
    datasets = [f["nowhere"], f["empty"], f["readme"], f["no_images"] + "/train"]
    options = {
        # unread if the head says its classes
        "--classes": ([f["list.txt"], f["photo"], f["readme"], f["nowhere"], f["data"]], []),
        "--corruption": ([f["c"]], [*datasets, f["data"] + "/val"]),
        "--sketch": ([f["data"] + "/train"], datasets),
        "--stylized": ([f["data"]], datasets),
        "--rendition": ([f["data"] + "/val"], datasets),
        "--limit": (["1", "2147483647"], ["0", HUGE, *NUMBERS]),
        "-j": (["0", "1", "10000"], [HUGE, *NUMBERS]),
        "-b": (["4", "8"], ["0", *NUMBERS]),
        "--gpu": ([], ["0", "99", HUGE, *NUMBERS]),
        "--json": ([f["new"] + ".json", f["list.txt"]], [f["nowhere"] + "/x.json", f["data"]]),
        "--plot": ([f["new"] + ".png"], [f["nowhere"] + "/x.png", f["new"] + ".xyz", f["data"]]),
        "--compare": ([], ["paper", "me", ""]),  # no row of these is the paper's
        "--allow-partial": ([[]], []),
        "--verbose": ([[]], []),
        "--nonsense": ([], [[], "1"]),
    }
    base = ["--val", f["data"], "--pretrained"]
    return (
        EVALUATE,
        base,
        options,
        (
            [f["linear"], "a=" + f["linear"], f"a={f['linear']},{f['linear']}", f["unnamed.pth.tar"]],
            [*bad_checkpoints(f), f["pretrained"], "a=" + f["nowhere"], ""],
        ),
    )


def words(value):
    return value if isinstance(value, list) else [value]


def command_lines(rng, base, options, positional):
    """Endless (arguments, whether one of them is wrong anywhere)."""
    while True:
        line, wrong = [*base], rng.random() < 0.2
        line += words(rng.choice(positional[wrong]))
        for flag in rng.sample(list(options), rng.randrange(7)):
            right, bad = options[flag]
            is_bad = bool(bad) and (not right or rng.random() < 0.15)
            if is_bad or right:
                line += [flag, *words(rng.choice(bad if is_bad else right))]
                wrong |= is_bad
        yield [*line, "--dry-run"], wrong


def outcome(script, arguments):
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return code, stdout.getvalue(), stderr.getvalue()


@pytest.mark.parametrize("grammar", [pretraining, probe, evaluation])
def test_every_command_line_ends_in_settings_or_one_line(files, grammar, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script, base, options, positional = grammar(files)
    lines, codes = command_lines(random.Random(0), base, options, positional), []
    for _ in range(COMBINATIONS):
        arguments, wrong = next(lines)
        code, out, err = outcome(script, arguments)
        codes.append(code)
        if code == 0:
            assert not wrong and "nothing was" in out and err == "", " ".join(arguments)
        else:
            assert code == 2 and err.count("\n") == 1 and err.startswith(f"{script}: error: "), [*arguments, err]
    assert codes.count(0) > 50 and codes.count(2) > 50
    assert not os.path.exists("ckpts")  # of the folder that the test runs in


# Checkpoints

NAN = float("nan")
ODD_VALUES = [None, True, -1, 0, 1.5, NAN, 2**70, "x", [], {}, [1], {"a": 1}, b"x", torch.ones(2), torch.tensor(NAN)]


def mutated(saved, rng):
    """A copy with one entry dropped, retyped or reshaped, at any depth."""
    saved = copy.deepcopy(saved)
    place = saved
    while True:
        name = rng.choice(sorted(place, key=str))
        if isinstance(place[name], dict) and place[name] and rng.random() < 0.7:
            place = place[name]
            continue
        value = place[name]
        kind = rng.randrange(3)
        if kind == 0:
            del place[name]
        elif kind == 1 and isinstance(value, torch.Tensor) and value.dim():
            place[name] = rng.choice(
                [value[:0], value.reshape(-1), value.double(), value.to_sparse(), value.to("meta")]
            )
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


# Logs


def random_log(rng):
    """Lines of a log, some of them damaged in one of many ways; the epochs of the sound ones of pre-training."""
    lines, epochs = [], []
    for epoch in range(rng.randrange(6)):
        line = json.dumps({"epoch": epoch, "loss": rng.random()}).encode() + b"\n"
        kind = rng.randrange(8)
        if kind == 0:
            line = line[: rng.randrange(len(line) - 1)] + b"\n"
        elif kind == 1:
            line = bytes(rng.randrange(256) for _ in range(rng.randrange(40))).replace(b"\n", b"") + b"\n"
        elif kind == 2:
            line = json.dumps(rng.choice([[], 3, None, "x", {}, {"epoch": "0"}, {"epoch": None}])).encode() + b"\n"
        elif kind == 3:
            line = b"[" * 5000 + b"\n"
        else:
            epochs.append(epoch)
        lines.append(line)
    if lines and rng.random() < 0.3:
        lines[-1] = lines[-1][:-1]  # killed while it was written
        epochs = [epoch for epoch in epochs if epoch < len(lines) - 1]
    return b"".join(lines), epochs


def test_random_logs_keep_their_sound_lines(tmp_path):
    path, rng = tmp_path / "log.jsonl", random.Random(0)
    for _ in range(2000):
        content, epochs = random_log(rng)
        path.write_bytes(content)
        resumed = rng.randrange(7)
        metrics.truncate_jsonl(str(path), resumed)
        records, damaged = metrics.read_jsonl(str(path))
        assert damaged == 0 and [record["epoch"] for record in records] == [e for e in epochs if e < resumed]
