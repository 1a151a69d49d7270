"""Decode image files to RGB, whatever they hold: ImageNet has a PNG named .JPEG and CMYK JPEGs."""

import functools
import io
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision.io
import torchvision.transforms.functional as TF
from PIL import Image

RETRY_SECONDS = 0.1  # a file on a network drive may be readable a moment later
NO_FAST_JPEG = "this torchvision has no JPEG decoder (torchvision.io.decode_jpeg): PIL reads the JPEGs, which is slower"


class BadImage(Exception):
    """A file that cannot be read as an image: `path`, and the `reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def read_rgb(path: str | Path) -> torch.Tensor:
    """Read an image file as uint8 (3, H, W): JPEGs with torchvision's decoder, other formats with PIL.

    Raises BadImage, after a second attempt, if the file is not an image, is damaged, or has over 179 million pixels
    (PIL's limit against decompression bombs). Only the first frame of an animation is read; transparency and the lower
    8 of 16 bits are dropped; EXIF orientation is ignored, as in published ImageNet results.
    """
    return _read(path, _decode)


def open_rgb(path: str | Path) -> Image.Image:
    """As `read_rgb`, but decoded by PIL for every format, as in published evaluations."""
    return _read(path, lambda image, data: _to_rgb(image))


@functools.cache
def has_fast_jpeg() -> bool:
    """Whether torchvision can decode JPEGs. Its decoder is deprecated and may be missing.

    Its successor, torchcodec, always applies EXIF rotation, which published ImageNet results do not.
    """
    sample = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sample, "JPEG")
    try:
        _decode_jpeg(sample.getvalue())
    except (AttributeError, RuntimeError):  # removed from torchvision, or built without libjpeg
        return False
    return True


def _decode_jpeg(data: bytes) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)


def _read(path: str | Path, decode: Callable):
    try:
        return _try_read(path, decode)
    except BadImage:
        time.sleep(RETRY_SECONDS)
        return _try_read(path, decode)


def _try_read(path: str | Path, decode: Callable):
    try:
        data = Path(path).read_bytes()
        with _no_warnings(), Image.open(io.BytesIO(data)) as image:  # reads the header only: size and format
            return decode(image, data)
    except Exception as error:  # on damaged data decoders raise nearly anything, struct.error and SyntaxError included
        raise BadImage(path, f"{type(error).__name__}: {error}".replace("\n", " ")) from error


@contextmanager
def _no_warnings():
    """PIL warns about broken EXIF data and large images, which are fine here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(image: Image.Image, data: bytes) -> torch.Tensor:
    if image.format == "JPEG" and has_fast_jpeg():
        try:
            return _decode_jpeg(data)
        except RuntimeError:  # CMYK or damaged: PIL converts the former and names the damage of the latter
            pass
    return TF.pil_to_tensor(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")
