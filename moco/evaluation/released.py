"""The checkpoints that the paper's authors released, by name: `released:patch-k16384-a2-run1`."""

import csv
import os
import tempfile
from pathlib import Path

import torch

from moco.errors import UsageError
from moco.training import checkpoint

TABLE = Path(__file__).parent / "released_checkpoints.csv"
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

    gdown downloads it to PyTorch's cache folder; only a checkpoint is kept. Raises UsageError for an unknown name, if
    gdown is missing or fails, and for a file that is no checkpoint; the message says what to do by hand.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME)
    if name not in drive_ids():
        raise UsageError(f"--pretrained {path}: no such checkpoint; there are {', '.join(drive_ids())}")
    cached = os.path.join(torch.hub.get_dir(), "non-semantic-negatives", f"{name}.pth.tar")
    if not os.path.exists(cached):
        by_hand = f"download {link(drive_ids()[name])} and save it as {cached}"
        try:
            _download(drive_ids()[name], cached)
        except ImportError:
            raise UsageError(f"--pretrained {path}: pip install gdown, or {by_hand}") from None
        except Exception as error:  # gdown raises whatever its own dependencies raise
            raise UsageError(f"--pretrained {path}: the download failed ({error}); {by_hand}") from error
    return cached


def _download(drive_id: str, cached: str) -> None:
    """Download a checkpoint, whole or not at all; raises an exception if that fails or it is something else."""
    import gdown

    os.makedirs(os.path.dirname(cached), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(cached)) as folder:
        partial = os.path.join(folder, os.path.basename(cached))
        if not gdown.download(id=drive_id, output=partial):
            raise OSError("no file came")
        with open(partial, "rb") as file:
            if file.read(512).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
                raise OSError("a web page came, with which the drive refuses downloads for some hours")
        if not checkpoint.load(partial, "downloaded").get("state_dict"):
            raise OSError("it holds no state_dict")
        os.replace(partial, cached)
