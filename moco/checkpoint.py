"""Checkpoints: written whole or not at all, read as tensors only, with the published code's key names.

Pre-training files hold `module.encoder_q.*`, linear ones `module.conv1.*` … `module.fc.*`, because the published code
saved models wrapped for distributed training. The prefix is added on saving and stripped, if present, on loading.
"""

import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn

from moco import contents, files
from moco.errors import RunError, UsageError, first_line

PREFIX = "module."
FC_KEYS = ("fc.weight", "fc.bias")
COUNTER = "num_batches_tracked"


def save(path: str, state: Mapping) -> None:
    """Write `state` to `path` so that neither a reader nor a crash ever leaves half a file. RunError if it cannot."""
    try:
        with files.atomic_write(path, "wb") as file:
            torch.save(_on_cpu(state), file)
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer turns an OSError into a RuntimeError
        if "DataLoader worker" in str(error):  # a loading process died just now: not about this file
            raise
        cause = error
        while cause.__context__:
            cause = cause.__context__
        raise RunError(
            f"{path} could not be written ({first_line(cause)}); earlier checkpoints are intact; free some space, then"
            " continue with --resume auto"
        ) from error


def _on_cpu(value):
    """The value with all tensors in it on the CPU: a file of tensors on a GPU cannot be read where there is none."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value


def prune(folder: str, keep: int, pattern: str) -> None:
    """Remove all but the last `keep` files of the folder whose names match `pattern`, a regular expression."""
    for name in matching(folder, pattern)[:-keep]:
        os.remove(os.path.join(folder, name))


def resume_path(resume: str, folder: str, pattern: str) -> str:
    """The file to resume from, or '' for a fresh start.

    'auto' is the last of the folder's files whose names match `pattern`, a regular expression: a longer number counts
    as later than a shorter one, "latest" as the last.
    """
    if resume != "auto":
        return resume
    names = matching(folder, pattern)
    return os.path.join(folder, names[-1]) if names else ""


def matching(folder: str, pattern: str) -> list[str]:
    """The folder's files whose names match the regular expression, in the order of `resume_path`."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if re.fullmatch(pattern, name)), key=lambda name: (len(name), name))


def load(path: str, option: str = "--resume") -> dict:
    """Read a checkpoint to CPU, tensors and plain values only.

    Raises UsageError if it is missing or not a checkpoint.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{option} {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sparse tensors, which are refused later
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes may raise anything; all of it means: not a checkpoint
        raise UsageError(f"{option} {path}: not a checkpoint: {_why_not_loaded(path, error)}") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(name, str) for name in checkpoint):
        raise UsageError(f"{option} {path}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    state = checkpoint.get("state_dict", {})
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{option} {path}: not a checkpoint, its state_dict does not consist of tensors")
    return checkpoint


def _why_not_loaded(path: str, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        return f"it cannot be read ({error})"
    if start != b"PK\3\4"[: len(start)] and start[:1] != b"\x80":
        return "it is another kind of file; use one that ends in .pth or .pth.tar"
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return (
            f"loading it would run code ({code[1]}), so it is not loaded; if you trust it, save its tensors alone:"
            " torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        )
    return f"it is damaged or truncated ({first_line(error)}); copy or download it again, or use an earlier one"


# Contents


def add_prefix(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {PREFIX + name: value for name, value in state_dict.items()}


def strip_prefix(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names without the prefixes that DistributedDataParallel (even twice) and torch.compile add."""
    return {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value for name, value in state_dict.items()}


