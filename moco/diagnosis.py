"""What to tell when the numbers of a run are no longer finite."""

import json
import os

import torch

from moco.failures import RunFailed


def nonfinite(state_dict):
    """The names of the entries that hold an infinite value or NaN."""
    values = {name: value for name, value in state_dict.items() if value.is_floating_point()}
    finite = [value.isfinite().all() for value in values.values()]
    return [name for name, good in zip(values, torch.stack(finite).tolist() if finite else []) if not good]


def stop(folder, model, what, *, epoch, step, lr, precision, images):
    """Write what is known to a file in `folder`, and raise the RunFailed that names it.

    what: "loss" or "weights". step: the first after which it was not finite, counted from 1, of `epoch`, counted from 0;
    images: paths of its global batch.
    """
    path = os.path.join(folder, f"nonfinite_{epoch:04d}_{step}.json")
    try:
        with open(path, "w") as file:
            json.dump({"epoch": epoch, "step": step, "lr": lr, "precision": precision, "images": images,
                       "nonfinite_weights": nonfinite(model.state_dict()), "largest_weights": largest(model)}, file, indent=1)
        told = f"the batch and the largest weights are in {path}"
    except OSError as error:
        told = f"{path}, about the batch and the weights, could not be written ({error})"
    advice = ("fp16 ends at 65504; use --precision bf16, or a smaller --lr" if precision == "fp16" else
              f"use a smaller --lr, for example {lr / 10:g}")
    raise RunFailed(f"{what} not finite in epoch {epoch} step {step}; {told}; {advice}, and go on from before with --resume"
                    " auto: what was saved is whole")


def largest(model, count=10):
    """{name: largest finite |value|} of the weights that have the largest ones."""
    sizes = {name: value.nan_to_num(0, 0, 0).abs().max().item() for name, value in model.named_parameters()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:count])
