"""Shared by the scripts here: the repository on the path, options, exit codes, the lock on the output folder.

Import it before numpy. The rest, class folders, conversion to RGB and atomic files, is moco's, without PyTorch.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"  # one thread per worker process; numpy reads these when it is loaded

from moco.data import folders  # noqa: E402
from moco.data.rgb import FORMATS, check_resizable, to_rgb  # noqa: E402, F401
from moco.errors import RunError, UsageError, note_reading, one_line, printable, read_last  # noqa: E402, F401
from moco.options import OptionParser, positive_int, seed_int, usable_cores  # noqa: E402, F401
from moco.processes import signals  # noqa: E402
from moco.processes.exits import cli_main  # noqa: E402
from moco.training.files import PARTIAL, FolderLock, atomic_write  # noqa: E402

RESUME = "run the same command again to resume"


def run(main: Callable[[], int | None]) -> None:
    """Call main() and exit with its code; errors end in one line on stderr, signals in 128 + their number."""
    signals.handle_stop_signals(lambda signum, frame: sys.exit(128 + signum), signals.END_SIGNALS)
    cli_main(main, again=RESUME)


class Parser(OptionParser):
    """The scripts' own parser, for several worker processes. begin: the arguments of a first command to try."""

    def __init__(self, description: str, begin: str):
        super().__init__(description, f"%(prog)s [options]\nto begin: python preprocess/%(prog)s {begin}")

    def add_workers(self) -> None:
        self.add_argument("--workers", type=positive_int, default=usable_cores(), metavar="N", help="worker processes")


def png_path(text: str) -> Path:
    """A file name that ends in .png; argparse.ArgumentTypeError otherwise."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png; try {Path(text).with_suffix('.png')}")
    return Path(text)


def lock(option: str, folder: Path) -> None:
    """Make the output folder and lock it until this process ends; wait while another process writes there.

    Raises UsageError if the folder cannot be made or locked.
    """

    def report(owner: str) -> None:
        print(f"another process is writing {folder} ({owner}); waiting for it", file=sys.stderr, flush=True)

    FolderLock(f"{option} {folder}", folder / ".lock").acquire(on_busy=report)


def claim(option: str, out: Path, mark: str, settings: dict) -> None:
    """Make an output folder and mark it as made with these settings, in the file `mark` in it.

    Needs no lock: of runs that start at once, one marks the folder and all compare. Raises UsageError if the folder was
    made with other settings, holds files and no mark, or cannot be written to.
    """
    wanted, path = one_line(json.dumps(settings)).strip(), out / mark  # the text that is printed below
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Listed before the mark is read: runs mark the folder before they write anything else there.
        if all(name.startswith(".") or name in folders.NOT_DATA or PARTIAL.search(name) for name in os.listdir(out)):
            _write_unless_there(path, wanted + "\n")
        made = one_line(path.read_text(errors="replace")).strip() if path.is_file() else ""
    except OSError as error:
        raise UsageError(f"{option} {out} cannot be written to ({error}); choose another folder") from error
    if made and made != wanted:
        holds = f"images made with {made}, not {wanted}"
        raise UsageError(f"{option} {out} holds {holds}; name a new folder, or remove this one")
    if not made:
        raise UsageError(
            f"{option} {out} holds files but no {mark}, which tells how they were made; name a new folder or, if they"
            f" were made with these settings, write this line to {path}: {wanted}"
        )


def make_once(out: Path, mark: str, settings: dict, make: Callable[[], object]) -> None:
    """Lock and claim --out, and fill it with make(), unless it is whole already: the file `mark` is written last."""
    lock("--out", out)
    whole, begun = out / mark, out / f"{mark}.begun"
    claim("--out", out, (whole if whole.is_file() else begun).name, settings)
    if whole.is_file():
        print(f"{out}: already there")
    else:
        make()
        begun.rename(whole)


def _write_unless_there(path: Path, text: str) -> None:
    """Write a file whole; if other processes write it at the same time, the first one's stays."""
    with tempfile.TemporaryDirectory(prefix=".mark-", dir=path.parent) as folder:
        whole = Path(folder, path.name)
        whole.write_text(text)
        try:
            os.link(whole, path)  # unlike a rename, it fails if the other one is there
        except OSError:
            if not path.exists():  # this file system has no hard links
                os.replace(whole, path)


def list_photos(folder: Path, limit: int | None, flat: bool = False) -> list[str]:
    """The paths below `folder` of the first `limit` photos of each class. Prints which other files lie there.

    flat: as of folders.list_images. Raises UsageError, too, if photos differ in the suffix alone: what is made of them
    would share a file.
    """
    listed = folders.list_images(folder, flat)
    report_left_out(folder, listed.left_out)
    photos = listed.first(limit).paths.names()
    if twins := len(photos) - len({os.path.splitext(photo)[0] for photo in photos}):
        told = "photos have the name of another but for the suffix (a.jpg, a.png), and would share one file"
        raise UsageError(f"{folder}: {twins} {told}; rename them")
    return photos


def report_left_out(folder: Path, left_out: str) -> None:
    """Print which other files lie among a folder's photos. left_out: as of folders.ImageFolder."""
    if left_out:
        print(f"{folder}: left out, as these formats are not read: {left_out}", flush=True)


def encode(image: Image.Image, kind: str, **options: int) -> bytes:
    """The content of an image file. kind, options: as of PIL's save()."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and its folder, so that even after a crash there is either nothing or all of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        file.write(data)


def is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0  # an empty one is what a power cut left of it
