"""8-bit RGB from an opened image of any format and bit depth; needs no PyTorch."""

import numpy as np
from PIL import Image, PngImagePlugin

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever a name says; PIL's others may start programs
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million: PIL's limit against decompression bombs
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: colour profiles may be larger than PIL's 1 MB


def to_rgb(image: Image.Image) -> Image.Image:
    """Scale an image to 8 bits per sample by the range that its format declares, where PIL would clip at 255.

    Raises ValueError if that range is not known: floats, 32 bits, signed samples, 12 bits stored as 16.
    """
    tiff = getattr(image, "tag_v2", {})
    packing = str(image.tile[0][3]) if getattr(image, "tile", None) else ""  # "RGB;16B": how the samples are stored
    full_range = ";16" in packing or "65535" in packing  # 16 bits, PIL keeps 8 of them if there are several bands
    if 2 in tiff.get(339, ()):  # SampleFormat
        raise ValueError("its samples are signed, so it is not known which is white; save it with unsigned ones")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its samples are {kind}, so it is not known which is white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int32).clip(0, 65535)
        bits = 12 if "I;12" in packing else 16
        if full_range and 0 < levels.max() < 4096:
            raise ValueError(f"its 16-bit samples reach only {levels.max()} of 65535, as 12-bit ones do; scale them")
        if tiff.get(262) == 0:  # PhotometricInterpretation: 0 is white
            levels = 2**bits - 1 - levels
        return Image.fromarray((levels >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if full_range:
        peaks = [high for band, (_, high) in zip(image.getbands(), image.getextrema()) if band not in "Aa"]
        if max(peaks) <= 16:
            raise ValueError("its 16-bit samples reach only a 16th of 65535, as 12-bit ones do; scale them")
    return image.convert("RGB")


def check_resizable(image: Image.Image, shorter: int) -> None:
    """Raise ValueError if resizing the shorter side to `shorter` px would take gigabytes: the image is too narrow."""
    if max(image.size) * shorter**2 > MAX_PIXELS * min(image.size):
        raise ValueError("{}x{} px: too narrow to resize its shorter side to {} px".format(*image.size, shorter))
