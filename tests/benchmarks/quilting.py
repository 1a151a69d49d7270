"""Texture synthesis: time against quilting written out in loops, throughput of two processes, and measures of quality.

    python tests/benchmarks/quilting.py PHOTOS

PHOTOS: a folder of images. One thread. Prints medians over all photos.
"""

import functools
import itertools
import statistics
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "preprocess"))
import common  # noqa: F401 - one thread; before numpy
import numpy as np
import quilting
from imagenet_texture_syn import cut_patches, read_photo

from moco.data import folders

PATCH, SIZE = 96, 224  # px
seconds = functools.partial(timeit.timeit, number=1)


def plain_quilting(patches, size, rng, block=40, overlap=8):
    """Efros & Freeman, written in the obvious way: block by block, all positions in turn, no balance, no correction."""
    step = block - overlap
    blocks = -(-(size - overlap) // step)
    canvas = np.zeros((blocks * step + overlap,) * 2 + (3,), np.float32)
    patches = patches.astype(np.float32)
    positions = list(np.ndindex(len(patches), patches.shape[1] - block + 1, patches.shape[2] - block + 1))
    for row in range(blocks):
        for column in range(blocks):
            there = canvas[row * step : row * step + block, column * step : column * step + block]
            mask = np.zeros((block, block, 1), np.float32)
            mask[:, :overlap] = column > 0
            mask[:overlap] = np.maximum(mask[:overlap], row > 0)
            errors = np.array(
                [np.sum(mask * (patches[p, y : y + block, x : x + block] - there) ** 2) for p, y, x in positions]
            )
            good = np.flatnonzero(errors <= 1.1 * errors.min())
            patch, y, x = positions[rng.choice(good)]
            new = patches[patch, y : y + block, x : x + block]
            difference = np.square(new - there).sum(2)
            keep = np.zeros((block, block), bool)
            for exists, strip, part in (
                (column, difference[:, :overlap], keep[:, :overlap]),
                (row, difference[:overlap].T, keep[:overlap].T),
            ):
                if exists:
                    part |= plain_cut(strip)
            there[:] = np.where(keep[..., None], there, new)
    return canvas[:size, :size].astype(np.uint8)


def plain_cut(difference):
    length, width = difference.shape
    total = difference.copy()
    for i in range(1, length):
        for j in range(width):
            total[i, j] += total[i - 1, max(j - 1, 0) : j + 2].min()
    keep = np.zeros((length, width), bool)
    j = int(total[-1].argmin())
    for i in range(length - 1, -1, -1):
        if i < length - 1:
            first = max(j - 1, 0)
            j = first + int(total[i, first : j + 2].argmin())
        keep[i, :j] = True
    return keep


def measures(patches, sources, texture):
    """Figures that show the known faults of quilting in a texture."""
    width, pixels = patches.shape[2], patches[0].size // 3
    across, within = [], []
    for axis, stride in enumerate((width, 1)):
        steps, cut = np.abs(np.diff(texture.astype(int), axis=axis)).mean(2), np.diff(sources, axis=axis) != stride
        across.append(steps[cut])
        within.append(steps[~cut])
    offset = sources - width * np.arange(SIZE)[:, None] - np.arange(SIZE)
    for side in itertools.count(1):
        windows = np.lib.stride_tricks.sliding_window_view(offset, (side + 1, side + 1))[::2, ::2]
        if not (windows == windows[..., :1, :1]).all((2, 3)).any():
            break
    return {
        "step across cuts": np.concatenate(across).mean(),
        "step within blocks": np.concatenate(within).mean(),
        "share of the first patch": np.mean(sources < pixels),
        "share of pixels used": len(np.unique(sources)) / (2 * pixels),
        "largest verbatim square": side,
    }


def texture_of(seed_and_patches):
    seed, patches = seed_and_patches
    return quilting.quilt(patches, SIZE, np.random.default_rng(seed))


def throughput(jobs, workers):
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(texture_of, jobs[: 2 * workers]))  # started
        return len(jobs) / seconds(lambda: list(pool.map(texture_of, jobs, chunksize=4)))


def main():
    folder = Path(sys.argv[1])
    photos = [read_photo(folder / name, PATCH)[0] for name in folders.images_in(folder)]
    rngs = np.random.default_rng(0).spawn(len(photos))
    jobs = [(seed, cut_patches(photo, PATCH, rng)) for seed, (photo, rng) in enumerate(zip(photos, rngs))]
    for job in jobs[:3]:
        texture_of(job)
    ours = [seconds(lambda job=job: texture_of(job)) for job in jobs for _ in range(3)]
    parts = {}
    for seed, patches in jobs:
        start = time.perf_counter()
        sources = quilting.lay_blocks(patches, SIZE, np.random.default_rng(seed))
        middle = time.perf_counter()
        texture = quilting.close_cuts(patches, sources)
        parts.setdefault("laying blocks", []).append(middle - start)
        parts.setdefault("closing cuts", []).append(time.perf_counter() - middle)
        for name, value in measures(patches, sources, texture).items():
            parts.setdefault(name, []).append(value)
    rng = np.random.default_rng(0)
    plain = [seconds(lambda patches=patches: plain_quilting(patches, SIZE, rng)) for _, patches in jobs[::9]]
    print(f"{len(jobs)} photos, two {PATCH}×{PATCH} patches to one {SIZE}×{SIZE} texture, one thread")
    ours, plain = statistics.median(ours), statistics.median(plain)
    print(f"ours {ours:.4f} s, in loops {plain:.2f} s: {plain / ours:.0f} times faster (medians)")
    ratios = [throughput(8 * jobs, 2) / throughput(4 * jobs, 1) for _ in range(3)]
    print(f"two processes against one: {statistics.median(ratios):.2f} times the throughput")
    ratio = sum(parts["step across cuts"]) / sum(parts["step within blocks"])
    print(f"step across cuts over step within blocks, all photos together: {ratio:.3f}")
    for name, values in parts.items():
        print(f"{name:28} median {np.median(values):8.4f}  least {min(values):8.4f}  most {max(values):8.4f}")


if __name__ == "__main__":
    main()
