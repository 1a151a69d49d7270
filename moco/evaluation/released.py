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


def links() -> dict[str, str]:
    """{name: its link on Google Drive}"""
    with open(TABLE, newline="") as file:
        ids = {line["name"]: line["google_drive_id"] for line in csv.DictReader(file)}
    return {name: f"https://drive.google.com/uc?id={ids[name]}" for name in ids}


def local_path(path: str, linear: bool = False) -> str:
    """The file that --pretrained means: `path`, the one in a run's folder, or that of a released checkpoint.

    linear: a run's linear checkpoint instead of its last one of pre-training. gdown downloads a released one, which is
    none, to PyTorch's cache folder; only a checkpoint is kept. Raises UsageError for an unknown name, if gdown is
    missing or fails, and for a file that is no checkpoint; the message says what to do by hand.
    """
    if linear or not path.startswith(SCHEME):
        return checkpoint.of_run("--pretrained", path, checkpoint.BEST if linear else checkpoint.PRETRAINING)
    name, known = path.removeprefix(SCHEME), links()
    if name not in known:
        raise UsageError(f"--pretrained {path}: no such checkpoint; there are {', '.join(known)}")
    cached = os.path.join(torch.hub.get_dir(), "non-semantic-negatives", f"{name}.pth.tar")
    if os.path.exists(cached):
        return cached
    by_hand = f"download {known[name]} and save it as {cached}"
    try:
        import gdown

        os.makedirs(os.path.dirname(cached), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(cached)) as folder:  # a whole checkpoint, or nothing
            partial = os.path.join(folder, os.path.basename(cached))
            if not gdown.download(known[name], output=partial):
                raise OSError("no file came")
            checkpoint.load(partial, "downloaded")
            os.replace(partial, cached)
    except ImportError:
        raise UsageError(f"--pretrained {path}: pip install gdown, or {by_hand}") from None
    except Exception as error:  # gdown raises whatever its own dependencies raise
        raise UsageError(f"--pretrained {path}: the download failed ({error}); {by_hand}") from error
    return cached
