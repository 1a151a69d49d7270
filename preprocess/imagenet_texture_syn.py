"""Make ImageNet-Texture: for every photo, a texture synthesised from two of its patches.

    python preprocess/imagenet_texture_syn.py --imagenet_path imagenet-100 --imagenet_t_path imagenet-100-texture

From SRC/train/<class>/<name>.JPEG: one 96×96 patch of the photo's centre, one of a random place, and from both
DST/train/<class>/<name>.png, 224×224: what moco-non-sem-neg.py --robust texture reads, if DST is named SRC-texture.
Can be stopped and started again at any time: textures that are there are kept.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"  # before numpy is loaded: one thread in each worker process

import functools
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import files
import numpy as np
import quilting
from PIL import Image, ImageDraw

PATCH, SIZE = 96, 224       # px


def cut_patches(photo, rng):
    """An RGB PIL image, at least PATCH px on a side → its patches, (2, PATCH, PATCH, 3) uint8: centre, random place."""
    pixels = np.asarray(photo)
    room = np.array(pixels.shape[:2]) - PATCH
    corners = [room // 2, rng.integers(0, room + 1)]
    return np.stack([pixels[top:top + PATCH, left:left + PATCH] for top, left in corners])


def read_photo(path):
    """(RGB image, whether it had to be enlarged to PATCH px on the shorter side)"""
    with Image.open(path) as image:
        photo = image.convert("RGB")
    short = min(photo.size)
    if short >= PATCH:
        return photo, False
    return photo.resize([max(PATCH, round(side * PATCH / short)) for side in photo.size], Image.BICUBIC), True


def generator(seed, photo):
    """The randomness of one photo, from the seed and its path below SRC: no worker, shard or restart changes it."""
    return np.random.default_rng(list(hashlib.blake2b(f"{seed} {photo}".encode(), digest_size=16).digest()))


def external_texture(program, time_limit, patches):
    """What EmbarkStudios' texture-synthesis makes of the patches, (SIZE, SIZE, 3) uint8. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, name) for name in ("texture.png", "a.png", "b.png")]
        for name, patch in zip(names[1:], patches):
            Image.fromarray(patch).save(name)
        command = [program, "--out-size", str(SIZE), "--out", names[0], "generate", *names[1:]]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=time_limit)
            return np.asarray(Image.open(names[0]).convert("RGB"))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{program} took more than {time_limit} s") from error
        except (subprocess.CalledProcessError, OSError) as error:
            told = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{program} failed: {told[-1] if told else error}") from error


def synthesise(photo, source, seed, program, time_limit):
    """(photo, patches, texture, whether the photo was enlarged) of the image at source/photo."""
    rng = generator(seed, photo)
    image, enlarged = read_photo(source / photo)
    patches = cut_patches(image, rng)
    texture = external_texture(program, time_limit, patches) if program else quilting.quilt(patches, SIZE, rng)
    return image, patches, texture, enlarged


def write_texture(photo, destination, **how):
    """Write one texture → (photo, whether it was enlarged, what is wrong with it or None)."""
    try:
        _, _, texture, enlarged = synthesise(photo, **how)
    except Exception as error:  # whatever a broken file makes a decoder raise, the others shall not suffer
        return photo, False, f"{type(error).__name__}: {error}"
    data = io.BytesIO()
    Image.fromarray(texture).save(data, "PNG", compress_level=1)
    files.write_whole(texture_path(destination, photo), data.getvalue())
    return photo, enlarged, None


def texture_path(destination, photo):
    return destination / (os.path.splitext(photo)[0] + ".png")


def list_photos(source, splits, limit):
    """The paths below `source`, as text, of the first `limit` photos of each class."""
    return [f"{split}/{name}/{file}" for split in splits for name in files.class_folders(source / split)
            for file in files.images_in(source / split / name)[:limit]]