def nonfinite(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the entries that hold an infinite value or NaN."""
    values = {name: value for name, value in state_dict.items() if value.is_floating_point()}
    finite = [value.isfinite().all() for value in values.values()]
    return [name for name, good in zip(values, torch.stack(finite).tolist() if finite else []) if not good]


def num_outputs(saved: Mapping, source: str) -> int:
    """How many outputs the head of a linear checkpoint has. Raises UsageError if it has no linear head."""
    state = strip_prefix(saved.get("state_dict", {}))
    if not set(FC_KEYS) <= state.keys():
        raise UsageError(
            f"{source}: it has no linear head; linear checkpoints are what main_lincls.py writes,"
            " checkpoint_robust_*.pth.tar and model_best_*.pth.tar"
        )
    return len(state["fc.bias"])


def check_finite(state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise UsageError if a tensor holds an infinite value or NaN."""
    if broken := nonfinite(state_dict):
        raise UsageError(
            f"{source}: {len(broken)} of its tensors, {broken[0]} the first, hold infinite values or NaN; use an"
            " earlier one"
        )


def check_pretraining(saved: Mapping, source: str, options: Mapping, classes: Sequence[str]) -> None:
    """Raise UsageError unless a run with these options ({name: value}) and classes can resume from `saved`."""
    if not {"epoch", "arch", "state_dict"} <= saved.keys():
        raise UsageError(f"{source}: not a pre-training checkpoint; --resume takes a checkpoint_*.pth.tar")
    contents.check_values(saved, source)
    state = strip_prefix(saved["state_dict"])
    if "queue" not in state:
        raise UsageError(f"{source}: it has no queue, so it is not a pre-training checkpoint")
    dim, length = state["queue"].shape if state["queue"].dim() == 2 else (0, 0)
    known = saved.get("options", {})  # published files hold no options
    saved_with = {
        "arch": saved["arch"],
        "moco_dim": dim,
        "moco_k": length,
        "mlp": "encoder_q.fc.2.weight" in state,
        **{name: known[name] for name in ("aug_plus", "image_size", "robust") if name in known},
    }
    check_same(source, {f"--{name.replace('_', '-')}": (there, options[name]) for name, there in saved_with.items()})
    if saved.get("classes", classes) != classes:
        raise UsageError(
            f"{source}: it was saved with classes {_count_and_names(saved['classes'])}, this run has"
            f" {_count_and_names(classes)}"
        )


def check_data_order(saved: Mapping, source: str, seed: int | None, images: int, images_per_step: int) -> None:
    """Raise UsageError unless the order of the data is still the same, if `saved` was saved within an epoch."""
    if saved.get("step"):
        check_same(
            source,
            {
                "training images:": (saved["images"], images),
                "images per step:": (saved["images_per_step"], images_per_step),
                "--seed": (saved["seed"], saved["seed"] if seed is None else seed),
            },
        )


def check_same(source: str, pairs: Mapping[str, tuple]) -> None:
    """Raise UsageError for the first {what: (saved value, this run's)} that differs."""
    for what, (there, here) in pairs.items():
        if there != here:
            raise UsageError(f"{source}: it was saved with {what} {there}, this run has {here}")


def _count_and_names(names: Sequence[str], count: int = 5) -> str:
    return f"{len(names)}: {', '.join(names[:count])}" + (", …" if len(names) > count else "")


def check_exactly(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str, allowed_missing: Sequence[str] = ()
) -> None:
    """Raise UsageError for any entry that is missing (except the allowed ones and the batch counts, which PyTorch once
    did not have), unexpected, of another shape, or not an ordinary tensor of the same kind of number."""
    own = module.state_dict()
    missing = [name for name in own if name not in {*state_dict, *allowed_missing} and not name.endswith(COUNTER)]
    unexpected = [name for name in state_dict if name not in own]
    both = [(name, own[name], state_dict[name]) for name in own if name in state_dict]
    misshapen = [name for name, mine, other in both if mine.shape != other.shape]
    odd = [
        name
        for name, mine, other in both
        if not contents.is_dense(other) or mine.is_floating_point() != other.is_floating_point()
    ]
    for fault, names in (
        ("lacks", missing),
        ("has the unknown", unexpected),
        ("has another shape for", misshapen),
        ("has another kind of tensor for", odd),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"{source}: does not fit this model: it {fault} {names[0]}{more}; check --arch and the head's options"
            )


def load_exactly(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str, allowed_missing: Sequence[str] = ()
) -> None:
    """load_state_dict after `check_exactly`."""
    check_exactly(module, state_dict, source, allowed_missing)
    module.load_state_dict(state_dict, strict=False)


def optimizer_of_group(state: Mapping, index: int) -> dict:
    """The state of an optimizer as it would be with one of its parameter groups alone."""
    group = state["param_groups"][index]
    return {
        "state": {new: state["state"][old] for new, old in enumerate(group["params"]) if old in state["state"]},
        "param_groups": [{**group, "params": list(range(len(group["params"])))}],
    }


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping) -> None:
    """Load the momenta of a saved state, if there is one; keep this run's options (weight decay, implementation, …).

    Momenta get the memory layout of their weights. Published files hold contiguous ones, and with channels_last weights
    fused SGD refuses those on a GPU and takes silently wrong steps on a CPU.
    """
    if not saved:  # a published file whose optimizer was removed
        return
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for weight, state in optimizer.state.items():
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"] = torch.empty_like(weight).copy_(state["momentum_buffer"])
