"""What every process of a node needs, made by one of them: the list of files, which takes long on a network drive."""

import json
import mmap
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from moco.processes.environment import LISTING_SECONDS, is_local_main, under_torchrun

Shared = TypeVar("Shared")
ANSWER_SECONDS = 10  # for torchrun's store


def once_per_node(name: str, make: Callable[[], Shared]) -> Shared:
    """make(), called by the node's first process under torchrun only; all others map its result into their memory.

    The arrays in it are shared, not copied. name: of what is made, equal in all processes. Where sharing is not
    possible, or make() fails in the first process, each process calls it. So does one that has waited LISTING_SECONDS.
    """
    if not _has_siblings():
        return make()
    try:
        store = _torchruns_store()
    except (dist.DistError, ValueError):
        return make()
    key = f"moco/{os.environ.get('GROUP_RANK', 0)}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{name}"
    if not is_local_main():
        try:
            store.wait([key], timedelta(seconds=LISTING_SECONDS))
            return _mapped(*json.loads(store.get(key)))
        except (dist.DistError, OSError, ValueError, TypeError):
            return make()
    where = []
    try:
        result = make()
        where = _in_memory_file(result)
    finally:
        store.set(key, json.dumps(where))
    return result


def _has_siblings() -> bool:
    return (
        under_torchrun()
        and int(os.environ["LOCAL_WORLD_SIZE"]) > 1
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and hasattr(os, "memfd_create")  # Linux
    )


def _torchruns_store() -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS))


def _in_memory_file(value: object) -> list:
    """[path, length of the pickled value, lengths of its arrays] of a file without a name that lives as this process.

    Empty if there can be none.
    """
    arrays = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts = [pickled, *(array.raw() for array in arrays)]
    try:
        descriptor = os.memfd_create("moco")
        with open(descriptor, "wb", closefd=False) as file:
            for part in parts:
                file.write(part)
    except OSError:  # not allowed, or no memory left
        return []
    return [f"/proc/{os.getpid()}/fd/{descriptor}", *map(len, parts)]


def _mapped(path: str, *lengths: int) -> object:
    """The value of `_in_memory_file`. Raises OSError or ValueError if it is gone."""
    with open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), sum(lengths), access=mmap.ACCESS_READ))
    parts, start = [], 0
    for length in lengths:
        parts.append(mapped[start : start + length])
        start += length
    return pickle.loads(parts[0], buffers=parts[1:])
