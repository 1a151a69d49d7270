"""docs/own-data.md: its steps from a folder of images to a table, run as printed on a few small images."""

import importlib.util
import json
import re
import subprocess
import sys
import textwrap

import pytest
from helpers import ENVIRONMENT, REPOSITORY, write_folder, write_photo

PAGE = (REPOSITORY / "docs" / "own-data.md").read_text()
LEFT_OUT = ("pip install", "torchvision_folders.py", "corruptions.py")  # the data are written here


def commands():
    section = PAGE.split("## The same by hand\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    lines = "".join(textwrap.dedent(block) for block in found if "python " in block)
    return [line for line in lines.replace("\\\n", " ").splitlines() if not any(each in line for each in LEFT_OUT)]


def write_images(root):
    """Files like those that the left-out steps write, of ten classes."""
    write_folder(root / "fashion", [f"c{label}" for label in range(10)], train=26, suffix=".png")
    for folder in ("fog/1", "snow/5"):
        for label in range(10):
            write_photo(root / "fashion-c" / folder / f"c{label}" / "0.png", (32, 32), seed=label)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_steps_of_the_page_lead_to_a_table(tmp_path):
    write_images(tmp_path)
    script = "\n".join(commands())
    for name in ("moco-non-sem-neg.py", "main_lincls.py", "eval_robustness.py"):
        assert name in script
        script = script.replace(name, str(REPOSITORY / name))
    script = script.replace("python ", f"{sys.executable} ").replace("--corruption", "--allow-partial --corruption")
    environment = ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        ["bash", "-e"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, f"{script}\n{run.stdout}\n{run.stderr}"
    table = json.loads((tmp_path / "robustness.json").read_text())["table"]
    assert {row: list(columns) for row, columns in table.items()} == {
        row: ["val", "Corruption"] for row in ("plain", "patch")
    }
    for picture in ("views", "curves", "corruptions"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5_000
