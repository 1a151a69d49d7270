"""Texture synthesis: time, throughput of two processes, and measures of quality.

    python tests/benchmarks/quilting.py PHOTOS

PHOTOS: a folder of images. One thread. Prints medians over all photos.
"""

import functools
import statistics
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "preprocess"))
import common  # noqa: F401 - one thread; before numpy
import numpy as np
import quilting
from imagenet_texture_syn import cut_patches, read_photo
from preprocessing import largest_verbatim_square, mean_steps

from moco.data import folders

PATCH, SIZE = 96, 224  # px
seconds = functools.partial(timeit.timeit, number=1)


def measures(patches, sources, texture):
    """Figures that show the known faults of quilting in a texture."""
    width, pixels = patches.shape[2], patches[0].size // 3
    across, within = mean_steps(texture, sources, width)
    return {
        "step across cuts": across,
        "step within blocks": within,
        "share of the first patch": np.mean(sources < pixels),
        "share of pixels used": len(np.unique(sources)) / (2 * pixels),
        "largest verbatim square": largest_verbatim_square(sources, width),
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
    print(f"{len(jobs)} photos, two {PATCH}×{PATCH} patches to one {SIZE}×{SIZE} texture, one thread")
    print(f"{statistics.median(ours):.4f} s a texture (median)")
    ratios = [throughput(8 * jobs, 2) / throughput(4 * jobs, 1) for _ in range(3)]
    print(f"two processes against one: {statistics.median(ratios):.2f} times the throughput")
    ratio = sum(parts["step across cuts"]) / sum(parts["step within blocks"])
    print(f"step across cuts over step within blocks, all photos together: {ratio:.3f}")
    for name, values in parts.items():
        print(f"{name:28} median {np.median(values):8.4f}  least {min(values):8.4f}  most {max(values):8.4f}")


if __name__ == "__main__":
    main()
