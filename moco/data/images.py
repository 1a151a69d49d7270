"""Decode image files to RGB: ImageNet has a PNG named .JPEG, CMYK JPEGs and files with broken EXIF data."""

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision.io
import torchvision.transforms.functional as TF
from PIL import Image

from moco.data.rgb import check_resizable, to_rgb
from moco.errors import RunError

RETRY_SECONDS = 0.1  # a file on a network drive may be readable a moment later
MAX_WAITS = 100  # in vain, of a process: thousands of bad files must not cost a wait each


class BadImage(RunError):
    """A file that cannot be read as an image. Its arguments are the path and the reason.

    A data loader's process hands it over as one argument, the message.
    """

    def __str__(self) -> str:
        return "{}: {}; replace this file".format(*self.args) if len(self.args) == 2 else str(self.args[0])


def read_rgb(path: str | Path) -> torch.Tensor:
    """Read an image file as uint8 (3, H, W): JPEGs with torchvision's decoder, other formats with PIL.

    Raises BadImage, after a second attempt, if the file is not an image, is damaged, has over 179 million pixels
    (rgb.MAX_PIXELS), or values whose range its format does not declare (see to_rgb). Only the first frame of an
    animation is read; transparency and the lower 8 of 16 bits are dropped; EXIF orientation is ignored, as in published
    ImageNet results.
    """
    return _read(path, _decode)


def open_rgb(path: str | Path, resizable_to: int | None = None) -> Image.Image:
    """Read an image file as `read_rgb` does, but with PIL for every format, as in published evaluations.

    resizable_to: px; an image too narrow to resize its shorter side to this is a BadImage, too.
    """

    def decode(image: Image.Image, data: bytes) -> Image.Image:
        if resizable_to:
            check_resizable(image, resizable_to)
        return to_rgb(image)

    return _read(path, decode)


def has_fast_jpeg() -> bool:
    """Whether torchvision still has its JPEG decoder, which is deprecated.

    Its successor, torchcodec, always applies EXIF rotation, which published ImageNet results do not.
    """
    return hasattr(torchvision.io, "decode_jpeg")


def _decode(image: Image.Image, data: bytes) -> torch.Tensor:
    if image.format == "JPEG" and has_fast_jpeg():
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # CMYK or damaged: PIL converts the former and names the damage
            return torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
    return TF.pil_to_tensor(to_rgb(image))


_bad_files = set()  # that this process could not read


def _read(path: str | Path, decode: Callable):
    """decode(image, data) of a file. If that fails, a second attempt, unless the file still holds the same data."""
    data, waits = None, path not in _bad_files and len(_bad_files) < MAX_WAITS
    for pause in (waits * RETRY_SECONDS, 0):
        try:
            before, data = data, Path(path).read_bytes()
            if data == before:  # damaged, and not just late
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about broken EXIF data, large images, the JPEG decoder: all fine here
                with Image.open(io.BytesIO(data)) as image:  # reads the header only: size and format
                    return decode(image, data)
        except Exception as error:  # damaged data make decoders raise nearly anything, struct.error and SyntaxError too
            cause = error
            time.sleep(pause)
    _bad_files.add(path)
    raise BadImage(str(path), f"{type(cause).__name__}: {cause}".replace("\n", " ")) from cause
