import os
import pickle

import pytest
import torch

from moco import checkpoint
from moco.builder import MoCo
from moco.encoders import build_encoder
from moco.errors import UsageError, RunError


def resnet(classes=7, arch="resnet18"):
    return build_encoder(arch, classes)


def pretraining_file(path, prefix="module.", mlp=True):
    model = MoCo(lambda num_classes: build_encoder("resnet18", num_classes), dim=8, K=4, mlp=mlp)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)
    return model.encoder_q.state_dict()


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("mlp", [True, False])
def test_backbone_of_a_pretraining_checkpoint_is_its_query_encoder_without_head(tmp_path, prefix, mlp):
    query = pretraining_file(tmp_path / "checkpoint_0199.pth.tar", prefix, mlp)
    backbone = checkpoint.backbone_weights(checkpoint.load(tmp_path / "checkpoint_0199.pth.tar"))
    expected = {name: value for name, value in query.items() if not name.startswith("fc.")}
    assert backbone.keys() == expected.keys() == {n for n in resnet().state_dict() if not n.startswith("fc.")}
    assert all(torch.equal(backbone[name], expected[name]) for name in expected)


def test_backbone_of_a_torchvision_file_and_of_a_linear_checkpoint(tmp_path):
    state = resnet().state_dict()
    linear = {"arch": "resnet18", "state_dict": checkpoint.add_prefix(state)}
    for saved in (state, linear):
        torch.save(saved, tmp_path / "file.pth")
        backbone = checkpoint.backbone_weights(checkpoint.load(tmp_path / "file.pth"))
        assert backbone.keys() == {name for name in state if not name.startswith("fc.")}


def test_missing_unexpected_and_misshapen_entries_are_named():
    state = resnet().state_dict()
    for fault, change in (("lacks conv1.weight", lambda s: s.pop("conv1.weight")),
                          ("unknown other", lambda s: s.update(other=torch.ones(1))),
                          ("another shape for fc.bias", lambda s: s.update({"fc.bias": torch.ones(3)}))):
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


@pytest.mark.parametrize("content, told", [
    (b"", "damaged or cut short"), (b"no checkpoint", "another kind of file"), (b"\xff\xd8\xff", "another kind of file"),
    (pickle.dumps([1, 2], protocol=2), "damaged")], ids=["empty", "text", "jpeg", "pickle"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content, told):
    (tmp_path / "file.pth.tar").write_bytes(content)
    with pytest.raises(UsageError, match=f"not a checkpoint: it is .*{told}"):
        checkpoint.load(tmp_path / "file.pth.tar")


@pytest.mark.parametrize("state", [[1, 2], {"fc.weight": 3}])
def test_a_state_dict_without_tensors_is_refused(tmp_path, state):
    torch.save({"state_dict": state}, tmp_path / "file.pth.tar")
    with pytest.raises(UsageError, match="not one of tensors"):
        checkpoint.load(tmp_path / "file.pth.tar")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    pretraining_file(tmp_path / "file.pth.tar")
    content = (tmp_path / "file.pth.tar").read_bytes()
    for length in (1, 10, 100, 1000, *(len(content) * part // 6 for part in range(1, 6)), len(content) - 1):
        (tmp_path / "file.pth.tar").write_bytes(content[:length])
        with pytest.raises(UsageError, match="not a checkpoint: it is damaged or cut short"):
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


def test_auto_resume_takes_the_last_epoch_and_ignores_other_files(tmp_path):
    for name in ("checkpoint_0009.pth.tar", "checkpoint_0019.pth.tar", "checkpoint_10000.pth.tar",
                 "checkpoint_0029.pth.tar.partial", "checkpoint_robust_0199.pth.tar", "log.jsonl"):
        (tmp_path / name).touch()
    pattern = r"checkpoint_(\d{4,}|latest)\.pth\.tar"
    assert checkpoint.resume_path("auto", tmp_path, pattern) == str(tmp_path / "checkpoint_10000.pth.tar")
    (tmp_path / "checkpoint_latest.pth.tar").touch()
    assert checkpoint.resume_path("auto", tmp_path, pattern) == str(tmp_path / "checkpoint_latest.pth.tar")
    assert checkpoint.resume_path("auto", tmp_path / "nowhere", pattern) == ""
    assert checkpoint.resume_path("a/file", tmp_path, pattern) == "a/file"
