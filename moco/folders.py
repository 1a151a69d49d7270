"""What data sets hold: folders of class folders of images, and pairs of photos and textures."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.failures import BadInput


def list_photos(directory):
    """(paths, labels, classes) of a folder of class folders: paths sorted, labels 0.. by sorted class name.

    BadInput if the directory is missing, has no class folders, or one of them holds no image.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(f"{directory}: there is no such directory; it must hold one folder of images a class")
    try:
        classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    except OSError as error:
        raise BadInput(f"{directory}: it cannot be read ({error})") from error
    if not classes:
        raise BadInput(f"{directory}: it holds no class folders")
    paths, labels, empty = [], [], []
    for label, name in enumerate(classes):
        files = sorted(str(Path(folder, file)) for folder, _, names in os.walk(directory / name, followlinks=True)
                       for file in names if file.lower().endswith(IMG_EXTENSIONS))
        if not files:
            empty.append(name)
        paths += files
        labels += [label] * len(files)
    if empty:
        raise BadInput(f"{directory}: no image in {_first(empty)}; remove the empty class folders or fill them")
    return paths, labels, classes


def data_split(data, split):
    """DIR/split, or BadInput that says which of the two is missing."""
    if not os.path.isdir(data):
        raise BadInput(f"{data}: there is no such directory; DIR must hold {split}/ with one folder of images a class")
    path = os.path.join(data, split)
    if not os.path.isdir(path):
        raise BadInput(f"{data}: it has no {split}/ folder; DIR is the folder above {split}/, not {split}/ itself")
    return path


def photos_of(data):
    """X, the photos that the textures X-texture belong to; BadInput for another name."""
    root = Path(os.path.normpath(data))
    if not root.name.endswith("-texture"):
        raise BadInput(f"{data}: with --robust texture, DIR is the texture data set and its name ends in -texture,"
                       f" for example {root}-texture beside {root}")
    return root.with_name(root.name.removesuffix("-texture"))


def list_pairs(data):
    """(photos, textures, labels, classes, unpaired) of `X-texture/train`, whose photos lie at the same relative paths under
    X/train. Photos without a texture are left out, and `unpaired` counts and names them ("" if there are none): a photo
    that cannot be read never gets one.

    BadInput for a missing sibling data set, and for textures without a photo: their number, the first five by name.
    """
    texture_root = Path(data_split(data, "train"))
    photo_root = Path(data_split(photos_of(data), "train"))
    textures, texture_labels, classes = list_photos(texture_root)
    photos, _, _ = list_photos(photo_root)
    texture_of, photo_of = ({os.path.splitext(os.path.relpath(path, root))[0]: path for path in paths}
                            for root, paths in ((texture_root, textures), (photo_root, photos)))
    label_of = dict(zip(textures, texture_labels))
    lonely = sorted(texture_of[name] for name in texture_of.keys() - photo_of.keys())
    if lonely:
        raise BadInput(f"{data}: textures without their photo in {photo_root}: {_first(lonely)}")
    unpaired = sorted(photo_of[name] for name in photo_of.keys() - texture_of.keys())
    names = sorted(texture_of)
    textures = [texture_of[name] for name in names]
    return ([photo_of[name] for name in names], textures, [label_of[path] for path in textures], classes,
            _first(unpaired) if unpaired else "")


def _first(names, count=5):
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{len(names)}: {', '.join(names[:count])}{more}"
