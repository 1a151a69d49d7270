"""Checkpoints: written whole or not at all, read as tensors only, with the key names of the published code.

Pre-training files hold `module.encoder_q.*`, linear ones `module.conv1.*` … `module.fc.*`: the published code saved
modules wrapped for distributed training. The prefix is added on saving and taken off, where present, on loading.
"""

import contextlib
import os
import pickle
import re

import torch

from moco.options import BadInput, RunFailed

PREFIX = "module."


def save(path, state):
    """Write `state` to `path` so that no reader and no crash ever sees half a file. RunFailed if that is impossible."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                         # PyTorch's zip writer turns a full disk into the second
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise RunFailed(f"{path} could not be written ({_first_line(error)}); what was saved before is whole;"
                        " make room, then go on with --resume auto") from error


def keep_last(folder, count, pattern):
    """Remove all but the last `count` of the folder's files whose names match."""
    for name in _matching(folder, pattern)[:-count]:
        os.remove(os.path.join(folder, name))


def load(path, option="--resume"):
    """Read a checkpoint to CPU, tensors and plain values only; BadInput if it is missing or none."""
    if not os.path.isfile(path):
        raise BadInput(f"{option} {path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise BadInput(f"{option} {path}: not a checkpoint that can be loaded as tensors only ({_first_line(error)});"
                       " it is cut short, of another program, or would run code: get it anew, or take another") from error
    if not isinstance(checkpoint, dict):
        raise BadInput(f"{option} {path}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    return checkpoint


def _first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def with_prefix(state_dict):
    return {PREFIX + name: value for name, value in state_dict.items()}


def without_prefix(state_dict):
    return {name.removeprefix(PREFIX): value for name, value in state_dict.items()}


def backbone(checkpoint):
    """The backbone weights, by torchvision's names and without a head, of what `load` gave.

    Takes pre-training checkpoints (their query encoder), linear ones, and bare torchvision state_dicts.
    """
    state = without_prefix(checkpoint.get("state_dict", checkpoint))
    query = {name.removeprefix("encoder_q."): value for name, value in state.items() if name.startswith("encoder_q.")}
    return {name: value for name, value in (query or state).items() if not name.startswith("fc.")}


def load_exactly(module, state_dict, source, allowed_missing=()):
    """load_state_dict, with BadInput for any missing, unexpected or misshapen entry but the allowed missing ones."""
    own = module.state_dict()
    missing = [name for name in own if name not in state_dict and name not in allowed_missing]
    unexpected = [name for name in state_dict if name not in own]
    misshapen = [name for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    for fault, names in (("lacks", missing), ("has the unknown", unexpected), ("has another shape for", misshapen)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BadInput(f"{source}: does not fit this model: it {fault} {names[0]}{more}; check --arch and the head's options")
    module.load_state_dict(state_dict, strict=False)


def load_optimizer(optimizer, saved):
    """Take the momenta of a saved state, and keep this run's options (weight decay, implementation, …)."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def resume_path(resume, folder, pattern):
    """The file to resume from, or '' for a fresh start. 'auto' is the last of the folder's files whose names match
    `pattern`, a regular expression; a longer number comes after a shorter one, "latest" after both."""
    if resume != "auto":
        return resume
    matching = _matching(folder, pattern)
    return os.path.join(folder, matching[-1]) if matching else ""


def _matching(folder, pattern):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if re.fullmatch(pattern, name)), key=lambda name: (len(name), name))
