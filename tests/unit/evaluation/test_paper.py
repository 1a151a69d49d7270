"""The comparison with the published table: what is compared, and what is not."""

import copy
import re

import numpy as np
import pytest
from helpers import REPOSITORY
from reports import report_of, result

from moco.errors import UsageError
from moco.evaluation import paper
from moco.evaluation.testsets import STANDARD, SUITES

CLASSES = [f"n{number:08}" for number in range(100)]
COLUMNS = {suite.title for suite in SUITES.values()}


@pytest.fixture(scope="module")
def _complete(tmp_path_factory):
    """A report with all columns of the published table, complete: 50 images in each of 100 classes."""
    keys = ["val", *(f"corruption/{name}/{severity}" for name in STANDARD for severity in range(1, 6))]
    cells = dict.fromkeys([*keys, "sketch", "stylized"], CLASSES) | {"rendition": CLASSES[:19]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("complete"))
        whole = {key: [result(50.0, dict.fromkeys(wnids, (25, 50)))] for key, wnids in cells.items()}
        return report_of(whole, ["patch-k16384-a2"], CLASSES, 224)


@pytest.fixture
def complete(_complete):
    """A copy that can be spoilt."""
    return copy.deepcopy(_complete)


def test_complete_columns_are_compared_with_a_standard_error(complete):
    header, _, _, published, difference, *remarks = paper.comparison(complete).splitlines()
    assert header == "|  | val | Corruption | Sketch | Stylized | Rendition |"
    assert published.startswith("| patch-k16384-a2, paper | 79.35±0.12 | 45.13±0.35 |")
    stds = [0.28, 0.17, 0.12, 0.52, 0.38, 0.32, 0.14, 0.09, 0.11]  # of val in all rows
    error = (sum(std**2 for std in stds) / 9 * (1 / 3 + 1)) ** 0.5  # of three runs there and one here
    assert difference.startswith(f"| difference | -29.35±{error:.2f} | +4.87±")
    assert "sample standard deviation" in remarks[-1] and "pooled over the published rows" in remarks[-1]
    assert "measured here with CenterCrop(224); the paper does not say" in remarks[0]
    assert "the classes are not those of preprocess/imagenet_100.txt" in remarks[1]  # these have other names


def classes_of(made, key):
    return made["cells"][key]["results"][0]["classes"]


def with_fewer_images(made, key):
    classes_of(made, key)[CLASSES[0]] = {"n": 14, "correct": 7}


def resized(made):
    made["cells"]["corruption/snow/5"]["preprocessing"] = "Resize(256), CenterCrop(224)"


@pytest.mark.parametrize(
    "column, message, spoil",
    [
        ("val", "5000 images of 99 classes, published: 100", lambda made: classes_of(made, "val").popitem()),
        ("Sketch", "1 of 100 classes do not have 40 to 51", lambda made: with_fewer_images(made, "sketch")),
        ("Corruption", "1 of 100 classes do not have 50", lambda made: with_fewer_images(made, "corruption/fog/3")),
        ("Corruption", "1 of 75 corruptions", lambda made: made["cells"].pop("corruption/snow/5")),
        ("Corruption", "images of another size than 224 px, for example in snow/5", resized),
        ("Stylized", "not tested", lambda made: made["cells"].pop("stylized")),
    ],
)
def test_an_incomplete_column_is_not_compared(complete, column, message, spoil):
    spoil(complete)
    text = paper.comparison(complete)
    assert f"{column} is not compared: {message}" in text
    assert {each for each in COLUMNS if each in text.splitlines()[0]} == COLUMNS - {column}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"limit": 2}, "--limit 2"),
        ({"image_size": 32}, "crops of 32 px, published: 224"),
        ({"wnids": CLASSES[:2]}, "the head has 2 classes, published: 100"),
    ],
)
def test_nothing_is_compared_of_another_evaluation(complete, change, message):
    text = paper.comparison(complete | change)
    assert text.startswith("--compare paper: no column is complete") and message in text and "|" not in text


def test_published_figures_are_those_of_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    assert len(paper.rows()) == 9
    for row in paper.rows().values():
        figures = ["{:.2f}±{:.2f}".format(*row[suite]) for suite in SUITES]
        if "rendition" in row["note"]:
            figures[-1] += " (?)"
        assert f"| {' | '.join([row['model'], row['moco_k'], row['alpha'] or '–', *figures])} |" in readme


