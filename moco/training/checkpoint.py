"""Checkpoints: written whole or not at all, read as tensors only, with the published code's key names.

Pre-training files hold `module.encoder_q.*`, linear ones `module.conv1.*` … `module.fc.*`, because the published code
saved models wrapped for distributed training. The prefix is added on saving and stripped, if present, on loading.
"""

import argparse
import contextlib
import json
import math
import operator
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from moco.encoders import ARCHS
from moco.errors import Finished, UsageError, first_line
from moco.negatives import NEGATIVES
from moco.processes.environment import is_main
from moco.training import files

PRETRAINING, BEST = r"checkpoint_(\d{4,}|latest)\.pth\.tar", r"model_best_.+\.pth\.tar"  # names of a run's files
PREFIX = "module."
FC_KEYS = ("fc.weight", "fc.bias")
COUNTER = "num_batches_tracked"
# Options that weights follow from, and where files of any project keep weights
SHAPES = ("arch", "moco_dim", "moco_k", "mlp")
CONTAINERS = ("state_dict", "model_state_dict", "model", "teacher", "network", "net")
MOMENTUM = re.compile("momentum|encoder_k|target|student|ema")


def save(path: str, state: Mapping, names: Iterable[str] = ()) -> None:
    """Write `state` to `path` so that neither a reader nor a crash ever finds half a file. Raises OSError.

    names: more paths in the same folder, of the same file.
    """
    with files.atomic_write(path, "wb") as file:
        try:
            torch.save(_on_cpu(state), file)
        except RuntimeError as error:  # PyTorch's zip writer hides the OSError behind it
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__
            raise error from None
    for name in names:
        files.add_name(path, name)


def _on_cpu(value):
    """The value with all tensors in it on the CPU: a file of tensors on a GPU cannot be read where there is none."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value


def resume_path(resume: str, folder: str, pattern: str, restarted: bool = False) -> str:
    """The file to resume from, or '' for a fresh start. restarted: by torchrun, after a failure of this run.

    'auto' is the last of the folder's files whose names match `pattern`, a regular expression: a longer number counts
    as later than a shorter one, "latest" as the last. A restarted run takes that one before the file it began with.
    Of the folder of another run, its file as of `of_run`.
    """
    if (resume == "auto" or restarted) and (names := matching(folder, pattern)):
        return os.path.join(folder, names[-1])
    return "" if resume == "auto" else of_run("--resume", resume, pattern)


def of_run(option: str, path: str, pattern: str) -> str:
    """`path` or, of a run's folder, the checkpoint in it whose name matches `pattern`, which a line on stderr names.

    Of a pre-training that is the one of the highest number, or checkpoint_latest.pth.tar if that has come further, as
    in an unfinished run. Raises UsageError if there is none, or if there are several of BEST: of several probes.
    """
    if not os.path.isdir(path):
        return path
    names, state = matching(path, pattern), ""
    if names and pattern == PRETRAINING and "latest" in names[-1]:
        latest = load(os.path.join(path, names[-1]), option)
        with reading(f"{option} {path}/{names[-1]}"):
            epoch, step, epochs = latest["epoch"], latest["step"], latest["options"]["epochs"]
            state = f", after {epoch} of {epochs} epochs" if epoch < epochs else ""
            if names[1:] and (epoch, step) <= (int(re.findall(r"\d+", names[-2])[0]) + 1, 0):
                names.pop()
    if not names or pattern == BEST and names[1:]:
        what = f"{'several' if names else 'no'} {'model_best' if pattern == BEST else 'checkpoint'}_*.pth.tar"
        there = names or sorted(str(each) for each in Path(path).rglob("*.pth*") if re.fullmatch(pattern, each.name))
        way = f"name one: {', '.join(there[:6])}{', …' * (len(there) > 6)}" if there else "name the folder of a run"
        raise UsageError(f"{option} {path}: it holds {what}; {way}")
    if is_main():
        print(f"{option} {path}: taking {names[-1]}{state}", file=sys.stderr, flush=True)
    return os.path.join(path, names[-1])


def matching(folder: str, pattern: str) -> list[str]:
    """The folder's files whose names match the regular expression, in the order of `resume_path`."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if re.fullmatch(pattern, name)), key=lambda name: (len(name), name))


