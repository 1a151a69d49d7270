"""Take the 100 classes of ImageNet-100 out of an ImageNet folder.

    python preprocess/imagenet_100_subset.py --imagenet_path imagenet --imagenet100_path imagenet-100

Makes DST/train/<wnid> and DST/val/<wnid>: symbolic links to SRC's class folders; with --mode hardlink or copy, real
folders; with --resize S, folders of smaller copies. A class folder appears only when it is complete, and existing ones are
kept, so that the script can be stopped and run again.
"""

import argparse
import functools
import io
import os
import shutil
import sys
from pathlib import Path

import files
from PIL import Image

SPLITS = {"train": range(600, 1301), "val": range(50, 51)}    # how many photos a class of ImageNet has
IMAGENET_100 = Path(__file__).with_name("imagenet_100.txt")


def parse_args() -> argparse.Namespace:
    """The options. Ends the script with exit code 2 where they cannot be right."""
    parser = files.Parser("Take the 100 classes of ImageNet-100 out of an ImageNet folder.")
    parser.add_argument("--imagenet_path", type=Path, required=True, metavar="SRC",
                        help="ImageNet, SRC/{train,val}/<wnid>/*")
    parser.add_argument("--imagenet100_path", type=Path, required=True, metavar="DST", help="folder to create")
    parser.add_argument("--mode", choices=["symlink", "hardlink", "copy"], default="symlink",
                        help="what a class folder is made of")
    parser.add_argument("--resize", type=files.at_least_one, metavar="S",
                        help="write JPEGs (quality 95) whose shorter side is S px instead; smaller photos keep their size")
    parser.add_argument("--classes", type=Path, metavar="FILE",
                        help="list of wnids, one per line (default: ImageNet-100's, imagenet_100.txt)")
    parser.add_workers()
    args = parser.parse_args()
    args.classes = args.classes or IMAGENET_100
    if not args.classes.is_file():
        parser.error(f"--classes {args.classes}: there is no such file")
    for split in SPLITS:
        folder = args.imagenet_path / split
        if not folder.is_dir():
            parser.error(f"--imagenet_path {args.imagenet_path}: it has no {split}/ folder; SRC holds train/ and val/")
        if not files.class_folders(folder):
            parser.error(f"--imagenet_path {args.imagenet_path}: {split}/ holds no class folders; ImageNet's val"
                         " archive unpacks flat and must be sorted into <wnid>/ folders first")
    if args.imagenet100_path.resolve() == args.imagenet_path.resolve():
        parser.error(f"--imagenet100_path {args.imagenet100_path} is SRC itself; try {args.imagenet_path}-100")
    return args


def take(source: Path, target: Path, partial: Path, mode: str) -> None:
    """Make the class folder `target` from `source`; `partial` holds an incomplete copy. OSError if it cannot be made."""
    if mode == "symlink":
        target.symlink_to(relative(source, target.parent), target_is_directory=True)
        return
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=os.link if mode == "hardlink" else shutil.copy2)
    partial.rename(target)


def relative(path: Path, start: Path) -> str | Path:
    """The path relative to `start` where possible: links then survive moving the whole tree."""
    try:
        return os.path.relpath(path.resolve(), start.resolve())
    except ValueError:                                                # another drive
        return path.resolve()


def take_smaller(job: tuple[Path, Path, Path], side: int) -> list[tuple[Path, str]]:
    """As `take`, with copies whose shorter side is `side` px. Returns the broken photos left out, [(path, reason)]."""
    source, target, partial = job
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    broken = []
    for name in files.images_in(source):
        data = io.BytesIO()
        try:
            with Image.open(source / name) as image:
                image.draft("RGB", (2 * side, 2 * side))              # lets JPEGs decode at a smaller scale
                photo = image.convert("RGB")
            scale = min(1, side / min(photo.size))
            smaller = photo.resize([max(1, round(length * scale)) for length in photo.size], Image.LANCZOS)
            smaller.save(data, "JPEG", quality=95)
        except Exception as error:  # a decoder may raise anything on a broken file; the other photos go on
            broken.append((source / name, f"{type(error).__name__}: {error}"))
            continue
        (partial / name).write_bytes(data.getvalue())
    partial.rename(target)
    return broken


def count(folder: Path, usual: range) -> None:
    """Print how many photos a split has, and which of its classes have an unusual number."""
    counts = {name: len(files.images_in(folder / name)) for name in files.class_folders(folder)}
    print(f"{folder}: {len(counts)} classes, {sum(counts.values())} photos")
    odd = [f"{name} {n}" for name, n in counts.items() if n not in usual]
    if odd:
        print(f"  {len(odd)} classes have not the usual {usual[0]} to {usual[-1]} photos: {', '.join(odd[:5])}"
              + (", …" if len(odd) > 5 else ""))


def main() -> int:
    args = parse_args()
    wnids = sorted(set(args.classes.read_text().split()))
    missing = [f"{split}/{wnid}" for split in SPLITS for wnid in wnids
               if not (args.imagenet_path / split / wnid).is_dir()]
    if missing:
        print(f"{args.imagenet_path}: {len(missing)} of {2 * len(wnids)} class folders are missing, nothing was made:",
              *missing, sep="\n  ", file=sys.stderr)
        return 1
    jobs = []
    for split in SPLITS:
        (args.imagenet100_path / split).mkdir(parents=True, exist_ok=True)
        for wnid in wnids:
            target = args.imagenet100_path / split / wnid
            if target.is_symlink() and not target.exists():           # SRC was moved
                target.unlink()
            if not target.exists():
                # Outside the splits, where an incomplete folder would look like a class.
                partial = args.imagenet100_path / ".partial" / split / wnid
                jobs.append((args.imagenet_path / split / wnid, target, partial))
    broken = []
    try:
        if args.resize:
            smaller = functools.partial(take_smaller, side=args.resize)
            for left_out in files.in_processes(smaller, jobs, args.workers, "class"):
                broken += left_out
        else:
            for job in jobs:
                take(*job, args.mode)
    except OSError as error:                                          # a full disk, or a hard link to another one
        sys.exit(f"{error}; run the same command again to resume, with another --mode if that is the reason")
    shutil.rmtree(args.imagenet100_path / ".partial", ignore_errors=True)
    print(f"{len(jobs)} class folders made, {2 * len(wnids) - len(jobs)} were there already")
    for split, usual in SPLITS.items():
        count(args.imagenet100_path / split, usual)
    return files.report_broken(broken)


if __name__ == "__main__":
    sys.exit(main())
