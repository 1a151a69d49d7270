"""Data preparation among other processes, signals, full disks and odd names."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from helpers import ended, run_script, started, write_photo

SUBSET, TEXTURES = "preprocess/imagenet_100_subset.py", "preprocess/imagenet_texture_syn.py"
CLASSES = ("n01", "n02", "n03")


@pytest.fixture
def imagenet(tmp_path):
    """Three classes of 20 training photos and one for validation, some of them in a folder of their own."""
    root = tmp_path / "imagenet"
    for split, count in (("train", 20), ("val", 1)):
        for name in CLASSES:
            for i in range(count):
                folder = root / split / name / "nested" if i % 3 == 2 else root / split / name
                write_photo(folder / f"{name}_{i}.JPEG", size=(160, 130), seed=i)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return root


def subset(imagenet, out, *options):
    return [SUBSET, "--imagenet_path", imagenet, "--imagenet100_path", out, "--workers", 2,
            "--classes", imagenet.parent / "classes.txt", *options]  # fmt: skip


def textures(imagenet, out, *options):
    return [TEXTURES, "--imagenet_path", imagenet, "--imagenet_t_path", out, "--workers", 2, *options]


def photos(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.JPEG"))


@pytest.mark.parametrize("options", [("--resize", 100), ("--mode", "copy")])
def test_two_subsets_at_once_are_one_whole_subset(imagenet, tmp_path, options):
    for attempt in range(2):
        out = tmp_path / f"out{attempt}"
        both = [started(*subset(imagenet, out, *options)) for _ in range(2)]
        results = [ended(process) for process in both]
        assert [code for code, _, _ in results] == [0, 0] and "Traceback" not in results[0][2] + results[1][2]
        assert photos(out) == photos(imagenet)
        assert not list(out.rglob("*.partial")) and not (out / ".partial").exists()


def test_smaller_copies_keep_nested_folders(imagenet, tmp_path):
    run_script(*subset(imagenet, tmp_path / "out", "--resize", 100))
    assert photos(tmp_path / "out") == photos(imagenet)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", [textures, subset])
def test_a_signal_ends_the_workers_too(imagenet, tmp_path, command, signum, code):
    for i in range(400):  # enough for a signal to come in between
        os.link(imagenet / "train" / "n01" / "n01_0.JPEG", imagenet / "train" / "n01" / f"n01_1{i:04}.JPEG")
    options = ("--resize", 100) if command is subset else ()
    process = started(*command(imagenet, tmp_path / "out", *options))
    while (
        not list((tmp_path / "out").rglob("*.partial"))
        + list((tmp_path / "out").rglob("*.JPEG"))
        + list((tmp_path / "out").rglob("*.png"))
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    ended_with, _, err = ended(process, timeout=30)
    assert ended_with == code and "Traceback" not in err, err


@pytest.mark.parametrize("command", [textures, subset])
def test_a_full_disk_is_one_line(imagenet, tmp_path, command):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    options = ("--resize", 100) if command is subset else ()
    code, _, err = ended(started(*command(imagenet, tmp_path / "out", *options), preexec_fn=limit))
    lines = [line for line in err.splitlines() if "error: " in line]
    assert code == 1 and len(lines) == 1 and "free some space" in lines[0] and "Traceback" not in err, err


def test_names_that_are_not_utf8_are_photos_like_others(imagenet, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(imagenet / "train" / "n02") + b"/\xff\xfe.JPEG"))
    os.link(imagenet / "train" / "n02" / "n02_0.JPEG", odd)
    run = run_script(*subset(imagenet, tmp_path / "out", "--resize", 100))
    assert (tmp_path / "out" / "train" / "n02" / odd.name).exists() and "broken" not in run.stderr
    run_script(*textures(imagenet, tmp_path / "textures", "--limit", 30))
    assert (tmp_path / "textures" / "train" / "n02" / odd.with_suffix(".png").name).exists()
