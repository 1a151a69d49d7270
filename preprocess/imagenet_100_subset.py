"""Take the 100 classes of ImageNet-100 out of an ImageNet folder.

    python preprocess/imagenet_100_subset.py --imagenet_path imagenet --imagenet100_path imagenet-100

Makes DST/train/<wnid> and DST/val/<wnid>: symbolic links to SRC's class folders, with --mode copy folders of copies,
with --resize S of smaller ones. Existing ones are kept, so that the script can be stopped and run again.
DST/subset.json keeps --resize and the class list; another one is refused there.
"""

import argparse
import functools
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

import common
import pool
from common import FORMATS, UsageError, folders, to_rgb
from PIL import Image

SPLITS = {"train": range(600, 1301), "val": range(50, 51)}  # how many photos a class of ImageNet has


def parse_args() -> argparse.Namespace:
    """The options, and `wnids`. Ends the script with exit code 2 where they cannot be right."""
    begin = "--imagenet_path imagenet --imagenet100_path imagenet-100"
    parser = common.Parser("Take the 100 classes of ImageNet-100 out of an ImageNet folder.", begin)
    add = functools.partial(parser.add_argument, type=Path)
    add("--imagenet_path", required=True, metavar="SRC", help="ImageNet, SRC/{train,val}/<wnid>/*")
    add("--imagenet100_path", required=True, metavar="DST", help="folder to create")
    add("--mode", type=str, choices=["symlink", "copy"], default="symlink", help="what a class folder is made of")
    resized = "write JPEGs (quality 95) whose shorter side is S px instead of links; smaller photos keep their size"
    parser.add_argument("--resize", type=common.positive_int, metavar="S", help=resized)
    listed = "list of wnids, one per line (default: ImageNet-100's, imagenet_100.txt)"
    add("--classes", metavar="FILE", help=listed)
    parser.add_workers()
    args = parser.parse_args()
    args.wnids = folders.read_class_list(args.classes or folders.IMAGENET_100)
    for split in SPLITS:
        folder = folders.split_path(str(args.imagenet_path), split)
        if not folders.class_folders(folder):
            raise folders.refusal(folder, "it has no class folders; SRC holds train/<wnid>/* and val/<wnid>/*")
    return args


def list_photos(source: Path, wnids: list[str]) -> list[str]:
    """The paths below `source` of the photos of these classes. UsageError if one of the classes holds none.

    Prints which other files lie there.
    """
    photos, empty = [], []
    for split in SPLITS:
        listed, others = {}, Counter()
        for name in [f"{split}/{wnid}" for wnid in wnids]:
            images = folders.images_in(source / name, listed, others)
            photos += [f"{name}/{image}" for image in images]
            empty += [] if images else [name]
        common.report_left_out(source / split, folders.count_text(others))
    if empty:
        told = f"{len(empty)} class folders hold no image, for example {empty[0]}; unpack them again"
        raise UsageError(f"--imagenet_path {source}: {told}")
    return photos


def make_link(source: Path, target: Path) -> bool:
    """Link to a class folder, by a relative path: it survives moving the whole tree. Returns whether it was missing."""
    if target.exists():
        return False
    target.unlink(missing_ok=True)  # a link into SRC from before it was moved
    target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()), target_is_directory=True)
    return True


def make_copy(photo: str, args: argparse.Namespace) -> tuple[dict[Path, bytes], bool]:
    """A copy, with --resize one whose shorter side is so many px, as pool.write_files takes it; none is enlarged."""
    if not args.resize:
        return {args.imagenet100_path / photo: (args.imagenet_path / photo).read_bytes()}, False
    with Image.open(args.imagenet_path / photo, formats=FORMATS) as image:
        image.draft("RGB", (2 * args.resize, 2 * args.resize))  # lets JPEGs decode at a smaller scale
        copy = to_rgb(image)
    scale = min(1, args.resize / min(copy.size))
    copy = copy.resize([max(1, round(length * scale)) for length in copy.size], Image.LANCZOS)
    return {args.imagenet100_path / photo: common.encode(copy, "JPEG", quality=95)}, False


def count(folder: Path, usual: range) -> None:
    """Print how many photos a split has, and which of its classes have an unusual number."""
    listed = {}
    counts = {name: len(folders.images_in(folder / name, listed)) for name in folders.class_folders(folder)}
    print(f"{folder}: {len(counts)} classes, {sum(counts.values())} photos")
    odd = [f"{name} {n}" for name, n in counts.items() if n not in usual]
    if odd:
        more = ", …" if len(odd) > 5 else ""
        print(f"  {len(odd)} classes have not the usual {usual[0]} to {usual[-1]} photos: {', '.join(odd[:5])}{more}")


def main() -> int:
    args = parse_args()
    source, out = args.imagenet_path, args.imagenet100_path
    names = [f"{split}/{wnid}" for split in SPLITS for wnid in args.wnids]
    missing = [name for name in names if not (source / name).is_dir()]
    if missing:
        counts = f"{len(missing)} of {len(names)} class folders are missing"
        print(f"{source}: {counts}, nothing was made:", *missing, sep="\n  ", file=sys.stderr)
        return 1
    photos, broken = list_photos(source, args.wnids), 0
    common.lock("--imagenet100_path", out)
    classes = {"classes": len(args.wnids), "sha256": hashlib.sha256("\n".join(args.wnids).encode()).hexdigest()}
    common.claim("--imagenet100_path", out, "subset.json", {"mode": args.mode, "resize": args.resize, **classes})
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
    if args.resize or args.mode == "copy":
        make, done = functools.partial(make_copy, args=args), lambda photo: common.is_whole(out / photo)
        _, _, broken = pool.write_files(make, photos, done, args.workers)
    else:
        made = sum([make_link(source / name, out / name) for name in names])
        print(f"{made} class folders made, {len(names) - made} were there already")
    for split, usual in SPLITS.items():
        count(out / split, usual)
    return int(broken > 0)


if __name__ == "__main__":
    common.run(main)
