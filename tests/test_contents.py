"""Checkpoints as input: what they must hold, whose weights are recognised, and what is never taken silently."""

import copy
import io
import json
import random
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from helpers import (
    EVALUATE,
    PRETRAIN,
    PROBE,
    REPOSITORY,
    SMALL,
    SMALL_PROBE,
    TORCHRUN_RANK,
    log,
    refused,
    run_script,
    same,
    weights,
    write_folder,
)

from moco.encoders import build_encoder
from moco.errors import UsageError
from moco.evaluation import classifier
from moco.training import checkpoint, metrics

TINY = [*SMALL[: SMALL.index("--moco-k")], "--moco-k", 16, "--moco-dim", 8, "-j", 0, "--seed", 1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pre-training that was saved within its second epoch, and a probe of it, with their data."""
    root = tmp_path_factory.mktemp("runs")
    data = write_folder(root / "data")
    run_script(PRETRAIN, *TINY, "--epochs", 2, "--save-freq", 1, "--ckpt_path", root / "pre", data)
    within = torch.load(root / "pre" / "checkpoint_0000.pth.tar", weights_only=True)
    means = {"names": ["loss"], "sizes": [None], "sums": torch.ones(1, 1), "steps": 1}
    torch.save(within | {"step": 1, "means": means}, root / "within.pth.tar")
    pretrained = root / "pre" / "checkpoint_0001.pth.tar"
    probe = [*SMALL_PROBE, "--epochs", 1, "--lr", 0.1, 1, "--pretrained", pretrained, "--ckpt_path", root / "probe"]
    run_script(PROBE, *probe, data)
    return root


def dry_run(script, *arguments):
    """(exit code, stderr) of a script with --dry-run, run in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", [script, *map(str, arguments), "--dry-run"])
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return code, stderr.getvalue()


# Whose weights are recognised


def resnet(arch="resnet18"):
    torch.manual_seed(0)
    return build_encoder(arch, 5).state_dict()


def numbered(state):
    """As lightly saves a ResNet: nn.Sequential(*network.children())."""
    children = [name for name, _ in build_encoder("resnet18", 5).named_children()]
    return {f"{children.index(name.split('.')[0])}.{name.split('.', 1)[1]}": value for name, value in state.items()}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def with_momentum_encoder(state):
    """As solo-learn saves: the momentum backbone comes first here, and must not be taken."""
    momentum = {name: torch.full_like(value, 7) for name, value in state.items()}
    return (
        prefixed("momentum_backbone.", momentum) | prefixed("backbone.", state) | {"projector.0.weight": torch.ones(3)}
    )


FOREIGN = {
    "torchvision": lambda state: state,
    "without batch counts": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
    "DDP": lambda state: {"state_dict": prefixed("module.", state)},
    "DDP twice": lambda state: {"state_dict": prefixed("module.module.", state)},
    "compiled": lambda state: {"state_dict": prefixed("_orig_mod.", state)},
    "DDP and compiled": lambda state: {"state_dict": prefixed("module._orig_mod.encoder_q.", state)},
    "encoder": lambda state: {"state_dict": prefixed("encoder.", state)},
    "backbone": lambda state: {"state_dict": prefixed("backbone.", state)},
    "base_encoder": lambda state: {"state_dict": prefixed("module.base_encoder.", state)},
    "model": lambda state: {"model": state, "epoch": 3},
    "teacher": lambda state: {"teacher": prefixed("backbone.", state), "student": {}},
    "solo-learn": lambda state: {"state_dict": with_momentum_encoder(state)},
    "lightly": lambda state: {"state_dict": prefixed("backbone.", numbered(state))},
    "numbered": lambda state: numbered(state),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_of_other_projects_are_found(kind):
    state = resnet()
    found = checkpoint.find_backbone(FOREIGN[kind](state), "x", build_encoder("resnet18", 1))
    expected = {name: value for name, value in state.items() if not name.startswith("fc.")}
    assert same(found.weights, expected)
    assert f"{len(expected)} tensors from" in found.origin


@pytest.mark.parametrize("other", ["resnet34", "resnet50", "resnet10", "shufflenet_v2_x0_5"])
def test_another_network_is_not_taken_for_a_resnet18(other):
    with pytest.raises(UsageError, match="check --arch"):
        checkpoint.find_backbone({"state_dict": resnet(other)}, "x", build_encoder("resnet18", 1))


def test_arch_comes_from_the_file_unless_it_is_given(runs, tmp_path):
    linear = runs / "probe" / "model_best_0001.pth.tar"
    code, error = dry_run(PROBE, "-b", 3, "--evaluate", "--resume", linear, runs / "data")
    assert (code, error) == (0, "")
    assert "it holds a resnet10, not --arch resnet50" in refused(
        PROBE, "-a", "resnet50", "-b", 3, "--evaluate", "--resume", linear, runs / "data"
    )
    resume = ["--epochs", 3, "--resume", runs / "pre" / "checkpoint_0001.pth.tar", "--ckpt_path", tmp_path]
    assert dry_run(PRETRAIN, *TINY[2:], *resume, runs / "data")[0] == 0


def test_a_file_without_optimizer_starts_from_zero_momenta(runs, tmp_path):
    saved = torch.load(runs / "pre" / "checkpoint_0000.pth.tar", weights_only=True)
    cleaned = {name: saved[name] for name in ("epoch", "arch", "state_dict")}
    torch.save(cleaned, tmp_path / "cleaned.pth.tar")
    options = ["--epochs", 2, "--resume", tmp_path / "cleaned.pth.tar", "--ckpt_path", tmp_path / "run"]
    run = run_script(PRETRAIN, *TINY, *options, runs / "data")
    assert "has no optimizer: the momenta start at zero" in run.stdout and len(log(tmp_path / "run")) == 1


# What a file must hold

NAN = float("nan")
ODD_PRETRAINING = {
    "epoch 1.5": ("epoch", 1.5),
    "epoch -5": ("epoch", -5),
    "epoch text": ("epoch", "1"),
    "epoch None": ("epoch", None),
    "epoch True": ("epoch", True),
    "step beyond the epoch": ("step", 10**6),
    "step negative": ("step", -1),
    "means None": ("means", None),
    "means of another width": ("means", {"names": ["loss", "x"], "sums": torch.ones(1, 1), "steps": 1}),
    "means without steps": ("means", {"names": ["loss"], "sums": torch.ones(1, 1), "steps": 0}),
    "optimizer a list": ("optimizer", []),
    "optimizer without state": ("optimizer", {"param_groups": []}),
    "classes an int": ("classes", 7),
    "classes twice": ("classes", ["n01", "n01"]),
    "image_size 0": ("image_size", 0),
    "image_size None": ("image_size", None),
    "image_size 10^6": ("image_size", 10**6),
    "arch unknown": ("arch", "resnet51"),
    "arch a list": ("arch", ["resnet10"]),
    "seed text": ("seed", "x"),
    "bad_images a list": ("bad_images", ["x"]),
    "scaler of something": ("scaler", {"scale": 1}),
    "options a list": ("options", [1]),
    "options alpha": ("options", {"alpha": "2"}),
    "images 0": ("images", 0),
}


@pytest.mark.parametrize("odd", ODD_PRETRAINING)
def test_odd_contents_of_a_pretraining_file_are_one_line(runs, tmp_path, odd):
    name, value = ODD_PRETRAINING[odd]
    saved = torch.load(runs / "within.pth.tar", weights_only=True) | {name: value}
    torch.save(saved, tmp_path / "odd.pth.tar")
    message = refused(PRETRAIN, *TINY, "--epochs", 5, "--resume", tmp_path / "odd.pth.tar", runs / "data")
    assert str(tmp_path) in message and len(message) < 400


def spoil_momentum(saved, change):
    state = copy.deepcopy(saved["optimizer"])
    state["state"][0] = {"momentum_buffer": change(state["state"][0]["momentum_buffer"])}
    return saved | {"optimizer": state}


@pytest.mark.parametrize("change", [
    lambda m: m[:-1], lambda m: m.reshape(-1), lambda m: torch.ones(()), lambda m: m * NAN, lambda m: "x",
    lambda m: m.to_sparse(), lambda m: m.long(), lambda m: m.to("meta")])  # fmt: skip
def test_a_momentum_of_another_kind_is_refused(runs, tmp_path, change):
    saved = torch.load(runs / "pre" / "checkpoint_0000.pth.tar", weights_only=True)
    torch.save(spoil_momentum(saved, change), tmp_path / "odd.pth.tar")
    assert "momentum of parameter 0" in refused(
        PRETRAIN, *TINY, "--epochs", 5, "--resume", tmp_path / "odd.pth.tar", runs / "data"
    )


@pytest.mark.parametrize("change", [
    lambda v: v.to_sparse(), lambda v: v.to("meta"), lambda v: v.long(), lambda v: v[:, :-1],
    lambda v: v * NAN])  # fmt: skip
def test_a_queue_of_another_kind_is_refused(runs, tmp_path, change):
    saved = torch.load(runs / "pre" / "checkpoint_0000.pth.tar", weights_only=True)
    saved["state_dict"]["module.queue"] = change(saved["state_dict"]["module.queue"])
    torch.save(saved, tmp_path / "odd.pth.tar")
    assert "odd.pth.tar: " in refused(
        PRETRAIN, *TINY, "--epochs", 5, "--resume", tmp_path / "odd.pth.tar", runs / "data"
    )


ODD_LINEAR = {
    "wnids an int": ("wnids", 3),
    "wnids too many": ("wnids", ["a", "b", "c"]),
    "lrs of text": ("lrs", ["x", "y"]),
    "lrs too few": ("lrs", [0.1]),
    "best_acc1s too few": ("best_acc1s", [50.0]),
    "best_acc1 None": ("best_acc1", None),
    "winner beyond": ("winner", 2),
    "heads empty": ("heads", {}),
    "heads misshapen": ("heads", {f"{i}.{n}": torch.ones(3) for i in (0, 1) for n in ("weight", "bias")}),
    "image_size 10^6": ("image_size", 10**6),
    "epoch -1": ("epoch", -1),
    "pretraining a list": ("pretraining", [3]),
}


@pytest.mark.parametrize("odd", ODD_LINEAR)
def test_odd_contents_of_a_linear_file_are_one_line(runs, tmp_path, odd):
    name, value = ODD_LINEAR[odd]
    saved = torch.load(runs / "probe" / "model_best_0001.pth.tar", weights_only=True) | {name: value}
    torch.save(saved, tmp_path / "odd.pth.tar")
    for command in ([PROBE, "-b", 3, "--evaluate", "--resume"], [EVALUATE, "--val", runs / "data", "--pretrained"]):
        position = command + [tmp_path / "odd.pth.tar"] + ([runs / "data"] if command[0] == PROBE else [])
        assert "odd.pth.tar" in refused(*position)


@pytest.mark.parametrize("name", ["module.fc.weight", "module.norm.running_var", "module.stages.0.conv1.weight"])
def test_a_linear_file_with_nan_is_refused_by_name(runs, tmp_path, name):
    saved = torch.load(runs / "probe" / "model_best_0001.pth.tar", weights_only=True)
    saved["state_dict"][name][0] = NAN
    torch.save(saved, tmp_path / "odd.pth.tar")
    assert name.removeprefix("module.") in refused(
        EVALUATE, "--val", runs / "data", "--pretrained", tmp_path / "odd.pth.tar"
    )
    assert name.removeprefix("module.") in refused(
        PROBE, "-b", 3, "--evaluate", "--resume", tmp_path / "odd.pth.tar", runs / "data"
    )


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


@pytest.mark.parametrize("which", ["pre-training", "linear", "evaluation"])
@pytest.mark.parametrize("count", [60, pytest.param(700, marks=pytest.mark.slow)])
def test_random_contents_are_a_plan_or_one_line(runs, tmp_path, which, count):
    file = runs / ("within.pth.tar" if which == "pre-training" else "probe/checkpoint_robust_0001.pth.tar")
    saved, rng, path = torch.load(file, weights_only=True), random.Random(count), tmp_path / "random.pth.tar"
    command = {
        "pre-training": [PRETRAIN, *TINY, "--epochs", 5, "--resume", path, "--ckpt_path", tmp_path / "r",
                         runs / "data"],
        "linear": [PROBE, *SMALL_PROBE, "--lr", 0.1, 1, "--epochs", 5, "--resume", path, "--ckpt_path", tmp_path / "r",
                   runs / "data"],
        "evaluation": [EVALUATE, "--val", runs / "data", "--pretrained", path, "--json", tmp_path / "r.json"],
    }[which]  # fmt: skip
    codes = set()
    for _ in range(count):
        torch.save(mutated(saved, rng), path)
        code, error = dry_run(*command)
        assert (code == 0 and not error) or (code == 2 and error.count("\n") == 1 and len(error) < 600), error
        codes.add(code)
    assert codes == {0, 2}


# Files that belong together


def test_the_probe_of_another_backbone_is_not_continued(runs, tmp_path):
    other = tmp_path / "checkpoint_0001.pth.tar"
    saved = torch.load(runs / "pre" / "checkpoint_0001.pth.tar", weights_only=True)
    saved["state_dict"]["module.encoder_q.stages.0.conv1.weight"] += 1
    torch.save(saved, other)
    options = [
        *SMALL_PROBE,
        "--epochs",
        2,
        "--lr",
        0.1,
        1,
        "--resume",
        "auto",
        "--ckpt_path",
        runs / "probe",
        runs / "data",
    ]
    message = refused(PROBE, "--pretrained", other, *options)
    assert "the probe of another backbone" in message and str(runs / "pre" / "checkpoint_0001.pth.tar") in message
    assert dry_run(PROBE, "--pretrained", runs / "pre" / "checkpoint_0001.pth.tar", *options)[0] == 0


@pytest.mark.parametrize("file, name", [
    ("ckpts/RUN/checkpoint_0199.pth.tar", "0199"),
    ("moco_lr0.03_batch128_epoch200.pth.tar", "epoch200"),
    ("checkpoint_latest.pth.tar", "latest"),
    ("released:patch-k16384-a2-run1", "patch-k16384-a2-run1"),
    ("my_runs/resnet50.pth", "resnet50"),
    ("", "random")])  # fmt: skip
def test_run_names_follow_the_published_rule(file, name):
    script = runpy.run_path(str(REPOSITORY / PROBE), run_name="script")
    assert script["run_name"](file) == name


def test_a_folder_with_another_run_is_refused(runs, tmp_path):
    options = [*TINY, "--epochs", 2, "--ckpt_path", runs / "pre", runs / "data"]
    before = (runs / "pre" / "log.jsonl").read_bytes()
    message = refused(PRETRAIN, *options)
    assert "it holds another run" in message and "--resume auto" in message and "another folder" in message
    assert "it holds another run" in refused(PRETRAIN, *options, "--resume", runs / "within.pth.tar")
    probe = [*SMALL_PROBE, "--epochs", 1, "--pretrained", runs / "pre" / "checkpoint_0001.pth.tar", runs / "data"]
    assert "checkpoint_robust_0001" in refused(PROBE, *probe, "--ckpt_path", runs / "probe")
    assert dry_run(PROBE, *probe, "--ckpt_path", runs / "pre")[0] == 0  # pre-training and its probe may share one
    (tmp_path / "log.jsonl").write_text('{"epoch": 0, "loss": 1}\n')  # killed before its first save
    assert "1 epochs in log.jsonl" in refused(PRETRAIN, *TINY, "--ckpt_path", tmp_path, runs / "data")
    assert (runs / "pre" / "log.jsonl").read_bytes() == before


def test_a_restart_by_torchrun_resumes(runs, monkeypatch):
    for name, value in {**TORCHRUN_RANK, "TORCHELASTIC_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dry_run(PRETRAIN, *TINY, "--epochs", 3, "--ckpt_path", runs / "pre", runs / "data") == (0, "")


@pytest.mark.parametrize(
    "damage", ["\0" * 500 + "\n", "\n", "[1]\n", '{"loss": 1}\n', '{"epoch": 0, "lo', "\xff\xfe\n"]
)
def test_damaged_log_lines_are_dropped_and_counted(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    sound = [
        '{"epoch": 0, "loss": 1.5}\n',
        '{"epoch": 1, "loss": 1.25}\n',
        '{"probe": "0001", "epoch": 0, "loss": [2.0]}\n',
    ]
    path.write_text("".join([*sound, damage]), encoding="latin-1")
    assert metrics.truncate_jsonl(str(path), 1) == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(sound[0]), json.loads(sound[2])]


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


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_logs_keep_their_sound_lines(tmp_path, count):
    path, rng = tmp_path / "log.jsonl", random.Random(count)
    for _ in range(count):
        content, epochs = random_log(rng)
        path.write_bytes(content)
        resumed = rng.randrange(7)
        metrics.truncate_jsonl(str(path), resumed)
        records, damaged = metrics.read_jsonl(str(path))
        assert damaged == 0 and [record["epoch"] for record in records] == [e for e in epochs if e < resumed]


def test_equal_accuracy_does_not_replace_the_best_epoch():
    heads = classifier.LinearHeads([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    best = classifier.BestHead([-1, -1], 0)
    assert best.update(heads, [{"acc1": 0.0}, {"acc1": 0.0}])
    assert not best.update(heads, [{"acc1": 0.0}, {"acc1": 0.0}])
    assert best.update(heads, [{"acc1": 0.0}, {"acc1": 10.0}]) and best.winner == 1
    torch.nn.init.constant_(heads[0].weight, NAN)
    assert not best.update(heads, [{"acc1": 50.0}, {"acc1": 10.0}]) and best.acc1s == [0.0, 10.0]


def test_the_published_script_resumes_a_linear_file(runs):
    """What its resuming does with a file, for a head as wide as the file's."""
    saved = torch.load(runs / "probe" / "checkpoint_robust_0001.pth.tar", weights_only=True)
    start_epoch, best_acc1 = saved["epoch"], saved["best_acc1"].to("cpu")
    assert (start_epoch, best_acc1.shape) == (1, ())
    model = torch.nn.DataParallel(build_encoder("resnet10", 2))  # names as in DistributedDataParallel
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in ("module.fc.weight", "module.fc.bias")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 30.0, momentum=0.9, weight_decay=0.0)
    model.load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["optimizer"])
    winner = saved["winner"]
    assert torch.equal(model.module.fc.weight, saved["heads"][f"{winner}.weight"])
    momentum = saved["optimizers"]["state"][2 * winner]["momentum_buffer"]
    assert torch.equal(optimizer.state[trained[0]]["momentum_buffer"], momentum)
    assert float(best_acc1) == max(saved["best_acc1s"])


def test_paths_with_commas_and_equals_signs_are_one_file(runs, tmp_path):
    linear = (runs / "probe" / "model_best_0001.pth.tar").read_bytes()
    odd = [tmp_path / "lr=0.3,wd=0.pth.tar", tmp_path / "b.pth.tar", tmp_path / "a,b=c.pth.tar"]
    for path in odd:
        path.write_bytes(linear)
    script = runpy.run_path(str(REPOSITORY / EVALUATE), run_name="script")
    rows = script["parse_rows"]([str(odd[0]), f"two={odd[1]},{odd[2]}", f"none={tmp_path / 'x,y'}"])
    assert rows == {
        str(odd[0]): [str(odd[0])],
        "two": [str(odd[1]), str(odd[2])],
        "none": [str(tmp_path / "x"), "y"],
    }


def test_long_class_lists_are_cut_in_messages(runs, tmp_path):
    saved = torch.load(runs / "pre" / "checkpoint_0001.pth.tar", weights_only=True)
    torch.save(saved | {"classes": [f"class {i}" for i in range(20_000)]}, tmp_path / "wide.pth.tar")
    message = refused(PRETRAIN, *TINY, "--epochs", 3, "--resume", tmp_path / "wide.pth.tar", runs / "data")
    assert "20000: class 0, class 1" in message and len(message) < 400


def test_newlines_in_names_do_not_break_messages(runs, tmp_path):
    path = tmp_path / "two\nlines.pth.tar"
    path.write_bytes(b"x")
    assert "two lines.pth.tar" in refused(PROBE, "-b", 3, "--pretrained", path, "--ckpt_path", tmp_path, runs / "data")


@pytest.mark.slow
def test_a_resumed_probe_keeps_the_momenta_of_all_heads(runs, tmp_path):
    options = [*SMALL_PROBE, "--lr", 0.1, 1, "--pretrained", runs / "pre" / "checkpoint_0001.pth.tar", runs / "data"]
    run_script(PROBE, *options, "--epochs", 2, "--ckpt_path", tmp_path / "whole")
    run_script(PROBE, *options, "--epochs", 1, "--ckpt_path", tmp_path / "cut")
    run_script(PROBE, *options, "--epochs", 2, "--ckpt_path", tmp_path / "cut", "--resume", "auto")
    one, other = (
        torch.load(tmp_path / run / "checkpoint_robust_0001.pth.tar", weights_only=True) for run in ("whole", "cut")
    )
    assert same(one["heads"], other["heads"]) and same(weights(tmp_path / "whole" / "checkpoint_robust_0001.pth.tar"),
                                                       other["state_dict"])  # fmt: skip
