"""Values of images: 8-bit RGB from what each format declares, and a refusal where it declares nothing."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from moco.data.rgb import check_resizable, to_rgb

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
EXPECTED = (RAMP >> 8).astype(np.uint8)


def encoded(pixels, kind, **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def png16(pixels):
    """A PNG of 16 bits per sample, RGB (H, W, 3) or gray with alpha (H, W, 2), which PIL cannot write."""
    height, width, bands = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, {2: 4, 3: 2}[bands], 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
        data += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return data


def tiff12(values):
    """A TIFF of 12 bits per sample, packed; values: (H, W) with an even W."""
    pairs = values.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1)]
    tags += [(278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<4sIH", b"II*\0", 8, len(tags)) + entries + bytes(4) + data


SCALED = {
    "16 bits, png": encoded(RAMP, "PNG"),
    "16 bits, tiff": encoded(RAMP, "TIFF"),
    "16 bits, packed tiff": encoded(RAMP, "TIFF", compression="tiff_lzw"),
    "16 bits, big-endian tiff": encoded(RAMP.astype(">u2"), "TIFF"),
    "16 bits, 0 is white": encoded(65535 - RAMP, "TIFF", tiffinfo={262: 0}),
    "12 bits, tiff": tiff12(RAMP >> 4),
    "12 bits, pgm": b"P5 8 8 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "16 bits, pgm": b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes(),
    "16 bits, RGB png": png16(np.stack([RAMP] * 3, 2)),
    "16 bits, gray and alpha": png16(np.stack([RAMP, np.full_like(RAMP, 65535)], 2)),
    "8 bits": encoded(EXPECTED, "PNG"),
}
UNKNOWN = {
    "floats of 0 to 1": (encoded(RAMP.astype(np.float32) / 65535, "TIFF"), "floats"),
    "int32 of 0 to 255": (encoded(EXPECTED.astype(np.int32), "TIFF"), "signed"),
    "uint32": (encoded(EXPECTED.astype(np.int32), "TIFF", tiffinfo={339: 1}), "32-bit integers|signed"),
    "portable float map": (b"Pf\n8 8\n-1.0\n" + np.ones((8, 8), np.float32).tobytes(), "floats"),
    "12 bits in a 16-bit png": (encoded(RAMP >> 4, "PNG"), "reach only 4095 of 65535"),
    "8 bits in a 16-bit png": (encoded(RAMP >> 8, "PNG"), "reach only 255 of 65535"),
    "12 bits in a 16-bit pgm": (b"P5 8 8 65535\n" + (RAMP >> 4).astype(">u2").tobytes(), "reach only 4095"),
    "12 bits in a 16-bit RGB png": (png16(np.stack([RAMP >> 4] * 3, 2)), "a 16th of 65535"),
    "12 bits in gray with alpha": (png16(np.stack([RAMP >> 4, np.full_like(RAMP, 65535)], 2)), "a 16th of 65535"),
}


def pixels_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(to_rgb(image))


@pytest.mark.parametrize("kind", SCALED)
def test_values_are_scaled_by_what_the_format_declares(kind):
    pixels = pixels_of(SCALED[kind])
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - EXPECTED[..., None]).max() <= 1


@pytest.mark.parametrize("kind", UNKNOWN)
def test_values_of_an_unknown_range_are_refused(kind):
    data, told = UNKNOWN[kind]
    with pytest.raises(ValueError, match=told):
        pixels_of(data)


def test_a_black_image_of_16_bits_is_black():
    assert not pixels_of(encoded(RAMP * 0, "PNG")).any()


def test_a_png_with_a_large_colour_profile_is_read():
    profile = np.random.default_rng(0).integers(0, 256, 5 * 2**20, dtype=np.uint8).tobytes()  # PIL's own limit is 1 MB
    data = io.BytesIO()
    Image.fromarray(EXPECTED).convert("RGB").save(data, "PNG", icc_profile=profile)
    assert np.array_equal(pixels_of(data.getvalue())[..., 0], EXPECTED)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (3, 40000)])
def test_a_narrow_image_is_not_resized(size):
    with pytest.raises(ValueError, match="x.* px: too narrow to resize its shorter side to 256 px"):
        check_resizable(Image.new("L", size), 256)
    check_resizable(Image.new("L", (2000, 2)), 37)