def test_a_comparison_repeats_the_note_on_a_published_row(complete):
    complete["checkpoints"][0]["row"] = "mocov2-later-k65536"
    (line,) = (line for line in paper.comparison(complete).splitlines() if line.startswith("mocov2-later-k65536: "))
    assert line == f"mocov2-later-k65536: {paper.rows()['mocov2-later-k65536']['note']}" and "copying error" in line


def test_perfect_reproductions_are_rarely_called_different():
    """Three runs there and three here of the same true means and spreads."""
    rng = np.random.default_rng(0)
    published, called = paper.rows(), []
    for suite in SUITES:
        spread = paper.spread(suite)
        for _ in range(400):
            ours, theirs = rng.normal(0, spread, (2, 3))
            with pytest.MonkeyPatch.context() as patch:
                stds = rng.normal(0, spread, (len(published), 3)).std(axis=1, ddof=1)
                other = {name: published[name] | {suite: (0, std)} for name, std in zip(published, stds)}
                patch.setattr(paper, "rows", lambda other=other: other)
                error = paper.spread(suite, ours) * (1 / 3 + 1 / 3) ** 0.5
            called.append(abs(ours.mean() - theirs.mean()) > 2 * error)
    assert 0.03 < np.mean(called) < 0.07


def test_a_copied_cell_has_no_part_in_the_spread():
    own = [0.12, 0.15, 0.15, 0.11, 0.44, 0.37, 0.18, 0.19]  # without the row whose Rendition repeats its Sketch
    assert paper.spread("rendition") == pytest.approx((sum(std**2 for std in own) / 8) ** 0.5)
    assert paper.spread("rendition", [1.0, 3.0]) == pytest.approx(((2 * sum(std**2 for std in own) + 2) / 17) ** 0.5)


def test_the_recipe_of_a_row_is_compared_with_what_made_a_checkpoint():
    made = {
        "robust": "patch", "num_nonsem": 1, "alpha": 2.0, "patch_ratio": [16, 72], "moco_k": 16384, "moco_t": 0.2,
        "moco_m": 0.999, "mlp": True, "aug_plus": True, "cos": True, "epochs": 200, "lr": 0.03, "image_size": 224,
        "images_per_step": 128, "arch": "resnet50", "moco_dim": 128, "momentum": 0.9, "weight_decay": 1e-4,
        "epoch": 200, "start_epoch": 0, "changes": [],
    }  # fmt: skip
    probe = {"epochs": 60, "images_per_step": 128, "schedule": [30, 40, 50], "weight_decay": 0.0, "changes": []}

    def recipe(row):
        found = paper.recipe(row)
        assert found.pop("released") == row
        assert {name: found.pop(f"probe {name}") for name in probe} == probe
        return found

    assert recipe("patch-k16384-a2") == made
    plain = {name: made[name] for name in made if name not in ("alpha", "num_nonsem", "patch_ratio")}
    assert recipe("mocov2-k8192") == plain | {"robust": "none", "moco_k": 8192}
    later = {"lr": 0.8, "images_per_step": 512, "moco_m": 0.99, "moco_k": 65536}
    assert recipe("patch-later-k65536-a2") == made | later
    texture = {name: made[name] for name in made if name != "patch_ratio"} | {"robust": "texture"}
    assert recipe("texture-k16384-a2") == texture

    def check(known, **more):
        paper.check_recipes([{"row": "patch-k16384-a2", "file": "a", "pretraining": known} | more])

    for known in made, {}, None:  # published files tell nothing
        check(known, probe=probe, pretrained="~/patch-k16384-a2-run1.pth.tar")
    change = {"epoch": 3, "alpha": [1.0, 2.0]}
    others = {"moco_k": 8192, "alpha": 3.0, "robust": "none", "epoch": 100, "arch": "resnet18", "changes": [change]}
    for name, value in others.items():
        with pytest.raises(UsageError, match=f"patch-k16384-a2 has {name} .*, a was made with {re.escape(str(value))}"):
            check(made | {name: value})
    with pytest.raises(UsageError, match="has probe epochs 60, a was made with 1"):
        check(made, probe=probe | {"epochs": 1})
    with pytest.raises(UsageError, match="has released patch-k16384-a2, a was made with mocov2-k16384"):
        check(None, pretrained="released:mocov2-k16384-run2")


def test_other_names_are_refused():
    with pytest.raises(UsageError, match="mine is not a row of the published table.*patch-k8192-a2"):
        paper.check_recipes([{"row": "patch-k16384-a3", "file": "a"}, {"row": "mine", "file": "b"}])
