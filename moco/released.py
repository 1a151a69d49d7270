"""The checkpoints the paper's authors released, by name: `released:patch-k16384-a2-run1`."""

import csv
import os
from pathlib import Path

import torch

from moco.failures import BadInput

TABLE = Path(__file__).parent / "data" / "released_checkpoints.csv"
SCHEME = "released:"


def drive_ids():
    """{name: Google Drive file id}"""
    with open(TABLE, newline="") as file:
        return {line["name"]: line["google_drive_id"] for line in csv.DictReader(file)}


def link(drive_id):
    return f"https://drive.google.com/uc?id={drive_id}"


def listing():
    return "\n".join(f"{SCHEME}{name:24}  {link(drive_id)}" for name, drive_id in drive_ids().items())


def local_path(path):
    """`path` itself, or where the released checkpoint it names lies, which is downloaded first if it is not there.

    Downloads go through gdown, to PyTorch's cache folder. BadInput for an unknown name, and where gdown is not
    installed or fails: it says the link and where to put the file.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME)
    if name not in drive_ids():
        raise BadInput(f"--pretrained {path}: there is no such checkpoint; there are {', '.join(drive_ids())}")
    kept = os.path.join(torch.hub.get_dir(), "non-semantic-negatives", f"{name}.pth.tar")
    if os.path.isfile(kept):
        return kept
    by_hand = f"download {link(drive_ids()[name])} and save it as {kept}"
    try:
        import gdown
    except ImportError:
        raise BadInput(f"--pretrained {path}: pip install gdown, or {by_hand}") from None
    os.makedirs(os.path.dirname(kept), exist_ok=True)
    partial = f"{kept}.{os.getpid()}.partial"
    try:
        got = gdown.download(id=drive_ids()[name], output=partial)
    except Exception as error:  # gdown raises what its own dependencies raise
        raise BadInput(f"--pretrained {path}: gdown failed ({error}); {by_hand}") from error
    if not got:
        raise BadInput(f"--pretrained {path}: gdown failed; {by_hand}")
    os.replace(partial, kept)
    return kept
