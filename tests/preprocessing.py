"""Miniature ImageNets and commands for the tests of preprocess/."""

import itertools
import os

import numpy as np
from helpers import write_photo

SCRIPTS = ("corruptions", "imagenet_100_subset", "imagenet_texture_syn", "shapes", "torchvision_folders")
CORRUPT, SUBSET, TEXTURE, SHAPES, FOLDERS = (f"preprocess/{name}.py" for name in SCRIPTS)


def write_imagenet(root):
    """Two classes of three photos in subfolders, with files among them that are no photos."""
    for split in ("train", "val"):
        for wnid in ("n01", "n02"):
            for number in range(3):
                write_photo(root / split / wnid / f"part{number}" / f"{wnid}_{number}.JPEG", seed=number)
        for folder in (root / split, root / split / "n01", root / split / "n02"):
            (folder / ".DS_Store").touch()
            write_photo(folder / "__MACOSX" / "a.JPEG")
            os.mkfifo(folder / "fifo.JPEG")
    (root.parent / "classes.txt").write_text("n02\nn01\n")
    return root


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


def tree(root):
    """{relative path: bytes} of all files below a folder, but for locks."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def refusal(result):
    """The one line with which a script refused its input. result: as of run_script."""
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and ".py: error: " in result.stderr, result.stderr
    return result.stderr


def mean_steps(texture, sources, width):
    """The mean steps between a texture's neighbouring pixels: across cuts, within blocks. width: of the patches."""
    across, within = [], []
    for axis, stride in enumerate((width, 1)):
        steps, cut = np.abs(np.diff(texture.astype(int), axis=axis)).mean(2), np.diff(sources, axis=axis) != stride
        across.append(steps[cut])
        within.append(steps[~cut])
    return np.concatenate(across).mean(), np.concatenate(within).mean()


def largest_verbatim_square(sources, width):
    """The side of the largest square of a texture that is a copy of a patch. width: of the patches."""
    size = len(sources)
    offset = sources - width * np.arange(size)[:, None] - np.arange(size)
    for side in itertools.count(2):
        windows = np.lib.stride_tricks.sliding_window_view(offset, (side, side))
        if not (windows == windows[..., :1, :1]).all((2, 3)).any():
            return side - 1
