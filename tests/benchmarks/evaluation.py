"""Three checkpoints in one pass: its time against three forward passes plus one decoding pass, and against three runs.

    python tests/benchmarks/evaluation.py PHOTOS

PHOTOS: a folder of images. One thread, no loading processes, ResNet-18 at 224 px.
"""

import os

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")

import functools
import statistics
import sys
import tempfile
import timeit
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from moco.data import datasets, loader
from moco.distributed import DistContext
from moco.encoders import build_encoder
from moco.evaluation import classifier, scores, testsets

BATCH, SIZE = 32, 224
seconds = functools.partial(timeit.timeit, number=1)


def main():
    torch.set_num_threads(1)
    models = [build_encoder("resnet18", 2).eval().to(memory_format=torch.channels_last) for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a").symlink_to(Path(sys.argv[1]).resolve())
        (test_set,) = testsets.list_test_sets({"val": folder}, ["a", "b"])
        dataset = datasets.ImageList(test_set.paths, test_set.labels, datasets.eval_transform(SIZE))
        batches = list(loader.eval_loader(dataset, BATCH, 0, DistContext()))

        def score(some):
            return list(scores.score([test_set], some, ["a", "b"], SIZE, BATCH, 0, DistContext()))

        def forward():
            with torch.inference_mode():
                for model in models:
                    for images, _ in batches:
                        model(classifier.to_input(images, torch.device("cpu")))

        def decode():
            for _ in loader.eval_loader(dataset, BATCH, 0, DistContext()):
                pass

        score(models)  # warm
        ratios, saved = [], []
        for _ in range(5):
            one_pass = seconds(lambda: score(models))
            ratios.append(one_pass / (seconds(forward) + seconds(decode)))
            saved.append(sum(seconds(lambda alone=model: score([alone])) for model in models) / one_pass)
    print(f"{len(test_set.paths)} photos, three ResNet-18, {SIZE} px, one thread, medians of 5")
    print(f"one pass over (three forward passes + one decoding pass): {statistics.median(ratios):.3f}")
    print(f"three evaluations over one pass: {statistics.median(saved):.2f}")


if __name__ == "__main__":
    main()
