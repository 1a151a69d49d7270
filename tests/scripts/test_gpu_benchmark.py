"""The benchmark for GPUs is tried at small sizes on the CPU."""

import json

import pytest
from helpers import run_script

from tests.benchmarks.gpu import overlap


@pytest.mark.slow
def test_the_gpu_benchmark_prints_its_tables(tmp_path):
    options = {"launcher": ("-m", "tests.benchmarks.gpu"), "env": {"CUDA_VISIBLE_DEVICES": ""}, "timeout": 600}
    result = run_script("--tiny", "--trace", tmp_path / "trace.json", **options)
    for text in ("--tiny", "torch 2.", "| batch 8, fp32, images/s |", "| batch 8, bf16, images/s |", "| workers |"):
        assert text in result.stdout, result.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def event(kind, name, stream, start, duration):
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}


def test_copies_beside_kernels_of_other_streams_are_told(tmp_path):
    kernels = [event("kernel", "conv", 7, 0, 50), event("kernel", "bn", 7, 40, 20), event("kernel", "blur", 20, 60, 40)]
    copies = [
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 50, 20),  # half of it beside kernels of stream 7
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 20, 0, 20),
    ]
    for events, share in ([*kernels, *copies, {"ph": "M"}], 0.5), (kernels, None):
        (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
        assert overlap(tmp_path / "trace.json") == share
