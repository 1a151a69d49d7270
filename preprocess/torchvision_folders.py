"""Write one of torchvision's small data sets as folders of images, as the training scripts read them.

    python preprocess/torchvision_folders.py --dataset stl10 --root raw --out stl10

Writes OUT/{train,val}/<class>/<number>.png. STL-10's 100,000 unlabeled images, on which the paper pre-trains, become a
data set of their own: OUT/unlabeled/train/all/<number>.png. Raw files are read from RAW as torchvision keeps them;
missing ones are downloaded to RAW. The script can be stopped and run again; another data set is refused in OUT.
"""

import argparse
import functools
import gzip
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import common
import pool

if TYPE_CHECKING:  # --help and wrong options need not wait for PyTorch
    from torch.utils.data import Dataset

# data set: (class in torchvision.datasets, the arguments of its training part, those of its test part)
DATASETS = {
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
}


def parse_args() -> tuple[common.Parser, argparse.Namespace]:
    begin = "--dataset cifar10 --root raw --out cifar10"
    parser = common.Parser("Write one of torchvision's small data sets as folders of images.", begin)
    parser.add_argument("--dataset", choices=DATASETS, required=True, help="which one")
    add = functools.partial(parser.add_argument, type=Path, required=True)
    add("--root", metavar="RAW", help="folder of the raw files; downloads go there")
    add("--out", metavar="DIR", help="folder to create")
    return parser, parser.parse_args()


def parts_of(name: str) -> dict[str, dict]:
    """{folder below OUT: arguments of torchvision's class}"""
    _, train, test = DATASETS[name]
    return {"train": train, "val": test} | ({"unlabeled/train": {"split": "unlabeled"}} if name == "stl10" else {})


def unpack_idx(root: Path, scratch: str) -> Path | str:
    """Unpack FashionMNIST's *-ubyte.gz, as its archive and Debian's dataset-fashion-mnist hold them, to `scratch`.

    Returns the folder to give torchvision: `root` if there was nothing to unpack.
    """
    raw = Path(scratch, "FashionMNIST", "raw")
    raw.mkdir(parents=True)
    for packed in root.glob("*-ubyte.gz"):
        raw.joinpath(packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return scratch if any(raw.iterdir()) else root


def open_part(kind: type, root: Path | str, part: dict) -> "Dataset":
    """The data set's part from `root`, else from the network. RuntimeError if it is in neither."""
    try:
        return kind(root, **part)
    except RuntimeError:  # torchvision found no files, or not all of them
        try:
            return kind(root, download=True, **part)
        except (URLError, OSError) as error:
            raise RuntimeError(f"no raw files of it, and downloading them failed ({error})") from error


def class_name(dataset: "Dataset", label: int) -> str:
    """The folder of a class; unlabeled images are all one class."""
    return dataset.classes[label].replace("/", "_").replace(" ", "_") if label >= 0 else "all"


def write_images(dataset: "Dataset", folder: Path) -> None:
    """Write those images that are not there yet as folder/<class>/<number>.png, RGB."""
    for index in pool.progress(range(len(dataset)), len(dataset), "image", str(folder)):
        image, label = dataset[index]
        path = folder / class_name(dataset, label) / f"{index:06}.png"
        if not common.is_whole(path):
            common.write_atomically(path, common.encode(image.convert("RGB"), "PNG", compress_level=1))


def main() -> None:
    parser, args = parse_args()
    from torchvision import datasets

    kind = getattr(datasets, DATASETS[args.dataset][0])
    with tempfile.TemporaryDirectory() as scratch:
        root = unpack_idx(args.root, scratch) if args.dataset == "fashionmnist" else args.root
        try:
            opened = {folder: open_part(kind, root, part) for folder, part in parts_of(args.dataset).items()}
        except RuntimeError as error:
            parser.error(f"--root {args.root}: {error}")
        common.claim("--out", args.out, "torchvision.json", {"dataset": args.dataset})
        for folder, dataset in opened.items():
            write_images(dataset, args.out / folder)
            print(f"{args.out / folder}: {len(dataset)} images")


if __name__ == "__main__":
    common.run(main)
