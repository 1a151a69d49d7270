"""Guards of a run: numbers that are not finite, and images that cannot be read."""

import json
import os
import sys
from collections.abc import Sequence

import torch.nn as nn

from moco import checkpoint, distributed
from moco.errors import RunError, one_line


def nonfinite_error(
    what: str,
    folder: str,
    epoch: int,
    step: int,
    lr: float,
    precision: str,
    images: Sequence[str],
    modules: Sequence[nn.Module],
) -> RunError:
    """The error of a run in which `what`, "the loss is" or "weights are", not finite; writes a diagnosis to the folder.

    images: of the batch, over all ranks; lr: the smallest learning rate.
    """
    path = os.path.join(folder, f"nonfinite_{epoch:04d}_{step}.json")
    diagnosis = {
        "epoch": epoch,
        "step": step,
        "lr": lr,
        "precision": precision,
        "images": images,
        "nonfinite_weights": [name for module in modules for name in checkpoint.nonfinite(module.state_dict())],
        "largest_weights": _largest_weights(modules),
    }
    try:
        with open(path, "w") as file:
            json.dump(diagnosis, file, indent=1)
        written = f"the batch and the largest weights are in {path}"
    except OSError as error:
        written = f"{path}, with the batch and the largest weights, could not be written ({error})"
    advice = f"use a smaller --lr, for example {lr / 10:g}"
    if precision == "fp16":
        advice = "fp16 ends at 65504: use --precision bf16, or a smaller --lr"
    return RunError(
        f"{what} not finite in epoch {epoch} step {step}; {written}; {advice}; the saved checkpoints are intact:"
        " continue from them with --resume auto"
    )


def _largest_weights(modules: Sequence[nn.Module], count: int = 10) -> dict[str, float]:
    """{name: largest finite |value|} of the parameters with the largest values."""
    largest = {
        name if len(modules) == 1 else f"{i}.{name}": value.nan_to_num(0, 0, 0).abs().max().item()
        for i, module in enumerate(modules)
        for name, value in module.named_parameters()
    }
    return dict(sorted(largest.items(), key=lambda item: -item[1])[:count])


class UnreadableFiles:
    """The images of a run that could not be read, equal on all ranks: reported once each, counted per epoch.

    limit: how many different files may be unreadable. known: {path: reason} of the run that this one resumes; they are
    not reported again, and count towards the limit only if they are met again, since they may have been repaired.
    """

    def __init__(self, limit: int):
        self.limit, self.known, self.seen, self.in_epoch = limit, {}, set(), 0

    def add(self, unreadable: list[tuple[str, str]]) -> None:
        """Add the (path, reason) of this rank's batch. All ranks must call this."""
        for path, reason in distributed.gather_lists(unreadable):
            self.in_epoch += 1
            if path not in self.known and distributed.is_main():
                sys.stderr.write(one_line(f"unreadable image, replaced by another of its class: {path}: {reason}"))
                sys.stderr.flush()
            self.known[path] = reason
            self.seen.add(path)

    def too_many(self) -> bool:
        return len(self.seen) > self.limit

    def give_up(self) -> None:
        """Raise RunError on rank 0; the other ranks wait for its end."""
        if distributed.is_main():
            raise RunError(
                f"{len(self.seen)} images could not be read, more than --max-bad-images {self.limit}; repair them or"
                f" raise the limit, then continue with --resume auto: {', '.join(sorted(self.seen))}"
            )
        distributed.barrier()
