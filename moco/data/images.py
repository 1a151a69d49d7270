"""Decode image files to RGB, whatever they hold: ImageNet has a PNG named .JPEG and CMYK JPEGs."""

import functools
import io
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision.io
import torchvision.transforms.functional as TF
from PIL import Image

from moco.data.rgb import to_rgb

RETRY_SECONDS = 0.1  # a file on a network drive may be readable a moment later
MAX_WAITING = 0.005  # share of a process's time that waits which did not help may take
NO_FAST_JPEG = "this torchvision has no JPEG decoder (torchvision.io.decode_jpeg): PIL reads the JPEGs, which is slower"


class BadImage(Exception):
    """A file that cannot be read as an image: `path`, and the `reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def read_rgb(path: str | Path) -> torch.Tensor:
    """Read an image file as uint8 (3, H, W): JPEGs with torchvision's decoder, other formats with PIL.

    Raises BadImage, after a second attempt, if the file is not an image, is damaged, or has over 179 million pixels
    (MAX_PIXELS), or values whose range its format does not declare (floats, 32 bits, signed, 12 bits stored as 16).
    Only the first frame of an animation is read; transparency and the lower 8 of 16 bits are dropped; EXIF orientation
    is ignored, as in published ImageNet results.
    """
    return _read(path, _decode)


def open_rgb(path: str | Path) -> Image.Image:
    """As `read_rgb`, but decoded by PIL for every format, as in published evaluations."""
    return _read(path, lambda image, data: to_rgb(image))


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


_started, _vain_waits = time.monotonic(), 0  # of this process: since when it reads, and how often waiting did not help


def _read(path: str | Path, decode: Callable):
    """decode(image, data) of a file. If that fails, a second attempt, unless the file still holds the same data."""
    global _vain_waits
    data, waited = None, False
    for attempt in (1, 2):
        try:
            before, data = data, Path(path).read_bytes()
            if data == before:  # damaged, and not just late
                break
            with _no_warnings(), Image.open(io.BytesIO(data)) as image:  # reads the header only: size and format
                decoded = decode(image, data)
        except Exception as error:  # damaged data make decoders raise nearly anything, struct.error and SyntaxError too
            cause = error
            # Waiting for each of thousands of bad files would take as long as reading the others.
            if attempt == 1 and _vain_waits * RETRY_SECONDS <= MAX_WAITING * (time.monotonic() - _started):
                waited = True
                time.sleep(RETRY_SECONDS)
        else:
            return decoded
    _vain_waits += waited
    raise BadImage(path, f"{type(cause).__name__}: {cause}".replace("\n", " ")) from cause


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
    return TF.pil_to_tensor(to_rgb(image))
