"""Shape and texture cues: file names, and decisions between the sixteen categories."""

import pytest
import torch
from helpers import REPOSITORY, paint
from reports import counted

from moco.distributed import DistContext
from moco.errors import UsageError
from moco.evaluation import cues, scores, testsets

SIZES = {
    "airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6, "chair": 4,
    "clock": 3, "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 8,
}  # fmt: skip
# Two cats, a dog and two birds; and a class that is in no category.
HEAD = ["n02123045", "n02123159", "n02099601", "n01530575", "n01531178", "n99999999"]
SMALL = {"bird": [3, 4], "cat": [0, 1], "dog": [2]}


class ByGray(torch.nn.Module):
    """Gives an image of gray level 20 * i the i-th of the logits it was made with."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float32)

    def forward(self, images):
        # undo the normalisation of the green channel
        level = ((images[:, 1].mean(dim=(1, 2)) * 0.224 + 0.456) * 255 / 20).round().long()
        return self.logits[level]


def score(folder, model, wnids, key="set/cues"):
    (test_set,) = testsets.list_test_sets({key: str(folder)}, wnids)
    ((_, (result,)),) = scores.score([test_set], [model], wnids, 28, 4, 0, DistContext())
    return test_set, result


# The sixteen categories


def test_the_categories_have_the_published_classes():
    categories = cues.sixteen_categories()
    assert {category: len(wnids) for category, wnids in categories.items()} == SIZES
    assert list(categories) == sorted(categories)
    every = [wnid for wnids in categories.values() for wnid in wnids]
    assert len(set(every)) == len(every) == 207 and all(len(wnid) == 9 and wnid[0] == "n" for wnid in every)
    rows = [line.split(",") for line in cues.CATEGORIES.read_text().splitlines()[1:]]
    assert {name for _, _, name in rows} <= set(pytest.importorskip("torchvision.models._meta")._IMAGENET_CATEGORIES)
    cats = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat", "cougar"}
    assert {name for category, _, name in rows if category == "cat"} == cats
    of_100 = cues.outputs_by_category((REPOSITORY / "preprocess" / "imagenet_100.txt").read_text().split())
    assert len(of_100) == 7 and sum(map(len, of_100.values())) == 28  # as docs/test-sets.md says


def test_a_category_has_the_mean_probability_of_its_classes():
    assert cues.outputs_by_category(HEAD) == SMALL
    logits = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    probabilities = logits.double().softmax(1)
    means = torch.stack([probabilities[:, own].mean(1) for own in SMALL.values()], 1)
    found = cues.category_logits(logits, SMALL.values())
    assert torch.equal(found.argmax(1), means.argmax(1))
    assert torch.allclose(found.double().softmax(1), means / means.sum(1, keepdim=True), atol=1e-6)
    # Two classes of 0.3 and 0.05 lose against one of 0.2; a sum or a maximum would let them win.
    assert cues.category_logits(torch.tensor([[0.3, 0.05, 0.2]]).log(), [[0, 1], [2]]).argmax().item() == 1


# File names


def test_names_tell_a_texture_first_or_both_numbered():
    known = {"cat", "dog", "n02"}
    assert cues.textures(["x/dog-1.png", "x/cat-0007.png"], ["cat", "dog"], known) == ["dog", "cat"]
    assert cues.textures(["cat/cat10-dog2.png", "cat/cat1-cat3.png"], ["cat", "cat"], known) == ["dog", "cat"]
    assert cues.textures(["cat/dog10-cat2.png"], ["cat"], known) is None  # the shape is not the folder's
    assert cues.textures(["cat/cat10-tiger2.png"], ["cat"], known) is None


def test_a_stray_name_has_no_texture_but_half_of_them_are_no_cues():
    names, known = ["dog-1.png", "photo.png", "cat-2.png", "tiger-3.png"], {"cat", "dog"}
    assert cues.textures(names[:3], ["cat"] * 3, known) == ["dog", "", "cat"]
    assert cues.textures(names, ["cat"] * 4, known) is None
    numbered = ["cat1-dog1.png", "dog2-cat1.png", "cat3-cat2.png"]  # the second one's shape is not its folder's
    assert cues.textures(numbered, ["cat"] * 3, known) == ["dog", "", "cat"]
    assert cues.textures(numbered[:2], ["cat"] * 2, known) is None


# Figures, by hand


def paint_conflicts(root):
    """{name: gray level / 20} of a set of six categories' folders and their decisions by the model below."""
    for name, level in {
        "cat/cat1-dog1.png": 0,  # decided for cat: shape
        "cat/cat2-bird1.png": 2,  # bird: texture
        "cat/cat3-cat1.png": 0,  # the cues agree
        "cat/cat4-oven1.png": 0,  # the head has no oven
        "dog/dog1-cat1.png": 0,  # cat: texture
        "dog/dog2-bird1.png": 1,  # dog: shape
        "dog/dog3-bird2.png": 1,  # dog: shape
        "bird/bird1-dog1.png": 0,  # cat: neither
        "oven/oven1-cat1.png": 0,
    }.items():
        paint(root / name, level)
    return ByGray([4, 1, 3, 0, 0, 9], [2, 2, 3, 0, 0, 9], [0, 0, 0, 2, 2, 9])


def test_the_figures_of_a_cue_conflict_set_in_categories(tmp_path):
    test_set, result = score(tmp_path, paint_conflicts(tmp_path), HEAD)
    assert test_set.categories == SMALL and result["n"] == 8  # no oven
    assert result["classes"] == {
        "bird": {"n": 1, "correct": 0}, "cat": {"n": 4, "correct": 3}, "dog": {"n": 3, "correct": 2},
    }  # fmt: skip
    assert result["top1"] == 100 * 5 / 8
    assert {name: counted(result, name) for name in ("conflict", "shape", "texture")} == {
        "conflict": 6, "shape": 3, "texture": 2,
    }  # fmt: skip


def test_categories_are_refused_where_they_cannot_be_decided(tmp_path):
    paint_conflicts(tmp_path)
    for head, key in (HEAD[:2], "set/cues"), (["n01", "n02"], "set/cues"), (HEAD, "stylized"):
        with pytest.raises(UsageError, match=r"none of its 4 class folders \(bird, …\) .* --set NAME=DIR"):
            score(tmp_path, None, head, key)
