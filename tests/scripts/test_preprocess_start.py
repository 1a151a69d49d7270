"""All scripts of preprocess/: what they import, and where their output goes."""

import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, REPOSITORY
from preprocessing import SCRIPTS, subset_command


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
    assert run.stdout.startswith(f"usage: {script}.py") and "numpy" in run.stderr.split()
    assert not {"torch", "torchvision"} & set(run.stderr.split())


@pytest.mark.parametrize("shell", ['"$@" | true', '"$@" >&-'])
@pytest.mark.parametrize("missing", [[], ["--classes", "nowhere.txt"]])
def test_a_closed_stdout_is_no_traceback(imagenet, shell, missing):
    command = map(str, [*subset_command(imagenet), *missing])
    pipe = ["bash", "-c", f'{shell}; exit "${{PIPESTATUS[0]}}"', "pipe", sys.executable, *command]
    run = subprocess.run(pipe, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in run.stderr and "BrokenPipe" not in run.stderr
    assert ("nowhere.txt" in run.stderr) == bool(missing)
    assert run.returncode in ({2} if missing else {0, 141} if "|" in shell else {0})  # 141: as SIGPIPE ends a program
