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
import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import common  # before numpy
import numpy as np
import pool
import quilting
from common import check_resizable, folders, to_rgb
from PIL import Image, ImageDraw


class Recipe(NamedTuple):
    """The settings that textures are made with."""

    source: Path  # SRC
    seed: int
    patch: int  # px, the side of the patches
    size: int  # px, the side of a texture
    program: str | None  # the external program, None for quilting
    time_limit: int  # s per photo, of the external program


class Synthesis(NamedTuple):
    """A photo and what was made of it."""

    photo: Image.Image
    patches: np.ndarray  # (2, patch, patch, 3) uint8: from the centre, from a random place
    texture: np.ndarray  # (size, size, 3) uint8
    enlarged: bool  # the photo was smaller than a patch


def cut_patches(photo: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
    """Two side×side patches of an RGB photo, (2, side, side, 3) uint8: its centre, a random place."""
    pixels = np.asarray(photo)
    room = np.array(pixels.shape[:2]) - side
    corners = [room // 2, rng.integers(0, room + 1)]
    return np.stack([pixels[top : top + side, left : left + side] for top, left in corners])


def read_photo(path: Path, least: int) -> tuple[Image.Image, bool]:
    """(RGB image, whether it had to be enlarged to `least` px on the shorter side)"""
    with Image.open(path) as image:
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


def external_texture(program: str, time_limit: int, patches: np.ndarray, size: int) -> np.ndarray:
    """Run EmbarkStudios' texture-synthesis on the patches: (size, size, 3) uint8. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, name) for name in ("texture.png", "a.png", "b.png")]
        for name, patch in zip(names[1:], patches):
            Image.fromarray(patch).save(name)
        command = [program, "--out-size", str(size), "--out", names[0], "generate", *names[1:]]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=time_limit)
            return np.asarray(Image.open(names[0]).convert("RGB"))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{program} took more than {time_limit} s") from error
        except (subprocess.CalledProcessError, OSError) as error:
            told = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{program} failed: {told[-1] if told else error}") from error


def synthesise(photo: str, recipe: Recipe) -> Synthesis:
    """Make the texture of the photo at this path below SRC. Raises what reading the photo or the program raises."""
    rng = generator(recipe.seed, photo)
    image, enlarged = read_photo(recipe.source / photo, recipe.patch)
    patches = cut_patches(image, recipe.patch, rng)
    if recipe.program:
        texture = external_texture(recipe.program, recipe.time_limit, patches, recipe.size)
    else:
        texture = quilting.quilt(patches, recipe.size, rng, quilting.blocks_for(recipe.patch))
    return Synthesis(image, patches, texture, enlarged)


def write_texture(photo: str, destination: Path, recipe: Recipe) -> tuple[str, bool, str | None]:
    """Write one texture: (photo, whether it was enlarged, why there is no texture or None)."""
    try:
        made = synthesise(photo, recipe)
    except Exception as error:  # a decoder may raise anything on a broken file; the other photos go on
        return photo, False, f"{type(error).__name__}: {error}"
    data = io.BytesIO()
    Image.fromarray(made.texture).save(data, "PNG", compress_level=1)
    common.write_atomically(texture_path(destination, photo), data.getvalue())
    return photo, made.enlarged, None


def texture_path(destination: Path, photo: str) -> Path:
    return destination / (os.path.splitext(photo)[0] + ".png")


def list_photos(source: Path, splits: list[str], limit: int | None) -> list[str]:
    """The paths below `source` of the first `limit` photos of each class. Prints which other files lie there."""
    photos = []
    for split in splits:
        listed = folders.list_images(source / split, flat=True)
        common.report_left_out(source / split, listed.left_out)
        photos += [os.path.join(split, name) for name in listed.first(limit).paths.names()]
    return photos


def save_preview(path: Path, photos: list[str], recipe: Recipe) -> None:
    """Save a sheet of photo | patches | texture for eight of the photos, two per row."""
    chosen = photos[:: max(1, len(photos) // 8)][:8]
    size, patch, gap = recipe.size, recipe.patch, 8
    width, height = size + patch + size + 16, max(size, 2 * patch + 4) + 2 * gap + 4
    sheet = Image.new("RGB", (2 * width, -(-len(chosen) // 2) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, photo in enumerate(chosen):
        made = synthesise(photo, recipe)
        x, y = i % 2 * width + 4, i // 2 * height + 14
        made.photo.thumbnail((size, size))
        pen.text((x, y - 12), photo, fill="black")
        sheet.paste(made.photo, (x, y))
        for pixels, left, top in (
            (made.patches[0], size + 4, 0),
            (made.patches[1], size + 4, patch + 4),
            (made.texture, size + patch + gap, 0),
        ):
            sheet.paste(Image.fromarray(pixels), (x + left, y + top))
    sheet.save(path)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The options, and the photos they name. Ends the script with exit code 2 where they are wrong."""
    begin = "--imagenet_path DIR --imagenet_t_path DIR-texture"
    parser = common.Parser("Synthesise a texture from two patches of every photo of an ImageNet folder.", begin)
    parser.add_argument(
        "--imagenet_path", type=Path, required=True, metavar="SRC", help="photos, SRC/<split>/<class>/*"
    )
    parser.add_argument(
        "--imagenet_t_path", type=Path, required=True, metavar="DST", help="textures, DST/<split>/<class>/*.png"
    )
    parser.add_argument("--patch", type=common.positive_int, default=96, metavar="PX", help="side of the patches")
    parser.add_argument("--size", type=common.positive_int, default=224, metavar="PX", help="side of the textures")
    parser.add_argument("--splits", nargs="+", default=["train"], metavar="SPLIT", help="folders of SRC: train, val")
    parser.add_argument("--limit", type=common.positive_int, metavar="N", help="only the first N photos of each class")
    parser.add_argument("--shard", type=shard, default="1/1", metavar="I/N", help="only the I-th of N parts")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same textures")
    parser.add_argument("--overwrite", action="store_true", help="replace existing textures")
    parser.add_workers()
    parser.add_argument(
        "--preview",
        type=common.png_path,
        metavar="FILE.png",
        help="only draw photo, patches and texture of eight photos",
    )
    parser.add_argument(
        "--texture-synthesis", metavar="BIN", help="run this program, as the authors did, instead of quilting"
    )
    parser.add_argument(
        "--time-limit", type=common.positive_int, default=60, metavar="S", help="seconds per photo for BIN"
    )
    args = parser.parse_args()
    check(parser, args)
    photos = list_photos(args.imagenet_path, args.splits, args.limit)
    common.check_stems(f"--imagenet_path {args.imagenet_path}", photos)
    return args, photos


def check(parser: common.Parser, args: argparse.Namespace) -> None:
    """End the script where the options cannot be right."""
    for split in args.splits:
        folders.split_path(str(args.imagenet_path), split)
    if args.imagenet_t_path.resolve() == args.imagenet_path.resolve():
        parser.error(f"--imagenet_t_path {args.imagenet_t_path} is SRC itself; try {args.imagenet_path}-texture")
    if args.patch < 8:
        parser.error(f"--patch {args.patch}: too small to choose blocks from; use 8 or more")
    if args.texture_synthesis and not shutil.which(args.texture_synthesis):
        parser.error(f"--texture-synthesis {args.texture_synthesis}: there is no such program")


def shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"; argparse.ArgumentTypeError unless 1 <= I <= N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part I/N, such as 1/4")
    return int(number), int(count)


def claim(destination: Path, recipe: Recipe) -> None:
    """Mark DST as made with this recipe. UsageError if it was made with another; --time-limit may change."""
    program = recipe.program and os.path.realpath(shutil.which(recipe.program))
    photos = os.path.relpath(os.path.realpath(recipe.source), os.path.realpath(destination))  # they may move together
    settings = {"photos": photos, "patch": recipe.patch, "size": recipe.size}
    settings |= {"seed": recipe.seed, "program": program}
    common.claim("--imagenet_t_path", destination, "textures.json", settings)


def main() -> int:
    args, photos = parse_args()
    recipe = Recipe(args.imagenet_path, args.seed, args.patch, args.size, args.texture_synthesis, args.time_limit)
    if args.preview:
        save_preview(args.preview, photos, recipe)
        print(f"wrote {args.preview}")
        return 0
    claim(args.imagenet_t_path, recipe)
    part, parts = args.shard
    photos = photos[part - 1 :: parts]
    jobs = [photo for photo in photos if args.overwrite or not texture_path(args.imagenet_t_path, photo).exists()]
    print(f"{len(photos)} photos, {len(photos) - len(jobs)} of them done; {args.workers} processes", flush=True)
    write = functools.partial(write_texture, destination=args.imagenet_t_path, recipe=recipe)
    small, broken = 0, []
    for folder in {texture_path(args.imagenet_t_path, photo).parent for photo in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    for photo, enlarged, reason in pool.in_processes(write, jobs, args.workers, "image"):
        small += enlarged
        broken += [(photo, reason)] if reason else []
    print(f"wrote {len(jobs) - len(broken)} textures; {small} photos below {args.patch} px were enlarged first")
    return common.report_broken(broken)


if __name__ == "__main__":
    common.run(main)
