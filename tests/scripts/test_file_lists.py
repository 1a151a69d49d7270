"""The cost of a long list of files, as the benchmark of start-up measures it."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.benchmarks import start_up


@pytest.mark.slow
def test_imagenets_list_costs_a_worker_no_memory():
    """1.28 million files, read by one of 8 ranks with 4 workers; the default start method is Python 3.14's."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))  # where a file may have a million links
    try:
        start_up.write_links(root, files=1_281_167, classes=1000)
        found = start_up.measured(root)
    finally:
        shutil.rmtree(root)
    memory = [value for name, value in found.items() if "private memory" in name]  # at the first batch, and the last
    assert len(memory) == 2 and max(memory) < 60 and memory[1] - memory[0] < 5, found
    assert sum(value for name, value in found.items() if name.endswith(", s")) < 8, found
    assert found["pickled list, MB"] < 60
