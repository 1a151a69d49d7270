"""List the images of a data set: class folders, photos with their textures, class lists; needs no PyTorch."""

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco.errors import UsageError, printable

IMAGENET_100 = Path(__file__).parents[2] / "preprocess" / "imagenet_100.txt"
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision
NOT_DATA = ("lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # folders of systems
IN_ORDER = "# in this order\n"  # first line of a class list for a head whose outputs are not sorted
FLAT = "all"  # the class of images that lie in no class folder
FORMS = "docs/own-data.md#data-in-another-form"


class PathArray(Sequence):
    """A read-only sequence of the paths root + name, as str, that holds the names in one array of bytes.

    Forked workers share its memory, where they would copy a list of str by reading it; it is pickled as one block.
    Indexed with a slice, a mask or several indices, it gives another PathArray, as NumPy's arrays do.
    """

    def __init__(self, root: str, names: Iterable[str]):
        """names: relative to `root`."""
        self.root, self._names = root, np.frombuffer(os.fsencode("".join(f"{name}\0" for name in names)), np.uint8)
        self._ends = np.flatnonzero(self._names == 0)

    def names(self) -> list[str]:
        """All paths relative to `root`, as a new list."""
        return os.fsdecode(self._names.tobytes()).split("\0")[:-1]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if not isinstance(index, (int, np.integer)):
            names = self.names()
            return PathArray(self.root, (names[i] for i in np.arange(len(self))[index]))
        index = range(len(self))[index]  # counts negative ones from the end
        start = self._ends[index - 1] + 1 if index else 0
        return self.root + os.fsdecode(self._names[start : self._ends[index]].tobytes())


class ImageFolder(NamedTuple):
    """The images of a folder of class folders, by class and then by path."""

    paths: PathArray
    labels: np.ndarray  # int32, ascending
    classes: list[str]  # the sorted names of label 0, 1, …
    left_out: str = ""  # how many files of other formats lie among the images, as "2 .gif, 1 .txt"

    def first(self, limit: int | None) -> "ImageFolder":
        """Only the first `limit` images of each class; all for None."""
        if limit is None:
            return self
        chosen = np.arange(len(self.labels)) - np.searchsorted(self.labels, self.labels) < limit
        return self._replace(paths=self.paths[chosen], labels=self.labels[chosen])


class TrainingImages(NamedTuple):
    """The images to pre-train on; `textures` are those of the photos, in the same order, or None."""

    photos: PathArray
    textures: PathArray | None
    labels: np.ndarray
    classes: list[str]
    unmatched: str = ""  # how many photos were left out because they have no texture, with examples
    left_out: str = ""  # as of ImageFolder: beside the photos, or the textures


# Listing


def list_images(directory: str | Path, flat: bool = False, known: Collection[str] | None = None) -> ImageFolder:
    """List the images of a folder of class folders: regular files at any depth with a suffix of IMG_EXTENSIONS.

    Follows links; a link to an image is listed under its own name. Skips hidden entries and NOT_DATA, and counts files
    with another suffix. flat: accept images in the folder itself, if it has no class folders, as one class, FLAT.
    known: the classes that must not be empty, by default all; others are skipped. Raises UsageError if one of them is,
    if the directory is missing or has no class folders, if images lie beside these, if something cannot be read, or if
    links lead nowhere or to one folder twice, as every loop does.
    """
    directory = Path(directory)
    if not is_folder(directory):
        raise refusal(directory, "no such directory; it must hold one folder of images per class")
    others: Counter[str] = Counter()
    folders, images = scan_folder(directory, others)
    classes, beside = sorted(folders), sorted(images)
    if beside and classes:
        names = _count_and_first(beside)
        raise UsageError(f"{directory}: it has images beside its class folders: {names}; move them into these, or away")
    root = str(directory / "_").removesuffix("_")
    if beside and flat:
        return ImageFolder(PathArray(root, beside), np.zeros(len(beside), np.int32), [FLAT], count_text(others))
    if not classes:
        found = f"{len(beside)} images; labels need one folder of images per class" if beside else count_text(others)
        raise refusal(directory, f"it has no class folders{found and f', only {found}'}")
    listed = {}
    _list_once(directory, os.path.realpath(directory), listed)
    found = {name: images_in(root + name, listed, others) for name in classes}
    known = known if known is not None and any(found.values()) else set(classes)
    if empty := [name for name in classes if name in known and not found[name]]:
        only = f", only {count_text(others)} (not read; convert images to {' '.join(IMG_EXTENSIONS)})" if others else ""
        raise UsageError(f"{directory}: no image in {_count_and_first(empty)}{only}; remove or fill these folders")
    classes = [name for name in classes if found[name]]
    paths = PathArray(root, (f"{name}/{image}" for name in classes for image in found[name]))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found[name]) for name in classes])
    return ImageFolder(paths, labels, classes, count_text(others))