def save_preview(path, photos, **how):
    """A sheet of photo | patches | texture for eight of the photos, two in a row."""
    chosen = photos[::max(1, len(photos) // 8)][:8]
    width, gap = SIZE + PATCH + SIZE + 16, 8
    sheet = Image.new("RGB", (2 * width, -(-len(chosen) // 2) * (SIZE + 2 * gap + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, photo in enumerate(chosen):
        image, patches, texture, _ = synthesise(photo, **how)
        x, y = i % 2 * width + 4, i // 2 * (SIZE + 2 * gap + 4) + 14
        image.thumbnail((SIZE, SIZE))
        pen.text((x, y - 12), photo, fill="black")
        for picture, left, top in ((image, 0, 0), (patches[0], SIZE + 4, 0), (patches[1], SIZE + 4, PATCH + 4),
                                   (texture, SIZE + PATCH + gap, 0)):
            sheet.paste(picture if isinstance(picture, Image.Image) else Image.fromarray(picture), (x + left, y + top))
    sheet.save(path)


def parse_args():
    parser = files.Parser("Synthesise a texture from two patches of every photo of an ImageNet folder.")
    parser.add_argument("--imagenet_path", type=Path, required=True, metavar="SRC", help="photos: SRC/<split>/<class>/*")
    parser.add_argument("--imagenet_t_path", type=Path, required=True, metavar="DST", help="textures: DST/<split>/<class>/*.png")
    parser.add_argument("--splits", nargs="+", default=["train"], metavar="SPLIT", help="folders of SRC to go through")
    parser.add_argument("--limit", type=files.at_least_one, metavar="N", help="only the first N photos of each class")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="only the I-th of N parts, I from 1")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same textures")
    parser.add_argument("--overwrite", action="store_true", help="make textures anew that are there already")
    parser.add_workers()
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="draw photo | patches | texture of eight, then exit")
    parser.add_argument("--texture-synthesis", metavar="BIN", help="use this program, as the authors did, not our quilting")
    parser.add_argument("--time-limit", type=files.at_least_one, default=60, metavar="SECONDS", help="of BIN for a photo")
    args = parser.parse_args()
    for split in args.splits:
        if not (args.imagenet_path / split).is_dir():
            parser.error(f"--imagenet_path {args.imagenet_path}: it has no {split}/ folder; SRC is the folder above it")
    if args.imagenet_t_path.resolve() == args.imagenet_path.resolve():
        parser.error(f"--imagenet_t_path {args.imagenet_t_path} is SRC itself; try {args.imagenet_path}-texture")
    if args.texture_synthesis and not shutil.which(args.texture_synthesis):
        parser.error(f"--texture-synthesis {args.texture_synthesis}: there is no such program")
    if args.preview and args.preview.suffix != ".png":
        parser.error(f"--preview {args.preview} does not end in .png; try {args.preview.with_suffix('.png')}")
    photos = list_photos(args.imagenet_path, args.splits, args.limit)
    if not photos:
        parser.error(f"--imagenet_path {args.imagenet_path}: there are no photos in {', '.join(args.splits)}")
    twins = len(photos) - len({texture_path(args.imagenet_t_path, photo) for photo in photos})
    if twins:
        parser.error(f"--imagenet_path {args.imagenet_path}: {twins} photos differ from another in the suffix only, and"
                     " would have one texture between them")
    return args, photos


def shard(text):
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise files.argparse.ArgumentTypeError(f"{text!r} is not a part I/N, such as 1/4")
    return int(number), int(count)


def main():
    args, photos = parse_args()
    how = dict(source=args.imagenet_path, seed=args.seed, program=args.texture_synthesis, time_limit=args.time_limit)
    if args.preview:
        save_preview(args.preview, photos, **how)
        return print(f"wrote {args.preview}")
    part, parts = args.shard
    photos = photos[part - 1::parts]
    jobs = [photo for photo in photos if args.overwrite or not texture_path(args.imagenet_t_path, photo).exists()]
    print(f"{len(photos)} photos, {len(photos) - len(jobs)} of them done; {args.workers} processes", flush=True)
    write = functools.partial(write_texture, destination=args.imagenet_t_path, **how)
    small, broken = 0, []
    try:
        for folder in {texture_path(args.imagenet_t_path, photo).parent for photo in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
        for photo, enlarged, reason in files.in_processes(write, jobs, args.workers, "image"):
            small += enlarged
            broken += [(photo, reason)] if reason else []
    except OSError as error:                                          # a full or read-only disk
        sys.exit(f"{error}; start again to go on from here")
    print(f"wrote {len(jobs) - len(broken)} textures; {small} photos below {PATCH} px were enlarged first")
    return files.report_broken(broken)


if __name__ == "__main__":
    sys.exit(main())
