"""Files that are written whole or not at all, and locks that the system frees when their owner ends."""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import socket
import stat
import sys
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

from moco import distributed
from moco.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where the scripts end before they need it
    fcntl = None

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer
_held: dict[str, int] = {}  # descriptors of locks that this process holds until it ends


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """A file to write in; it takes the place of `path` when the block ends, and is removed if the block fails.

    It lies in the folder of `path`. Its name cannot be guessed and it must not exist, so that nothing is written
    through a link that somebody put there, nor by two processes. What killed processes left of earlier attempts is
    removed; a process that is still writing holds a lock on its file. Raises OSError.
    """
    path = os.fspath(path)
    for leftover in glob.glob(f"{glob.escape(path)}.{'[0-9a-f]' * 16}.partial"):
        _remove_abandoned(leftover)
    with contextlib.closing(_new_file(path, mode)) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(file.name)
            raise


def _new_file(path: str, mode: str) -> IO:
    """A locked new file beside `path`."""
    while True:
        partial = f"{path}.{secrets.token_hex(8)}.partial"
        file = open(partial, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")  # noqa: SIM115
        _lock(file.fileno())
        if os.path.exists(partial):
            return file
        file.close()  # another process took it for abandoned before it was locked


def _remove_abandoned(path: str) -> None:
    """Remove an unfinished file whose writer has ended. Links, and files that may still be written, stay."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor) is True:
                os.remove(path)
        finally:
            os.close(descriptor)


def hold(path: str) -> str:
    """Lock the file at `path`, which may not exist yet, until this process ends. '' or, if another has it, who has.

    The lock is the kernel's: it is freed however the process ends, also over NFS (version 4, or 3 with lockd), and is
    not inherited by forked processes. The file stays: removing it could free a lock that another process waits for. On
    a file system without locks a line on stderr says so. Raises OSError.
    """
    if path in _held:
        return ""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    locked = _lock(descriptor)
    if locked is False:
        time.sleep(0.2)  # its owner may be about to write who it is
        owner = os.pread(descriptor, 1000, 0)
        os.close(descriptor)
        return _describe(owner)
    if locked is None:
        print(
            f"{path}: this file system has no locks, so that nothing stops a second run from writing here: start one"
            " only",
            file=sys.stderr,
            flush=True,
        )
    _held[path] = descriptor
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    if "SLURM_JOB_ID" in os.environ:
        owner["job"] = os.environ["SLURM_JOB_ID"]
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    return ""


def _describe(owner: bytes) -> str:
    try:
        known = json.loads(owner)
        job = f", Slurm job {known['job']}" if "job" in known else ""
        return f"process {known['pid']} on {known['host']}, since {known['since']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _lock(descriptor: int) -> bool | None:
    """Whether the file could be locked for this process; None on a file system without locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


# ---- claim: One run per folder, one evaluation per report: rank 0 locks it before anything is built.


class Claim(NamedTuple):
    """What a run is about to write, and what was there when it was checked, before it was locked.

    name: as the user gave it, for messages. lock: the file to lock. pattern: a regular expression for the names of the
    files in question; seen: their states.
    """

    name: str
    lock: str
    folder: str
    pattern: str
    seen: dict[str, tuple]

    def take(self) -> None:
        """Lock it, on rank 0, until the process ends. All ranks must call this.

        Raises UsageError, on all ranks, if another process has it, or had it since it was looked at.
        """
        refusal = self._lock() if distributed.is_main() else ""
        if refusals := distributed.gather_lists([refusal] if refusal else []):
            raise UsageError(refusals[0])

    def _lock(self) -> str:
        """Why it is refused, '' if it is not."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            owner = hold(self.lock)
        except OSError as error:
            return f"{self.name}: {self.lock} cannot be created or locked ({error}); choose a folder you can write to"
        if owner:
            return (
                f"{self.name}: another run is writing here ({owner}); wait for its end or stop it, or choose another"
                " place"
            )
        if look_at(self.folder, self.pattern) != self.seen:
            return (
                f"{self.name}: another run wrote here while this one was starting; run the same command again, with"
                " --resume auto to continue that run"
            )
        return ""


def of_folder(option: str, folder: str) -> Claim:
    """A claim of a folder of checkpoints with its log, as it is now."""
    pattern = r".+\.(pth\.tar|jsonl)"
    return Claim(f"{option} {folder}", os.path.join(folder, ".lock"), folder, pattern, look_at(folder, pattern))


def of_file(option: str, path: str) -> Claim:
    """A claim of one file, as it is now."""
    folder, name = os.path.split(path)
    folder = folder or "."
    lock = os.path.join(folder, f".{name}.lock")
    pattern = re.escape(name)
    return Claim(f"{option} {path}", lock, folder, pattern, look_at(folder, pattern))


def look_at(folder: str, pattern: str) -> dict[str, tuple]:
    """{name: what changes when the file is written again} of the folder's files whose names match."""
    if not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if re.fullmatch(pattern, entry.name) and entry.is_file()]
    states = {entry.name: entry.stat() for entry in found}
    return {name: (state.st_ino, state.st_mtime_ns, state.st_size) for name, state in states.items()}
