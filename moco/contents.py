"""What a checkpoint file must hold: types, ranges and shapes of everything that is read from it.

A file may come from anywhere. What is wrong in it is refused here, in one line, and not found later as a traceback or,
worse, as a wrong figure.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn

from moco.encoders import ARCHS
from moco.errors import UsageError

MAX_IMAGE_SIZE = 4096  # px


def _int(low: int, high: int = 2**63) -> tuple[Callable, str]:
    return lambda v: type(v) is int and low <= v < high, f"an integer from {low} to {high - 1}"


def _number(low: float, high: float) -> tuple[Callable, str]:
    def test(value):
        if isinstance(value, torch.Tensor):
            return value.dim() == 0 and is_dense(value) and test(value.item())
        return type(value) in (int, float) and low <= value <= high

    return test, f"a number from {low:g} to {high:g}"


def _list_of(kind: tuple[Callable, str], distinct: bool = False) -> tuple[Callable, str]:
    def test(value):
        sound = isinstance(value, (list, tuple)) and len(value) > 0 and all(map(kind[0], value))
        return sound and (not distinct or len(set(value)) == len(value))

    return test, f"a list of {'different ' if distinct else ''}items, each {kind[1]}"


TEXT = (lambda v: isinstance(v, str) and v != "", "a text")
PERCENT = _number(-1, 100)  # -1: no epoch is over yet
DICT = (lambda v: isinstance(v, dict) and all(isinstance(name, str) for name in v), "a dict with text keys")
NAMES = _list_of(TEXT, distinct=True)
STEPS = _int(1, 2**31)
RULES = {
    "epoch": _int(0, 2**31),
    "step": _int(0, 2**31),
    "arch": (lambda v: isinstance(v, str) and v in ARCHS, "one of the architectures of --arch"),
    "image_size": _int(1, MAX_IMAGE_SIZE + 1),
    "seed": _int(0),
    "images": _int(1),
    "images_per_step": _int(1),
    "bad_in_epoch": _int(0),
    "bad_images": DICT,
    "classes": NAMES,
    "wnids": NAMES,
    "lrs": _list_of(_number(1e-45, 1e38)),
    "best_acc1": PERCENT,
    "best_acc1s": _list_of(PERCENT),
    "winner": _int(0),
    "options": DICT,
    "pretraining": (lambda v: v is None or DICT[0](v), "None or a dict with text keys"),
    "scaler": DICT,
    "pretrained": (lambda v: isinstance(v, str), "a text"),
}
OPTION_RULES = {  # of `options` and `pretraining`: those that are read
    "moco_k": _int(1, 2**31),
    "num_nonsem": _int(0, 2**31),
    "alpha": _number(0, 1e38),
    "image_size": _int(1, MAX_IMAGE_SIZE + 1),
}
SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def arch_of(saved: Mapping, source: str) -> str | None:
    """The architecture that a file names; None if it names none. Raises UsageError if it is unknown."""
    arch = saved.get("arch")
    if "arch" in saved and not RULES["arch"][0](arch):
        raise UsageError(f"{source}: its arch is {short(arch)}, not {RULES['arch'][1]}")
    return arch


def check_values(saved: Mapping, source: str) -> None:
    """Raise UsageError unless all entries but the tensors of a model and its optimizer have sound values."""
    for entries, rules, where in (
        (saved, RULES, ""),
        (saved.get("options"), OPTION_RULES, "options: "),
        (saved.get("pretraining"), OPTION_RULES, "pretraining: "),
    ):
        for name, (test, wanted) in rules.items():
            if entries and name in entries and not test(entries[name]):
                raise UsageError(f"{source}: its {where}{name} is {short(entries[name])}, not {wanted}")
    if saved.get("scaler") and not (
        saved["scaler"].keys() == SCALER_KEYS and all(type(v) in (int, float) for v in saved["scaler"].values())
    ):
        raise UsageError(f"{source}: its scaler is not a state of torch.amp.GradScaler")
    if len(saved.get("best_acc1s", [0])) != len(saved.get("lrs", [0])) or saved.get("winner", 0) >= len(
        saved.get("lrs", [0])
    ):
        raise UsageError(f"{source}: its lrs, best_acc1s and winner do not belong together")
    if saved.get("step"):
        _check_within_epoch(saved, source)


def _check_within_epoch(saved: Mapping, source: str) -> None:
    """Of a checkpoint saved within an epoch: the order of the data and the running means."""
    missing = [name for name in ("means", "seed", "images", "images_per_step") if name not in saved]
    if missing:
        raise UsageError(f"{source}: it was saved within an epoch and lacks {missing[0]}")
    steps = saved["images"] // saved["images_per_step"]
    if saved["step"] > steps:  # as many: saved before the evaluation at the end
        raise UsageError(f"{source}: its step is {saved['step']}, but an epoch has {steps} steps")
    if not _is_running_means(saved["means"]):
        raise UsageError(f"{source}: its means are not those of a run within an epoch")


def _is_running_means(means: object) -> bool:
    """Whether this is a state of metrics.RunningMeans: names, their sizes (once there were none), sums, steps."""
    if not isinstance(means, dict) or not {"names", "sums", "steps"} <= means.keys() or not NAMES[0](means["names"]):
        return False
    sizes, sums = means.get("sizes", [None] * len(means["names"])), means["sums"]
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(means["names"]):
        return False
    if not all(size is None or STEPS[0](size) for size in sizes) or not STEPS[0](means["steps"]):
        return False
    width = sum(size or 1 for size in sizes)
    return isinstance(sums, torch.Tensor) and is_dense(sums) and sums.dim() == 2 and sums.shape[1] == width


def check_optimizer(saved: Mapping, source: str, parameters: Sequence[torch.Tensor]) -> None:
    """Raise UsageError unless `saved` is the state of SGD on these parameters.

    Momenta of another shape would corrupt memory, and those that are not finite the weights.
    """
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not isinstance(saved.get("param_groups"), list):
        raise UsageError(f"{source}: its optimizer is {short(saved)}, not the state of one")
    for index, entry in state.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entry, dict):
            raise UsageError(f"{source}: its optimizer has a state for parameter {short(index)}, which does not exist")
        momentum, shape = entry.get("momentum_buffer"), parameters[index].shape
        if momentum is None:
            continue
        if not isinstance(momentum, torch.Tensor) or momentum.shape != shape or not is_dense(momentum):
            raise UsageError(
                f"{source}: the momentum of parameter {index} is {short(momentum)}, not a tensor of shape"
                f" {tuple(shape)}"
            )
        if not momentum.is_floating_point() or not momentum.isfinite().all():
            raise UsageError(f"{source}: the momentum of parameter {index} holds infinite values or NaN")


def check_heads(saved: Mapping, source: str, head: nn.Linear) -> None:
    """Raise UsageError unless `heads`, where there are some, are one linear layer per learning rate like `head`."""
    if "heads" not in saved:
        return
    heads, count = saved["heads"], len(saved.get("lrs", [None]))
    wanted = {f"{i}.{name}": value.shape for i in range(count) for name, value in head.state_dict().items()}
    sound = isinstance(heads, dict) and heads.keys() == wanted.keys()
    if not sound or not all(
        isinstance(value, torch.Tensor)
        and is_dense(value)
        and value.shape == wanted[name]
        and value.is_floating_point()
        for name, value in heads.items()
    ):
        raise UsageError(f"{source}: its heads are not {count} linear layers of {head.out_features} outputs")


def is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor has ordinary values in memory: neither sparse, quantized nor on the meta device."""
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def short(value: object) -> str:
    """A value as text for a message of one line."""
    if isinstance(value, torch.Tensor):
        kind = "" if is_dense(value) else f"{value.layout} {value.device} ".replace("torch.", "")
        return f"a {kind}tensor of shape {tuple(value.shape)}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
