"""moco-non-sem-neg.py as people type it."""

import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import (
    FAULTS,
    PRETRAIN,
    REPOSITORY,
    SMALL,
    TORCHRUN,
    TORCHRUN_RANK,
    log,
    refused,
    run_script,
    same,
    weights,
    write_folder,
)
from PIL import Image

from moco import augment
from moco.data import folders

METHOD = ["--mlp", "--aug-plus", "--cos", "--epochs", 3, "--save-freq", 1]
SETTINGS = [*SMALL, *METHOD]
LATEST = "checkpoint_latest.pth.tar"


@pytest.fixture(scope="module")
def whole(shared_data, tmp_path_factory):
    """A run of three epochs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run_script(PRETRAIN, *SETTINGS, "--ckpt_path", folder, shared_data)
    return folder


@pytest.fixture(scope="module")
def stopped(shared_data, tmp_path_factory):
    """The same run, stopped by a signal after the first step of its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    run = run_script(FAULTS, "SIGTERM in step 3", PRETRAIN, *SETTINGS, "--ckpt_path", folder, shared_data, check=False)
    assert run.returncode == 143 and "stopped by SIGTERM in epoch 1 after step 1, saved" in run.stdout, run.stderr
    return folder


@pytest.mark.parametrize("where", ["epoch 1", "epoch 1 step 1"])
def test_resumed_equals_uninterrupted(shared_data, whole, stopped, tmp_path, where):
    for name in (LATEST, "log.jsonl"):
        shutil.copy((stopped if "step" in where else whole) / name, tmp_path)
    if "step" not in where:  # killed in the second epoch
        shutil.copy(whole / "checkpoint_0000.pth.tar", tmp_path / LATEST)
    # SMALL without its --seed: the checkpoint knows it
    run = run_script(PRETRAIN, *SMALL[:-2], *METHOD, "--resume", "auto", "--ckpt_path", tmp_path, shared_data)
    assert f"starting at {where} (" in run.stdout
    assert log(tmp_path) == log(whole) and len(log(whole)) == 3
    one, other = (torch.load(folder / LATEST, weights_only=True) for folder in (whole, tmp_path))
    assert same(one["state_dict"], other["state_dict"]) and one["seed"] == other["seed"]
    momenta = [[state["momentum_buffer"] for state in saved["optimizer"]["state"].values()] for saved in (one, other)]
    assert all(map(torch.equal, *momenta))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_byte_encoders_train_and_resume(data, tmp_path, precision):
    settings = [PRETRAIN, *SMALL, "--precision", precision, "--save-freq", 1, "--ckpt_path", tmp_path, data]
    run_script(*settings, "--epochs", 2)
    whole = torch.load(tmp_path / "checkpoint_0001.pth.tar", weights_only=True)
    assert bool(whole["scaler"]) == (precision == "fp16")
    assert all(value.dtype in (torch.float32, torch.int64) for value in whole["state_dict"].values())
    for name in ("0001", "latest"):
        (tmp_path / f"checkpoint_{name}.pth.tar").unlink()
    run_script(*settings, "--epochs", 2, "--resume", "auto")
    assert same(whole["state_dict"], weights(tmp_path / "checkpoint_0001.pth.tar"))


def test_same_seed_same_run_another_seed_another_run(data, tmp_path):
    results = []
    for seed, workers in (1, 0), (1, 2), (2, 0):
        folder = tmp_path / f"{seed} {workers}"
        settings = [*SMALL, "--seed", seed, "-j", workers, "--epochs", 1, "--ckpt_path", folder, data]
        run = run_script(FAULTS, "workers as asked", PRETRAIN, *settings)
        assert f"processes  1, with {workers} loader workers each" in run.stdout
        results.append((log(folder), weights(folder / LATEST)))
    first, again, other = results
    assert first[0] == again[0] and same(first[1], again[1])
    assert first[0] != other[0] and not same(first[1], other[1])


