"""Pictures of training logs, evaluations and views: what is drawn, and what is left out and mentioned."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco import augment, plot
from moco.errors import UsageError

drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def write_log(folder, *records, end=""):
    path = Path(folder, "log.jsonl")
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return str(path)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.main()


def drawn(figure, title):
    """The points of each line in the panel of that title."""
    (axis,) = (axis for axis in figure.axes if axis.get_title() == title)
    return [list(zip(*map(list, line.get_data()))) for line in axis.lines if len(line.get_xdata())]


def legend(figure):
    return [text.get_text().lstrip() for text in figure.legends[0].get_texts()]


@drawing
def test_curves_of_runs_of_different_lengths_and_keys():
    plain = [{"epoch": e, "loss": 3.0 - e, "q_k": 0.5, "q_queue": 0.0, "spread": 0.9} for e in range(3)]
    patch = [{"epoch": e, "loss": 4.0 - e, "q_k": 0.6, "q_t": 0.1, "knn_top1": 20.0 + e} for e in range(2)]
    figure = plot.curves(plot.read_runs([write_log("plain", *plain), write_log("patch", *patch)]))
    assert legend(figure) == ["plain", "patch"]
    assert drawn(figure, "loss") == [[(0, 3.0), (1, 2.0), (2, 1.0)], [(0, 4.0), (1, 3.0)]]
    assert len(drawn(figure, "cosine")) == 4  # q·k twice, q·queue of one, q·t of the other
    assert drawn(figure, "spread") == [[(0, 0.9), (1, 0.9), (2, 0.9)]]
    assert drawn(figure, "200-nearest-neighbour top-1, %") == [[(0, 20.0), (1, 21.0)]]
    assert all("probe" not in axis.get_title() for axis in figure.axes)


@drawing
def test_curves_of_a_probe_are_lines_of_its_heads():
    lines = [
        {"probe": "0199", "epoch": e, "lr": [30 / 10**e, 1 / 10**e], "loss": [7e5, 1.0], "val_acc1": [20.0, 60.0 + e]}
        for e in range(2)
    ]
    figure = plot.curves(plot.read_runs([write_log("run", {"epoch": 0, "loss": 5.0}, *lines)]))
    assert legend(figure) == ["run", "run, probe 0199, lr 30", "run, probe 0199, lr 1"]
    assert drawn(figure, "probe: top-1 on val/, %") == [[(0, 20.0), (1, 20.0)], [(0, 60.0), (1, 61.0)]]
    scales = {axis.get_title(): axis.get_yscale() for axis in figure.axes}
    assert scales["loss"] == "linear" and scales["probe: loss"] == "log"  # or one head would flatten the other


@drawing
def test_curves_leave_out_what_is_damaged_and_say_so(capsys):
    odd = [{"epoch": 0, "loss": None, "spread": "x"}, {"epoch": 1, "loss": 2.0}]
    figure = plot.curves(plot.read_runs([write_log("cut", *odd, end='{"epoch": 2, "lo'), write_log("new")]))
    assert drawn(figure, "loss") == [[(1, 2.0)]] and [axis.get_title() for axis in figure.axes] == ["loss"]
    damaged, empty = capsys.readouterr().err.splitlines()
    assert damaged.startswith("cut/log.jsonl: 2 epochs, 1 damaged") and empty.startswith("new/log.jsonl: 0 epochs")


@drawing
@pytest.mark.parametrize("name", ["$a_1$", "_hidden", "a$b", "é\udcff", "x" * 300])
def test_any_folder_name_is_a_label(name):
    figure = plot.curves(plot.runs_of(name, [{"epoch": 0, "loss": 1.0}]))
    figure.savefig("a.png")
    (label,) = legend(figure)
    end = name[-50:].replace("\udcff", r"\udcff").replace("$", r"\$")
    assert label.endswith(end) and len(label) <= 62


@drawing
@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["no/log.jsonl"], "no/log.jsonl: no such file; name the log.jsonl of a run"),
        (["empty/log.jsonl"], "nothing to draw"),
        (["other/log.jsonl"], "nothing to draw"),
        (["odd/log.jsonl"], "nothing to draw"),
        (["other/log.jsonl", "--out", "a.txt"], "--out a.txt: its name must end in .png or .pdf or .svg"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, reason, tmp_path, monkeypatch):
    write_log("empty")
    write_log("other", {"epoch": 0, "else": 1})
    write_log("odd", {"epoch": 0, "probe": "0199"})
    with pytest.raises(UsageError) as refusal:
        call(monkeypatch, "--out", "a.png", *arguments)
    assert reason in str(refusal.value) and not list(tmp_path.glob("a.*"))


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="^--out a.png: matplotlib is not installed; pip install matplotlib$"):
        call(monkeypatch, "log.jsonl", "--out", "a.png")


# Views


@pytest.mark.parametrize("size, side", [(56, 224), (64, 192), (224, 224), (300, 300)])
def test_views_are_columns_and_small_ones_are_enlarged(tmp_path, size, side):
    query, key, negative = (augment.normalize(torch.zeros(2, 3, size, size)) for _ in range(3))
    query[1, 0], key[0, 1] = 1e9, 1e9  # red in the second row, green in the first
    negatives = torch.stack([negative, negative], dim=1)
    plot.save_views(tmp_path / "views.png", query.clamp(max=4), key.clamp(max=4), negatives, ["patch 1", "patch 2"])
    sheet = np.asarray(Image.open(tmp_path / "views.png").convert("RGB"))
    gap, label = plot.GAP, plot.LABEL_HEIGHT
    assert sheet.shape == (label + 2 * (side + gap), gap + 4 * (side + gap), 3)
    for row, column, color in ((0, 0, 0), (1, 0, (255, 0, 0)), (0, 1, (0, 255, 0)), (1, 1, 0), (1, 3, 0)):
        top, start = label + row * (side + gap), gap + column * (side + gap)
        assert (sheet[top : top + side, start : start + side] == color).all()
        assert (sheet[top + side : top + side + gap] == 255).all()
    assert (sheet[:label] < 128).any()  # the labels
