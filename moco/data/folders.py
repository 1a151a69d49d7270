"""Which files are images of which class: folders of class folders, and photos with their textures."""

import abc
import codecs
import errno
import operator
import os
import pickle
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.errors import UsageError

IMAGENET_100 = Path(__file__).parents[2] / "preprocess" / "imagenet_100.txt"
FLAT = "all"  # the class of images that lie in no class folder
NOT_DATA = ("lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # folders of systems


# ---- sequences: Long sequences of paths and of labels, held as arrays, that the processes of a run share.

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


class ImageFolder(NamedTuple):
    """The images of a folder of class folders: sorted paths, labels, and the sorted class names of label 0, 1, …"""

    paths: Sequence[str]
    labels: Sequence[int]
    classes: list[str]


class TrainingImages(NamedTuple):
    """The images to pre-train on. `textures` are those of the photos, in the same order, or None."""

    photos: Sequence[str]
    textures: Sequence[str] | None
    labels: Sequence[int]
    classes: list[str]
    unmatched: str = ""  # how many photos were left out because they have no texture, with examples


def list_images(directory: str | Path) -> ImageFolder:
    """List a folder of class folders: the regular files, at any depth, whose suffix is an image's.

    Links are followed, and a link to an image is an image of its own name. Hidden entries and those of NOT_DATA are no
    data. Raises UsageError if the directory is missing or has no class folders, if a class has no image or images lie
    beside the class folders, if something cannot be read or a link leads nowhere, and if links lead to the same folder
    twice, as all loops do. preprocess/image_lists.py lists by the same rule.
    """
    directory = Path(directory)
    if not is_folder(directory):
        raise UsageError(f"{directory}: no such directory; it must hold one folder of images per class")
    classes, beside = _folders_and_images(str(directory))
    if beside and classes:
        raise UsageError(
            f"{directory}: it has {len(classes)} class folders and, beside them, images: {_count_and_first(beside)};"
            " move these into their class folders, or away"
        )
    if not classes:
        flat = f", only {len(beside)} images; labels are needed here: make one folder of images per class"
        raise UsageError(f"{directory}: it has no class folders{flat if beside else ''}")
    root = str(directory / "_").removesuffix("_")
    names, counts, empty, listed = [], [], [], {}
    _list_once(str(directory), os.path.realpath(directory), listed)
    for name in sorted(classes):
        files = _images_below(root, name, listed)
        if not files:
            empty.append(name)
        names.append(os.fsencode("".join(files)))
        counts.append(len(files))
    if empty:
        raise UsageError(
            f"{directory}: no image in {_count_and_first(empty)}; remove the empty class folders or fill them"
        )
    labels = LabelList(np.repeat(np.arange(len(counts)), counts))
    return ImageFolder(PathList(root, b"".join(names)), labels, sorted(classes))


def _folders_and_images(directory: str) -> tuple[list[str], list[str]]:
    """The names of the subfolders and of the images in a folder, the latter sorted."""
    folders, files = scan_folder(directory)
    return folders, sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS))


def list_flat(directory: str) -> ImageFolder | None:
    """The images that lie in a folder itself, as one class; None if there are none, or class folders."""
    folders, names = _folders_and_images(directory)
    if folders or not names:
        return None
    return ImageFolder(PathList.of(os.path.join(directory, ""), names), LabelList(np.zeros(len(names))), [FLAT])


def count_classes(data: str, classes: Sequence[str]) -> str:
    """The number of classes of the training images of `data`, and that they lie in no class folders, if so."""
    if list(classes) == [FLAT] and not os.path.isdir(os.path.join(data, "train", FLAT)):
        return "1 class, as there are no class folders"
    return f"{len(classes)} classes"


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder. Raises UsageError if that cannot be read, or for a link that leads nowhere."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise UsageError(_dangling(path)) from None
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise UsageError(_unreadable(path, error)) from error


