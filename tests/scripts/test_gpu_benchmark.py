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
