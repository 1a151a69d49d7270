"""Systems that are not supported: one line says so and what to do."""

import pytest
from helpers import EVALUATE, FAULTS, PRETRAIN, PROBE, run_script


@pytest.mark.parametrize("script", [PRETRAIN, PROBE, EVALUATE])
def test_on_windows_a_script_ends_in_one_line(script):
    run = run_script(FAULTS, "Windows", script, "--help", check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "use WSL" in run.stderr, run.stderr


@pytest.mark.parametrize("module", ["moco/negatives.py", "moco/builder.py", "moco/training/files.py"])
def test_what_other_code_imports_works_on_windows(module):
    run_script(FAULTS, "Windows", module)


@pytest.mark.parametrize("script", ["torchvision_folders.py", "imagenet_100_subset.py", "imagenet_texture_syn.py"])
def test_data_preparation_starts_on_windows(script):
    assert f"usage: {script}" in run_script(FAULTS, "Windows", f"preprocess/{script}", "--help").stdout