def count_text(suffixes: Counter[str]) -> str:
    """{suffix: files} as text: "20 .avif, 1 .txt"."""
    return printable(", ".join(f"{n} {suffix}" for suffix, n in suffixes.most_common()))


def class_folders(folder: str | Path) -> list[str]:
    """The sorted names of a folder's subfolders. Raises UsageError as `scan_folder` does."""
    return sorted(scan_folder(folder)[0])


def images_in(
    class_folder: str | Path, listed: dict[str, str] | None = None, others: Counter[str] | None = None
) -> list[str]:
    """The sorted paths, relative to a class folder, of the images at any depth in it.

    listed: one dict for all class folders that are listed together: no folder may be reached twice. others: counts the
    files that are no images, by suffix. Raises UsageError as `list_images` does.
    """
    listed = {} if listed is None else listed
    images, waiting = [], [("", os.path.realpath(class_folder))]
    while waiting:
        below, real = waiting.pop()
        folder = os.path.join(class_folder, below).removesuffix("/")
        _list_once(folder, real, listed)
        folders, names = scan_folder(folder, others)
        images += [below + name for name in names]
        for name in folders:
            path = os.path.join(folder, name)  # realpath looks at every folder above, so only for links
            inner = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
            waiting.append((f"{below}{name}/", inner))
    return sorted(images)


