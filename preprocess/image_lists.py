"""Lists of images, by the rule of moco/listing.py: what is prepared here is what is trained on there."""

import errno
import os
from pathlib import Path

from files import UsageError

NOT_DATA = ("lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # folders of systems
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def list_images(directory: Path, without_classes: bool = False) -> dict[str, list[str]]:
    """{class: the sorted paths, below its folder, of its images} of a folder of class folders.

    Images are the regular files, at any depth, whose suffix is an image's; links are followed; hidden entries and those
    of NOT_DATA are no data. Raises UsageError if there are no classes, if a class has no image or images lie beside the
    class folders, if something cannot be read or a link leads nowhere, and if links lead to the same folder twice, as
    all loops do. without_classes: images and no folders are accepted, too, as {"": their names}.
    """
    listed = {}
    list_once(directory, os.path.realpath(directory), listed)
    folders, names = scan_folder(str(directory))
    beside = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    if without_classes and beside and not folders:
        return {"": beside}
    if not folders:
        flat = f", only {len(beside)} images; make one folder of images per class" if beside else ""
        raise UsageError(f"{directory}: it has no class folders{flat}")
    if beside:
        raise UsageError(
            f"{directory}: it has {len(folders)} class folders and, beside them, images: {len(beside)}:"
            f" {', '.join(beside[:5])}{', …' if len(beside) > 5 else ''}; move these into their class folders, or away"
        )
    images = {name: images_in(directory / name, listed) for name in sorted(folders)}
    empty = [name for name, names in images.items() if not names]
    if empty:
        raise UsageError(
            f"{directory}: no image in {len(empty)}: {', '.join(empty[:5])}{', …' if len(empty) > 5 else ''};"
            " remove the empty class folders or fill them"
        )
    return images


def class_folders(folder: Path) -> list[str]:
    """The names of a folder's subfolders, sorted. Raises UsageError as `scan_folder`."""
    return sorted(scan_folder(str(folder))[0])


def images_in(top: Path, listed: dict[str, str] | None = None) -> list[str]:
    """The paths below a class folder of its images, sorted. Raises UsageError as `list_images`.

    listed: what list_once keeps, where several class folders are listed.
    """
    images, waiting = [], [("", os.path.realpath(top))]
    listed = {} if listed is None else listed
    while waiting:
        below, real = waiting.pop()
        folder = os.path.join(top, below) if below else str(top)
        list_once(folder, real, listed)
        folders, names = scan_folder(folder)
        images += [os.path.join(below, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        for name in folders:
            path = os.path.join(folder, name)
            # realpath looks at every folder above, so only for links
            real_path = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
            waiting.append((os.path.join(below, name), real_path))
    return sorted(images)


def scan_folder(folder: str) -> tuple[list[str], list[str]]:
    """The names of the subfolders and of the regular files in a folder, links followed, what is no data left out.

    Raises UsageError for what cannot be read and links that lead nowhere.
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
                    raise UsageError(
                        f"{entry.path}: a link that leads nowhere ({os.readlink(entry.path)}); restore what it leads"
                        " to, or remove it"
                    )
        if not os.access(folder, os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), folder)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: cannot be read ({error.strerror or error}); nothing may be missing from a"
            " listing"
        ) from error
    return folders, files


def list_once(folder: str | Path, real: str, listed: dict[str, str]) -> None:
    """Raise UsageError if the folder is, or lies above, one that is listed already: it was reached by a link.

    listed: {real path of a listed folder or of one above it: the path by which it was reached}; the folder is added.
    """
    if real in listed:
        raise UsageError(
            f"{folder}: a link makes images count twice: {real} is or holds what is listed as {listed[real]}; remove"
            " the link"
        )
    while real not in listed:
        listed[real] = str(folder)
        real = os.path.dirname(real)
