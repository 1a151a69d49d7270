"""Preprocessing of odd trees, names and values, several writers of a file, and no worker left behind."""

import gzip
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import files
import imagenet_100_subset
import imagenet_texture_syn
import numpy as np
import pool
import pytest
from helpers import ENVIRONMENT, REPOSITORY, run_script, write_folder, write_photo
from PIL import Image

SUBSET, TEXTURE, FOLDERS, SHAPES = (
    f"preprocess/{name}.py" for name in ("imagenet_100_subset", "imagenet_texture_syn", "torchvision_folders", "shapes")
)
SLOW_PROGRAM = "#!/bin/sh\nexec sleep 30\n"  # for --texture-synthesis


@pytest.fixture
def imagenet(tmp_path):
    """Two classes, their photos in subfolders, with files that are no photos among them."""
    root = write_folder(tmp_path / "imagenet", train=0, val=0)
    for split in ("train", "val"):
        for wnid in ("n01", "n02"):
            for number in range(3):
                write_photo(root / split / wnid / f"part{number}" / f"{wnid}_{number}.JPEG", seed=number)
            add_litter(root / split / wnid)
        add_litter(root / split)
    (tmp_path / "classes.txt").write_text("n02\nn01\n")
    return root


def add_litter(folder):
    for name in ("._a.JPEG", ".DS_Store"):
        (folder / name).write_bytes(b"litter")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.JPEG").write_bytes(b"litter")
    os.mkfifo(folder / "fifo.JPEG")


def subset_command(imagenet, *options):
    return [
        SUBSET, "--imagenet_path", imagenet, "--imagenet100_path", imagenet.parent / "i100",
        "--classes", imagenet.parent / "classes.txt", "--workers", 2, *options,
    ]  # fmt: skip


def texture_command(imagenet, *options):
    return [
        TEXTURE, "--imagenet_path", imagenet, "--imagenet_t_path", imagenet.parent / "t", "--patch", 24, "--size", 32,
        "--workers", 2, *options,
    ]  # fmt: skip


