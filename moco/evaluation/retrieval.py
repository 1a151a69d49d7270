"""Retrieval across two sets of pictures: does the nearest picture of the other set show the same?

It needs no labels. Two files of features by one network, of folders in which equal names show the same subject:
    python main_lincls.py --pretrained ckpts/RUN --features noto.npz emoji/artists/noto
    python main_lincls.py --pretrained ckpts/RUN --features black.npz emoji/artists/openmoji-black
    python -m moco.evaluation.retrieval noto.npz black.npz --baselines
The first file is searched for the nearest of each picture in the others. --baselines adds what needs no network:
colours, pixels and edges (Dalal & Triggs, Histograms of Oriented Gradients, CVPR 2005, without overlapping blocks).
"""

import argparse
import statistics
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from moco import options
from moco.data.images import read_rgb
from moco.errors import UsageError, printable
from moco.processes.exits import cli_main

SIDE, CELL, DIRECTIONS, CHUNK = 64, 8, 8, 512  # px of a picture, of a cell; directions of edges; queries at a time


class Features(NamedTuple):
    """The pictures of a file that `main_lincls.py --features` wrote."""

    file: str
    features: torch.Tensor  # (N, d)
    paths: list[str]

    def names(self, same: str) -> list[str]:
        """Each picture's file name without its suffix, or its folder's: the class."""
        return [Path(path).stem if same == "name" else Path(path).parent.name for path in self.paths]


def read_features(path: str) -> Features:
    """Raises UsageError if the file is none of `main_lincls.py --features`."""
    try:
        with np.load(path) as saved:
            return Features(path, torch.from_numpy(saved["features"]), saved["paths"].tolist())
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: no features of main_lincls.py --features ({error})") from error


def matches(queries: torch.Tensor, names: Sequence[str], gallery: torch.Tensor, bank: Sequence[str]) -> list[bool]:
    """For each of queries (N, d) with a name in the bank: whether the nearest of gallery (M, d), by cosine, has it."""
    known, keys = set(bank), F.normalize(gallery, dim=1).T
    nearest = torch.cat([(F.normalize(part, dim=1) @ keys).argmax(1) for part in queries.split(CHUNK)]).tolist()
    return [bank[index] == name for name, index in zip(names, nearest) if name in known]


def _percent(hits):  # with the standard error of report.difference: at least one picture's effect
    p, n = statistics.fmean(hits), len(hits)
    return f"{100 * p:.1f}±{100 * (p * (1 - p) / n + 1 / n**2) ** 0.5:.1f}"


# --- what needs no network: uint8 image (3, SIDE, SIDE) → a vector, to be compared by cosine


def colours(image: torch.Tensor) -> torch.Tensor:
    """Square roots of a histogram of 4×4×4 colours: the cosine is the overlap of two histograms (Bhattacharyya)."""
    bins = (image // 64).flatten(1).long()
    return (16 * bins[0] + 4 * bins[1] + bins[2]).bincount(minlength=64).sqrt()


def pixels(image: torch.Tensor) -> torch.Tensor:
    """Pixels less their mean: the cosine is their correlation."""
    return image.float().flatten() - image.float().mean()


def edges(image: torch.Tensor) -> torch.Tensor:
    """The strength of edges by direction, any sign, in each cell of CELL px; cells have unit length."""
    rows, columns = torch.gradient(image.float().mean(0))
    angle = torch.atan2(rows, columns).remainder(torch.pi) * (DIRECTIONS / torch.pi)
    by_direction = F.one_hot(angle.round().long() % DIRECTIONS, DIRECTIONS).movedim(2, 0) * torch.hypot(rows, columns)
    return F.normalize(F.avg_pool2d(by_direction, CELL), dim=0).flatten()


BASELINES = {"colours": colours, "pixels": pixels, "edges": edges}


def vectors(of: Features, baselines: Iterable[str]) -> dict[str, torch.Tensor]:
    """{"features" or baseline: (N, d)} of a file's pictures, which only baselines read. Raises BadImage."""
    resized = v2.Resize((SIDE, SIDE), antialias=True)
    images = [resized(read_rgb(path)) for path in of.paths] if baselines else []
    return {"features": of.features} | {kind: torch.stack([*map(BASELINES[kind], images)]) for kind in baselines}


def parse_args() -> argparse.Namespace:
    parser = options.OptionParser("How often does the nearest picture of another set show the same?")
    parser.prog, parser.usage = "retrieval.py", "%(prog)s GALLERY.npz QUERIES.npz…"
    parser.add_argument("gallery", metavar="GALLERY.npz", help="where pictures are looked for")
    parser.add_argument("queries", nargs="+", metavar="QUERIES.npz", help="the pictures, by the same network")
    parser.add_argument("--same", choices=["name", "class"], default="name", help="what makes a match: file or folder")
    parser.add_argument("--baselines", action="store_true", help="also compare colours, pixels and edges")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    gallery, *others = map(read_features, [args.gallery, *args.queries])
    baselines, bank, table = tuple(BASELINES) * args.baselines, gallery.names(args.same), []
    galleries = vectors(gallery, baselines)
    for other in others:
        names = other.names(args.same)
        if set(other.paths) & set(gallery.paths):
            raise UsageError(f"{other.file}: it holds pictures of {gallery.file}, which would find themselves")
        if not set(names) & set(bank):
            raise UsageError(f"{other.file}: no {args.same} of it, such as {names[0]}, is in {gallery.file}")
        if other.features.shape[1] != gallery.features.shape[1]:
            raise UsageError(f"{other.file}: another network's features than {gallery.file}'s, of another length")
        hits = [matches(own, names, galleries[kind], bank) for kind, own in vectors(other, baselines).items()]
        table.append([other.file, str(len(hits[0])), *map(_percent, hits)])
    head = [f"same {args.same} in {gallery.file}, %", "pictures", *galleries]
    print(*(printable(f"| {' | '.join(row)} |") for row in [head, ["---"] * len(head), *table]), sep="\n")


if __name__ == "__main__":
    cli_main(main, again="run the same command again")
