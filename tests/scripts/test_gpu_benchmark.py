"""The benchmark for GPUs is tried at small sizes on the CPU."""

import json

import pytest
from helpers import run_script

BENCHMARK = ("-m", "tests.benchmarks.gpu")


@pytest.mark.slow
def test_the_gpu_benchmark_prints_its_tables(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    result = run_script("--tiny", "--trace", tmp_path / "trace.json", launcher=BENCHMARK, env=environment, timeout=600)
    for text in ("--tiny", "torch 2.", "| batch 8, fp32, images/s |", "| batch 8, bf16, images/s |", "| workers |"):
        assert text in result.stdout, result.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def event(kind, name, stream, start, duration):
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}


def test_copies_beside_kernels_of_other_streams_are_told(tmp_path):
    from tests.benchmarks.gpu import overlap

    kernels = [event("kernel", "conv", 7, 0, 50), event("kernel", "bn", 7, 40, 20), event("kernel", "blur", 20, 60, 40)]
    copies = [
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 50, 20),  # half of it beside kernels of stream 7
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 20, 0, 20),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*kernels, *copies, {"ph": "M"}]}))
    assert overlap(path) == 0.5
    path.write_text(json.dumps({"traceEvents": kernels}))
    assert overlap(path) is None
