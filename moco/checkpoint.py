"""Checkpoints: written whole or not at all, read as tensors only, with the key names of the published code.

Pre-training files hold `module.encoder_q.*`, linear ones `module.conv1.*` … `module.fc.*`: the published code saved
modules wrapped for distributed training. The prefix is added on saving and taken off, where present, on loading.
"""

import contextlib
import os
import pickle
import re

import torch

from moco.diagnosis import nonfinite
from moco.failures import BadInput, RunFailed

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
    except (OSError, RuntimeError) as error:                         # PyTorch's zip writer turns the first into the second
        with contextlib.suppress(OSError):
            os.remove(partial)
        if "DataLoader worker" in str(error):                        # a loading process died just now: not about this file
            raise
        first = error
        while first.__context__:
            first = first.__context__
        raise RunFailed(f"{path} could not be written ({_first_line(first)}); what was saved before is whole;"
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
    except Exception as error:  # anything may be raised for bytes of any kind; all of it means: no checkpoint
        raise BadInput(f"{option} {path}: not a checkpoint: {_what_is_wrong(path, error)}") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(name, str) for name in checkpoint):
        raise BadInput(f"{option} {path}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    state = checkpoint.get("state_dict", {})
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadInput(f"{option} {path}: not a checkpoint, its state_dict is not one of tensors")
    return checkpoint


def _what_is_wrong(path, error):
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        return f"it cannot be read ({error})"
    if start != b"PK\3\4"[:len(start)] and start[:1] != b"\x80":
        return "it is of another kind of file; take one that ends in .pth or .pth.tar"
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return (f"loading it would run code ({code[1]}), so it is not loaded; if you trust it, save its tensors"
                " alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)")
    return f"it is damaged or cut short ({_first_line(error)}); copy or download it anew, or take an earlier one"


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


def check_resumable(saved, source, options, classes, images, images_per_step):
    """BadInput unless a run with these options ({name: value}), classes and numbers can go on from a checkpoint: it is one
    of pre-training, its weights are finite, and it was made with the same."""
    if not {"epoch", "arch", "state_dict", "optimizer"} <= saved.keys():
        raise BadInput(f"{source}: not a pre-training checkpoint; --resume takes a checkpoint_*.pth.tar")
    state = without_prefix(saved["state_dict"])
    if "queue" not in state:
        raise BadInput(f"{source}: it has no queue, so it is no pre-training checkpoint")
    if broken := nonfinite(state):
        raise BadInput(f"{source}: {len(broken)} of its tensors, {broken[0]} the first, hold infinite values or NaN;"
                       " take an earlier one")
    dim, length = state["queue"].shape if state["queue"].dim() == 2 else (0, 0)
    known = saved.get("options", {})                                 # published files say no more than arch and weights
    made_with = {"arch": saved["arch"], "moco_dim": dim, "moco_k": length, "mlp": "encoder_q.fc.2.weight" in state,
                 **{name: known[name] for name in ("aug_plus", "image_size", "robust") if name in known}}
    pairs = [(f"--{name.replace('_', '-')}", there, options[name]) for name, there in made_with.items()]
    pairs.append(("classes", _listed(saved.get("classes", classes)), _listed(classes)))
    if saved.get("step"):                                            # its order of the data must be this run's
        pairs += [("training images:", saved["images"], images), ("images a step:", saved["images_per_step"], images_per_step),
                  ("--seed", saved["seed"], saved["seed"] if options["seed"] is None else options["seed"])]
    for option, there, here in pairs:
        if there != here:
            raise BadInput(f"{source}: it was made with {option} {there}, this run has {here}")


def _listed(names):
    return f"{len(names)}: {', '.join(names)}"


def check_exactly(module, state_dict, source, allowed_missing=()):
    """BadInput for any missing, unexpected or misshapen entry but the allowed missing ones."""
    own = module.state_dict()
    missing = [name for name in own if name not in state_dict and name not in allowed_missing]
    unexpected = [name for name in state_dict if name not in own]
    misshapen = [name for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    for fault, names in (("lacks", missing), ("has the unknown", unexpected), ("has another shape for", misshapen)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BadInput(f"{source}: does not fit this model: it {fault} {names[0]}{more}; check --arch and the head's options")


def load_exactly(module, state_dict, source, allowed_missing=()):
    """load_state_dict, after `check_exactly`."""
    check_exactly(module, state_dict, source, allowed_missing)
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
