import argparse
import copy
import functools
import os
import pickle

import pytest
import torch
from helpers import same

from moco.builder import MoCo
from moco.encoders import build_encoder
from moco.errors import UsageError
from moco.training import checkpoint

NAN = float("nan")


@functools.cache
def resnet():
    return build_encoder("resnet18", 7)


def on_meta():
    with torch.device("meta"):
        return build_encoder("resnet18", 1)


def saved_pretraining():
    """A small model, and its checkpoint within an epoch."""
    torch.manual_seed(0)
    model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=8, K=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for weight in model.encoder_q.parameters():
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return model, {
        "epoch": 1, "step": 1, "arch": "resnet10", "state_dict": checkpoint.add_prefix(model.state_dict()),
        "optimizer": optimizer.state_dict(), "scaler": {}, "seed": 1, "image_size": 32, "classes": ["a", "b"],
        "means": {"names": ["loss"], "sizes": [None], "sums": torch.ones(1, 1), "steps": 1}, "images": 10,
        "images_per_step": 2, "options": {"aug_plus": True}, "bad_images": {}, "bad_in_epoch": 0,
    }  # fmt: skip


# Files


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran_code",)


@pytest.mark.parametrize("content, told", [
    (b"", "damaged, truncated"), (b"no checkpoint", "damaged, truncated"), (pickle.dumps([1]), "damaged, truncated"),
    ({"state_dict": {"fc.weight": 3}}, "does not consist of tensors"), (torch.ones(3), "holds a Tensor"),
    ({"state_dict": Malicious()}, "loading it would run code .*mkdir.*KEY one of state_dict,")])  # fmt: skip
def test_what_is_no_checkpoint_is_refused_and_never_runs_code(tmp_path, content, told):
    path = tmp_path / "file.pth.tar"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UsageError, match=f"not a checkpoint.*{told}"):
        checkpoint.load(path)
    assert os.listdir(tmp_path) == [path.name]


