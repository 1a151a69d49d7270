import imagenet_100_subset
import pytest

from moco.data import folders
from moco.errors import UsageError


@pytest.mark.parametrize("name", ["../n01", "n01/part0", ".."])
def test_a_listed_class_that_is_a_path_is_refused(tmp_path, name):
    (tmp_path / "classes.txt").write_text(f"n02 {name}")
    with pytest.raises(UsageError, match="is not the name of a class folder"):
        imagenet_100_subset.read_classes(tmp_path / "classes.txt")


def test_the_list_that_comes_along_has_100_classes():
    assert len(imagenet_100_subset.read_classes(folders.IMAGENET_100)) == 100