def test_torchrun_trains_with_two_processes(data, tmp_path):
    settings = [*SMALL, "--epochs", 2, "--knn", "--knn-freq", 2, "--ckpt_path", tmp_path, data]
    run = run_script(PRETRAIN, *settings, launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert "processes  2, with 1 loader workers each" in run.stdout and "images per step  8" in run.stdout
    assert run.stdout.count("epoch 1 [2/2]") == 1  # one process prints
    assert run.stdout.count("200-nearest-neighbour top-1") == 1
    assert [("knn_top1" in record) for record in log(tmp_path)] == [False, True]
    assert (tmp_path / "checkpoint_0001.pth.tar").exists()


def test_plain_moco_has_no_negatives(shared_data, tmp_path):
    for options in (["--robust", "none"], ["--num-nonsem", 0]):
        folder = tmp_path / options[0]
        run = run_script(PRETRAIN, *SMALL, "--epochs", 1, *options, "--ckpt_path", folder, shared_data)
        (record,) = log(folder)
        assert "q_t" not in record and "q_k" in record
        assert "chance loss  4.174" in run.stdout  # ln(1 + 64)


def test_preview_draws_labelled_columns_and_trains_nothing(shared_data, tmp_path):
    write_folder(tmp_path / "few", classes=["n01"], train=1)
    settings = [*SMALL, "--num-nonsem", 2, "--preview", tmp_path / "grid.png", "--ckpt_path", tmp_path / "c"]
    for data, rows in (tmp_path / "few", 1), (shared_data, 8):
        run = run_script(PRETRAIN, *settings, data)
        with Image.open(tmp_path / "grid.png") as grid:  # 4 columns, 8 rows of 32 px crops enlarged to 224 px
            assert grid.width == 4 * 230 + 6 and grid.height == 34 + rows * 230
    assert "grid.png" in run.stdout and not (tmp_path / "c").exists()


def test_knn_is_logged_and_skipped_without_val_and_keep_counts_checkpoints(data, tmp_path):
    settings = [*SMALL, "--epochs", 3, "--knn", "--knn-freq", 2, "--save-freq", 1, "--keep", 2, data]
    run = run_script(PRETRAIN, *settings, "--ckpt_path", tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").glob("*.tar"))  # the oldest is removed
    assert names == [f"checkpoint_{name}.pth.tar" for name in ("0001", "0002", "latest")]
    assert [("knn_top1" in record) for record in log(tmp_path / "a")] == [False, True, True]
    assert 0 <= log(tmp_path / "a")[2]["knn_top1"] <= 100 and run.stdout.count("200-nearest-neighbour top-1") == 2
    shutil.rmtree(data / "val")
    run = run_script(PRETRAIN, *SMALL, "--epochs", 1, "--knn", "--ckpt_path", tmp_path / "b", data)
    assert "skipped: " in run.stdout and "knn_top1" not in log(tmp_path / "b")[0]


def test_a_dry_run_prints_what_follows_from_the_options(shared_data):
    out = run_script(PRETRAIN, *SMALL, "--dry-run", shared_data).stdout
    for line in "steps per epoch  2", "images  16 in 2 classes", "patch ratio  4 12", "dry run  nothing was started":
        assert line in out


# Refusals


@pytest.mark.parametrize("options, message", [
    ("--patch-ratio 0 16", "'0' is not an integer of 1 or more"), ("--patch-ratio 72 16", "--patch-ratio 72 16"),
    ("--patch-ratio 16 500", "224 px"), ("--alpha nan", "'nan' is not a number of 0 or more"),
    ("--robust shapes", "invalid choice"), ("--arch vit_b_16", "which end in fc"), ("--alhpa 3", "--alhpa: unknown"),
    ("--resume nowhere.pth.tar", "no such file"), (f"--resume {REPOSITORY}/README.md", "not a checkpoint"),
    ("--robust texture", "ends in -texture"), ("--robust texture --num-nonsem 2", "--num-nonsem 2"),
    ("--gpu 99", "--gpu 99"), ("--start-epoch 5 --epochs 5", "--start-epoch 5"),
    ("--world-size 2 --rank 0 --multiprocessing-distributed --batch-size 4", "--dist-url"),
    ("--batch-size 64", "16 training images do not fill one batch of 64")])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_built(shared_data, tmp_path, options, message):
    batch = () if "--batch-size" in options else ("-b", 8)
    line = refused(PRETRAIN, *shlex.split(options), "--ckpt_path", tmp_path / "ckpt", *batch, shared_data)
    assert message in line
    assert [path.name for path in tmp_path.glob("ckpt/*")] in ([], [".lock"])  # until this process ends


def test_a_batch_that_does_not_divide_is_refused(shared_data, tmp_path, monkeypatch):
    for name, value in {**TORCHRUN_RANK, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():  # as torchrun sets it
        monkeypatch.setenv(name, value)
    line = refused(PRETRAIN, *SMALL, "-b", 7, "--ckpt_path", tmp_path / "c", shared_data)
    assert "--batch-size 7 cannot be divided among the 2 processes" in line and not (tmp_path / "c").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(shared_data, whole, tmp_path):
    resume = [PRETRAIN, *SETTINGS, "--epochs", 9, "--ckpt_path", tmp_path / "new", "--resume"]
    line = refused(*resume, whole / LATEST, "--moco-k", 32, shared_data)
    assert "it was saved with --moco-k 64, this run has 32" in line
    (tmp_path / "two\nlines.pth.tar").write_bytes(b"x")
    assert "two lines.pth.tar" in refused(*resume, tmp_path / "two\nlines.pth.tar", shared_data)


# Options that make the result


def test_a_run_keeps_its_options_in_its_folder_and_another_tells_the_change(shared_data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "own")
    own = [PRETRAIN, *SETTINGS, "--ckpt_path", tmp_path / "own", "--resume"]
    for options in ["auto", "--alpha", 3], [tmp_path / "own" / "checkpoint_0000.pth.tar", "--seed", 2]:
        line = refused(*own, *options, shared_data)
        assert f"it was saved with {options[-2]} 1" in line and "in another --ckpt_path" in line
    other = write_folder(tmp_path / "data", classes=("n01", "n07"))
    assert "it was saved with classes 2, this run has 2 (n02 differs)" in refused(*own, "auto", other)
    assert (tmp_path / "own" / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    first = whole / "checkpoint_0000.pth.tar"
    run_script(*own[:-2], tmp_path / "new", "--resume", first, "--alpha", 3, shared_data)
    change = {"epoch": 1, "alpha": [1.0, 3.0]}
    assert [line.get("changed") for line in log(tmp_path / "new")] == [change, None]
    saved = torch.load(tmp_path / "new" / LATEST, weights_only=True)
    assert saved["changes"] == [change] and saved["options"]["alpha"] == 3.0


README = "-a resnet50 --lr 0.03 --batch-size 128 --mlp --moco-t 0.2 --aug-plus --cos --moco-k 16384 --epochs 200"


def settings(capsys, monkeypatch, *options, images=126_689):
    """{option: text} that --dry-run prints of a data set of so many images."""
    found = folders.TrainingImages(folders.PathArray("", map(str, range(images))), None, np.zeros(images), ["n01"])
    monkeypatch.setattr(folders, "list_training_images", lambda *_, **__: found)
    monkeypatch.setattr(sys, "argv", [PRETRAIN, *shlex.split(" ".join(map(str, options))), "--dry-run", "data"])
    runpy.run_path(str(REPOSITORY / PRETRAIN), run_name="__main__")
    return dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_the_papers_recipe_is_readmes_published_command(capsys, monkeypatch):
    written = settings(capsys, monkeypatch, README, "--robust patch --alpha 2 --patch-ratio 16 72")
    del written["arch"]  # resnet50 is the default
    assert settings(capsys, monkeypatch, "--recipe paper") == written | {"arch": "resnet50"}
    small = settings(capsys, monkeypatch, "--recipe paper --image-size 56 -b 64", images=4000)
    assert (small["moco k"], small["patch ratio"], small["batch size"]) == ("512", "4 18", "64")
    assert small["patches"] == "4 to 18 px, in proportion to the crop"
    own = settings(capsys, monkeypatch, "--recipe paper --no-mlp --no-cos --moco-k 9 --patch-ratio 5 6 --alpha 3")
    assert not {"mlp", "cos"} & own.keys() and (own["moco k"], own["patch ratio"], own["alpha"]) == ("9", "5 6", "3.0")


@pytest.mark.parametrize("options, images, told", [
    ("", 126_689, {"recipe"}), ("--epochs 9 -b 64 --moco-k 512", 4000, {"recipe"}), ("", 400, {"recipe", "queue"}),
    ("--alpha 2 --image-size 56", 9000, {"patches", "queue"}),
    ("--alpha 2 --image-size 56 --patch-ratio 16 56 --patch-size 16", 126_689, {"patches"}),
    ("--alpha 2 --patch-ratio 16 112", 126_689, set()), ("--robust none --mlp --moco-k 65536", 126_689, set()),
    ("--robust none --mlp --image-size 56", 65_536, set()), ("--recipe paper", 300, set())])  # fmt: skip
def test_settings_that_will_hardly_work_are_named(capsys, monkeypatch, options, images, told):
    found = settings(capsys, monkeypatch, "-b 8", options, images=images)
    assert found.keys() & {"recipe", "queue", "patches"} == told
    if "queue" in told:
        fitting = {400: 64, 9000: 1024}[images]
        assert found["queue"] == f"65536 keys of {images} images, their own negatives: try --moco-k {fitting}"
    assert found.get("patch size", "").startswith("ignored") == ("--patch-size" in options)
    if "16 56" in options:
        assert found["patches"] == "above half the crop they show whole objects: try --patch-ratio 4 18"


# A new kind of negative, and one's own patch negatives

PATCHED = """
import runpy, sys
from moco import negatives

def fail(*args, **options):
    raise RuntimeError("a reader's own negatives")

def inverted(query, texture, rng, options):
    return -query.unsqueeze(1)

if sys.argv[1] == "new kind":
    negatives.NEGATIVES["inverted"] = negatives.Negative(inverted)
else:
    negatives.patch_negatives = fail
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def patched(tmp_path):
    (tmp_path / "patched.py").write_text(PATCHED)
    return tmp_path / "patched.py"


def test_an_entry_of_the_table_is_a_kind_of_negative_everywhere(patched, shared_data, tmp_path):
    command = [patched, "new kind", PRETRAIN, *SMALL, "--robust", "inverted", "--ckpt_path", tmp_path / "run"]
    assert "patch, texture, inverted or none" in " ".join(run_script(*command[:3], "--help").stdout.split())
    run_script(*command, "--preview", tmp_path / "grid.png", shared_data)
    with Image.open(tmp_path / "grid.png") as grid:
        query, negative = (grid.getpixel((x, 100)) for x in (100, 100 + 2 * 230))
    assert np.abs(np.add(query, negative) - [255 * 2 * mean for mean in augment.MEAN]).max() <= 2  # about the mean
    run_script(*command, "--epochs", 1, shared_data)
    (record,) = log(tmp_path / "run")
    assert "q_t" in record
    assert torch.load(tmp_path / "run" / LATEST, weights_only=True)["options"]["robust"] == "inverted"


def test_training_and_preview_call_patch_negatives(patched, shared_data, tmp_path):
    for options in ["--epochs", 1], ["--preview", tmp_path / "grid.png"]:
        command = [patched, "fail", PRETRAIN, *SMALL, *options, "--ckpt_path", tmp_path / "run", shared_data]
        run = run_script(*command, check=False)
        assert run.returncode == 1 and "a reader's own negatives" in run.stderr
