"""main_lincls.py --features: what its file holds."""

import numpy as np
import pytest
import torch
from helpers import PROBE, SMALL_PROBE, TORCHRUN, refused, run_ranks, run_script, write_folder
from torchvision import transforms
from torchvision.datasets import ImageFolder

from moco.augment import MEAN, STD
from moco.evaluation import classifier


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A data set with a linear checkpoint of it, and the features that its backbone gives val/."""
    root = tmp_path_factory.mktemp("probed")
    data = write_folder(root / "data", val=5)
    run_script(PROBE, *SMALL_PROBE, "--epochs", 1, "--ckpt_path", root, data)
    return root


def features(probed, *options, **settings):
    """(what was printed, the arrays of the file)"""
    path = probed / "f.npz"
    path.unlink(missing_ok=True)
    run = run_script(PROBE, *SMALL_PROBE, "--features", path, *options, probed / "data", **settings)
    with np.load(path, allow_pickle=False) as file:
        return run.stdout, dict(file)


def test_features_are_those_of_a_plain_loop(probed):
    out, made = features(probed, "--evaluate", "--resume", probed / "model_best_random.pth.tar", "-b", 4)
    model, _ = classifier.load_classifier(str(probed / "model_best_random.pth.tar"))
    preset = transforms.Compose(
        [transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    folder = ImageFolder(probed / "data" / "val", preset)
    head, model.fc = model.fc, torch.nn.Identity()
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image, _ in folder])
    assert made["features"].dtype == np.float32 and made["features"].shape == (10, 256)
    assert np.allclose(made["features"], expected.numpy(), atol=1e-5)
    assert made["paths"].tolist() == [path for path, _ in folder.samples]
    assert made["labels"].tolist() == folder.targets and made["labels"].dtype == np.int64
    assert made["classes"].tolist() == folder.classes and made["split"] == "val"
    hits = (head(torch.from_numpy(made["features"])).argmax(1).numpy() == made["labels"]).sum()
    assert f"top-1 {100 * hits / 10:.2f} %" in out
    assert f"features (10, 256) of {probed / 'data'}/val by {probed / 'model_best_random.pth.tar'}" in out


@pytest.mark.slow
def test_a_rank_without_images_is_no_obstacle(probed, tmp_path):
    data = write_folder(tmp_path / "few", val=1)
    command = [PROBE, *SMALL_PROBE, "-b", 9, "--evaluate", "--resume", probed / "model_best_random.pth.tar"]
    for name, launcher in (("alone", ()), ("three", (*TORCHRUN, "--nproc-per-node=3"))):
        run_script(*command, "--features", tmp_path / f"{name}.npz", data, launcher=launcher)
    with np.load(tmp_path / "alone.npz") as alone, np.load(tmp_path / "three.npz") as three:
        assert len(three["features"]) == 2 and np.allclose(alone["features"], three["features"], atol=1e-5)


def test_a_backbone_needs_no_head_and_trains_none(probed):
    before = {path: path.stat().st_mtime_ns for path in probed.iterdir() if path.name != "f.npz"}
    best = probed / "model_best_random.pth.tar"
    _, whole = features(probed, "--evaluate", "--resume", best)
    out, made = features(probed, "--pretrained", best, "--ckpt_path", probed)
    assert np.array_equal(made["features"], whole["features"])
    assert "top-1" not in out and "epoch" not in out and out.startswith("wrote ")
    assert before == {path: path.stat().st_mtime_ns for path in probed.iterdir() if path.name != "f.npz"}


def test_features_of_two_processes_are_in_order(tmp_path):
    rows = run_ranks(2, tmp_path, gathered)["gathered"]
    assert all(torch.equal(own, torch.arange(10.0).reshape(5, 2)) for own in rows)


def gathered(ctx):
    return classifier.gather_in_order(torch.arange(10.0).reshape(5, 2)[ctx.rank :: 2], 5, ctx)


@pytest.mark.slow
def test_two_processes_write_the_features_of_one(probed):
    best = probed / "model_best_random.pth.tar"
    _, one = features(probed, "--pretrained", best)
    _, two = features(probed, "--pretrained", best, launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert np.allclose(one.pop("features"), two.pop("features"), atol=1e-5)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_file_of_features_that_cannot_be_is_refused(probed):
    best, data = ["--pretrained", probed / "model_best_random.pth.tar"], probed / "data"
    assert "its name must end in .npz" in refused(PROBE, *best, "--features", probed / "f.npy", data)
    assert "there is no folder" in refused(PROBE, *best, "--features", probed / "no" / "f.npz", data)
    export = [*best, "--features", probed / "f.npz", "--export-backbone", probed / "b.pth"]
    assert "--export-backbone writes the backbone and does nothing else" in refused(PROBE, *export, data)
    assert not (probed / "b.pth").exists()
