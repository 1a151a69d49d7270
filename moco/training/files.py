"""Files that are written whole or not at all, and the lock on an output folder; imports nothing heavy."""

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from typing import IO

from moco.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where preprocess/ runs without locks
    fcntl = None

PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial$")  # the end of an unfinished file's name
# from file systems that cannot lock, or flush to the disk; 524: the kernel's own ENOTSUPP
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, 524}
_held: dict[str, int] = {}  # {lock file: descriptor}: closing the descriptor would free the lock


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """A file to write in; once on the disk it takes the place of `path`, and it is removed if the block fails.

    It lies in the folder of `path`, under a name that no other process and no link has. Files that killed processes
    left unfinished in that folder are removed, once per process. Raises OSError.
    """
    path = os.fspath(path)
    _remove_abandoned(os.path.dirname(path) or ".")
    with contextlib.closing(_new_file(path, mode)) as file:
        try:
            yield file
            file.flush()
            _flush_to_disk(file.fileno(), os.path.dirname(path) or ".")
            os.replace(file.name, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.remove(file.name)
            if isinstance(error, OSError):
                error.filename = path  # writing to an open file does not say which one
            raise


def _new_file(path: str, mode: str) -> IO:
    """A new file beside `path`, locked for as long as it is open: unlocked ones count as abandoned."""
    while True:
        partial = _partial(path)
        file = open(partial, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")  # noqa: SIM115
        _lock(file.fileno())
        if os.path.exists(partial):
            return file
        file.close()  # another process took it for abandoned before it was locked


def _partial(path: str) -> str:
    return os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.partial")


def _flush_to_disk(descriptor: int, folder: str) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn(f"{folder}: this file system cannot flush files to the disk: a power cut may take the last ones")


@functools.cache
def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_name(path: str, name: str) -> None:
    """Give a file a second name in its folder, in place of the file of that name; a copy where no links can be made."""
    partial = _partial(name)
    try:
        os.link(path, partial)
        os.replace(partial, name)
    except OSError:
        with open(path, "rb") as file, atomic_write(name, "wb") as copy:
            shutil.copyfileobj(file, copy)


@functools.cache
def _remove_abandoned(folder: str) -> None:
    """Remove the folder's unfinished files whose writers have ended. Links, and files that may be in use, stay."""
    with os.scandir(folder) as entries:
        names = [entry.path for entry in entries if PARTIAL.search(entry.name) and entry.is_file(follow_symlinks=False)]
    for name in names:
        with contextlib.suppress(OSError), open(name, "r+b") as file:
            if _lock(file.fileno()):
                os.remove(name)


class FolderLock:
    """Lock on an output folder or file, held by every process it is passed to, until all of them have ended.

    The kernel frees it, however they end, also on NFS (version 4, or 3 with lockd). name: for messages, as the user
    gave it. path: of the lock file, which stays: removing it could free a lock that another process waits for.
    """

    def __init__(self, name: str, path: str | os.PathLike):
        self.name, self.path = name, os.path.abspath(path)

    def acquire(self, on_busy: Callable[[str], object] | None = None) -> None:
        """Take the lock, before anything in the folder is read. A process that has it already keeps it.

        on_busy: called with the owner's description if another process has the lock, before waiting for it. Raises
        UsageError if another process has it and `on_busy` is None, or if it cannot be created.
        """
        if self.path in _held:
            return
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            locked = _lock(descriptor)
        except OSError as error:
            raise UsageError(
                f"{self.name}: {self.path} cannot be created or locked ({error}); choose a folder you can write to"
            ) from error
        if locked is False:
            time.sleep(0.2)  # its owner may be about to write who it is
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            if on_busy is None:
                os.close(descriptor)
                way = "wait for its end or stop it, or choose another place"
                raise UsageError(f"{self.name}: another run is writing here ({owner}); {way}")
            on_busy(owner)
            _lock(descriptor, wait=True)
        if locked is None and fcntl:
            _warn(f"{self.path}: this file system has no locks: see that no second run writes here")
        _held[self.path] = descriptor
        job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}{job}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)

    def __getstate__(self) -> tuple:
        """Passed to a process that is being started, it goes along with its descriptor, and with it the lock."""
        return self.name, self.path, reduction.DupFd(_held[self.path]) if self.path in _held else None

    def __setstate__(self, state: tuple) -> None:
        self.name, self.path, shared = state
        if shared is not None:
            _held[self.path] = shared.detach()


def _lock(descriptor: int, wait: bool = False) -> bool | None:
    """Whether the open file could be locked; None where the file system, or Windows, has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
