import os
import pickle

import pytest
import torch

from moco.builder import MoCo
from moco.encoders import build_encoder
from moco.errors import RunError, UsageError
from moco.training import checkpoint


def resnet(classes=7, arch="resnet18"):
    return build_encoder(arch, classes)


def pretraining_file(path, prefix="module.", mlp=True):
    model = MoCo(lambda num_classes: build_encoder("resnet18", num_classes), dim=8, K=4, mlp=mlp)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)
    return model.encoder_q.state_dict()


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("mlp", [True, False])
def test_a_pretraining_files_backbone_is_its_query_encoder(tmp_path, prefix, mlp):
    query = pretraining_file(tmp_path / "checkpoint_0199.pth.tar", prefix, mlp)
    saved = checkpoint.load(tmp_path / "checkpoint_0199.pth.tar")
    backbone = checkpoint.find_backbone(saved, "file", resnet()).weights
    expected = {name: value for name, value in query.items() if not name.startswith("fc.")}
    assert backbone.keys() == expected.keys() == {n for n in resnet().state_dict() if not n.startswith("fc.")}
    assert all(torch.equal(backbone[name], expected[name]) for name in expected)


def test_torchvision_and_linear_files_have_a_backbone_too(tmp_path):
    state = resnet().state_dict()
    linear = {"arch": "resnet18", "state_dict": checkpoint.add_prefix(state)}
    for saved in (state, linear):
        torch.save(saved, tmp_path / "file.pth")
        backbone = checkpoint.find_backbone(checkpoint.load(tmp_path / "file.pth"), "file", resnet()).weights
        assert backbone.keys() == {name for name in state if not name.startswith("fc.")}


def test_missing_unexpected_and_misshapen_entries_are_named():
    state = resnet().state_dict()
    for fault, change in (
        ("lacks conv1.weight", lambda s: s.pop("conv1.weight")),
        ("unknown other", lambda s: s.update(other=torch.ones(1))),
        ("another shape for fc.bias", lambda s: s.update({"fc.bias": torch.ones(3)})),
    ):
        broken = dict(state)
        change(broken)
        model = resnet()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UsageError, match=fault):
            checkpoint.load_exactly(model, broken, "file")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran_code",)


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "damaged or truncated"),
        (b"no checkpoint", "another kind of file"),
        (b"\xff\xd8\xff", "another kind of file"),
        (pickle.dumps([1, 2], protocol=2), "damaged"),
    ],
    ids=["empty", "text", "jpeg", "pickle"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, told):
    (tmp_path / "file.pth.tar").write_bytes(content)
    with pytest.raises(UsageError, match=f"not a checkpoint: it is .*{told}"):
        checkpoint.load(tmp_path / "file.pth.tar")


@pytest.mark.parametrize("state", [[1, 2], {"fc.weight": 3}])
def test_a_state_dict_without_tensors_is_refused(tmp_path, state):
    torch.save({"state_dict": state}, tmp_path / "file.pth.tar")
    with pytest.raises(UsageError, match="does not consist of tensors"):
        checkpoint.load(tmp_path / "file.pth.tar")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    pretraining_file(tmp_path / "file.pth.tar")
    content = (tmp_path / "file.pth.tar").read_bytes()
    for length in (1, 10, 100, 1000, *(len(content) * part // 6 for part in range(1, 6)), len(content) - 1):
        (tmp_path / "file.pth.tar").write_bytes(content[:length])
        with pytest.raises(UsageError, match="not a checkpoint: it is damaged or truncated"):
            checkpoint.load(tmp_path / "file.pth.tar")


def test_a_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.ones(3), tmp_path / "file.pth.tar")
    with pytest.raises(UsageError, match="holds a Tensor"):
        checkpoint.load(tmp_path / "file.pth.tar")


def test_loading_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "file.pth.tar")
    with pytest.raises(UsageError, match="loading it would run code .*mkdir"):
        checkpoint.load(tmp_path / "file.pth.tar")
    assert not (tmp_path / "ran_code").exists()


def test_a_failed_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint.save(path, {"epoch": 1})

    def full_disk(state, file):
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1} and os.listdir(tmp_path) == [path.name]


