import ctypes
from pathlib import Path

import pytest
import torch
from helpers import FORKSERVER

from moco.encoders import configure_device


def resident():
    """Memory of this process, MB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


def send_what_stays(connection, keep):
    if keep:
        configure_device(torch.device("cpu"), strict_fp32=False, deterministic=False)
    before = resident()
    x = torch.ones(100 * 2**18)
    del x
    connection.send(resident() - before)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="for glibc only")
def test_a_cpu_process_keeps_freed_memory():
    stays = {}
    for keep in (True, False):
        here, there = FORKSERVER.Pipe()
        process = FORKSERVER.Process(target=send_what_stays, args=(there, keep))
        process.start()
        stays[keep] = here.recv()
        process.join()
    assert stays[True] > 90 > 10 > stays[False]  # MB, of 100 allocated and freed
