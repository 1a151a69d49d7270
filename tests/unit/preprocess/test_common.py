import argparse
import json
from pathlib import Path

import common
import pytest

from moco.errors import UsageError


def test_a_folder_is_claimed_once_for_some_settings(tmp_path):
    for name in (".lock", "lost+found", f"made.json.{'0' * 16}.partial"):  # left by the system, or by a killed run
        (tmp_path / name).touch()
    for _ in range(2):
        common.claim("--out", tmp_path, "made.json", {"seed": 0})
        assert json.loads((tmp_path / "made.json").read_text()) == {"seed": 0}
    with pytest.raises(UsageError, match=r'--out .* holds images made with {"seed": 0}, not {"seed": 1}'):
        common.claim("--out", tmp_path, "made.json", {"seed": 1})
    with pytest.raises(UsageError, match="holds something else"):
        common.claim("--out", tmp_path, "other.json", {"seed": 0})


def test_photos_that_differ_in_the_suffix_only_are_refused():
    common.check_stems("--val x", ["n01/a.jpg", "n02/a.jpg"])
    with pytest.raises(UsageError, match="--val x: 1 photos have the name of another"):
        common.check_stems("--val x", ["n01/a.jpg", "n01/a.png"])


@pytest.mark.parametrize(
    "convert, good, result, bad",
    [(common.positive_int, "12", 12, ("0", "-1", "1.5", "²")), (common.png_path, "a.png", Path("a.png"), ("a.jpg",))],
)
def test_values_of_options(convert, good, result, bad):
    assert convert(good) == result
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            convert(text)