def heed_interrupts():
    """In a job in the background interrupts are ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(command, *prefix, **settings):
    """Start a script in a session of its own; stderr is a pipe."""
    arguments = [*prefix, sys.executable, *map(str, command)]
    return subprocess.Popen(
        arguments, cwd=REPOSITORY, env=ENVIRONMENT, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed_interrupts, **settings,
    )  # fmt: skip


def names_below(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def one_line(result, script, code):
    """The message of a script that ended with this code and one line on stderr."""
    lines = result.stderr.splitlines()
    assert result.returncode == code and len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{os.path.basename(script)}: error: ")
    return lines[0]


PHOTOS = [
    f"{split}/{wnid}/part{i}/{wnid}_{i}" for split in ("train", "val") for wnid in ("n01", "n02") for i in range(3)
]

# Trees


@pytest.mark.parametrize("options", [("--mode", "hardlink"), ("--mode", "copy"), ("--resize", 32)])
def test_a_subset_has_the_photos_of_all_levels(imagenet, options):
    result = run_script(*subset_command(imagenet, *options))
    assert "2 classes, 6 photos" in result.stdout
    assert names_below(imagenet.parent / "i100") == [f"{name}.JPEG" for name in PHOTOS]


def test_a_linked_subset_counts_the_photos_of_all_levels(imagenet):
    assert "2 classes, 6 photos" in run_script(*subset_command(imagenet)).stdout


def test_textures_are_made_of_photos_at_all_levels(imagenet):
    run_script(*texture_command(imagenet, "--splits", "train", "val"))
    assert names_below(imagenet.parent / "t") == [f"{name}.png" for name in PHOTOS]


def test_hard_links_are_made_of_photos_not_of_links(imagenet, tmp_path):
    photo = imagenet / "train" / "n01" / "part0" / "n01_0.JPEG"
    photo.rename(tmp_path / "photo.JPEG")
    photo.symlink_to("../../../../photo.JPEG")  # leads nowhere from elsewhere
    run_script(*subset_command(imagenet, "--mode", "hardlink"))
    copy = tmp_path / "i100" / "train" / "n01" / "part0" / "n01_0.JPEG"
    assert not copy.is_symlink() and copy.samefile(tmp_path / "photo.JPEG")


BAD_TREES = {
    "loop": (lambda folder: (folder / "n01" / "loop").symlink_to(".."), "count twice"),
    "dangling": (lambda folder: (folder / "n01" / "more").symlink_to("gone"), "leads nowhere"),
    "empty class": (lambda folder: shutil.rmtree(folder / "n01") or (folder / "n01").mkdir(), "no image"),
}


@pytest.mark.parametrize("tree", BAD_TREES)
@pytest.mark.parametrize("command", [subset_command, texture_command])
def test_a_misleading_tree_is_refused_before_any_work(imagenet, tree, command):
    change, told = BAD_TREES[tree]
    change(imagenet / "train")
    arguments = command(imagenet)
    message = one_line(run_script(*arguments, check=False), arguments[0], 2)
    assert told in message and "n01" in message
    assert not (imagenet.parent / "i100").exists() and not (imagenet.parent / "t").exists()


def test_an_empty_class_of_an_earlier_run_is_not_done(imagenet):
    empty = imagenet.parent / "i100" / "train" / "n01"
    empty.mkdir(parents=True)
    message = one_line(run_script(*subset_command(imagenet, "--resize", 32), check=False), SUBSET, 2)
    assert f"{empty} is there already, but holds no image" in message


def test_a_class_of_broken_photos_is_not_made(imagenet):
    for number in range(3):
        (imagenet / "train" / "n01" / f"part{number}" / f"n01_{number}.JPEG").write_bytes(b"broken")
    result = run_script(*subset_command(imagenet, "--resize", 32), check=False)
    assert result.returncode == 1 and "3 broken images were left out" in result.stderr
    assert "3 class folders made" in result.stdout and not (imagenet.parent / "i100" / "train" / "n01").exists()


# Names and values


def test_folders_that_are_not_utf8_can_be_printed(imagenet, tmp_path):
    shutil.copytree(imagenet / "train" / "n01" / "part0", imagenet / "train" / "n03\udcff")
    shutil.move(imagenet, tmp_path / "odd\udcff")
    run_script(*texture_command(tmp_path / "odd\udcff"), env={"LC_ALL": "C.UTF-8"})
    command = subset_command(tmp_path / "odd\udcff")
    command[4] = tmp_path / "i\udcff"
    run_script(*command)


def test_utf8_names_keep_their_textures():
    """The random place of a patch follows from the bytes of the name, as before."""
    rng = imagenet_texture_syn.generator(3, "train/n01/\u00fc.JPEG")
    digest = hashlib.blake2b("3 train/n01/\u00fc.JPEG".encode(), digest_size=16).digest()
    assert rng.integers(1 << 40) == np.random.default_rng(list(digest)).integers(1 << 40)


@pytest.mark.parametrize("command, written", [(texture_command, "t"), (subset_command, "i100")])
def test_values_of_an_unknown_range_are_broken_images(imagenet, command, written):
    photo = imagenet / "train" / "n01" / "part0" / "n01_0.JPEG"
    Image.fromarray(np.linspace(0, 1, 6400, dtype=np.float32).reshape(80, 80)).save(photo, "TIFF")
    options = ("--resize", 32) if command is subset_command else ()
    result = run_script(*command(imagenet, *options), check=False)
    assert result.returncode == 1 and "n01_0.JPEG: ValueError: its samples are floats" in result.stderr
    assert len(names_below(imagenet.parent / written / "train")) == 5


def test_16_bits_become_8_not_white(imagenet):
    pixels = np.linspace(0, 65535, 6400).astype(np.uint16).reshape(80, 80)
    Image.fromarray(pixels).save(imagenet / "train" / "n01" / "part0" / "n01_0.JPEG", "PNG")
    run_script(*subset_command(imagenet, "--resize", 40))
    small = Image.open(imagenet.parent / "i100" / "train" / "n01" / "part0" / "n01_0.JPEG")
    assert abs(np.asarray(small).mean() - 127) < 3


def test_a_narrow_photo_is_a_broken_image(imagenet):
    Image.new("L", (1, 60000)).save(imagenet / "train" / "n01" / "part0" / "n01_0.JPEG", "PNG")
    result = run_script(*texture_command(imagenet, "--patch", 96), check=False)
    assert result.returncode == 1 and "n01_0.JPEG: ValueError: 1x60000 px: too narrow" in result.stderr


# Several runs at once


def test_a_second_run_waits_for_the_first_and_says_so(imagenet):
    (imagenet.parent / "i100").mkdir()
    with files.only_writer(imagenet.parent / "i100"):
        run = start(subset_command(imagenet))
        assert "another process is writing" in run.stderr.readline()
        assert not list((imagenet.parent / "i100").iterdir())
    assert run.wait(60) == 0 and len(os.listdir(imagenet.parent / "i100" / "train")) == 2
    run.stderr.close()


def test_two_runs_write_the_same_textures(imagenet):
    for number in range(40):
        write_photo(imagenet / "train" / "n01" / f"{number}.JPEG")
    runs = [start(texture_command(imagenet, "--overwrite")) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    textures = names_below(imagenet.parent / "t")
    assert len(textures) == 46 and all(name.endswith(".png") for name in textures)
    for name in textures:
        Image.open(imagenet.parent / "t" / name).load()


def test_a_file_that_two_threads_write_is_whole(tmp_path):
    contents = [bytes([number]) * 100_000 * (number + 1) for number in range(4)]

    def write(data):
        for _ in range(50):
            files.write_whole(tmp_path / "file", data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_bytes() in contents
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["file"]


def test_a_partial_file_follows_no_link(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("file.partial", f"file.{'0' * 16}.partial"):
        (tmp_path / name).symlink_to("mine")
    files.write_whole(tmp_path / "file", b"data")
    assert (tmp_path / "mine").read_bytes() == b"mine" and (tmp_path / "file").read_bytes() == b"data"


# Ends


def processes_of(session):
    """The processes of a session that have not ended."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(name))
    return found


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def working(imagenet):
    """A script with two workers that are busy."""
    program = imagenet.parent / "slow"
    program.write_text(SLOW_PROGRAM)
    program.chmod(0o755)
    run = start(texture_command(imagenet, "--texture-synthesis", program))
    try:
        wait_until(lambda: len(processes_of(run.pid)) == 5)  # itself, two workers and the program of each
        yield run
    finally:
        for process in processes_of(run.pid):  # of this test's own session
            os.kill(process, signal.SIGKILL)
        run.stderr.close()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_script(working, signum):
    os.kill(working.pid, signum)
    code = working.wait(10)
    assert code == (-signum if signum == signal.SIGKILL else 128 + signum)
    wait_until(lambda: not processes_of(working.pid), seconds=10)
    stderr = working.stderr.read()
    assert "Traceback" not in stderr
    assert ("interrupted; run the same command again" in stderr) == (signum == signal.SIGINT)