def scan_folder(folder: str) -> tuple[list[str], list[str]]:
    """The names of the subfolders and of the regular files in a folder, links followed, what is no data left out.

    Costs no system call per entry, links aside. Raises UsageError for what cannot be read and links that lead nowhere.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in NOT_DATA:
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    raise UsageError(_dangling(entry.path))
        if not os.access(folder, os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), folder)
    except OSError as error:
        raise UsageError(_unreadable(error.filename or folder, error)) from error
    return folders, files


def _images_below(root: str, name: str, listed: dict[str, str]) -> list[str]:
    """The sorted names, relative to root, of the images below the class folder root + name, each with a final NUL."""
    images, waiting = [], [(name, os.path.realpath(root + name))]
    while waiting:
        folder, real = waiting.pop()
        _list_once(root + folder, real, listed)
        folders, files = scan_folder(root + folder)
        images += [f"{folder}/{file}\0" for file in files if file.lower().endswith(IMG_EXTENSIONS)]
        for inner in folders:
            path = os.path.join(root, folder, inner)
            # realpath looks at every folder above, so only for links
            inner_real = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, inner)
            waiting.append((f"{folder}/{inner}", inner_real))
    return sorted(images)


def _list_once(folder: str, real: str, listed: dict[str, str]) -> None:
    """Raise UsageError if the folder is, or lies above, one that is listed already: it was reached by a link.

    listed: {real path of a listed folder or of one above it: the path by which it was reached}; the folder is added.
    """
    if real in listed:
        raise UsageError(
            f"{folder}: a link makes images count twice: {real} is or holds what is listed as {listed[real]}; remove"
            " the link"
        )
    while real not in listed:
        listed[real] = folder
        real = os.path.dirname(real)


def _dangling(path: str | Path) -> str:
    return f"{path}: a link that leads nowhere ({os.readlink(path)}); restore what it leads to, or remove it"


def _unreadable(path: str | Path, error: Exception) -> str:
    return (
        f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); nothing may be missing from a listing"
    )


def split_path(data: str, split: str) -> str:
    """DATA/split. Raises UsageError that says which of the two is missing."""
    if not is_folder(data):
        raise UsageError(f"{data}: no such directory; DIR must hold {split}/ with one folder of images per class")
    path = os.path.join(data, split)
    if not is_folder(path):
        raise UsageError(f"{data}: it has no {split}/ folder; DIR is the folder above {split}/, not {split}/ itself")
    return path


def photo_root(texture_root: str) -> Path:
    """X, the photos of the texture data set X-texture. Raises UsageError for another name."""
    root = Path(os.path.normpath(texture_root))
    if not root.name.endswith("-texture"):
        raise UsageError(
            f"{texture_root}: with --robust texture, DIR is the texture data set, and its name ends in -texture,"
            f" for example {root}-texture beside {root}"
        )
    return root.with_name(root.name.removesuffix("-texture"))


def list_training_images(data: str, with_textures: bool = False) -> TrainingImages:
    """The training images of the data set `data`; with textures, `data` is the texture data set."""
    if with_textures:
        return list_texture_pairs(data)
    train = split_path(data, "train")
    folder = list_flat(train) or list_images(train)
    return TrainingImages(folder.paths, None, folder.labels, folder.classes)


def list_texture_pairs(data: str) -> TrainingImages:
    """The pairs of X-texture/train and X/train, where a texture has the relative path of its photo, suffix aside.

    Photos without a texture are left out and counted in `unmatched`: an unreadable photo never gets a texture.
    Raises UsageError if X is missing, or if textures have no photo (their number and the first five).
    """
    texture_dir, photo_dir = Path(split_path(data, "train")), Path(split_path(str(photo_root(data)), "train"))
    textures, photos = (list_flat(str(folder)) or list_images(folder) for folder in (texture_dir, photo_dir))
    texture_of, photo_of = _indices_by_stem(textures.paths), _indices_by_stem(photos.paths)
    for root, folder, index_of in (texture_dir, textures, texture_of), (photo_dir, photos, photo_of):
        if len(index_of) < len(folder.paths):
            alike = sorted(set(range(len(folder.paths))).difference(index_of.values()))
            raise UsageError(
                f"{root}: images that differ from another in the suffix only, so that their pairs are not known:"
                f" {_count_and_first(folder.paths.take(alike))}; remove them"
            )
    without_photo = textures.paths.take(sorted(texture_of[stem] for stem in texture_of.keys() - photo_of.keys()))
    if without_photo:
        raise UsageError(f"{data}: textures without their photo in {photo_dir}: {_count_and_first(without_photo)}")
    without_texture = photos.paths.take(sorted(photo_of[stem] for stem in photo_of.keys() - texture_of.keys()))
    stems = sorted(texture_of)
    chosen = [texture_of[stem] for stem in stems]
    return TrainingImages(
        photos.paths.take(photo_of[stem] for stem in stems),
        textures.paths.take(chosen),
        LabelList(np.asarray(textures.labels)[chosen]),
        textures.classes,
        _count_and_first(without_texture) if without_texture else "",
    )


def _indices_by_stem(paths: PathList) -> dict[str, int]:
    """{path relative to the root, without its suffix: index}; of equal ones the last."""
    return {name[: name.rindex(".")]: index for index, name in enumerate(paths.names())}


def _count_and_first(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    text = f"{len(names)}: {', '.join(names[:count])}{more}"
    return text.encode(errors="backslashreplace").decode()  # names need not be UTF-8, what is printed must


# Class lists


def read_class_list(path: str | Path) -> list[str]:
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
