"""Take the 100 classes of ImageNet-100 out of an ImageNet folder.

    python preprocess/imagenet_100_subset.py --imagenet_path imagenet --imagenet100_path imagenet-100

Makes DST/train/<wnid> and DST/val/<wnid>: symbolic links to SRC's class folders; with --mode hardlink or copy, real
folders; with --resize S, folders of smaller copies. A class folder appears only when it is complete, and existing ones
are kept, so that the script can be stopped and run again. DST/subset.json keeps --resize and the class list; another
one is refused there.
"""

import argparse
import functools
import hashlib
import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import common
import pool
from common import UsageError, folders, to_rgb
from PIL import Image

SPLITS = {"train": range(600, 1301), "val": range(50, 51)}  # how many photos a class of ImageNet has


def parse_args() -> argparse.Namespace:
    """The options, and `wnids`. Ends the script with exit code 2 where they cannot be right."""
    begin = "--imagenet_path imagenet --imagenet100_path imagenet-100"
    parser = common.Parser("Take the 100 classes of ImageNet-100 out of an ImageNet folder.", begin)
    parser.add_argument(
        "--imagenet_path", type=Path, required=True, metavar="SRC", help="ImageNet, SRC/{train,val}/<wnid>/*"
    )
    parser.add_argument("--imagenet100_path", type=Path, required=True, metavar="DST", help="folder to create")
    parser.add_argument(
        "--mode", choices=["symlink", "hardlink", "copy"], default="symlink", help="what a class folder is made of"
    )
    parser.add_argument(
        "--resize",
        type=common.positive_int,
        metavar="S",
        help="write JPEGs (quality 95) whose shorter side is S px instead; smaller photos keep their size",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="list of wnids, one per line (default: ImageNet-100's, imagenet_100.txt)",
    )
    parser.add_workers()
    args = parser.parse_args()
    args.wnids = read_classes(args.classes or folders.IMAGENET_100)
    for split in SPLITS:
        folder = folders.split_path(str(args.imagenet_path), split)
        if not folders.class_folders(folder):
            raise folders.refusal(folder, "it has no class folders; SRC holds train/<wnid>/* and val/<wnid>/*")
    if args.imagenet100_path.resolve() == args.imagenet_path.resolve():
        parser.error(f"--imagenet100_path {args.imagenet100_path} is SRC itself; try {args.imagenet_path}-100")
    return args


def read_classes(path: Path) -> list[str]:
    """The sorted wnids of a class list. Raises UsageError as `folders.read_class_list`, and for a path in it."""
    wnids = folders.read_class_list(path)
    for wnid in wnids:
        if wnid in (".", "..") or Path(wnid).name != wnid:
            raise UsageError(f"--classes {path}: {wnid!r} is not the name of a class folder")
    return wnids


class Job(NamedTuple):
    """A class folder to make."""

    source: Path
    images: list[str]  # paths below source
    target: Path
    partial: Path  # where it is made, before it takes its place


def take(job: Job, mode: str) -> None:
    """Make the class folder. OSError if it cannot be made."""
    if mode == "symlink":
        job.target.symlink_to(relative(job.source, job.target.parent), target_is_directory=True)
        return
    shutil.rmtree(job.partial, ignore_errors=True)
    for name in job.images:
        copy = job.partial / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if mode == "hardlink":
            os.link(os.path.realpath(job.source / name), copy)  # not of a link, which may be relative
        else:
            shutil.copy2(job.source / name, copy)
    job.partial.rename(job.target)


def relative(path: Path, start: Path) -> str | Path:
    """The path relative to `start` where possible: links then survive moving the whole tree."""
    try:
        return os.path.relpath(path.resolve(), start.resolve())
    except ValueError:  # another drive of Windows
        return path.resolve()


def take_smaller(job: Job, side: int) -> list[tuple[Path, str]]:
    """Make the class folder of copies whose shorter side is `side` px. Returns the broken photos, [(path, reason)].

    A class of which all photos are broken is not made.
    """
    shutil.rmtree(job.partial, ignore_errors=True)
    broken = []
    for name in job.images:
        data = io.BytesIO()
        try:
            with Image.open(job.source / name) as image:
                image.draft("RGB", (2 * side, 2 * side))  # lets JPEGs decode at a smaller scale
                photo = to_rgb(image)
            scale = min(1, side / min(photo.size))
            smaller = photo.resize([max(1, round(length * scale)) for length in photo.size], Image.LANCZOS)
            smaller.save(data, "JPEG", quality=95)
        except Exception as error:  # a decoder may raise anything on a broken file; the other photos go on
            broken.append((job.source / name, f"{type(error).__name__}: {error}"))
            continue
        copy = job.partial / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data.getvalue())
    if job.partial.exists():
        job.partial.rename(job.target)
    return broken


