import hashlib

import imagenet_texture_syn
import numpy as np
import pytest
from helpers import write_photo


def test_patches_are_cut_from_the_centre_and_from_a_random_place(tmp_path):
    write_photo(tmp_path / "a.png", (60, 50))
    photo, enlarged = imagenet_texture_syn.read_photo(tmp_path / "a.png", 24)
    centre, other = imagenet_texture_syn.cut_patches(photo, 24, np.random.default_rng(0))
    pixels = np.asarray(photo)
    assert not enlarged and np.array_equal(centre, pixels[13:37, 18:42])
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (24, 24, 3))[:, :, 0]
    assert (windows == other).all((2, 3, 4)).any()


@pytest.mark.parametrize("size, enlarged_to", [((30, 20), (36, 24)), ((10, 40), (24, 96))])
def test_small_photos_are_enlarged_to_a_patch(tmp_path, size, enlarged_to):
    write_photo(tmp_path / "a.png", size)
    photo, enlarged = imagenet_texture_syn.read_photo(tmp_path / "a.png", 24)
    assert enlarged and photo.size == enlarged_to


def test_the_random_place_follows_from_the_bytes_of_the_name():
    rng = imagenet_texture_syn.generator(3, "train/n01/\u00fc.JPEG")
    digest = hashlib.blake2b("3 train/n01/\u00fc.JPEG".encode(), digest_size=16).digest()
    assert rng.integers(1 << 40) == np.random.default_rng(list(digest)).integers(1 << 40)
    imagenet_texture_syn.generator(3, "train/n01/\udcff.JPEG")  # names need not be UTF-8


def test_a_program_that_hangs_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(imagenet_texture_syn, "TIME_LIMIT", 0.1)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="took more than 0.1 s"):
        imagenet_texture_syn.external_texture(str(program), np.zeros((2, 24, 24, 3), np.uint8), 32)
