"""What the scripts here share: options, one-line errors, and files written whole or not at all."""

import argparse
import contextlib
import errno
import functools
import multiprocessing
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

# One thread per worker process. numpy reads these when it is loaded: import this module first.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
from PIL import Image, PngImagePlugin  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million: PIL's limit against decompression bombs
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: colour profiles may be larger than PIL's 1 MB
END_SIGNALS = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows has no SIGHUP
PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial$")  # the end of an unfinished file's name


class UsageError(Exception):
    """The input cannot work: one line on stderr that names the value and what would work, exit code 2."""


class RunError(Exception):
    """The script cannot continue, and the input is not to blame: one line on stderr, exit code 1."""


def cli_main(main: Callable[[], int | None]) -> NoReturn:
    """Call main() and exit with its code; errors end in one line on stderr, signals in 128 + their number."""
    _open_closed_streams()
    for signum in END_SIGNALS:
        if signal.getsignal(signum) == signal.SIG_DFL:  # not ignored, as under nohup
            signal.signal(signum, exit_on_signal)
    message, code = "", 1
    try:
        code = main()
        sys.stdout.flush()
    except UsageError as error:
        message, code = str(error), 2
    except RunError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, code = "interrupted; run the same command again to resume", 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of stdout has ended, as in `… | head`
        code = 141  # silent, like a program that SIGPIPE ends
    except OSError as error:  # a full or read-only disk, a drive that is gone
        message = f"{error}; free some space if the disk is full, and run the same command again to resume"
    except MemoryError:
        message = "out of memory; use fewer --workers and run the same command again to resume"
    finally:
        stop_workers()
        _flush_stdout()
    if message:
        sys.stderr.write(" ".join(f"{os.path.basename(sys.argv[0])}: error: {message}".split()) + "\n")
    sys.exit(code)


def _open_closed_streams() -> None:
    """Let what is printed to a closed stdout or stderr go nowhere, and not into the next file that is opened."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # no reader, or a full disk: Python would try again when it exits, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_on_signal(signum: int, frame: object) -> NoReturn:
    """The handler of END_SIGNALS in a script: 128 + the number of the signal, as shells expect."""
    sys.exit(128 + signum)


def printable(text: object) -> str:
    """The text with escapes for what stdout cannot print: names of files need not be UTF-8."""
    return str(text).encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help as wide as the terminal, with the defaults of those options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)

    def add_workers(self) -> None:
        self.add_argument("--workers", type=at_least_one, default=os.cpu_count(), metavar="N", help="worker processes")

    def error(self, message: str) -> NoReturn:
        self.exit(2, " ".join(f"{self.prog}: error: {message}".split()) + "\n")


def at_least_one(text: str) -> int:
    """A whole number of 1 or more; argparse.ArgumentTypeError otherwise."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def read_words(path: Path) -> list[str]:
    """The sorted words of a file, UTF-8 or UTF-16 with a byte order mark. OSError or ValueError if it is not text."""
    data = path.read_bytes()
    text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8")
    words = sorted(text.replace("\ufeff", " ").split())  # byte order marks, also of files that were joined
    odd = [word for word in words if not word.isprintable()]
    if odd:
        raise ValueError(f"{odd[0]!a} holds invisible characters; save it as UTF-8")
    return words


# Files


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an opened image, 8 bits per sample, from the range that its format declares: PIL would clip at 255.

    Raises ValueError if the range is not known. moco/images.py has the same function.
    """
    tiff = getattr(image, "tag_v2", {})
    packing = str(image.tile[0][3]) if getattr(image, "tile", None) else ""  # "RGB;16B": how the samples are stored
    full_range = ";16" in packing or "65535" in packing  # 16 bits, PIL keeps 8 of them if there are several bands
    if 2 in tiff.get(339, ()):  # SampleFormat
        raise ValueError("its samples are signed, so it is not known which is white; save it with unsigned ones")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its samples are {kind}, so it is not known which is white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int32).clip(0, 65535)
        bits = 12 if "I;12" in packing else 16
        if full_range and 0 < levels.max() < 4096:
            raise ValueError(f"its 16-bit samples reach only {levels.max()} of 65535, as 12-bit ones do; scale them")
        if tiff.get(262) == 0:  # PhotometricInterpretation: 0 is white
            levels = 2**bits - 1 - levels
        return Image.fromarray((levels >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if full_range:
        peaks = [high for band, (_, high) in zip(image.getbands(), image.getextrema()) if band not in "Aa"]
        if max(peaks) <= 16:
            raise ValueError("its 16-bit samples reach only a 16th of 65535, as 12-bit ones do; scale them")
    return image.convert("RGB")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that, even after a crash or when two processes write it, there is either nothing or all of it.

    It is written under a name that no other process has, and no link has, then renamed. OSError if it cannot be
    written. moco/files.py has a function of the same kind.
    """
    _remove_abandoned(os.path.dirname(path) or ".")
    while True:
        partial = f"{path}.{secrets.token_hex(8)}.partial"
        with open(partial, "xb") as file:
            lock(file)  # until it is renamed: unlocked ones count as abandoned
            if not os.path.exists(partial):
                continue  # another process took it for abandoned before it was locked
            try:
                file.write(data)
                file.flush()
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(partial)
                raise
            return


@functools.cache
def _remove_abandoned(folder: str) -> None:
    """Remove what processes that were killed left unfinished in a folder; once, since listing it takes time."""
    with os.scandir(folder) as entries:
        names = [entry.path for entry in entries if PARTIAL.search(entry.name) and entry.is_file(follow_symlinks=False)]
    for name in names:
        with contextlib.suppress(OSError), open(name, "r+b") as file:
            if lock(file, wait=False, supported=False):
                os.remove(name)


def lock(file: BinaryIO | int, wait: bool = True, supported: bool = True) -> bool:
    """Lock a file against other processes until it is closed; False if it is locked and `wait` is False.

    On a file system without locks, and on Windows, the answer is `supported`.
    """
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
                raise
            return supported
    return True if fcntl else supported


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process has the folder, which must exist, in a block of this; the system frees it at exit.

    The lock is on a file beside the folder, or in it where that cannot be written; over NFS folders themselves cannot
    be locked. The file stays.
    """
    real = os.path.realpath(folder)
    beside = os.path.join(os.path.dirname(real), f".{os.path.basename(real)}.lock")
    if not os.access(os.path.dirname(real), os.W_OK):
        beside = os.path.join(real, ".lock")
    with open(beside, "a+b", opener=_open_no_link) as file:
        if not lock(file, wait=False):
            file.seek(0)
            owner = file.read().decode(errors="replace")
            print(
                f"another process is writing {printable(folder)} ({owner}); waiting for it", file=sys.stderr, flush=True
            )
            lock(file)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
        file.flush()
        yield


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def stop_workers() -> None:
    """End the processes that this one has started."""
    for process in multiprocessing.active_children():
        process.terminate()


def report_broken(broken: Sequence[tuple[object, str]]) -> int:
    """List the broken images, (path, reason), on stderr. Returns the exit code: 1 if there are any."""
    if broken:
        print(f"{len(broken)} broken images were left out:", file=sys.stderr)
        for path, reason in broken:
            print(f"  {path}: {reason}", file=sys.stderr)
    return int(bool(broken))
