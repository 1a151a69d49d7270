"""Images that cannot be read: a run replaces and reports them, a test needs all."""

import shutil

import pytest
from helpers import (
    EVALUATE,
    FAULTS,
    PRETRAIN,
    PROBE,
    SMALL,
    SMALL_PROBE,
    TORCHRUN,
    log,
    run_script,
    same,
    weights,
    write_folder,
)
from PIL import Image

LATEST = "checkpoint_latest.pth.tar"
UNREADABLE = "unreadable image, replaced by another of its class: "
TWO = [*TORCHRUN, "--nproc-per-node=2"]


@pytest.fixture
def odd(tmp_path):
    """A data set with every kind of image that has been met, good and bad; the names of the bad ones."""
    root = write_folder(tmp_path / "data", train=20)
    n01, n02 = root / "train" / "n01", root / "train" / "n02"
    photo = (n01 / "n01_0.JPEG").read_bytes()
    Image.new("CMYK", (40, 40), (9, 99, 199, 0)).save(n01 / "n01_1.JPEG", "JPEG")
    Image.new("I;16", (40, 40), 40_000).save(n01 / "n01_2.JPEG", "PNG")
    Image.new("RGB", (1, 1)).save(n01 / "n01_3.JPEG", "JPEG")
    bad = {n01 / "n01_4.JPEG": photo[:-300], n01 / "n01_5.JPEG": b"", n02 / "n02_6.JPEG": b"<html>404</html>"}
    for path, content in bad.items():
        path.write_bytes(content)
    Image.new("1", (20_000, 20_000)).save(n02 / "n02_7.JPEG", "PNG")  # 50 kB
    return root, {*map(str, bad), str(n02 / "n02_7.JPEG")}


def test_bad_images_are_replaced_reported_once_and_counted(odd, tmp_path):
    data, bad = odd
    for workers in (0, 2):
        settings = [*SMALL, "-j", workers, "--epochs", 3, "--ckpt_path", tmp_path / str(workers), data]
        lines = run_script(FAULTS, "workers as asked", PRETRAIN, *settings).stderr.splitlines()
        assert len(lines) == 4 and all(line.startswith(UNREADABLE) for line in lines)
        assert {line.split(": ")[1] for line in lines} == bad
    assert all(record["bad_images"] >= 3 for record in log(tmp_path / "0"))
    assert log(tmp_path / "0") == log(tmp_path / "2")
    assert same(weights(tmp_path / "0" / LATEST), weights(tmp_path / "2" / LATEST))
    # a resumed run does not report them again
    again = run_script(PRETRAIN, *SMALL, "--epochs", 4, "--resume", "auto", "--ckpt_path", tmp_path / "0", data)
    assert again.stderr == "" and log(tmp_path / "0")[3]["bad_images"] >= 3
    # two ranks find them in halves of each batch, and agree on the sum.
    both = run_script(PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", tmp_path / "two", data, launcher=TWO)
    assert log(tmp_path / "two")[0]["bad_images"] == log(tmp_path / "0")[0]["bad_images"]
    assert both.stderr.count(UNREADABLE) >= 3


@pytest.mark.parametrize("launcher", [[], TWO], ids=["one process", "two"])
def test_too_many_bad_images_stop_the_run_with_their_list(odd, tmp_path, launcher):
    data, bad = odd
    settings = [*SMALL, "--epochs", 3, "--max-bad-images", 2, "--ckpt_path", tmp_path / "run", data]
    run = run_script(PRETRAIN, *settings, launcher=launcher, check=False)
    (line,) = (line for line in run.stderr.splitlines() if "more than --max-bad-images 2" in line)
    assert run.returncode == 1 and sum(path in line for path in bad) >= 3
    for path in bad:
        shutil.copy(data / "val" / "n01" / "n01_0.JPEG", path)  # repaired
    more = run_script(PRETRAIN, *settings, "--resume", "auto", launcher=launcher)
    assert "epoch 2 [5/5]" in more.stdout and "unreadable" not in more.stderr


def test_a_probe_replaces_bad_images_but_a_test_needs_all(odd, tmp_path):
    data, _ = odd
    settings = [*SMALL_PROBE, "--ckpt_path", tmp_path, data]
    run = run_script(PROBE, *settings, "--epochs", 1)
    assert 3 <= run.stderr.count(UNREADABLE) <= 4
    assert log(tmp_path)[0]["bad_images"] == run.stderr.count(UNREADABLE)
    broken, linear = data / "val" / "n02" / "n02_1.JPEG", tmp_path / "model_best_random.pth.tar"
    broken.write_bytes(b"")
    test = [EVALUATE, "--val", data, "-j", 1, "--json", tmp_path / "t.json", "--pretrained"]
    for command in [PROBE, *settings, "--evaluate", "--resume"], test:
        run = run_script(*command, linear, check=False)
        line = run.stderr.splitlines()[-1]
        assert run.returncode == 1 and "Traceback" not in run.stderr and f"error: {broken}: " in line