def load(path: str, option: str = "--resume") -> dict:
    """Read tensors and plain values only, to the CPU. Raises UsageError if it is missing or not a checkpoint."""
    if not os.path.isfile(path):
        raise UsageError(f"{option} {path}: no such file")
    try:
        # Namespace: the options that MAE and DINO save
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about sparse tensors, which are refused later
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes may raise anything; all of it means: not a checkpoint
        why = f"it is damaged, truncated or another kind of file ({first_line(error)}); copy or download it again"
        if type(error).__name__ == "UnpicklingError" and (code := re.search(r"GLOBAL (\S+)", str(error))):
            saver = f"torch.save(torch.load(FILE, weights_only=False)[KEY], NEW), KEY one of {', '.join(CONTAINERS)}"
            why = f"loading it would run code ({code[1]}); if you trust it, save its tensors alone: {saver}"
        if str(path).endswith(".safetensors"):
            why = "safetensors; save them as torch.save(safetensors.torch.load_file(FILE), NEW)"
        raise UsageError(f"{option} {path}: not a checkpoint: {why}") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(name, str) for name in checkpoint):
        raise UsageError(f"{option} {path}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    state = checkpoint.get("state_dict", {})
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{option} {path}: not a checkpoint, its state_dict does not consist of tensors")
    return checkpoint


def add_prefix(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {PREFIX + name: value for name, value in state_dict.items()}


def strip_prefix(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names without the prefixes that DistributedDataParallel (even twice) and torch.compile add."""
    return {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value for name, value in state_dict.items()}


def num_outputs(saved: Mapping, source: str) -> int:
    """The number of outputs of a linear checkpoint's head. Raises UsageError if it has no linear head."""
    state = strip_prefix(saved.get("state_dict", {}))
    if not set(FC_KEYS) <= state.keys():
        wanted = "main_lincls.py writes checkpoint_robust_*.pth.tar and model_best_*.pth.tar"
        raise UsageError(f"{source}: it has no linear head, so it is not a linear checkpoint; {wanted}")
    return state["fc.bias"].numel()


# Checks: a file may come from anywhere, and is refused before anything is built from it


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """While the content of a file is read: anything that raises means that it is damaged or not ours, a UsageError."""
    try:
        yield
    except (UsageError, Finished):
        raise
    except Exception as error:  # the content may be anything, and so may what it makes Python raise
        why = f"{type(error).__name__}: {first_line(error)[:100]}"
        raise UsageError(f"{source}: damaged, or not written by these scripts ({why}); use another file") from error


def check_values(saved: Mapping, source: str) -> None:
    """Raise UsageError unless the entries beside the weights and momenta could have been saved by these scripts."""
    with reading(source):
        arch_of(saved, source)
        for name, low, high in ("epoch", 0, 2**31), ("step", 0, 2**31), ("seed", 0, 2**63), ("image_size", 1, 4097):
            if not low <= operator.index(saved.get(name, low)) < high:
                raise ValueError(f"its {name} is {saved[name]}")
        names = saved.get("wnids", [])
        if not isinstance(names, list) or len({each for each in names if isinstance(each, str)}) < len(names):
            raise ValueError("its wnids are not a list of different names")
        rates = [float(lr) for lr in saved.get("lrs", [1])]
        best = [float(acc1) for acc1 in saved.get("best_acc1s", [saved.get("best_acc1", 0)] * len(rates))]
        if len(best) != len(rates) or not 0 <= saved.get("winner", 0) < len(rates) or not all(map(math.isfinite, best)):
            raise ValueError("its lrs, best_acc1s and winner do not belong together")
        for known in "options", "pretraining":  # what a table prints of them
            [float((saved.get(known) or {}).get(name) or 0) for name in ("moco_k", "num_nonsem", "alpha")]
        if saved.get("scaler"):
            torch.amp.GradScaler("cpu").load_state_dict(dict(saved["scaler"]))
        operator.index(saved.get("bad_in_epoch", 0)), dict(saved.get("bad_images", {})).items()


def arch_of(saved: Mapping, source: str) -> str | None:
    """The architecture that a file names; None if it names none. Raises UsageError if it is unknown."""
    with reading(source):
        if (arch := saved.get("arch")) not in (None, *ARCHS):
            raise ValueError(f"its arch is {arch!r}, not one of those of --arch")
        return arch


def check_pretraining(saved: Mapping, source: str, options: Mapping) -> None:
    """Raise UsageError unless a run with these options, {name: value}, has the model of `saved`."""
    if not {"epoch", "arch"} <= saved.keys() or "queue" not in strip_prefix(saved.get("state_dict", {})):
        raise UsageError(
            f"{source}: it has no queue, epoch or arch; --resume takes a pre-training's checkpoint_*.pth.tar"
        )
    check_values(saved, source)
    known = {"arch": saved["arch"]} | saved.get("options", {})  # published files hold none: their shapes must do
    for name in SHAPES:
        if known.get(name, options[name]) != options[name]:
            label = f"--{name.replace('_', '-')}"
            raise UsageError(f"{source}: it was saved with {label} {known[name]}, this run has {options[name]}")


def settings(saved: Mapping, key: str, source: str) -> dict:
    """The options, seed and data that made a checkpoint's weights, as far as it says.

    key: "options" of a pre-training, "probe" of a linear checkpoint, "pretraining" of the one behind that.
    """
    if key == "pretraining":
        saved = {key: saved.get(key)}
    names = ("arch", "seed", "images", "images_per_step", "classes", "changes")
    names += ("epoch", "step", "processes") if key == "options" else ()
    with reading(source):
        return effective({name: saved[name] for name in names if name in saved} | dict(saved.get(key) or {}))


def effective(options: Mapping) -> dict:
    """The options that have an effect beside the others, lists for tuples: to be compared with a file's."""
    used = NEGATIVES[options["robust"]].names if options.get("robust") in NEGATIVES and options["num_nonsem"] else ()
    idle = {name for kind in NEGATIVES.values() for name in kind.names if "robust" in options} - {*used}
    idle |= {"schedule"} if options.get("cos") else set()
    idle |= {"batch_size"} if "images_per_step" in options else set()  # the former is a node's
    return json.loads(json.dumps({name: value for name, value in options.items() if name not in idle}))


def check_exactly(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str, allowed_missing: Sequence[str] = ()
) -> None:
    """Raise UsageError for any entry that is missing (except the allowed ones and the batch counts, which PyTorch once
    did not have), unexpected, of another shape or kind, or not finite."""
    own = module.state_dict()
    faults = [f"lacks {name}" for name in own if name not in {*state_dict, *allowed_missing} and COUNTER not in name]
    faults += [f"has the unknown {name}" for name in state_dict if name not in own]
    others = [name for name in own if name in state_dict and not _is_like(state_dict[name], own[name])]
    faults += [f"has another shape or kind of tensor for {name}" for name in others]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UsageError(f"{source}: does not fit this model: it {faults[0]}{more}; use the options it was made with")
    if broken := [name for name, value in state_dict.items() if not value.isfinite().all()]:
        which = f"{len(broken)} of its tensors, {broken[0]} the first"
        raise UsageError(f"{source}: {which}, hold infinite values or NaN; use an earlier one")


def check_momenta(saved: Mapping, source: str, parameters: Sequence[torch.Tensor]) -> None:
    """Raise UsageError unless this is the state of SGD on these parameters.

    Momenta of another shape would corrupt memory, and those that are not finite the weights.
    """
    with reading(source):
        by_index = dict(enumerate(parameters))
        for index, entry in saved["state"].items():
            momentum, weight = entry["momentum_buffer"], by_index[index]
            if momentum is not None and not (_is_like(momentum, weight) and momentum.isfinite().all()):
                raise ValueError(f"the momentum of parameter {index} is no finite tensor of shape {[*weight.shape]}")


def _is_like(value: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a tensor has the shape of `own`, its kind of numbers, and ordinary values in memory."""
    ordinary = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return ordinary and value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


# Restoring


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


# Backbones, in whatever file they are


def find_backbone(checkpoint: Mapping, source: str, network: nn.Module) -> tuple[dict, str]:
    """The weights for `network` (on the meta device) without its fc, and where in a loaded checkpoint they are.

    They may be under any prefix: pre-training checkpoints (the query encoder), linear ones, plain torchvision
    state_dicts, and files of other projects, whose weights are in `model`, `teacher`, `backbone.`, `encoder.`, …, or
    numbered as in nn.Sequential(*network.children()). Raises UsageError if the network is not in the file, is only
    a part of a larger one, or if a weight has another shape or is not finite.
    """
    containers = {name: checkpoint.get(name) for name in CONTAINERS} | {"": checkpoint}
    is_state = lambda each: isinstance(each, Mapping) and each and all(map(torch.is_tensor, each.values()))
    container, state = next(((name, each) for name, each in containers.items() if is_state(each)), ("", {}))
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    numbers = {name: str(number) for number, (name, _) in enumerate(network.named_children())}
    numbered = {numbers[name.partition(".")[0]] + "." + name.partition(".")[2]: name for name in own}
    first = next(iter(own))
    ends = [first, next(iter(numbered))]
    prefixes = {name.removesuffix(end) for name in state for end in ends if f".{name}".endswith(f".{end}")}
    # A momentum encoder comes last.
    for prefix in sorted(prefixes, key=lambda prefix: (MOMENTUM.search(prefix) is not None, len(prefix), prefix)):
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        names = numbered if first not in found else dict(zip(own, own))
        if not all(name in found or name.endswith(COUNTER) for name in names):
            continue
        modules = {name.partition(".")[0] for name in names}
        weights = {names.get(n, n): value for n, value in found.items() if n.partition(".")[0] in modules}
        check_exactly(network, weights, source, FC_KEYS)
        where = f"{container + ': ' if container else ''}{prefix}*"
        return weights, f"{len(weights)} tensors from {where}, {len(state) - len(weights)} others left out"
    raise UsageError(f"{source}: it holds no weights of this --arch ({', '.join(list(state)[:2])}, …); check --arch")