def test_auto_resume_takes_the_last_epoch(tmp_path):
    for name in (
        "checkpoint_0009.pth.tar",
        "checkpoint_0019.pth.tar",
        "checkpoint_10000.pth.tar",
        "checkpoint_0029.pth.tar.partial",
        "checkpoint_robust_0199.pth.tar",
        "log.jsonl",
    ):
        (tmp_path / name).touch()
    pattern = r"checkpoint_(\d{4,}|latest)\.pth\.tar"
    assert checkpoint.resume_path("auto", tmp_path, pattern) == str(tmp_path / "checkpoint_10000.pth.tar")
    (tmp_path / "checkpoint_latest.pth.tar").touch()
    assert checkpoint.resume_path("auto", tmp_path, pattern) == str(tmp_path / "checkpoint_latest.pth.tar")
    assert checkpoint.resume_path("auto", tmp_path / "nowhere", pattern) == ""
    assert checkpoint.resume_path("a/file", tmp_path, pattern) == "a/file"


def test_pruning_keeps_the_last_files_of_a_pattern(tmp_path):
    for name in ("checkpoint_0009.pth.tar", "checkpoint_0019.pth.tar", "checkpoint_10000.pth.tar", "other.pth.tar"):
        (tmp_path / name).touch()
    checkpoint.prune(tmp_path, 2, r"checkpoint_\d{4,}\.pth\.tar")
    left = ["checkpoint_0019.pth.tar", "checkpoint_10000.pth.tar", "other.pth.tar"]
    assert sorted(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_backbone_that_is_not_finite_is_refused(value):
    state = resnet().state_dict()
    state["layer1.0.bn1.weight"][3] = value
    assert checkpoint.nonfinite(state) == ["layer1.0.bn1.weight"]
    with pytest.raises(UsageError, match="file: layer1.0.bn1.weight holds infinite values or NaN"):
        checkpoint.find_backbone({"state_dict": state}, "file", resnet())
    with pytest.raises(UsageError, match="file: it holds no weights of this --arch"):
        checkpoint.find_backbone({"state_dict": {"fc.weight": torch.ones(2)}}, "file", resnet())


def test_a_run_that_contradicts_its_checkpoint_is_refused():
    model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=8, K=4)
    saved = {"epoch": 1, "arch": "resnet10", "state_dict": checkpoint.add_prefix(model.state_dict()), "optimizer": {}}
    options = {"arch": "resnet10", "moco_dim": 8, "moco_k": 4, "mlp": False, "aug_plus": True, "robust": "patch"}
    checkpoint.check_pretraining(saved, "file", options, ["a"])  # a published file stores neither classes nor options
    saved |= {"classes": ["a"], "options": {"aug_plus": True}}
    checkpoint.check_pretraining(saved, "file", options, ["a"])
    for name, value in {"moco_k": 8, "moco_dim": 4, "mlp": True, "arch": "resnet18", "aug_plus": False}.items():
        with pytest.raises(UsageError, match=f"with --{name.replace('_', '-')} .*, this run has {value}"):
            checkpoint.check_pretraining(saved, "file", options | {name: value}, ["a"])
    with pytest.raises(UsageError, match="with classes 1: a, this run has 2: a, b"):
        checkpoint.check_pretraining(saved, "file", options, ["a", "b"])


def test_within_an_epoch_the_order_of_the_data_must_match():
    saved = {"step": 3, "images": 10, "images_per_step": 2, "seed": 5}
    checkpoint.check_data_order(saved, "file", None, 10, 2)
    checkpoint.check_data_order(saved | {"step": 0}, "file", 6, 11, 4)  # between epochs it may change
    for seed, images, per_step in ((6, 10, 2), (5, 11, 2), (5, 10, 4)):
        with pytest.raises(UsageError, match="it was saved with"):
            checkpoint.check_data_order(saved, "file", seed, images, per_step)


def test_momenta_are_loaded_and_the_runs_options_kept():
    weight = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    weight.sum().backward()
    saved.step()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    checkpoint.load_optimizer(optimizer, saved.state_dict())
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.ones(2))
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["momentum"] == 0.9


def test_momenta_get_the_memory_layout_of_their_weights():
    layer = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    buffers = [torch.randn(4, 4, 3, 3), torch.randn(4)]  # contiguous, as in published files
    state = {number: {"momentum_buffer": buffer} for number, buffer in enumerate(buffers)}
    checkpoint.load_optimizer(optimizer, {"state": state, "param_groups": [{"lr": 1.0, "params": [0, 1]}]})
    loaded = optimizer.state[layer.weight]["momentum_buffer"]
    assert torch.equal(loaded, buffers[0]) and loaded.stride() == layer.weight.stride() != buffers[0].stride()
