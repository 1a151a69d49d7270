"""The checkpoints that the paper's authors released, by name: `released:patch-k16384-a2-run1`."""

import csv
import os
from pathlib import Path

import torch

from moco.errors import UsageError
from moco.training import checkpoint

TABLE = Path(__file__).parent / "released_checkpoints.csv"
SCHEME = "released:"


def links() -> dict[str, str]:
    """{name: its link on Google Drive}"""
    with open(TABLE, newline="") as file:
        ids = {line["name"]: line["google_drive_id"] for line in csv.DictReader(file)}
    return {name: f"https://drive.google.com/uc?id={ids[name]}" for name in ids}


def local_path(path: str, linear: bool = False) -> str:
    """The file that --pretrained means: `path`, the one in a run's folder, or that of a released checkpoint.

    linear: a run's linear checkpoint instead of its last one of pre-training. Released ones, which are of pre-training,
    lie in PyTorch's cache folder. Raises UsageError for an unknown name, and for one that is not there: with its link.
    """
    if linear or not path.startswith(SCHEME):
        return checkpoint.of_run("--pretrained", path, checkpoint.BEST if linear else checkpoint.PRETRAINING)
    name, known = path.removeprefix(SCHEME), links()
    if name not in known:
        raise UsageError(f"--pretrained {path}: no such checkpoint; there are {', '.join(known)}")
    cached = os.path.join(torch.hub.get_dir(), "non-semantic-negatives", f"{name}.pth.tar")
    if not os.path.exists(cached):
        raise UsageError(f"--pretrained {path}: download {known[name]} and save it as {cached}")
    return cached
