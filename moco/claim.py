"""One run per folder, one evaluation per report: rank 0 locks it before anything is built."""

import os
import re
from typing import NamedTuple

from moco import distributed, files
from moco.errors import UsageError


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
            owner = files.hold(self.lock)
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
