"""All scripts of preprocess/ start without PyTorch."""

import subprocess
import sys

import pytest
from helpers import REPOSITORY
from preprocessing import SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_pytorch(script, tmp_path):
    program = f"""
import runpy, sys
sys.argv, sys.path[0] = ["{script}.py", "--help"], "{REPOSITORY}/preprocess"  # as for a script
try:
    runpy.run_path("{REPOSITORY}/preprocess/{script}.py", run_name="__main__")
finally:
    print(*sys.modules, file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    usage, begin, *_ = run.stdout.splitlines()
    assert usage == f"usage: {script}.py [options]" and begin.startswith(f"to begin: python preprocess/{script}.py --")
    assert "numpy" in run.stderr.split() and not {"torch", "torchvision"} & set(run.stderr.split())
