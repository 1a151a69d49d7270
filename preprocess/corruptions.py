"""Corrupt one's own photos as ImageNet-C was made: 19 corruptions at five severities.

    pip install imagecorruptions-imaug
    python preprocess/corruptions.py --val data/val --out data-c
    python preprocess/corruptions.py --val small/val --out small-c --size 64

Reads DIR/<class>/<name>.*, or that below DIR/val, resizes and crops each photo as in testing (at 224 px: Resize(256),
CenterCrop(224)), and writes OUT/<corruption>/<severity>/<class>/<name>.JPEG at quality 85, which
`eval_robustness.py --corruption OUT` reads. The last four corruptions, the extra ones, are in no average there. An
image is a function of the seed, its path below the class folders' folder, the corruption and the severity. The script
can be stopped and run again: existing images are kept.

ImageNet-C: Hendrycks & Dietterich, ICLR 2019.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path
from types import ModuleType

import common  # before numpy
import numpy as np
import pool
from common import FORMATS, UsageError, check_resizable, to_rgb
from PIL import Image

os.environ["OPENCV_FOR_THREADS_NUM"] = "1"  # per worker process; read when the library loads OpenCV

# fmt: off
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
)
# fmt: on
OWN_SEED = ("impulse_noise", "glass_blur")  # take a seed as an argument; the others use numpy's global generator
SEVERITIES = range(1, 6)
LEAST_SIZE = 32  # px, the library's limit
DRAWS = 20  # of random numbers for one image; for spatter at 32 px, 1 in 60 is of no use
QUALITY = 85  # of the JPEGs, as in ImageNet-C
MARK = "corruptions.json"  # in OUT: how its images were made
PACKAGE = "imagecorruptions-imaug"


def library() -> ModuleType:
    """The module that corrupts. UsageError if it, or what it needs, is not installed."""
    try:
        import imagecorruptions
    except ImportError as error:
        told = f"the corruptions are those of the package {PACKAGE}, which cannot be imported ({error})"
        raise UsageError(f"{told}: pip install {PACKAGE}") from error
    return imagecorruptions


def version() -> str:
    """The version of the library: another one may make other images."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def crop(path: Path, size: int) -> tuple[Image.Image, bool]:
    """(RGB photo as a test sees it, size×size, whether it had to be enlarged). ValueError if it is too narrow.

    As torchvision's Resize(256/224 of the size) and CenterCrop(size), pixel by pixel.
    """
    with Image.open(path, formats=FORMATS) as image:
        photo = to_rgb(image)
    short, shorter = min(photo.size), round(size * 256 / 224)
    check_resizable(photo, shorter)
    photo = photo.resize([int(shorter * side / short) for side in photo.size], Image.BILINEAR)
    left, top = (round((side - size) / 2) for side in photo.size)
    return photo.crop((left, top, left + size, top + size)), short < shorter


def corrupt(image: Image.Image, name: str, severity: int, seed: int) -> np.ndarray:
    """The corrupted RGB image, uint8 (H, W, 3): the same for the same seed, 0 to 2**32 - 1."""
    for draw in range(DRAWS):
        np.random.seed((seed + draw) % 2**32)
        options = {"seed": (seed + draw) % 2**32} if name in OWN_SEED else {}
        try:
            with np.errstate(invalid="raise"):
                return library().corrupt(np.asarray(image), corruption_name=name, severity=severity, **options)
        except FloatingPointError:  # spatter without a drop is 0 / 0, and would be a black image
            continue
    raise ValueError(f"{name} at severity {severity} gives no image of it in {DRAWS} draws")


def seed_of(seed: int, photo: str, name: str, severity: int) -> int:
    """32 bits for one image, independent of workers and restarts."""
    text = f"{seed} {name} {severity} {photo}".encode(errors="surrogateescape")  # names need not be UTF-8
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def images_of(photo: str, out: Path) -> dict[tuple[str, int], Path]:
    """{(corruption, severity): file} of the photo at this path below the class folders."""
    name = os.path.splitext(photo)[0] + ".JPEG"
    return {(each, severity): out / each / str(severity) / name for each in CORRUPTIONS for severity in SEVERITIES}


def make_images(photo: str, args: argparse.Namespace) -> tuple[dict[Path, bytes], bool]:
    """What is missing of a photo, as pool.write_files takes it."""
    image, enlarged = crop(args.val / photo, args.size)
    made = {}
    for (name, severity), path in images_of(photo, args.out).items():
        if not common.is_whole(path):
            corrupted = corrupt(image, name, severity, seed_of(args.seed, photo, name, severity))
            made[path] = common.encode(Image.fromarray(corrupted), "JPEG", quality=QUALITY)
    return made, enlarged


def parse_args() -> argparse.Namespace:
    """The options. Ends the script with exit code 2 where they are wrong."""
    begin = "--val DIR --out DIR-c"
    parser = common.Parser("Corrupt photos as ImageNet-C was made, for eval_robustness.py --corruption.", begin)
    add = parser.add_argument
    add("--val", type=Path, required=True, metavar="DIR", help="photos, <class>/* or val/<class>/*")
    add("--out", type=Path, required=True, metavar="OUT", help="images, OUT/<corruption>/<severity>/<class>/*.JPEG")
    add("--size", type=common.positive_int, default=224, metavar="PX", help="side of the images: the tested crop size")
    add("--limit", type=common.positive_int, metavar="N", help="only the first N photos of each class")
    add("--seed", type=common.seed_int, default=0, metavar="N", help="same seed, same images")
    parser.add_workers()
    args = parser.parse_args()
    if args.size < LEAST_SIZE:
        parser.error(
            f"--size {args.size}: the library corrupts images of {LEAST_SIZE} px or more; use --size {LEAST_SIZE}, and"
            f" train and test with --image-size {LEAST_SIZE}, or eval_robustness.py will resize them to its crop"
        )
    if (args.val / "val").is_dir():
        args.val = args.val / "val"
    if args.out.resolve() == args.val.resolve() or args.val.resolve() in args.out.resolve().parents:
        parser.error(f"--out {args.out} lies in the photos' folder, where it would be a class; name another")
    return args


def main() -> int:
    args = parse_args()
    library()
    photos = common.list_photos(args.val, args.limit)
    made_with = {"size": args.size, "seed": args.seed, "quality": QUALITY, PACKAGE: version()}
    common.lock("--out", args.out)
    common.claim("--out", args.out, MARK, {"val": os.path.realpath(args.val), **made_with})
    make = functools.partial(make_images, args=args)
    done = lambda photo: all(map(common.is_whole, images_of(photo, args.out).values()))
    made, small, broken = pool.write_files(make, photos, done, args.workers)
    enlarged = f"; {small} photos below {round(args.size * 256 / 224)} px were enlarged first" if small else ""
    print(f"wrote the corruptions of {made} photos, {args.size} px{enlarged}")
    return int(broken > 0)


if __name__ == "__main__":
    common.run(main)