def test_an_interrupt_cancels_no_job_that_waits():
    """On Python 3.10 and 3.11, a pool that loses its workers would print a traceback for each."""
    waiting = [Future() for _ in range(3)]
    waiting[-1].set_exception(KeyboardInterrupt())
    left = waiting[:-1]
    with pytest.raises(KeyboardInterrupt):
        list(pool._results(waiting))
    assert waiting == left and not any(future.cancelled() for future in left)


def test_an_interrupt_at_the_terminal_is_one_line(working):
    """A terminal interrupts the whole group, the workers included."""
    os.killpg(working.pid, signal.SIGINT)
    assert working.wait(10) == 130
    stderr = working.stderr.read()
    assert "Traceback" not in stderr and stderr.count("error:") == 1


def test_a_worker_that_is_killed_is_one_line(working):
    children = multiprocessing_children(working.pid)
    os.kill(children[0], signal.SIGKILL)
    assert working.wait(15) == 1
    stderr = working.stderr.read()
    assert "a worker process was killed" in stderr and "Traceback" not in stderr


def multiprocessing_children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    return [child for child in children if child in processes_of(pid)]


def write_raw_fashion(folder):
    for part, count in (("train", 3), ("t10k", 3)):
        pixels = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28)) + os.urandom(784 * count)
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        folder.mkdir(exist_ok=True)
        for kind, data in (("images-idx3", pixels), ("labels-idx1", labels)):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))


