"""Retrieval across two sets equals a loop, and its baselines see what they are named after."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.folders import ImageFolder
from moco.errors import UsageError
from moco.evaluation import classifier, retrieval


def plain(queries, names, gallery, bank):
    """The definition in loops: the largest cosine decides."""
    hits = []
    for query, name in zip(queries.double(), names):
        if name in bank:
            cosines = [float(query @ key / query.norm() / key.norm()) for key in gallery.double()]
            hits.append(bank[cosines.index(max(cosines))] == name)
    return hits


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_it_equals_the_definition(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    torch.manual_seed(0)
    gallery, names = torch.randn(30, 5), [f"{place % 12}" for place in range(40)]
    queries = torch.cat([gallery + 0.7 * torch.randn(30, 5), torch.randn(10, 5)]) * torch.rand(40, 1)
    bank = names[3:33]  # in part other ones than the queries'
    bank = [name for name in bank if name != "7"] + ["lonely"] * bank.count("7")
    found = retrieval.matches(queries, names, gallery, bank)
    assert found == plain(queries, names, gallery, bank) and 0 < sum(found) < len(found) < 40


def picture(side=64, turned=False, colour=(255, 0, 0), ground=(255, 255, 255)):
    """A bar on a ground, lying or standing: uint8 (3, side, side)."""
    image = torch.tensor(ground, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
    bar = image[:, side // 4 : side // 2, 4:-4]
    bar[:] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
    return image.mT if turned else image


def cosine(function, one, other):
    return torch.cosine_similarity(function(one), function(other), dim=0).item()


def test_each_baseline_sees_what_it_is_named_after():
    lying, standing = picture(), picture(turned=True)
    inverted = picture(colour=(0, 255, 255), ground=(0, 0, 0))
    assert cosine(retrieval.colours, lying, standing) == pytest.approx(1)
    assert cosine(retrieval.colours, lying, inverted) == 0
    assert cosine(retrieval.pixels, lying, inverted) == pytest.approx(-1, abs=1e-4)
    assert cosine(retrieval.edges, lying, inverted) == pytest.approx(1, abs=1e-4)
    assert cosine(retrieval.edges, lying, standing) < 0.5
    rows = retrieval.edges(lying).view(8, 8, 8).sum((1, 2))  # by direction: the gradient of a lying bar is upright
    assert rows.argmax() == 4 and retrieval.edges(standing).view(8, 8, 8).sum((1, 2)).argmax() == 0


def write(folder, pictures, features):
    """Pictures of a class folder each, {class/name: image}, and the file of their features."""
    paths = []
    for name, image in pictures.items():
        path = folder / "val" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        paths.append(str(path))
    listed = ImageFolder(paths, np.zeros(len(paths), int), ["all"])
    classifier.save_features(f"{folder}.npz", features, listed)
    return f"{folder}.npz"


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *map(str, arguments)])
    retrieval.main()
    return [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]


def test_the_table_has_a_row_per_file(tmp_path, monkeypatch, capsys):
    shapes = {"a/bar": picture(), "b/pole": picture(turned=True)}
    recoloured = {"b/bar": picture(colour=(0, 0, 255)), "b/pole": picture(turned=True, colour=(0, 0, 255))}
    first = write(tmp_path / "one", shapes, torch.eye(2))
    other = write(tmp_path / "other", recoloured | {"b/alone": picture(80)}, torch.tensor([[0.1, 1], [0, 1], [1, 0]]))
    head, _, row = run(monkeypatch, capsys, first, other, "--baselines")
    assert head == [f"same name in {first}, %", "pictures", "features", "colours", "pixels", "edges"]
    assert row[:3] == [other, "2", "50.0±61.2"] and row[4:] == ["100.0±50.0"] * 2
    assert run(monkeypatch, capsys, first, other, "--same", "class")[2] == [other, "3", "66.7±43.0"]
    wide = write(tmp_path / "wide", shapes, torch.ones(2, 3))
    (tmp_path / "text.npz").write_text("no features")
    for wrong, told in (
        (write(tmp_path / "new", {"c/dot": picture()}, torch.eye(2)[:1]), "no name of it, such as dot"),
        (first, "pictures of .*one.npz, which would find themselves"),
        (wide, "another network's features"), (tmp_path / "text.npz", "no features of main_lincls"),
        (tmp_path / "none.npz", "no features of main_lincls"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            run(monkeypatch, capsys, first, wrong)
