"""The checkpoints that the paper's authors released, by name: `released:patch-k16384-a2-run1`."""

import csv
import os
from pathlib import Path

import torch

from moco.errors import UsageError

TABLE = Path(__file__).parent / "data" / "released_checkpoints.csv"
SCHEME = "released:"


def drive_ids() -> dict[str, str]:
    """{name: Google Drive file id}"""
    with open(TABLE, newline="") as file:
        return {line["name"]: line["google_drive_id"] for line in csv.DictReader(file)}


def link(drive_id: str) -> str:
    return f"https://drive.google.com/uc?id={drive_id}"


def listing() -> str:
    return "\n".join(f"{SCHEME}{name:28}  {link(drive_id)}" for name, drive_id in drive_ids().items())


def local_path(path: str) -> str:
    """`path` itself, or the local file of the released checkpoint that it names, downloaded if necessary.

    gdown downloads it to PyTorch's cache folder. Raises UsageError for an unknown name, and if gdown is missing or
    fails; the message has the link and the place for a download by hand.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME)
    if name not in drive_ids():
        raise UsageError(f"--pretrained {path}: no such checkpoint; there are {', '.join(drive_ids())}")
    cached = os.path.join(torch.hub.get_dir(), "non-semantic-negatives", f"{name}.pth.tar")
    if os.path.isfile(cached):
        return cached
    by_hand = f"download {link(drive_ids()[name])} and save it as {cached}"
    try:
        import gdown
    except ImportError:
        raise UsageError(f"--pretrained {path}: pip install gdown, or {by_hand}") from None
    os.makedirs(os.path.dirname(cached), exist_ok=True)
    partial = f"{cached}.{os.getpid()}.partial"
    try:
        downloaded = gdown.download(id=drive_ids()[name], output=partial)
    except Exception as error:  # gdown raises whatever its own dependencies raise
        raise UsageError(f"--pretrained {path}: gdown failed ({error}); {by_hand}") from error
    if not downloaded:
        raise UsageError(f"--pretrained {path}: gdown failed; {by_hand}")
    os.replace(partial, cached)
    return cached
