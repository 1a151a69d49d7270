"""Long sequences of paths and of labels, held as arrays, that the processes of a run share.

As Python lists, those of ImageNet take 150 MB. A forked data loader worker gets a copy of its own page by page, since
even reading an object changes its reference count, and pickling copies the lists whole. Arrays stay shared with forked
processes and are pickled as one block of bytes.
"""

import abc
import operator
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Buffer = bytes | memoryview | pickle.PickleBuffer


class _ArraySequence(Sequence):
    """A read-only sequence whose items are made from arrays when they are asked for; a slice is a list.

    It equals any sequence of the same items.
    """

    @abc.abstractmethod
    def _item(self, index: int) -> Any:
        """The item at 0 <= index < len(self)."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        position = operator.index(index)
        position += len(self) if position < 0 else 0
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} of a sequence of {len(self)}")
        return self._item(position)

    def __reversed__(self) -> Iterator:
        return reversed(list(self))  # not an item at a time

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3])) + (", …" if len(self) > 3 else "")
        return f"{type(self).__name__}({len(self)}: {shown})"


class PathList(_ArraySequence):
    """The paths root + name of many files, as str. names: the bytes of each name and a NUL, one after the other."""

    def __init__(self, root: str, names: Buffer):
        self.root, self._names = root, np.frombuffer(names, np.uint8)
        self._ends = np.flatnonzero(self._names == 0)

    @classmethod
    def of(cls, root: str, names: Iterable[str]) -> "PathList":
        return cls(root, os.fsencode("".join(name + "\0" for name in names)))

    def names(self) -> list[str]:
        """All paths relative to `root`, as a new list."""
        return os.fsdecode(self._names.tobytes()).split("\0")[:-1]

    def take(self, indices: Iterable[int]) -> "PathList":
        """The paths at these indices, in this order."""
        names = self._names.tobytes().split(b"\0")
        return PathList(self.root, b"".join(names[index] + b"\0" for index in indices))

    def _item(self, index: int) -> str:
        start = self._ends[index - 1] + 1 if index else 0
        return self.root + os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self):
        return (self.root + name for name in self.names())

    def __reduce_ex__(self, protocol: int) -> tuple:
        return PathList, (self.root, pickle.PickleBuffer(self._names) if protocol >= 5 else self._names.tobytes())


class LabelList(_ArraySequence):
    """Class labels, as int. numpy.asarray(labels) is an int32 view of them."""

    def __init__(self, labels: Iterable[int]):
        self._array = np.array(labels if isinstance(labels, np.ndarray) else list(labels), np.int32)

    def _item(self, index: int) -> int:
        return int(self._array[index])

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self):
        return iter(self._array.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._array, dtype) if copy else np.asarray(self._array, dtype)
