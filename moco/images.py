"""Image files to RGB, whatever is in them: as in ImageNet, where a PNG is named .JPEG and some JPEGs are CMYK."""

import io
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from moco import distributed
from moco.failures import RunFailed

RETRY_AFTER = 0.1                # seconds; a file on a network may be there the next moment


class BadImage(Exception):
    """A file that cannot be read as an image. `path`, and in `reason` why."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def read_rgb(path):
    """An image file as uint8 (3, H, W). JPEGs by torchvision's decoder, the rest, and what it refuses, by PIL.

    Raises BadImage, after a second try, for whatever is no image, is damaged, or has over 179 million pixels (PIL's
    limit, against files that take all memory). Of an animation the first frame is read; transparency is dropped, and so
    is the lower half of 16 bits; EXIF's orientation is ignored, as in published ImageNet figures.
    """
    return _read(path, _decode)


def open_rgb(path):
    """As `read_rgb`, as PIL's RGB image, and every format by PIL, as in published figures of evaluation."""
    return _read(path, lambda image, data: _to_rgb(image))


def _read(path, decode):
    try:
        return _try(path, decode)
    except BadImage:
        time.sleep(RETRY_AFTER)
        return _try(path, decode)


def _try(path, decode):
    try:
        data = Path(path).read_bytes()
        with _quietly(), Image.open(io.BytesIO(data)) as image:      # so far its header, which tells size and format
            return decode(image, data)
    except Exception as error:  # decoders raise nearly anything on damaged data, struct.error and SyntaxError among it
        raise BadImage(path, f"{type(error).__name__}: {error}".replace("\n", " ")) from error


@contextmanager
def _quietly():
    """PIL warns of broken EXIF data and of large images, which are fine here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(image, data):
    if image.format == "JPEG":
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # CMYK or damaged: PIL converts the first, and names the damage in the second
            pass
    return TF.pil_to_tensor(_to_rgb(image))


def _to_rgb(image):
    if image.mode.startswith("I"):                                   # 16 bits; PIL would cut them off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


class BadImages:
    """What could not be read in a run: the same in all processes, said once each, counted for each epoch.

    limit: how many files may be unreadable. known: {path: reason} from the run that this one continues; they are not said
    again, and count once they are met again: they may have been mended.
    """

    def __init__(self, limit, known=None, in_epoch=0):
        self.limit, self.known, self.in_epoch, self.met = limit, dict(known or {}), in_epoch, set()

    def add(self, faults):
        """Take in the (path, reason) of this process's batch; all processes must call this."""
        for path, reason in distributed.gather_lists(faults):
            self.in_epoch += 1
            if path not in self.known and distributed.is_main():
                print(f"bad image, replaced by another of its class: {path}: {reason}", file=sys.stderr, flush=True)
            self.known[path] = reason
            self.met.add(path)

    def too_many(self):
        return len(self.met) > self.limit

    def give_up(self):
        """RunFailed, in the main process; the others wait for its end."""
        if distributed.is_main():
            raise RunFailed(f"{len(self.met)} images could not be read, more than --max-bad-images {self.limit}; mend them or"
                            f" allow more, then go on with --resume auto: {', '.join(sorted(self.met))}")
        distributed.barrier()
