"""Decode image files to RGB: ImageNet has a PNG named .JPEG, CMYK JPEGs and files with broken EXIF data."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision.io
import torchvision.transforms.functional as TF
from PIL import Image

from moco.data.rgb import FORMATS, check_resizable, to_rgb
from moco.errors import RunError, note_reading


class BadImage(RunError):
    """A file that cannot be read as an image. Its arguments are the path and the reason.

    A data loader's process hands it over as one argument, the message.
    """

    def __str__(self) -> str:
        return "{}: {}; replace this file".format(*self.args) if len(self.args) == 2 else str(self.args[0])


def read_rgb(path: str | Path, resizable_to: int | None = None) -> torch.Tensor:
    """Read an image file as uint8 (3, H, W): JPEGs with torchvision's decoder, other formats with PIL.

    Raises BadImage if the file is not an image, is damaged, has over 179 million pixels (rgb.MAX_PIXELS), or values
    whose range its format does not declare (see to_rgb). Only the first frame of an animation is read; transparency and
    the lower 8 of 16 bits are dropped; EXIF orientation is ignored, as in published ImageNet results. resizable_to: px;
    an image too narrow to resize its shorter side to this is a BadImage, too.
    """
    with _opened(path, resizable_to) as (image, data):
        # It is deprecated; its successor torchcodec always applies EXIF rotation.
        if image.format == "JPEG" and hasattr(torchvision.io, "decode_jpeg"):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):  # CMYK or damaged: PIL converts the former and names the damage
                return torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
        return TF.pil_to_tensor(to_rgb(image))


def open_rgb(path: str | Path, resizable_to: int | None = None) -> Image.Image:
    """Read an image file as `read_rgb` does, but with PIL for every format, as in published evaluations."""
    with _opened(path, resizable_to) as (image, _):
        return to_rgb(image)


@contextlib.contextmanager
def _opened(path: str | Path, resizable_to: int | None) -> Iterator[tuple[Image.Image, bytes]]:
    """The image, of which PIL has read the header only, and the file's data; any error becomes a BadImage."""
    try:
        note_reading(path)
        data = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken EXIF data, large images, the JPEG decoder: all fine here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if resizable_to:
                    check_resizable(image, resizable_to)
                yield image, data
    except Exception as error:  # damaged data make decoders raise nearly anything, struct.error and SyntaxError too
        raise BadImage(str(path), f"{type(error).__name__}: {error}".replace("\n", " ")) from error