def test_the_options_that_other_projects_save_do_not_hinder_and_safetensors_are_named(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1, betas=(0.9, 1))}, tmp_path / "mae.pth")
    assert checkpoint.load(tmp_path / "mae.pth")["model"]["a"] == 1
    (tmp_path / "a.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UsageError, match="safetensors; save them as torch.save"):
        checkpoint.load(tmp_path / "a.safetensors")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    torch.save(saved_pretraining()[1], tmp_path / "file.pth.tar")
    content = (tmp_path / "file.pth.tar").read_bytes()
    for length in (1, 10, 100, 1000, *(len(content) * part // 6 for part in range(1, 6)), len(content) - 1):
        (tmp_path / "file.pth.tar").write_bytes(content[:length])
        with pytest.raises(UsageError, match="not a checkpoint: it is damaged, truncated"):
            checkpoint.load(tmp_path / "file.pth.tar")


def test_a_failed_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint.save(path, {"epoch": 1})

    def full_disk(state, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1} and os.listdir(tmp_path) == [path.name]


def test_auto_resume_takes_the_last_epoch_and_pruning_keeps_it(tmp_path):
    numbered = [f"checkpoint_{epoch}.pth.tar" for epoch in ("0009", "0019", "10000")]
    others = ["checkpoint_0029.pth.tar.partial", "checkpoint_robust_0199.pth.tar", "log.jsonl"]
    for name in (*numbered, *others):
        (tmp_path / name).touch()
    pattern = r"checkpoint_(\d{4,}|latest)\.pth\.tar"
    assert checkpoint.resume_path("auto", tmp_path, pattern) == str(tmp_path / numbered[-1])
    (tmp_path / "checkpoint_latest.pth.tar").touch()
    latest = str(tmp_path / "checkpoint_latest.pth.tar")
    assert checkpoint.resume_path("auto", tmp_path, pattern) == latest
    assert checkpoint.resume_path("a/file", tmp_path, pattern, restarted=True) == latest
    assert checkpoint.resume_path("auto", tmp_path / "nowhere", pattern) == ""
    assert checkpoint.resume_path("a/file", tmp_path, pattern) == "a/file"


@pytest.mark.parametrize("latest, names, taken", [
    (None, ["0009", "0199"], "0199"), ((200, 0), ["0199"], "0199"), ((4, 3), [], "latest, after 4 of 200 epochs"),
    ((200, 1), ["0199"], "latest"), ((150, 0), ["0099"], "latest, after 150 of 200 epochs"),
    ((100, 0), ["0099"], "0099, after 100 of 200 epochs")])  # fmt: skip
def test_the_folder_of_a_run_stands_for_its_last_checkpoint(tmp_path, capsys, latest, names, taken):
    for name in names:
        (tmp_path / f"checkpoint_{name}.pth.tar").touch()
    if latest:
        saved = dict(zip(("epoch", "step"), latest)) | {"options": {"epochs": 200}}
        torch.save(saved, tmp_path / "checkpoint_latest.pth.tar")
    number, _, state = taken.partition(",")
    found = checkpoint.of_run("--pretrained", str(tmp_path), checkpoint.PRETRAINING)
    assert found == f"{tmp_path}/checkpoint_{number}.pth.tar"
    told = f"--pretrained {tmp_path}: taking checkpoint_{number}.pth.tar" + (state and f",{state}") + "\n"
    assert capsys.readouterr().err == told


def test_a_folder_of_no_or_of_several_checkpoints_is_refused_with_their_names(tmp_path):
    for name in ("a/model_best_0001.pth.tar", "a/model_best_0199.pth.tar", "b/checkpoint_0199.pth.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for folder, pattern, told in (
        ("", checkpoint.PRETRAINING, "no checkpoint_.*; name one: .*/b/checkpoint_0199.pth.tar$"),
        ("a", checkpoint.BEST, "several model_best_.*; name one: model_best_0001.pth.tar, model_best_0199.pth.tar$"),
        ("b", checkpoint.BEST, "no model_best_.*; name the folder of a run$"),
    ):
        with pytest.raises(UsageError, match=f"--pretrained {tmp_path / folder}: it holds {told}"):
            checkpoint.of_run("--pretrained", str(tmp_path / folder), pattern)


# Whose backbone it is


def pretraining(state):
    """A pre-training's: the query encoder, whose head is another one, and a key encoder that must not be taken."""
    keys = {name: torch.full_like(value, 7) for name, value in state.items()}
    heads = {f"encoder_q.fc.{i}.{part}": torch.ones(3) for i in (0, 2) for part in ("weight", "bias")}
    query = {name: value for name, value in prefixed("encoder_q.", state).items() if ".fc." not in name}
    return prefixed("module.", prefixed("encoder_k.", keys) | query | heads | {"queue": torch.ones(3, 4)})


def numbered(state):
    """The form in which lightly saves a ResNet: nn.Sequential(*network.children())."""
    children = [name for name, _ in build_encoder("resnet18", 7).named_children()]
    return {f"{children.index(name.split('.')[0])}.{name.split('.', 1)[1]}": value for name, value in state.items()}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def with_momentum_encoder(state):
    """The form of solo-learn: the momentum backbone comes first here, and must not be taken."""
    momentum = {name: torch.full_like(value, 7) for name, value in state.items()}
    momentum = prefixed("momentum_backbone.", momentum)
    return momentum | prefixed("backbone.", state) | {"projector.0.weight": torch.ones(3)}


FOREIGN = {
    "torchvision": dict,
    "without batch counts": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
    "DDP twice": lambda state: {"state_dict": prefixed("module.module.", state)},
    "DDP and compiled": lambda state: {"state_dict": prefixed("module._orig_mod.encoder_q.", state)},
    "base_encoder": lambda state: {"state_dict": prefixed("module.base_encoder.", state)},
    "model": lambda state: {"model": state, "epoch": 3},
    "teacher": lambda state: {"teacher": prefixed("backbone.", state), "student": {}},
    "solo-learn": lambda state: {"state_dict": with_momentum_encoder(state)},
    "lightly": lambda state: {"state_dict": prefixed("backbone.", numbered(state))},
    "numbered": numbered,
    "linear": lambda state: {"arch": "resnet18", "state_dict": checkpoint.add_prefix(state)},
    "pre-training": lambda state: {"state_dict": pretraining(state)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_of_other_projects_are_found(kind):
    state = resnet().state_dict()
    found = checkpoint.find_backbone(FOREIGN[kind](state), "x", on_meta())
    counted = kind != "without batch counts"
    expected = {n: v for n, v in state.items() if not n.startswith("fc.") and (counted or "num_batches" not in n)}
    assert same(found[0], expected)
    assert f"{len(expected)} tensors from" in found[1]


def test_another_network_is_not_taken_for_a_resnet18():
    for other in "resnet34", "resnet50", "shufflenet_v2_x0_5":
        with pytest.raises(UsageError, match="use the options it was made with|check --arch"):
            checkpoint.find_backbone({"state_dict": build_encoder(other, 7).state_dict()}, "x", on_meta())


def test_a_backbone_that_is_not_finite_or_not_there_is_refused():
    state = copy.deepcopy(resnet().state_dict())
    state["layer1.0.bn1.weight"][3] = NAN
    with pytest.raises(UsageError, match="file: 1 of its tensors, layer1.0.bn1.weight the first, hold infinite"):
        checkpoint.find_backbone({"state_dict": state}, "file", on_meta())
    for saved in {"state_dict": {"fc.weight": torch.ones(2)}}, {"epoch": 3}:
        with pytest.raises(UsageError, match="file: it holds no weights of this --arch"):
            checkpoint.find_backbone(saved, "file", on_meta())


# What a file must hold


@pytest.mark.parametrize("change, fault", [
    (None, "lacks queue"), (lambda queue: queue[:, :-1], "another shape or kind of tensor for queue"),
    (lambda queue: queue.to_sparse(), "another shape or kind of tensor for queue"),
    (lambda queue: queue.to("meta"), "another shape or kind of tensor for queue"),
    (lambda queue: queue.long(), "another shape or kind of tensor for queue"),
    (lambda queue: queue * NAN, "queue the first, hold infinite values or NaN")])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_before_any_is_loaded(change, fault):
    model, _ = saved_pretraining()
    before = copy.deepcopy(model.state_dict())
    checkpoint.check_exactly(model, before, "file")
    broken = {name: value + 1 for name, value in before.items()}
    queue = broken.pop("queue")
    if change:
        broken["queue"] = change(queue)
    with pytest.raises(UsageError, match=f"^file: .*{fault}"):
        checkpoint.load_exactly(model, broken, "file")
    with pytest.raises(UsageError, match="has the unknown other"):
        checkpoint.load_exactly(model, before | {"other": queue}, "file")
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("change", [
    lambda m: m[:-1], lambda m: m.reshape(-1), lambda m: torch.ones(()), lambda m: m * NAN, lambda m: "x",
    lambda m: m.to_sparse(), lambda m: m.long(), lambda m: m.to("meta"), None])  # fmt: skip
def test_a_momentum_of_another_kind_is_refused(change):
    model, saved = saved_pretraining()
    parameters = list(model.parameters())
    checkpoint.check_momenta(saved["optimizer"], "file", parameters)
    state = copy.deepcopy(saved["optimizer"])
    if change:
        state["state"][0]["momentum_buffer"] = change(state["state"][0]["momentum_buffer"])
    else:
        state["state"][len(parameters)] = state["state"][0]  # of a parameter that there is not
    with pytest.raises(UsageError, match="file: damaged, or not written by these scripts"):
        checkpoint.check_momenta(state, "file", parameters)


ODD = [
    {"epoch": None}, {"epoch": -1}, {"epoch": 1.5}, {"epoch": "3"}, {"epoch": 2**40}, {"step": -1},
    {"step": "2"}, {"image_size": 10**6}, {"image_size": "x"}, {"arch": "resnet51"},
    {"arch": ["resnet10"]}, {"seed": "x"}, {"bad_images": ["x"]}, {"scaler": {"scale": 1}}, {"options": [1]},
    {"options": {"alpha": "x"}}, {"wnids": 3}, {"wnids": [1]}, {"wnids": ["a", "a"]}, {"lrs": ["x"]},
    {"lrs": [0.1], "best_acc1s": [1, 2]}, {"best_acc1": NAN}, {"lrs": [0.1], "winner": 1}, {"pretraining": [3]},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_values_beside_the_weights_are_refused_in_one_line(odd):
    saved = saved_pretraining()[1]
    checkpoint.check_values(saved, "file")
    with pytest.raises(UsageError, match="^file: damaged, or not written by these scripts") as refused:
        checkpoint.check_values(saved | odd, "file")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_run_of_another_model_than_its_checkpoints_is_refused():
    names = ("epoch", "arch", "state_dict")
    saved = {name: value for name, value in saved_pretraining()[1].items() if name in names}
    options = {"arch": "resnet10", "moco_dim": 8, "moco_k": 4, "mlp": False}
    checkpoint.check_pretraining(saved, "file", options)  # a published file stores no options
    saved["options"] = {name: options[name] for name in options if name != "arch"}
    checkpoint.check_pretraining(saved, "file", options)
    for name, value in {"moco_k": 8, "moco_dim": 4, "mlp": True, "arch": "resnet18"}.items():
        with pytest.raises(UsageError, match=f"with --{name.replace('_', '-')} .*, this run has {value}"):
            checkpoint.check_pretraining(saved, "file", options | {name: value})


def test_momenta_get_the_memory_layout_of_their_weights_and_the_options_of_the_run():
    layer = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    buffers = [torch.randn(4, 4, 3, 3), torch.randn(4)]  # contiguous, as in published files
    state = {number: {"momentum_buffer": buffer} for number, buffer in enumerate(buffers)}
    checkpoint.load_optimizer(optimizer, {"state": state, "param_groups": [{"lr": 1.0, "params": [0, 1]}]})
    loaded = optimizer.state[layer.weight]["momentum_buffer"]
    assert torch.equal(loaded, buffers[0]) and loaded.stride() == layer.weight.stride() != buffers[0].stride()
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["momentum"] == 0.9


def test_checkpoints_hold_cpu_tensors(tmp_path, monkeypatch):
    """Wherever the training ran, so that torch.load works without options on a machine without a GPU."""
    saved = []
    monkeypatch.setattr(torch, "save", lambda state, file: saved.append(state))

    class OnGpu(torch.Tensor):
        """A tensor that says when it is asked for its CPU copy."""

        def cpu(self):
            return torch.ones(2)

    tensor = torch.empty(2, device="meta").as_subclass(OnGpu)
    rest = {"param_groups": [{"lr": 0.1, "params": (0,)}]}
    checkpoint.save(tmp_path / "file.pth.tar", {"weight": tensor, "optimizer": {"state": {0: [tensor]}, **rest}})
    (written,) = saved
    optimizer = written["optimizer"]
    assert torch.equal(written["weight"], torch.ones(2)) and torch.equal(optimizer["state"][0][0], torch.ones(2))
    assert optimizer["param_groups"] == rest["param_groups"]
