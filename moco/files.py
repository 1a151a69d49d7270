"""Files that are written whole or not at all."""

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """A file to write in; it takes the place of `path` when the block ends, and is removed if the block fails.

    It lies in the folder of `path`. Its name cannot be guessed and it must not exist, so that nothing is written
    through a link that somebody put there. What a killed process left of an earlier attempt is removed: one process at
    a time may write a file. Raises OSError.
    """
    path = os.fspath(path)
    for leftover in glob.glob(f"{glob.escape(path)}.{'[0-9a-f]' * 16}.partial"):
        os.remove(leftover)
    partial = f"{path}.{secrets.token_hex(8)}.partial"
    try:
        with open(partial, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
