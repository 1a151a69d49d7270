"""What all processes of a run must have in common, compared when they have met and before they do anything together."""

import argparse
import hashlib
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from moco import distributed
from moco.errors import UsageError
from moco.sequences import LabelList, PathList

# Options that may differ: where things are on a node, which node it is, and what only rank 0 does.
OWN_OPTIONS = {
    "data", "ckpt_path", "resume", "pretrained", "workers", "batch_size", "gpu", "rank", "local_rank", "dist_url",
    "print_freq", "verbose", "json", "plot", "latex", "classes", "val", "corruption", "sketch", "stylized",
    "rendition", "sets", "defaults", "auto_resume",
}  # fmt: skip
SHOWN = 4  # ranks named per value


def shared_options(args: argparse.Namespace) -> dict[str, object]:
    """{"--name": value} of the options that must be equal on all ranks."""
    return {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in OWN_OPTIONS}


def check_agreement(shared: Mapping[str, object], facts: Mapping[str, Callable[[], object]]) -> None:
    """Raise UsageError on all ranks if options, a fact or the code differ between them. All must call it first.

    Otherwise collectives would hang or abort, or the ranks would train different things without a word. facts: by name,
    functions of what to compare; they are called only where there are several ranks.
    """
    if distributed.world_size() == 1:
        return
    mine = {name: str(value) for name, value in shared.items()}
    mine |= {name: str(fact()) for name, fact in facts.items()}
    mine |= {"PyTorch": torch.__version__, "the code": f"version {code_version()}"}
    everyone = distributed.gather_lists([(socket.gethostname(), mine)])
    names = dict.fromkeys(name for _, own in everyone for name in own)
    found = [(name, [own.get(name, "not given") for _, own in everyone]) for name in names]
    differing = [f"{name} is {_by_rank(values, everyone)}" for name, values in found if len(set(values)) > 1]
    if differing:
        raise UsageError(
            f"the processes of this run do not agree: {'; '.join(differing)}; start all of them with the same options,"
            " data and code"
        )


def _by_rank(values: Sequence[str], everyone: Sequence[tuple[str, dict]]) -> str:
    parts = []
    for value in dict.fromkeys(values):
        ranks = [rank for rank, other in enumerate(values) if other == value]
        hosts = dict.fromkeys(everyone[rank][0] for rank in ranks)
        more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
        parts.append(f"{value} on rank {', '.join(map(str, ranks[:SHOWN]))}{more} ({', '.join(list(hosts)[:SHOWN])})")
    return ", but ".join(parts)


def code_version() -> str:
    """A digest of this project's code, as it is on this node's disk: of moco/ and of the script that runs."""
    package = Path(__file__).parent
    script = Path(sys.modules["__main__"].__file__ if hasattr(sys.modules["__main__"], "__file__") else __file__)
    sources = [*sorted(package.glob("*.py")), script]
    return digest([(source.name, source.read_bytes()) for source in sources])


def describe_files(paths: Sequence[str]) -> str:
    """Count and digest of a list of files, wherever their folder is."""
    return f"{len(paths)} files ({digest(paths)})"


def describe_classes(classes: Sequence[str]) -> str:
    """Count and digest of a class list."""
    return f"{len(classes)} classes ({digest(list(classes))})"


def describe_checkpoint(saved: Mapping) -> str:
    """Epoch, step and digest of what was loaded from a checkpoint."""
    if not saved:
        return "none"
    return f"epoch {saved.get('epoch')}, step {saved.get('step', 0)} ({digest(saved)})"


def digest(value: object) -> str:
    """Eight characters that differ for different values: tensors, arrays, paths, and containers of them."""
    state = hashlib.blake2b(digest_size=4)
    for part in _bytes_of(value):
        state.update(part)
    return state.hexdigest()


def _bytes_of(value: object) -> Iterable[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, PathList):
        yield "\0".join(value.names()).encode(errors="surrogateescape")
    elif isinstance(value, LabelList):
        yield np.asarray(value).tobytes()
    elif isinstance(value, Mapping):
        yield b"{"
        for name, item in value.items():
            yield repr(name).encode()
            yield from _bytes_of(item)
        yield b"}"
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from _bytes_of(item)
            yield b","
        yield b"]"
    else:
        yield repr(value).encode(errors="surrogateescape")