def scan_folder(folder: str | Path, others: Counter[str] | None = None) -> tuple[list[str], list[str]]:
    """The names of a folder's subfolders and of its images; follows links, skips hidden entries and NOT_DATA.

    others: counts the other files by suffix. Makes no system call per entry, except for links. Raises UsageError if
    something cannot be read or a link leads nowhere.
    """
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in NOT_DATA:
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    if entry.name.lower().endswith(IMG_EXTENSIONS):
                        images.append(entry.name)
                    elif others is not None:
                        others[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1
                elif entry.is_symlink():
                    os.stat(entry.path)  # raises an error if it leads nowhere
        os.stat(os.path.join(folder, "."))  # raises an error if the files in it cannot be opened
    except OSError as error:
        raise _unreadable(error.filename or folder, error) from error
    return folders, images


def is_folder(path: str | Path) -> bool:
    """Whether the folder exists. Raises UsageError if it cannot be examined, or is a link that leads nowhere."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not os.path.islink(path):
            return False
        raise _unreadable(path, error) from error


def refusal(path: str | Path, told: str) -> UsageError:
    """The error on a path that is no folder of class folders: a file, or what `told` says."""
    told = "a file; name the folder that holds train/" if os.path.isfile(path) else told
    return UsageError(f"{path}: {told}; archives, tables and other forms of data: {FORMS}")


def _list_once(folder: str | Path, real: str, listed: dict[str, str]) -> None:
    """Raise UsageError if a link led to this folder, and it is, or contains, one that is listed already.

    listed: {real path of a listed folder or of one above it: the path by which it was reached}; the folder is added.
    """
    if real in listed:
        raise UsageError(f"{folder}: a link makes the images of {listed[real]} count twice; remove the link")
    while real not in listed:
        listed[real] = str(folder)
        real = os.path.dirname(real)


def _unreadable(path: str | Path, error: Exception) -> UsageError:
    if os.path.islink(path) and not os.path.exists(path):
        return UsageError(f"{path}: a link that leads nowhere ({os.readlink(path)}); restore its target or remove it")
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"{path}: cannot be read ({reason}); nothing may be missing from a listing")


def _count_and_first(names: Sequence[str]) -> str:
    return printable(f"{len(names)}: {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5))


# Training sets


def split_path(data: str, split: str) -> str:
    """DATA/split. Raises UsageError that says which of the two is missing."""
    if not is_folder(data):
        raise refusal(data, f"no such directory; DIR must hold {split}/ with one folder of images per class")
    path = os.path.join(data, split)
    if not is_folder(path):
        names, images = scan_folder(data, others := Counter())
        there = [*(f"{name}/" for name in sorted(names)[:5]), count_text(others + Counter(images=len(images)))]
        inner = next((name for name in sorted(names) if os.path.isdir(os.path.join(data, name, split))), None)
        way = f"name {data}/{inner}" if inner else f"DIR is the folder above {split}/, not {split}/ itself"
        raise refusal(data, f"it has no {split}/ folder and holds {', '.join(filter(None, there)) or 'nothing'}; {way}")
    if split == "val":
        check_not_training(path)
    return path


def check_not_training(val: str) -> None:
    """Raise UsageError if val/, or a class folder or its first image, is the one in train/ beside it: by a link."""
    train = os.path.join(os.path.dirname(os.path.realpath(val)), "train")
    firsts = (f"{name}/{image}" for name in class_folders(val) for image in scan_folder(os.path.join(val, name))[1][:1])
    for name in [".", *class_folders(val), *firsts]:
        own, other = os.path.join(val, name), os.path.join(train, name)
        if os.path.exists(other) and os.path.samefile(own, other):
            raise UsageError(
                f"{os.path.normpath(own)}: these are the training images, {os.path.normpath(other)}; test on others"
            )


def photo_root(texture_root: str) -> Path:
    """X, the photos of the texture data set X-texture. Raises UsageError for another name."""
    root = Path(os.path.normpath(texture_root))
    if not root.name.endswith("-texture"):
        raise UsageError(
            f"{root}: a texture data set's name ends in -texture, for example {root}-texture beside {root}"
        )
    return root.with_name(root.name.removesuffix("-texture"))


def list_training_images(data: str, with_textures: bool = False) -> TrainingImages:
    """The training images of the data set `data`; with textures, the pairs of `data`, X-texture, and X.

    A texture has the relative path of its photo, suffix aside. Photos without a texture are left out and counted in
    `unmatched`: an unreadable photo never gets a texture. Raises UsageError if X is missing, or if textures have no
    photo (their number and the first five).
    """
    photo_data = str(photo_root(data)) if with_textures else data
    photos = list_images(split_path(photo_data, "train"), flat=True)
    if not with_textures:
        return TrainingImages(photos.paths, None, photos.labels, photos.classes, left_out=photos.left_out)
    textures = list_images(split_path(data, "train"), flat=True)
    texture_of, photo_of = _index_by_stem(textures.paths), _index_by_stem(photos.paths)
    without_photo = [index for stem, index in texture_of.items() if stem not in photo_of]
    without_texture = [index for stem, index in photo_of.items() if stem not in texture_of]
    if without_photo:
        names = _count_and_first(textures.paths[without_photo])
        raise UsageError(f"{data}: textures without their photo in {photos.paths.root}: {names}")
    stems = sorted(texture_of)
    chosen = [texture_of[stem] for stem in stems]
    return TrainingImages(
        photos.paths[[photo_of[stem] for stem in stems]],
        textures.paths[chosen],
        textures.labels[chosen],
        textures.classes,
        _count_and_first(photos.paths[without_texture]) if without_texture else "",
        ", ".join(filter(None, (photos.left_out, textures.left_out))),
    )


def _index_by_stem(paths: PathArray) -> dict[str, int]:
    """{path relative to the root, without its suffix: index}. Raises UsageError for two images of one stem."""
    index_of = {name[: name.rindex(".")]: index for index, name in enumerate(paths.names())}
    if len(index_of) < len(paths):
        twins = sorted(set(range(len(paths))).difference(index_of.values()))
        names = _count_and_first(paths[twins])
        raise UsageError(f"{paths.root}: images with the name of another but for the suffix: {names}; remove them")
    return index_of


# Class lists


def read_class_list(path: str | Path) -> list[str]:
    """The wnids of a text file in UTF-8, separated by whitespace: sorted, unless its first line is "# in this order".

    Raises UsageError if it is missing, not text, empty, or names a class twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        ordered = text.removeprefix(IN_ORDER)
        wnids = ordered.split() if ordered != text else sorted(text.split())
    except (OSError, ValueError) as error:
        raise UsageError(f"--classes {path}: not a readable text file ({error})") from error
    wrong = [wnid for wnid, n in Counter(wnids).items() if n > 1 or not wnid.isprintable()]
    if wrong or not wnids:
        reason = f"{wrong[0]!a} is listed twice or holds invisible characters" if wrong else "it is empty"
        example = os.path.relpath(IMAGENET_100)
        raise UsageError(f"--classes {path}: {reason}; it must be UTF-8 and name each class once, like {example}")
    return wnids
