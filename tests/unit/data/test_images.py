"""Every file that calls itself an image is read as RGB or is a BadImage; nothing else happens."""

import io
import random
import struct

import numpy as np
import pytest
import torch
from helpers import write_photo
from PIL import Image

from moco.data import datasets, images
from moco.data.images import BadImage


def colours(size=(33, 21)):
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "P", "PA", "LA", "RGBA"])
@pytest.mark.parametrize("suffix", [".JPEG", ".png"])
def test_every_kind_of_image_becomes_rgb_whatever_its_name(tmp_path, mode, suffix):
    image = colours().convert(mode)
    path = tmp_path / f"photo{suffix}"
    image.save(path, format={"CMYK": "JPEG", "PA": "TIFF"}.get(mode, "PNG"))  # as in ImageNet: a PNG named .JPEG
    rgb = images.read_rgb(path)
    assert rgb.shape == (3, 21, 33) and rgb.dtype == torch.uint8
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    assert (rgb.int() - expected.int()).abs().float().mean() < 1
    assert np.array_equal(np.array(images.open_rgb(path)), np.array(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PDF"])
def test_only_documented_formats_are_opened_whatever_the_name(tmp_path, kind):
    """PIL gives PostScript to Ghostscript, a program that a file could control."""
    (tmp_path / "photo.jpg").write_bytes(encoded(colours(), kind))
    for read in images.read_rgb, images.open_rgb:
        with pytest.raises(BadImage, match="photo.jpg: UnidentifiedImageError"):
            read(tmp_path / "photo.jpg")


def test_torchvisions_decoder_is_used_while_it_exists(tmp_path, monkeypatch):
    assert hasattr(images.torchvision.io, "decode_jpeg")
    write_photo(tmp_path / "photo.JPEG")
    monkeypatch.setattr(images.torchvision.io, "decode_jpeg", lambda data, mode: torch.full((3, 1, 1), 7))
    assert images.read_rgb(tmp_path / "photo.JPEG").flatten().tolist() == [7, 7, 7]


def test_without_torchvisions_decoder_pil_reads_jpegs(tmp_path, monkeypatch):
    image, exif = colours((200, 150)), Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90°
    paths = [tmp_path / name for name in ("photo", "gray", "turned")]
    for path, data in zip(paths, (PHOTO, encoded(image.convert("L"), "JPEG"), encoded(image, "JPEG", exif=exif))):
        path.write_bytes(data)
    fast = [images.read_rgb(path) for path in paths]
    monkeypatch.delattr(images.torchvision.io, "decode_jpeg")
    for path, expected in zip(paths, fast):
        slow = images.read_rgb(path)
        assert slow.shape == (3, 150, 200) and slow.dtype == torch.uint8  # EXIF orientation is ignored by both
        assert (slow.int() - expected.int()).abs().max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, kind):
    first, second = (Image.new("RGB", (9, 7), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "film", kind, save_all=True, append_images=[second])
    rgb = images.read_rgb(tmp_path / "film")
    assert rgb.shape == (3, 7, 9) and (rgb[0] > 240).all() and (rgb[2] < 15).all()


def test_broken_exif_and_transparent_palettes_do_not_warn(tmp_path, recwarn):
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + b"\x12\x01\x03\x00" * 3  # 65535 entries, and cut short
    (tmp_path / "exif").write_bytes(encoded(colours(), "JPEG", exif=exif))
    (tmp_path / "palette").write_bytes(encoded(colours().quantize(8), "PNG", transparency=b"\x00\x80\xff"))
    for name in ("exif", "palette"):
        assert images.read_rgb(tmp_path / name).shape == (3, 21, 33)
        assert images.open_rgb(tmp_path / name).size == (33, 21)
    assert not recwarn.list


def jpeg_of(side):
    """A JPEG whose header promises side × side pixels."""
    data = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


PHOTO = encoded(colours((200, 150)), "JPEG")
BROKEN = {
    "empty": b"",
    "text": b"this is no image\n",
    "html": b"<html>404</html>",
    "truncated jpeg": PHOTO[: len(PHOTO) // 2],
    "truncated png": encoded(colours(), "PNG")[:150],
    "jpeg header only": PHOTO[:20],
    "decompression bomb": jpeg_of(20_000),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_image_is_a_bad_image(tmp_path, fault):
    (tmp_path / "photo.JPEG").write_bytes(BROKEN[fault])
    for read in (images.read_rgb, images.open_rgb):
        with pytest.raises(BadImage, match="photo.JPEG") as bad:
            read(tmp_path / "photo.JPEG")
        assert bad.value.args[0] == str(tmp_path / "photo.JPEG") and "\n" not in str(bad.value)
        assert "bomb" not in fault or "DecompressionBomb" in bad.value.args[1]


def damaged(number):
    """Random bytes, or a JPEG or PNG with some of its bits flipped; a function of the number."""
    rng = random.Random(number)
    if number % 5 == 0:
        start = rng.choice([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00", b"RIFF\0\0\0\0WEBP"])
        return start + rng.randbytes(rng.randrange(2000))
    data = bytearray(SOURCES[number % len(SOURCES)])
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(700, len(data)))  # headers, too
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


SOURCES = [
    PHOTO,
    encoded(colours((60, 50)), "JPEG", progressive=True),
    encoded(colours((60, 50)).convert("CMYK"), "JPEG"),
    encoded(colours((60, 50)), "PNG"),
    encoded(colours((60, 50)).quantize(16), "PNG"),
    encoded(colours((60, 50)), "JPEG", subsampling=0, restart_marker_blocks=2),
]


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_never_crash_the_reading_process(tmp_path, count):
    """Each is an image or a BadImage, and nothing is written to the terminal; any other exception fails here."""
    path, read, bad = tmp_path / "photo.JPEG", 0, 0
    for number in range(count):
        path.write_bytes(damaged(number))
        try:
            views, _ = datasets.TwoCrops([path], 32)[0], images.open_rgb(path)
            assert views.shape == (2, 3, 32, 32)
            read += 1
        except BadImage:
            bad += 1
    assert read > count / 10 and bad > count / 10