def count(folder: Path, usual: range) -> None:
    """Print how many photos a split has, and which of its classes have an unusual number."""
    listed = {}
    counts = {name: len(folders.images_in(folder / name, listed)) for name in folders.class_folders(folder)}
    print(f"{folder}: {len(counts)} classes, {sum(counts.values())} photos")
    odd = [f"{name} {n}" for name, n in counts.items() if n not in usual]
    if odd:
        more = ", …" if len(odd) > 5 else ""
        print(f"  {len(odd)} classes have not the usual {usual[0]} to {usual[-1]} photos: {', '.join(odd[:5])}{more}")


def list_sources(source: Path, wnids: list[str]) -> dict[str, list[str]]:
    """{"train/<wnid>": the paths of its photos below it, …}. UsageError if one of the classes holds none.

    Prints which other files lie there.
    """
    images = {}
    for split in SPLITS:
        listed, others = {}, Counter()
        images |= {f"{split}/{wnid}": folders.images_in(source / split / wnid, listed, others) for wnid in wnids}
        common.report_left_out(source / split, folders.count_text(others))
    empty = [name for name, names in images.items() if not names]
    if empty:
        raise UsageError(
            f"--imagenet_path {source}: {len(empty)} class folders hold no image, for example"
            f" {empty[0]}; unpack them again"
        )
    return images


def list_jobs(args: argparse.Namespace, images: Mapping[str, list[str]]) -> list[Job]:
    """The class folders that are not there yet. UsageError if one is there and empty."""
    jobs = []
    for name, names in images.items():
        target = args.imagenet100_path / name
        if target.is_symlink() and not target.exists():  # SRC was moved
            target.unlink()
        if not target.exists():
            # Outside the splits, where an incomplete folder would look like a class.
            partial = args.imagenet100_path / ".partial" / name
            jobs.append(Job(args.imagenet_path / name, names, target, partial))
        elif not folders.images_in(target):
            raise UsageError(f"{target} is there already, but holds no image; remove it and run again")
    return jobs


def make(args: argparse.Namespace, images: Mapping[str, list[str]]) -> int:
    """Make the class folders that are missing, and count what is there. Returns the exit code."""
    jobs, broken = list_jobs(args, images), []
    for parent in {path.parent for job in jobs for path in (job.target, job.partial)}:
        parent.mkdir(parents=True, exist_ok=True)
    if args.resize:
        smaller = functools.partial(take_smaller, side=args.resize)
        for left_out in pool.in_processes(smaller, jobs, args.workers, "class"):
            broken += left_out
    else:
        for job in jobs:
            take(job, args.mode)
    shutil.rmtree(args.imagenet100_path / ".partial", ignore_errors=True)
    made = sum(job.target.exists() for job in jobs)
    print(f"{made} class folders made, {len(images) - len(jobs)} were there already")
    code = common.report_broken(broken)
    for split, usual in SPLITS.items():
        count(args.imagenet100_path / split, usual)
    return code


def main() -> int:
    args = parse_args()
    missing = [
        f"{split}/{wnid}" for split in SPLITS for wnid in args.wnids if not (args.imagenet_path / split / wnid).is_dir()
    ]
    if missing:
        counts = f"{len(missing)} of {2 * len(args.wnids)} class folders are missing"
        print(f"{args.imagenet_path}: {counts}, nothing was made:", *missing, sep="\n  ", file=sys.stderr)
        return 1
    images = list_sources(args.imagenet_path, args.wnids)
    common.lock("--imagenet100_path", args.imagenet100_path)
    classes = {"classes": len(args.wnids), "sha256": hashlib.sha256("\n".join(args.wnids).encode()).hexdigest()}
    common.claim("--imagenet100_path", args.imagenet100_path, "subset.json", {"resize": args.resize, **classes})
    return make(args, images)


if __name__ == "__main__":
    common.run(main)
