"""Make ImageNet-Texture: for every photo, a texture synthesised from two of its patches.

    python preprocess/imagenet_texture_syn.py --imagenet_path imagenet-100 --imagenet_t_path imagenet-100-texture
    python preprocess/imagenet_texture_syn.py --patch 24 --size 64 --imagenet_path 64-px --imagenet_t_path 64-px-texture

Reads SRC/train/<class>/<name>.JPEG, cuts one 96×96 patch from the photo's centre and one from a random place, and
writes a 224×224 texture made from both to DST/train/<class>/<name>.png. If DST is named SRC-texture and lies beside
SRC, `moco-non-sem-neg.py --robust texture DST` reads it. The script can be stopped and run again: existing textures
are kept. DST/textures.json keeps the settings, and others are refused there. With --splits val it makes textures of the
validation photos, a test set of textures alone for `eval_robustness.py --set texture=DST`.
"""

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import common  # before numpy
import numpy as np
import pool
import quilting
from common import FORMATS, check_resizable, folders, to_rgb
from PIL import Image

TIME_LIMIT = 600  # s for a photo, of the external program: one that hangs shall not hold up the others


def cut_patches(photo: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
    """Two side×side patches of an RGB photo, (2, side, side, 3) uint8: its centre, a random place."""
    pixels = np.asarray(photo)
    room = np.array(pixels.shape[:2]) - side
    corners = [room // 2, rng.integers(0, room + 1)]
    return np.stack([pixels[top : top + side, left : left + side] for top, left in corners])


def read_photo(path: Path, least: int) -> tuple[Image.Image, bool]:
    """(RGB image, whether it had to be enlarged to `least` px on the shorter side)"""
    with Image.open(path, formats=FORMATS) as image:
        photo = to_rgb(image)
    short = min(photo.size)
    if short >= least:
        return photo, False
    check_resizable(photo, least)
    return photo.resize([max(least, round(side * least / short)) for side in photo.size], Image.BICUBIC), True


def generator(seed: int, photo: str) -> np.random.Generator:
    """The generator of one photo, from the seed and its path below SRC: independent of workers, shards and restarts."""
    name = f"{seed} {photo}".encode(errors="surrogateescape")  # names need not be UTF-8
    return np.random.default_rng(list(hashlib.blake2b(name, digest_size=16).digest()))


def external_texture(program: str, patches: np.ndarray, size: int) -> np.ndarray:
    """Run EmbarkStudios' texture-synthesis on the patches: (size, size, 3) uint8. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, name) for name in ("texture.png", "a.png", "b.png")]
        for name, patch in zip(names[1:], patches):
            Image.fromarray(patch).save(name)
        command = [program, "--out-size", str(size), "--out", names[0], "generate", *names[1:]]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=TIME_LIMIT)
            return np.asarray(Image.open(names[0]).convert("RGB"))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{program} took more than {TIME_LIMIT} s") from error
        except (subprocess.CalledProcessError, OSError) as error:
            told = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{program} failed: {told[-1] if told else error}") from error


def make_texture(photo: str, args: argparse.Namespace) -> tuple[dict[Path, bytes], bool]:
    """The texture of the photo at this path below SRC, as pool.write_files takes it."""
    rng = generator(args.seed, photo)
    image, enlarged = read_photo(args.imagenet_path / photo, args.patch)
    patches = cut_patches(image, args.patch, rng)
    if args.texture_synthesis:
        texture = external_texture(args.texture_synthesis, patches, args.size)
    else:
        texture = quilting.quilt(patches, args.size, rng, quilting.blocks_for(args.patch))
    data = common.encode(Image.fromarray(texture), "PNG", compress_level=1)
    return {texture_path(args.imagenet_t_path, photo): data}, enlarged


def texture_path(destination: Path, photo: str) -> Path:
    return destination / (os.path.splitext(photo)[0] + ".png")


def parse_args() -> argparse.Namespace:
    """The options. Ends the script with exit code 2 where they are wrong."""
    begin = "--imagenet_path DIR --imagenet_t_path DIR-texture"
    parser = common.Parser("Synthesise a texture from two patches of every photo of an ImageNet folder.", begin)
    add = parser.add_argument
    add("--imagenet_path", type=Path, required=True, metavar="SRC", help="photos, SRC/<split>/<class>/*")
    add("--imagenet_t_path", type=Path, required=True, metavar="DST", help="textures, DST/<split>/<class>/*.png")
    add("--patch", type=common.positive_int, default=96, metavar="PX", help="side of the patches")
    add("--size", type=common.positive_int, default=224, metavar="PX", help="side of the textures")
    add("--splits", nargs="+", default=["train"], metavar="SPLIT", help="folders of SRC: train, val")
    add("--limit", type=common.positive_int, metavar="N", help="only the first N photos of each class")
    add("--shard", type=shard, default="1/1", metavar="I/N", help="only the I-th of N parts")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same textures")
    parser.add_workers()
    add("--texture-synthesis", metavar="BIN", help="run this program, as the authors did, instead of quilting")
    args = parser.parse_args()
    for split in args.splits:
        folders.split_path(str(args.imagenet_path), split)
    if args.patch < 8:
        parser.error(f"--patch {args.patch}: too small to choose blocks from; use 8 or more")
    if args.texture_synthesis and not shutil.which(args.texture_synthesis):
        parser.error(f"--texture-synthesis {args.texture_synthesis}: there is no such program")
    return args


def shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"; argparse.ArgumentTypeError unless 1 <= I <= N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part I/N, such as 1/4")
    return int(number), int(count)


def main() -> int:
    args = parse_args()
    source, out = args.imagenet_path, args.imagenet_t_path
    photos = [
        os.path.join(split, name)
        for split in args.splits
        for name in common.list_photos(source / split, args.limit, flat=True)
    ]
    program = args.texture_synthesis and os.path.realpath(shutil.which(args.texture_synthesis))
    path = os.path.relpath(os.path.realpath(source), os.path.realpath(out))  # they may move together
    settings = {"photos": path, "patch": args.patch, "size": args.size, "seed": args.seed, "program": program}
    common.claim("--imagenet_t_path", out, "textures.json", settings)
    part, parts = args.shard
    make, done = functools.partial(make_texture, args=args), lambda photo: common.is_whole(texture_path(out, photo))
    made, small, broken = pool.write_files(make, photos[part - 1 :: parts], done, args.workers)
    print(f"wrote {made} textures; {small} photos below {args.patch} px were enlarged first")
    return int(broken > 0)


if __name__ == "__main__":
    common.run(main)