def full_disk_commands(imagenet, out):
    write_raw_fashion(imagenet.parent / "raw")
    return {
        "subset": subset_command(imagenet, "--mode", "copy"),
        "subset, resized": subset_command(imagenet, "--resize", 64),
        "textures": texture_command(imagenet),
        "preview": texture_command(imagenet, "--preview", out / "sheet.png"),
        "torchvision": [FOLDERS, "--dataset", "fashionmnist", "--root", imagenet.parent / "raw", "--out", out / "f"],
        "shapes": [SHAPES, "--out", out / "s", "--train", 10, "--test", 10, "--cell", 10, "--workers", 2],
    }


@pytest.mark.parametrize("kind", ["subset", "subset, resized", "textures", "preview", "shapes"])
def test_a_full_disk_ends_in_one_line(imagenet, tmp_path, kind):
    """A limit on the size of files stands for it: writing fails in the middle of a file."""
    (tmp_path / "out").mkdir()
    command = full_disk_commands(imagenet, tmp_path / "out")[kind]
    run = start(command, "bash", "-c", 'ulimit -f 1; exec "$@"', "limit")
    _, stderr = run.communicate(timeout=60)
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert run.returncode == 1 and "Traceback" not in stderr and len(lines) == 1, stderr
    assert "File too large" in lines[0] and "run the same command again" in lines[0]
    assert not list(tmp_path.rglob("?*.partial"))


@pytest.mark.parametrize("kind", ["subset", "textures", "torchvision"])
def test_a_folder_that_cannot_be_made_is_one_line(imagenet, tmp_path, kind):
    (tmp_path / "out").mkdir()
    command = full_disk_commands(imagenet, tmp_path / "out")[kind]
    for name in ("i100", "t", "out/f"):
        (tmp_path / name).write_text("a file")
    result = run_script(*command, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Not a directory" in result.stderr or "File exists" in result.stderr


@pytest.mark.parametrize("shell", ['"$@" | true', '"$@" | (exec <&-; sleep 2)', '"$@" >&-'])
@pytest.mark.parametrize("missing", [[], ["--classes", "nowhere.txt"]])
def test_a_closed_stdout_is_no_traceback(imagenet, shell, missing):
    run = start([*subset_command(imagenet), *missing], "bash", "-c", f'{shell}; exit "${{PIPESTATUS[0]}}"', "pipe")
    _, stderr = run.communicate(timeout=60)
    assert "Traceback" not in stderr and "BrokenPipe" not in stderr
    assert ("nowhere.txt" in stderr) == bool(missing)
    allowed = {2} if missing else {0, 141} if "|" in shell else {0}  # 141: as SIGPIPE ends a program
    assert run.returncode in allowed


@pytest.mark.parametrize("names", ["../n01", "n01/part0", ".."])
def test_a_listed_class_that_is_a_path_is_refused(tmp_path, names):
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(files.UsageError, match="is not the name of a class folder"):
        imagenet_100_subset.read_classes(tmp_path / "classes.txt")


def test_a_listed_class_that_the_data_lack_is_named(imagenet):
    (imagenet.parent / "classes.txt").write_text("n01\nn02\nn0Z\n")
    result = run_script(*subset_command(imagenet), check=False)
    assert result.returncode == 1 and "train/n0Z" in result.stderr and not (imagenet.parent / "i100").exists()
