"""Class lists: which class each output of a linear head stands for."""

import codecs
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moco import listing, testsets
from moco.errors import UsageError

IMAGENET_100 = Path(__file__).parents[1] / "preprocess" / "imagenet_100.txt"


def of_head(
    path: str, saved: Mapping, outputs: int, classes: str | Path | None = None, val: str | Path | None = None
) -> list[str]:
    """The wnid of each output: the checkpoint's own, those of --classes, those of --val, or ImageNet-100's.

    path, saved: the checkpoint and what it holds. Raises UsageError if none fits the number of outputs.
    """
    if saved.get("wnids"):
        return saved["wnids"]
    if classes:
        wnids = read(classes)
        if len(wnids) > outputs:
            raise UsageError(f"--classes {classes}: {len(wnids)} classes, but the head of {path} has {outputs} outputs")
        if val:
            _check_listed(classes, wnids, val)
        return wnids
    if val:
        of_val = listing.list_images(testsets.class_root(val)).classes
        if len(of_val) == outputs:
            return of_val
    imagenet_100 = read(IMAGENET_100)
    if outputs == len(imagenet_100) and (not val or set(imagenet_100) <= set(of_val)):
        return imagenet_100
    raise UsageError(
        f"--pretrained {path}: it stores no class list for its {outputs} outputs, and none fits; name a file of them"
        f" with --classes (ImageNet-100's: {os.path.relpath(IMAGENET_100)}), or give as --val the data the head was"
        f" trained on, if it has {outputs} classes, or train the head with main_lincls.py, which stores them"
    )


def _check_listed(classes: str, wnids: Sequence[str], val: str) -> None:
    """Raise UsageError if --val lacks a class of --classes: a misspelt name can shift the labels of the others."""
    root = testsets.class_root(val)
    absent = sorted(set(wnids) - set(listing.list_images(root).classes))
    if absent:
        raise UsageError(
            f"--classes {classes}: {len(absent)} of its {len(wnids)} classes, for example {absent[0]}, are not in"
            f" --val {root}; correct the list, or leave out --val to test on other sets"
        )


def read(path: str | Path) -> list[str]:
    """The sorted wnids of a file: UTF-8, or UTF-16 with a byte order mark, separated by whitespace.

    Raises UsageError if it is missing, not text, empty, or names a class twice.
    """
    if not os.path.isfile(path):
        raise UsageError(f"--classes {path}: no such file")
    try:
        wnids = _words(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"--classes {path}: not a readable text file ({error})") from error
    repeated = sorted({wnid for wnid, following in zip(wnids, wnids[1:]) if wnid == following})
    if not wnids or repeated:
        wrong = f"it names {repeated[0]} twice ({len(repeated)} repeated)" if repeated else "it is empty"
        raise UsageError(
            f"--classes {path}: {wrong}; it must name each class once, one per line, like"
            f" {os.path.relpath(IMAGENET_100)}"
        )
    return wnids


def _words(data: bytes) -> list[str]:
    """The sorted words of a text file. Raises ValueError if it is not text. preprocess/files.py has the same."""
    text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8")
    names = sorted(text.replace("\ufeff", " ").split())  # byte order marks, also of files that were joined
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise ValueError(f"{odd[0]!a} holds invisible characters; save it as UTF-8")
    return names
