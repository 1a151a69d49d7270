"""The weights of a backbone in whatever file they are: under any prefix, in any container."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn as nn

from moco.checkpoint import COUNTER, FC_KEYS, check_exactly, nonfinite
from moco.errors import UsageError


class Backbone(NamedTuple):
    """The weights of a backbone, with torchvision's names and without a head, and where in the file they were."""

    weights: dict[str, torch.Tensor]
    origin: str


def find_backbone(checkpoint: Mapping, source: str, network: nn.Module) -> Backbone:
    """The weights for `network` (on the meta device; its fc is left out) in a loaded checkpoint.

    They may be under any prefix: pre-training checkpoints (the query encoder), linear ones, plain torchvision
    state_dicts, and files of other projects, whose weights are in `model`, `teacher`, `backbone.`, `encoder.`, …, or
    numbered as in nn.Sequential(*network.children()). Raises UsageError if the network is not in the file, is only
    a part of a larger one, or if a weight has another shape or is not finite.
    """
    state, container = _tensors_of(checkpoint)
    if not state:
        raise UsageError(f"{source}: it holds no backbone weights")
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    found, prefix = _named_as(network, list(own), state)
    if not found:
        names = ", ".join(list(state)[:2])
        raise UsageError(f"{source}: it holds no weights of this --arch ({names}, …); check --arch")
    modules = {name.split(".")[0] for name in own}
    weights = {name: value for name, value in found.items() if name.split(".")[0] in modules}
    check_exactly(network, weights, source, FC_KEYS)
    if broken := nonfinite(weights):
        raise UsageError(f"{source}: {broken[0]} holds infinite values or NaN; use an earlier checkpoint")
    for name, value in own.items():  # PyTorch before 0.4.1 did not count batches
        weights.setdefault(name, torch.zeros_like(value, device="cpu"))
    where = f"{container + ': ' if container else ''}{prefix}*"
    return Backbone(weights, f"{len(weights)} tensors from {where}, {len(state) - len(weights)} others left out")


def _named_as(network: nn.Module, own: list[str], state: Mapping) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors under the first prefix that has all of the network's names, and that prefix; ({}, "") if none has."""
    children = {str(i): name for i, (name, _) in enumerate(network.named_children())}
    for prefix in _prefixes(state, own[0], children):
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not found.keys() & set(own):
            found = {_by_name(name, children): value for name, value in found.items()}
        if all(name in found or name.endswith(COUNTER) for name in own):
            return found, prefix
    return {}, ""


def _tensors_of(checkpoint: Mapping) -> tuple[dict[str, torch.Tensor], str]:
    """The state_dict in a file, and its name there ("" if it is the file itself)."""
    for container in ("state_dict", "model_state_dict", "model", "teacher", "network", "net"):
        state = checkpoint.get(container)
        if isinstance(state, Mapping) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return dict(state), container
    if all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return dict(checkpoint), ""
    return {}, ""


def _prefixes(state: Mapping, first: str, children: Mapping[str, str]) -> list[str]:
    """What precedes the network's first weight in the file's names; a momentum encoder's prefix comes last."""
    numbers = {name: number for number, name in children.items()}
    module, rest = first.split(".", 1)
    ends = [first] + ([f"{numbers[module]}.{rest}"] if module in numbers else [])
    found = {name.removesuffix(end) for name in state for end in ends if name.endswith(end)}
    found = [prefix for prefix in found if prefix == "" or prefix.endswith(".")]
    momentum = re.compile("momentum|encoder_k|target|student|ema")
    return sorted(found, key=lambda prefix: (momentum.search(prefix) is not None, len(prefix), prefix))


def _by_name(name: str, children: Mapping[str, str]) -> str:
    first, _, rest = name.partition(".")
    return f"{children.get(first, first)}.{rest}"
