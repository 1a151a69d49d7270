import ctypes
from pathlib import Path

import pytest
import torch
from helpers import FORKSERVER

from moco.encoders import configure_device


def resident():
    """Memory of this process, MB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


def stays(keep):
    """MB, of 100 allocated and freed."""
    if keep:
        configure_device(torch.device("cpu"), strict_fp32=False, deterministic=False)
    before = resident()
    torch.ones(100 * 2**18)
    return resident() - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="for glibc only")
def test_a_cpu_process_keeps_freed_memory():
    with FORKSERVER.Pool(1) as pool:
        freed, kept = pool.map(stays, [False, True])
    assert kept > 90 > 10 > freed
