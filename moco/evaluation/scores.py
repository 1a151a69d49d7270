"""Scores of linear classifiers on the test sets, image by image."""

import base64
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn as nn

from moco import distributed
from moco.data import loader
from moco.distributed import DistContext
from moco.evaluation import testsets
from moco.evaluation.classifier import predictions
from moco.evaluation.testsets import TestSet


def score(
    test_sets: Sequence[TestSet], models: Sequence[nn.Module], wnids: Sequence[str], image_size: int, batch_size: int,
    workers: int, ctx: DistContext, on_batch: Callable[[int], object] = lambda images: None,
    chosen: Mapping[str, Sequence[int]] | None = None, dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[TestSet, list[dict]]]:  # fmt: skip
    """Score linear classifiers that share one class list: yields (test set, a result per model), set by set.

    models: in eval mode, on the context's device; wnids: the class of output 0, 1, …; outputs beyond them count as
    wrong; chosen: {key of a test set: indices of the models to score on it}, all by default; dtype: of autocast. A
    result has the top-1 in percent over all outputs, n, counts per class in the order of the images, the number of
    images whose outputs are not finite, the preprocessing, and `masks`, a bit for each image (`unpack`): correct over
    all outputs, and over the classes present in the set; if file names give shape and texture class, whether these
    conflict, and the decisions for either among these. Each image is read once, by one rank; all ranks must call this
    and get the same results.
    """
    if not test_sets:
        return
    current: list[nn.Module] = []  # the models of the set that is being read
    sets = [testsets.PreprocessedImages(each, image_size) for each in test_sets]
    read = loader.eval_loader(sets, batch_size, workers, ctx)
    batches = predictions(lambda images: [model(images) for model in current], read, ctx.device, dtype)
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
            decided = []
            for values in map(test_set.decisive, logits):
                finite = values.isfinite().all(1)
                for row in values.argmax(1), present[values[:, present].argmax(1)]:
                    decided.append(torch.where(finite, row, -1))
            own[:, done : done + len(used)] = torch.stack([*decided, used])
            done += len(used)
            on_batch(len(used) * ctx.world_size)
        *decisions, used = distributed.all_reduce(rows).cpu()
        counts = [(name, n) for (name, _), n in zip(testsets.presets(image_size), used.bincount().tolist()) if n]
        preprocessing = counts[0][0] if len(counts) == 1 else "; ".join(f"{name} of {n} images" for name, n in counts)
        names, pairs = list(test_set.categories or wnids), zip(decisions[::2], decisions[1::2])
        textures = labels if test_set.textures is None else torch.as_tensor(test_set.textures)
        results = [_result(*pair, labels, textures, names) for pair in pairs]
        yield test_set, [each | {"preprocessing": preprocessing} for each in results]


def _result(
    decided: torch.Tensor, among: torch.Tensor, labels: torch.Tensor, textures: torch.Tensor, names: Sequence[str]
) -> dict:
    hits, conflict = decided == labels, (textures >= 0) & (textures != labels)
    counts = labels.bincount(minlength=len(names)).tolist()
    correct = labels[hits].bincount(minlength=len(names)).tolist()
    masks = {"correct": hits, "correct among shared": among == labels}
    if conflict.float().mean() >= 0.1:  # not a misfiled photo of another set
        masks |= {"conflict": conflict, "shape": hits & conflict, "texture": (decided == textures) & conflict}
    return {
        "top1": 100 * hits.sum().item() / len(labels),
        "n": len(labels),
        "classes": {name: {"n": m, "correct": c} for name, m, c in zip(names, counts, correct) if m},
        "not_finite": (decided < 0).sum().item(),
        "masks": {name: pack(mask) for name, mask in masks.items()},
    }


def pack(mask: Sequence[bool]) -> str:
    """A bit for each image, as text for JSON."""
    return base64.b64encode(np.packbits(np.asarray(mask, dtype=bool))).decode()


@functools.lru_cache(maxsize=1024)
def unpack(text: str, n: int) -> np.ndarray:
    """The n bits of `pack`, 0 or 1. ValueError if the text does not hold as many."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if not 0 <= len(bits) - n < 8:
        raise ValueError(f"a mask of {len(bits)} bits for {n} images")
    return bits[:n]
