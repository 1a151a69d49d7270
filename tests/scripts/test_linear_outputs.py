"""Other outputs of main_lincls.py: the file of --features, and the hint at diverged heads."""

import numpy as np
import pytest
import torch
from helpers import EVALUATE, PROBE, SMALL_PROBE, run_script, write_folder
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


def features(probed, *options):
    """(what was printed, the arrays of the file)"""
    path = probed / "f.npz"
    path.unlink(missing_ok=True)
    run = run_script(PROBE, *SMALL_PROBE, "--features", path, *options, probed / "data")
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


def test_a_backbone_needs_no_head_and_trains_none(probed):
    before = {path: path.stat().st_mtime_ns for path in probed.iterdir() if path.name != "f.npz"}
    best = probed / "model_best_random.pth.tar"
    _, whole = features(probed, "--evaluate", "--resume", best)
    out, made = features(probed, "--pretrained", best, "--ckpt_path", probed)
    assert np.array_equal(made["features"], whole["features"])
    assert "top-1" not in out and "epoch" not in out and out.startswith("wrote ")
    assert before == {path: path.stat().st_mtime_ns for path in probed.iterdir() if path.name != "f.npz"}


def test_outputs_that_are_not_finite_are_no_figures(probed):
    saved = torch.load(probed / "model_best_random.pth.tar", weights_only=True)
    negative, huge = dict(saved["state_dict"]), dict(saved["state_dict"])
    negative["module.norm.running_var"] = -torch.ones(256)
    huge["module.fc.weight"] = 1e38 * torch.ones_like(huge["module.fc.weight"])
    for state, options in (negative, ["--features", probed / "f.npz"]), (negative, []), (huge, []):
        torch.save(saved | {"state_dict": state}, probed / "broken.pth.tar")
        command = [PROBE, *SMALL_PROBE, *options, "--evaluate", "--resume", probed / "broken.pth.tar", probed / "data"]
        (probed / "f.npz").unlink(missing_ok=True)
        run = run_script(*command, check=False)
        assert run.returncode == 2 and "its outputs are not finite for 10 of 10 images" in run.stderr
        assert "top-1" not in run.stdout and not (probed / "f.npz").exists()
    test = ["--pretrained", probed / "broken.pth.tar", "--val", probed / "data", "--json", probed / "r.json", "-j", 0]
    run = run_script(EVALUATE, *test, check=False)
    assert run.returncode == 2 and "its outputs are not finite for 10 of the 10 images of val" in run.stderr
    assert not (probed / "r.json").exists()


def test_a_probe_that_diverges_says_once_which_option_to_try(shared_data, tmp_path):
    settings = [*SMALL_PROBE, "--epochs", 3, "--lr", 8000, 5000, "--ckpt_path", tmp_path, shared_data]
    (line,) = (each for each in run_script(PROBE, *settings).stdout.splitlines() if "diverged" in each)
    assert line.startswith("loss diverged for --lr 8000 5000 (") and "; chance is 0.69); try --lr 5 50 500" in line
