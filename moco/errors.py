"""The exceptions of this project, which the scripts turn into one line on stderr; imports nothing heavy."""

import mmap
import os

_notes = mmap.mmap(-1, 2**20)  # shared with forked processes: 4 KB for each, by its number


class UsageError(Exception):
    """The user's input cannot work. The message names the value, why it is wrong, and one that would work."""


class RunError(Exception):
    """The run cannot continue, and the input is not to blame. The message says what happened and what to do."""


class Finished(Exception):
    """There is nothing left to do. The message says so on stdout, and the exit code is 0: job scripts can be rerun."""


class PeerError(RunError):
    """Another process of this run has ended; that process reports the cause."""


def first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "")


def printable(text: object) -> str:
    """The text in one line, with control characters and undecodable bytes escaped: names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(message: str) -> str:
    return printable(" ".join(message.split())) + "\n"


def note_reading(path: str) -> None:
    """Note the file that this process is about to decode: if the decoder crashes, `read_last` tells the program."""
    start, note = os.getpid() % 256 * 4096, os.fsencode(f"{os.getpid()} {path}")[:4095] + b"\0"
    _notes[start : start + len(note)] = note


def read_last(pid: int) -> str:
    """The last file that a forked process noted."""
    owner, _, path = _notes[pid % 256 * 4096 :].partition(b"\0")[0].partition(b" ")
    return os.fsdecode(path) if owner == b"%d" % pid else "an unknown file"
