"""Scores of linear classifiers on the test sets, and the means over the corruptions.

Corruption and mCE: Hendrycks & Dietterich, ICLR 2019. Shape bias: Geirhos et al., ICLR 2019.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn as nn

from moco import distributed
from moco.data import loader
from moco.distributed import DistContext
from moco.evaluation import testsets
from moco.evaluation.classifier import predictions
from moco.evaluation.testsets import TestSet

EXTRA, MCE = "Corruption, extra four", "mCE"  # columns beside those of the suites
ALEXNET_ERRORS = {  # mean top-1 error over the severities, percent: the authors' divisors of mCE
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640,
    "defocus_blur": 81.9880, "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360,
    "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip


def score(
    test_sets: Sequence[TestSet],
    models: Sequence[nn.Module],
    wnids: Sequence[str],
    image_size: int,
    batch_size: int,
    workers: int,
    ctx: DistContext,
    on_batch: Callable[[int], object] = lambda images: None,
    chosen: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[tuple[TestSet, list[dict]]]:
    """Score linear classifiers that share one class list: yields (test set, a result per model), set by set.

    models: in eval mode, on the context's device; wnids: the class of output 0, 1, …; outputs beyond them count as
    wrong; chosen: {key of a test set: indices of the models to score on it}, all by default. A result has the top-1 in
    percent over all outputs and over the classes present in the set, n, counts per class, and the preprocessing. If
    file names give shape and texture class, it also has the number of images where these differ, the decisions for
    shape and for texture in these images, and the shape bias: the percentage of shape among the decisions for either.
    Each image is read once, by one rank; all ranks must call this and get the same results.
    """
    if not test_sets:
        return
    current: list[nn.Module] = []  # the models of the set that is being read
    sets = [testsets.PreprocessedImages(each, image_size) for each in test_sets]
    batches = predictions(
        lambda images: [model(images) for model in current],
        loader.eval_loader(sets, batch_size, workers, ctx),
        ctx.device,
    )
    for test_set in test_sets:
        current[:] = models if chosen is None else [models[index] for index in chosen[test_set.key]]
        labels = torch.as_tensor(test_set.labels).long()
        present = labels.unique().to(ctx.device)
        # Each image's preset, and two decisions of each model: over all outputs, and over the classes present.
        rows = torch.zeros(2 * len(current) + 1, len(labels), dtype=torch.long, device=ctx.device)
        own = rows[:, ctx.rank :: ctx.world_size]  # as eval_loader distributes them
        done = 0
        while done < own.shape[1]:
            logits, used = next(batches)
            decisive = map(test_set.decisive, logits)
            decided = [row for values in decisive for row in (values.argmax(1), present[values[:, present].argmax(1)])]
            own[:, done : done + len(used)] = torch.stack([*decided, used])
            done += len(used)
            on_batch(len(used) * ctx.world_size)
        *decisions, used = distributed.all_reduce(rows).cpu()
        preprocessing = testsets.describe_preprocessing(used.bincount().tolist(), image_size)
        names, pairs = list(test_set.categories or wnids), zip(decisions[::2], decisions[1::2])
        results = [_result(*pair, labels, names) for pair in pairs]
        if test_set.textures is not None:
            textures = torch.as_tensor(test_set.textures)
            results = [each | _cue_figures(own, labels, textures) for each, own in zip(results, decisions[::2])]
        yield test_set, [each | {"preprocessing": preprocessing} for each in results]


def _result(decided: torch.Tensor, decided_shared: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict:
    n, hits = len(labels), decided == labels
    counts = labels.bincount(minlength=len(names)).tolist()
    correct = labels[hits].bincount(minlength=len(names)).tolist()
    return {
        "top1": 100 * hits.sum().item() / n,
        "top1_shared_classes": 100 * (decided_shared == labels).sum().item() / n,
        "n": n,
        "classes": {name: {"n": m, "correct": c} for name, m, c in zip(names, counts, correct) if m},
    }


def _cue_figures(decided: torch.Tensor, labels: torch.Tensor, textures: torch.Tensor) -> dict:
    """Decisions for shape and texture where these are two different classes of the head; {} if there are none."""
    conflict = (textures >= 0) & (textures != labels)
    if not conflict.any():
        return {}
    shape, texture = ((decided == cue)[conflict].sum().item() for cue in (labels, textures))
    return {
        "conflicts": conflict.sum().item(),
        "shape_decisions": shape,
        "texture_decisions": texture,
        "shape_bias": 100 * shape / (shape + texture) if shape + texture else None,
    }


def corruption_figures(top1: Mapping[str, float], classes: int) -> dict[str, float]:
    """Means of one model's {"corruption/fog/3": top-1, …}, each severity of each corruption with the same weight.

    Corruption is over the standard corruptions; the four extra ones have a figure of their own, and so has mCE if
    nothing is missing and there are 1000 classes.
    """
    groups = {testsets.SUITES["corruption"].title: testsets.STANDARD, EXTRA: testsets.CORRUPTIONS["extra"]}
    means = {
        title: statistics.fmean(values)
        for title, names in groups.items()
        if (values := [value for key, value in top1.items() if key.split("/")[1] in names])
    }
    if classes == 1000 and not testsets.missing_corruptions(top1):
        means[MCE] = statistics.fmean(
            100 * (100 - top1[f"corruption/{name}/{severity}"]) / error
            for name, error in ALEXNET_ERRORS.items()
            for severity in testsets.SEVERITIES
        )
    return means
