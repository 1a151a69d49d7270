"""An evaluation never shows a wrong figure without a word, and never loses one: odd test sets and odd JSON files."""

import copy
import json
import random
import string

import pytest
import torch
from helpers import EVALUATE, PROBE, SMALL_PROBE, refused, run_script, write_folder
from PIL import Image

from moco.distributed import DistContext
from moco.errors import UsageError
from moco.evaluation import paper, report, results, scores, testsets
from moco.evaluation.classifier import to_input

WNIDS = ["n01", "n02"]


class Watch(torch.nn.Module):
    """Keeps the images it is given; always decides for the first class."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen += list(images)
        return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), len(WNIDS)).float()


def paint_rim(path, side):
    """A white picture with a black rim of a quarter of the side: a crop cuts it off, a mere resize does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side))
    image.paste((255, 255, 255), (side // 4, side // 4, side - side // 4, side - side // 4))
    image.save(path)


def scored(test_sets, *models):
    return list(scores.score(test_sets, models, WNIDS, 28, 4, 0, DistContext()))


def dark_share(image):
    """The share of an image's pixels that are nearer to black than to white."""
    black, white = (
        to_input(torch.full((1, 3, 1, 1), level, dtype=torch.uint8), torch.device("cpu")) for level in (0, 255)
    )
    return (image < (black + white)[0] / 2).float().mean().item()


# What is done to the images (items 5 and 6)


@pytest.mark.parametrize(
    "suite, side, preprocessing, dark",
    [
        ("corruption", 28, "CenterCrop(28)", 0.75),  # as published
        ("corruption", 64, "Resize(32), CenterCrop(28)", 0.67),  # the protocol of photos, not the centre alone: 0
        ("corruption", 36, "Resize(32), CenterCrop(28)", 0.67),
        ("corruption", 16, "Resize(28), CenterCrop(28)", 0.75),  # no black padding: that would be 0.92
        ("stylized", 28, "CenterCrop(28)", 0.75),
        ("stylized", 64, "Resize(32), CenterCrop(28)", 0.67),
        ("val", 28, "Resize(32), CenterCrop(28)", 0.67),
        ("sketch", 28, "Resize(32), CenterCrop(28)", 0.67),
    ],
)
def test_preprocessing_follows_from_the_images_size(tmp_path, suite, side, preprocessing, dark):
    paint_rim(tmp_path / ("fog/1/n01" if suite == "corruption" else "n01") / "a.png", side)
    (test_set,) = testsets.list_test_sets({suite: str(tmp_path)}, WNIDS)
    model = Watch()
    ((_, (result,)),) = scored([test_set], model)
    assert result["preprocessing"] == preprocessing == test_set.preprocessing_of_images(28)
    assert dark_share(model.seen[0]) == pytest.approx(dark, abs=0.03)


def test_sizes_may_differ_within_a_set_and_are_counted(tmp_path):
    for name, side in (("a", 28), ("b", 28), ("c", 64), ("d", 16)):
        paint_rim(tmp_path / "fog" / "1" / "n01" / f"{name}.png", side)
    test_sets = testsets.list_test_sets({"corruption": str(tmp_path)}, WNIDS)
    ((_, (result,)),) = scored(test_sets, Watch())
    assert result["preprocessing"] == (
        "CenterCrop(28) of 2 images; Resize(32), CenterCrop(28) of 1 images; Resize(28), CenterCrop(28) of 1 images"
    )


def test_resized_corruptions_and_unresized_styles_are_told(tmp_path):
    made = make(tmp_path, {"corruption/fog/1": 40.0, "corruption/fog/2": 50.0, "stylized": 20.0})
    assert "Corruption (partial)" in report.table(made) and "RESIZED" not in str(report.notes(made))
    assert "Stylized: 4 images, CenterCrop(28) (not resized: the images have" in "\n".join(report.notes(made))
    made["cells"]["corruption/fog/2"]["preprocessing"] = made["cells"]["stylized"]["preprocessing"] = (
        "Resize(32), CenterCrop(28)"
    )
    assert "Corruption (partial, resized)" in report.table(made) and "not resized" not in str(report.notes(made))
    assert "RESIZED: images of 1 of these do not have the crop's 28 px" in "\n".join(report.notes(made))


def test_folders_that_are_no_corruption_are_listed(tmp_path):
    for name in ("fog/1", "fog/6", "gausian_noise/1", "noise/shot_noise/2", "noise/static/3", ".cache/1", "notes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "README.md").write_text("")
    unknown = testsets.unknown_corruptions(str(tmp_path))
    assert unknown == ["fog/6", "gausian_noise", "noise/static", "notes"]
    made = make(tmp_path, {"corruption/fog/1": 40.0}) | {"not_evaluated": unknown}
    assert "fog/6, gausian_noise, noise/static, notes" in report.notes(made)[-1]


# The comparison with the paper (item 10)

IMAGENET_100 = [f"n{number:08}" for number in range(100)]
ALL_CORRUPTIONS = [f"corruption/{name}/{severity}" for name in testsets.STANDARD for severity in range(1, 6)]


def complete_report(tmp_path):
    """A report with all columns of the published table, complete: 50 images in each of 100 classes."""
    file = tmp_path / "m.pth"
    file.write_bytes(b"weights")
    made = results.new({"patch-k16384-a2": [str(file)]}, [{}], IMAGENET_100, 224, None)
    for key in ("val", *ALL_CORRUPTIONS, "sketch", "stylized", "rendition"):
        wnids = IMAGENET_100[:19] if key == "rendition" else IMAGENET_100
        result = {"top1": 50.0, "top1_shared_classes": 60.0, "n": 50 * len(wnids)}
        result["classes"] = {wnid: {"n": 50, "correct": 25} for wnid in wnids}
        labels = [IMAGENET_100.index(wnid) for wnid in wnids for _ in range(50)]
        test_set = testsets.TestSet(key, f"/data/{key}", [f"/data/{key}/x.png"] * len(labels), labels)
        results.add(made, test_set, [result], 224, IMAGENET_100)
    return made


def test_complete_columns_are_compared_with_the_paper(tmp_path):
    header, *lines = paper.comparison(complete_report(tmp_path)).splitlines()
    assert header == "|  | val | Corruption | Sketch | Stylized | Rendition |"
    assert lines[3] == "| difference in the paper's std | -244.6 | +13.9 | +20.7 | +171.7 | +101.5 |"
    assert "measured here with CenterCrop(224); the paper does not tell" in lines[4]
    assert "the classes are not those of preprocess/imagenet_100.txt" in lines[5]  # these have other names


def with_fewer_images(made, key):
    made["cells"][key]["results"][0]["classes"][IMAGENET_100[0]]["n"] = 14


INCOMPLETE = {
    "a class is missing": (
        lambda made: made["cells"]["val"]["results"][0]["classes"].popitem(),
        "val is not compared: 5000 images of 99 classes, published: 100",
        {"val"},
    ),
    "images are missing": (
        lambda made: with_fewer_images(made, "sketch"),
        "Sketch is not compared: 1 classes do not have 40 to 51 images, for example n00000000 has 14",
        {"Sketch"},
    ),
    "images of one severity are missing": (
        lambda made: with_fewer_images(made, "corruption/fog/3"),
        "Corruption is not compared: 1 classes do not have 50 images",
        {"Corruption"},
    ),
    "a severity is missing": (
        lambda made: made["cells"].pop("corruption/snow/5"),
        "Corruption is not compared: 1 of 75 corruptions × severities are missing",
        {"Corruption"},
    ),
    "corrupted images of another size": (
        lambda made: made["cells"]["corruption/snow/5"].update(preprocessing="Resize(256), CenterCrop(224)"),
        "Corruption is not compared: images of another size than 224 px, for example in snow/5",
        {"Corruption"},
    ),
    "renditions of a few classes": (
        lambda made: made["cells"]["rendition"]["results"][0]["classes"].popitem(),
        "Rendition is not compared: 950 images of 18 classes, published: 19",
        {"Rendition"},
    ),
    "a column was not tested": (
        lambda made: made["cells"].pop("stylized"),
        "Stylized is not compared: not tested",
        {"Stylized"},
    ),
}
ALL_COLUMNS = set(report.TITLES.values())


@pytest.mark.parametrize("fault", INCOMPLETE)
def test_an_incomplete_column_is_not_compared(tmp_path, fault):
    made = complete_report(tmp_path)
    spoil, told, columns = INCOMPLETE[fault]
    spoil(made)
    text = paper.comparison(made)
    assert told in text
    assert {each for each in ALL_COLUMNS if each in text.splitlines()[0]} == ALL_COLUMNS - columns


@pytest.mark.parametrize(
    "change, told",
    [
        ({"limit": 2}, "val is not compared: --limit 2"),
        ({"image_size": 32}, "Sketch is not compared: crops of 32 px, published: 224"),
        ({"wnids": WNIDS}, "Rendition is not compared: the head has 2 classes, published: 100"),
    ],
)
def test_nothing_is_compared_of_another_evaluation(tmp_path, change, told):
    text = paper.comparison(complete_report(tmp_path) | change)
    assert text.startswith("--compare paper: no column is complete") and told in text and "|" not in text


# The JSON file (item 11)


def test_set(key="val", n=4, folder=None):
    labels = [index * len(WNIDS) // n for index in range(n)]
    folder = folder or f"/data/{key}"
    paths = [f"{folder}/{WNIDS[label]}/{index}.png" for index, label in enumerate(labels)]
    return testsets.TestSet(key, folder, paths, labels)


test_set.__test__ = False


def make(tmp_path, cells, rows=("mine",), weights="weights", **settings):
    """A report on one checkpoint per row; cells: {key: top-1}."""
    files = {}
    for row in rows:
        files[row] = [str(tmp_path / f"{row}.pth")]
        (tmp_path / f"{row}.pth").write_text(f"{weights} of {row}")
    options = {"wnids": WNIDS, "image_size": 28, "limit": None} | settings
    made = results.new(files, [{}] * len(files), **options)
    for key, top1 in cells.items():
        results.add(made, test_set(key), [result(top1 + index) for index in range(len(rows))], 28, WNIDS)
    return made


def result(top1):
    classes = {wnid: {"n": 2, "correct": 1} for wnid in WNIDS}
    return {"top1": top1, "top1_shared_classes": top1, "n": 4, "classes": classes}


def continued(path, fresh, *keys):
    """The top-1 of the first row that `fresh` takes from the file, by test set."""
    results.reuse_results(str(path), fresh, [test_set(key) for key in keys])
    return {key: cell["results"][0]["top1"] for key, cell in fresh["cells"].items()}


def all_results(path):
    """{(checkpoint, test set, settings): top-1} of all results in a file."""
    return {
        (sha, key, str({name: value for name, value in entry.items() if name != "result"})): entry["result"]["top1"]
        for sha, sets in results._read(str(path)).items()
        for key, entries in sets.items()
        for entry in entries
    }


def test_a_renamed_row_is_not_scored_again(tmp_path):
    results.save(tmp_path / "r.json", make(tmp_path, {"val": 5.0, "sketch": 6.0}))
    (tmp_path / "moved.pth").write_bytes((tmp_path / "mine.pth").read_bytes())
    renamed = results.new({"patch-k16384-a2": [str(tmp_path / "moved.pth")]}, [{}], WNIDS, 28, None)
    assert continued(tmp_path / "r.json", renamed, "val", "sketch") == {"val": 5.0, "sketch": 6.0}
    assert list(report.by_row(renamed)) == ["patch-k16384-a2"] and renamed["earlier"] == {}


def test_only_the_missing_models_of_a_set_are_scored(tmp_path):
    results.save(tmp_path / "r.json", make(tmp_path, {"val": 5.0}, rows=["a"]))
    both = make(tmp_path, {}, rows=["b", "a"])
    assert continued(tmp_path / "r.json", both, "val") == {}
    assert results.unfinished(both, test_set()) == [0]
    results.add(both, test_set(), [result(7.0)], 28, WNIDS)
    assert [each["top1"] for each in both["cells"]["val"]["results"]] == [7.0, 5.0] and both["earlier"] == {}


def test_scores_are_those_of_the_models_chosen_for_each_set(tmp_path):
    for key in ("1", "2"):
        paint_rim(tmp_path / "fog" / key / "n01" / "a.png", 28)
    models = [Watch(), Watch(), Watch()]
    sets = testsets.list_test_sets({"corruption": str(tmp_path)}, WNIDS)
    chosen = {"corruption/fog/1": [2, 0], "corruption/fog/2": [1]}
    scored = list(scores.score(sets, models, WNIDS, 28, 4, 0, DistContext(), chosen=chosen))
    assert [len(results) for _, results in scored] == [2, 1] and [len(model.seen) for model in models] == [1, 1, 1]


OTHERS = {
    "another model": lambda folder: make(folder, {"val": 7.0}, weights="other"),
    "another suite": lambda folder: make(folder, {"sketch": 7.0}),
    "another limit": lambda folder: make(folder, {"val": 7.0}, limit=1),
    "other classes": lambda folder: make(folder, {"val": 7.0}, wnids=["n02", "n01"]),
    "another crop": lambda folder: make(folder, {"val": 7.0}, image_size=56),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_finished_result_outlives_other_evaluations(tmp_path, other):
    path = tmp_path / "r.json"
    keys = [*ALL_CORRUPTIONS, "val"]
    results.save(path, make(tmp_path, dict.fromkeys(keys, 5.0)))
    before = all_results(path)
    made = OTHERS[other](tmp_path)
    cells = made.pop("cells")
    made["cells"] = {}
    assert continued(path, made, *cells) == {}
    made["cells"] = cells
    results.save(path, made)
    assert all_results(path).items() >= before.items() and len(all_results(path)) == len(before) + 1
    assert continued(path, make(tmp_path, {}), *keys) == dict.fromkeys(keys, 5.0)  # and is taken up again


@pytest.mark.parametrize("change", ["folder", "number", "names"])
def test_a_result_on_other_images_is_not_taken(tmp_path, change):
    path = tmp_path / "r.json"
    results.save(path, make(tmp_path, {"val": 5.0}))
    other = {
        "folder": test_set(folder="/elsewhere"),
        "number": test_set(n=6),
        "names": test_set()._replace(paths=[path.replace(".png", ".jpg") for path in test_set().paths]),
    }[change]
    fresh = make(tmp_path, {})
    results.reuse_results(str(path), fresh, [other])
    assert fresh["cells"] == {} and len(fresh["earlier"]) == 1


def first_version(made):
    """A report as it was written before results had an identity of their own."""
    old = {name: made[name] for name in ("image_size", "limit", "wnids", "wnids_sha256", "checkpoints")}
    cells = json.loads(json.dumps(made["cells"]))
    for cell in cells.values():
        del cell["images_sha256"]
    return old | {"cells": cells, "table": {}}


@pytest.mark.parametrize("side, reused", [(28, True), (64, False)])
def test_a_file_of_the_first_version_is_taken_where_it_holds(tmp_path, side, reused):
    """It cropped corrupted images of any size, and resized all stylized ones."""
    for folder in ("c/fog/1", "s/val"):
        paint_rim(tmp_path / folder / "n01" / "a.png", side)
    directories = {"corruption": str(tmp_path / "c"), "stylized": str(tmp_path / "s")}
    sets = testsets.list_test_sets(directories, WNIDS)
    made = make(tmp_path, {})
    for each in sets:
        results.add(made, each, [result(5.0) | {"n": 1}], 28, WNIDS)
    old = first_version(made)
    old["cells"]["stylized"]["preprocessing"] = "Resize(32), CenterCrop(28)"
    (tmp_path / "r.json").write_text(json.dumps(old))
    fresh = make(tmp_path, {})
    results.reuse_results(str(tmp_path / "r.json"), fresh, sets)
    assert ("corruption/fog/1" in fresh["cells"]) == reused
    assert ("stylized" in fresh["cells"]) != reused
    results.save(tmp_path / "r.json", fresh)
    assert len(all_results(tmp_path / "r.json")) == 2


MALFORMED = {
    "half a file": '{"checkpoints": [',
    "a text": "half a fi",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "an object": "{}",
    "another program's": '{"results": [1, 2]}',
    "deeply nested": "[" * 100_000,
    "a long number": "1" * 10_000,
    "not UTF-8": b"\xff\xfe{}",
    "NUL bytes": b"\0" * 64,
    "an image": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_file_that_is_not_its_own_is_refused_and_kept(tmp_path, kind):
    content = MALFORMED[kind]
    path = tmp_path / "r.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(UsageError, match="name another file"):
        results.reuse_results(str(path), make(tmp_path, {}), [test_set()])
    assert path.read_bytes() == before


def test_an_empty_or_absent_file_is_a_new_one(tmp_path):
    (tmp_path / "empty.json").touch()
    for name in ("empty.json", "absent.json"):
        assert continued(tmp_path / name, make(tmp_path, {}), "val") == {}
    with pytest.raises(UsageError, match="not a regular file"):
        results.reuse_results("/dev/null", make(tmp_path, {}), [test_set()])


ODD_VALUES = {
    "top1": ["5", None, True, -1, 101, float("nan"), float("inf"), 10**400, [], {}],
    "n": [0, -1, 1.5, "4", None, 3, 2**40],
    "classes": [
        None,
        [],
        {"n01": None},
        {"n01": {}},
        {"n01": {"n": 1, "correct": 2}},
        {"n01": {"n": "1", "correct": 0}},
    ],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ODD_VALUES.items() for value in values])
def test_an_odd_value_is_named_with_its_place(tmp_path, name, value):
    made = make(tmp_path, {"val": 5.0})
    made["cells"]["val"]["results"][0][name] = value
    (tmp_path / "r.json").write_text(json.dumps(made))
    with pytest.raises(UsageError, match=r"cells\.val\.results\[0\]"):
        results.reuse_results(str(tmp_path / "r.json"), make(tmp_path, {}), [test_set()])


def mutated(content, rng):
    """The content with up to three places deleted, duplicated, or replaced by another value."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        places = list(containers(content))
        parent, key = rng.choice(places)
        values = [None, True, 0, -3, 1.5, 1e300, 10**30, "", "x" * 50, "\ud800", [], {}, [[]], {"n": 1}, float("nan")]
        action = rng.choice(["delete", "replace", "replace", "copy"])
        if action == "delete":
            del parent[key]
        elif action == "replace":
            parent[key] = rng.choice(values)
        elif isinstance(parent, dict):
            parent["".join(rng.choices(string.ascii_letters, k=3))] = parent[key]
        else:
            parent.append(parent[key])
        if not list(containers(content)):
            break
    return content


def containers(value):
    """(container, key or index) of all values within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from containers(inner)


def fuzz_json(tmp_path, seed, count):
    """Damage a file `count` times: each is refused with one line, or all that it holds is kept and shown."""
    rng = random.Random(seed)
    made = make(tmp_path, {"val": 5.0, "corruption/fog/1": 6.0, "sketch": 7.0}, rows=["a", "b"])
    results.save(tmp_path / "r.json", made)
    other = make(tmp_path, {}, rows=["b"])
    continued(tmp_path / "r.json", other, "val")
    other["table"] = report.by_row(other)
    taken = 0
    for number in range(count):
        path = tmp_path / "damaged.json"
        text = json.dumps(mutated(rng.choice([made, other, first_version(made)]), rng), indent=1)
        if rng.random() < 0.2:
            start = rng.randrange(len(text))
            text = text[:start] + rng.choice(["", "\0", "}", '"', ","]) + text[start + rng.randrange(20) :]
        path.write_text(text)
        fresh = make(tmp_path, {}, rows=["a", "b"])
        try:
            figures = continued(path, fresh, "val", "corruption/fog/1", "sketch")
        except UsageError as error:
            assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 700, (number, text)
            assert path.read_text() == text
            continue
        taken += bool(figures)
        before = {(sha, key, top1) for (sha, key, _), top1 in all_results(path).items()}
        for key in ("val", "corruption/fog/1", "sketch"):
            if results.unfinished(fresh, test_set(key)):
                lacking = len(results.unfinished(fresh, test_set(key)))
                results.add(fresh, test_set(key), [result(1.0)] * lacking, 28, WNIDS)
        results.save(path, fresh)
        assert {(sha, key, top1) for (sha, key, _), top1 in all_results(path).items()} >= before, (number, text)
        assert report.table(fresh) and report.notes(fresh)
    return taken


def test_damaged_json_files_are_refused_or_kept(tmp_path):
    assert fuzz_json(tmp_path, 0, 300) > 20


@pytest.mark.slow
def test_2000_damaged_json_files_are_refused_or_kept(tmp_path):
    assert fuzz_json(tmp_path, 1, 2000) > 200


# The script


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear checkpoint of two classes and its data; a copy with other weights."""
    root = tmp_path_factory.mktemp("linear")
    data = write_folder(root / "data")
    for name, seed in (("one", 1), ("two", 2)):
        options = [*SMALL_PROBE, "-j", 0, "--seed", seed, "--epochs", 1, "--ckpt_path", root / name]
        run_script(PROBE, *options, data)
    return root


def checkpoint(linear, name):
    return linear / name / "model_best_random.pth.tar"


def test_the_script_scores_only_what_is_missing(linear, tmp_path):
    common = ["--val", linear / "data", "-j", 0, "--json", tmp_path / "r.json"]
    first = run_script(EVALUATE, "--pretrained", checkpoint(linear, "one"), *common)
    other = run_script(EVALUATE, "--pretrained", checkpoint(linear, "two"), *common)
    sketch = ["--sketch", linear / "data" / "train"]
    rows = [f"a={checkpoint(linear, 'one')}", f"b={checkpoint(linear, 'two')}"]
    both = run_script(EVALUATE, "--pretrained", *rows, *common, *sketch)
    assert "1 of 2 test sets are already in" in both.stderr and "test sets are already" not in other.stderr
    figures = [run.stdout.splitlines()[2].split(" | ")[3].rstrip(" |") for run in (first, other)]
    assert [line.split(" | ")[3] for line in both.stdout.splitlines()[2:4]] == figures
    saved = json.loads((tmp_path / "r.json").read_text())
    assert list(saved["table"]) == ["a", "b"] and list(saved["cells"]) == ["val", "sketch"] and saved["earlier"] == {}


def test_the_script_tells_of_sizes_and_unknown_names(linear, tmp_path):
    for name in ("fog/1", "fogg/1"):
        write_folder(tmp_path / "c" / name / "photos", train=1, val=1)
        for split in (tmp_path / "c" / name / "photos" / "val").iterdir():
            split.rename(tmp_path / "c" / name / split.name)
    for rest in tmp_path.glob("c/*/1/photos"):
        rest.rename(tmp_path / f"rest of {rest.parent.parent.name}")
    options = ["--pretrained", checkpoint(linear, "one"), "--corruption", tmp_path / "c", "-j", 0, "--allow-partial"]
    plan = run_script(EVALUATE, *options, "--json", tmp_path / "r.json", "--dry-run")
    assert "no such corruption or severity: fogg" in plan.stdout
    run = run_script(EVALUATE, *options, "--json", tmp_path / "r.json")
    assert "| Corruption (partial, resized) |" in run.stdout and "RESIZED" in run.stdout
    assert "no such corruption or severity: fogg" in run.stdout and "no such corruption or severity: fogg" in run.stderr
    assert "corruption/fog/1: images of another size" in run.stderr and "Resize(37), CenterCrop(32)" in run.stderr


def test_the_script_refuses_a_foreign_json_file(linear, tmp_path):
    (tmp_path / "r.json").write_text('{"name": "package"}')
    options = ["--pretrained", checkpoint(linear, "one"), "--val", linear / "data", "--json", tmp_path / "r.json"]
    assert "JSON of another program" in refused(EVALUATE, *options)
    assert (tmp_path / "r.json").read_text() == '{"name": "package"}'


def test_the_script_does_not_compare_a_few_images(linear, tmp_path):
    row = f"patch-k16384-a2={checkpoint(linear, 'one')}"
    options = ["--val", linear / "data", "-j", 0, "--json", tmp_path / "r.json", "--compare", "paper"]
    out = run_script(EVALUATE, "--pretrained", row, *options).stdout
    assert "--compare paper: no column is complete" in out and "difference in the paper's std" not in out
    assert "val is not compared: crops of 32 px, published: 224" in out and "Sketch is not compared: not tested" in out
