"""The 15 corruptions of ImageNet-C (Hendrycks & Dietterich, ICLR 2019) for images of 56 px, in numpy.

They are made for the generated data of shapes.py. For photos, corruptions.py has the published ones.
"""

import io
from math import cos, pi, sin

import numpy as np
from PIL import Image

CROP = 56  # px, the centre crop that is corrupted


def to_uint8(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def moved(image: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Mean of a CROP×CROP×C image at N displacements of dy, dx pixels (N×1×1 or N×CROP×CROP), bilinear."""
    at, end = np.arange(CROP), CROP - 1.001
    y, x = np.clip(at[:, None] + dy, 0, end), np.clip(at + dx, 0, end)
    top, left = y.astype(int), x.astype(int)
    y, x = (y - top).astype(np.float32)[..., None], (x - left).astype(np.float32)[..., None]
    upper = (1 - x) * image[top, left] + x * image[top, left + 1]
    lower = (1 - x) * image[top + 1, left] + x * image[top + 1, left + 1]
    return ((1 - y) * upper + y * lower).mean(axis=0)


def smeared(rng: np.random.Generator, image: np.ndarray, half: float) -> np.ndarray:
    """Motion blur over 2 × half pixels in a random direction."""
    angle, steps = rng.uniform(0, pi), np.linspace(-half, half, 13)[:, None, None]
    return moved(image, steps * sin(angle), steps * cos(angle))


def clouds(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise, CROP×CROP×1, about unit variance, with `cells` bumps along a side."""
    noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((CROP, CROP), Image.BICUBIC))[..., None]


def jpeg(rng: np.random.Generator, image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


SEED = np.arange(18)[:, None, None]  # of a sunflower, whose seeds fill a disc evenly
DISC = np.sqrt((SEED + 0.5) / 18) * [np.sin(2.4 * SEED), np.cos(2.4 * SEED)]
FROM_CENTRE = np.mgrid[:CROP, :CROP][:, None] - (CROP - 1) / 2
# fmt: off
CORRUPTIONS = {             # of ImageNet-C: levels at severity 1 to 5; random generator, image, level → image
    "gaussian_noise": ((.06, .1, .15, .21, .28), lambda rng, x, deviation: x + rng.normal(0, deviation, x.shape)),
    "shot_noise": ((100, 50, 25, 12, 6), lambda rng, x, photons: rng.poisson(x * photons) / photons),
    "impulse_noise": ((.02, .05, .09, .15, .22), lambda rng, x, share: np.where(
        rng.random(x.shape) < share, rng.random(x.shape) < .5, x)),
    "defocus_blur": ((.8, 1.2, 1.7, 2.3, 3), lambda rng, x, radius: moved(x, *radius * DISC)),
    "glass_blur": ((.8, 1.2, 1.7, 2.3, 3), lambda rng, x, far: moved(x, *rng.uniform(-far, far, (2, 1, CROP, CROP)))),
    "motion_blur": ((1.2, 2, 3, 4, 5.5), smeared),
    "zoom_blur": ((1.06, 1.1, 1.16, 1.23, 1.32), lambda rng, x, zoom: moved(
        x, *(1 / np.linspace(1, zoom, 10)[:, None, None] - 1) * FROM_CENTRE)),
    "snow": ((.015, .035, .06, .09, .13), lambda rng, x, flakes: 1 - (1 - x) * (1 - 2 * flakes) * (
        1 - np.clip(3 * smeared(rng, rng.random((CROP, CROP, 1)) < flakes, 2), 0, 1))),
    "frost": ((.2, .32, .45, .58, .72), lambda rng, x, ice: (
        (1 - .6 * ice) * x + ice * np.exp(-1.5 * np.abs(clouds(rng, 6) * clouds(rng, 14))))),
    "fog": ((.25, .4, .54, .67, .78), lambda rng, x, haze: (
        (1 - haze) * x + haze * (.7 + .12 * clouds(rng, 4) + .06 * clouds(rng, 8)))),
    "brightness": ((.1, .18, .26, .34, .43), lambda rng, x, added: x + added),
    "contrast": ((.6, .45, .32, .21, .13), lambda rng, x, kept: x.mean() + kept * (x - x.mean())),
    "elastic_transform": ((.6, 1, 1.5, 2.1, 2.8), lambda rng, x, pull: moved(
        x, pull * clouds(rng, 9).transpose(2, 0, 1), pull * clouds(rng, 9).transpose(2, 0, 1))),
    "pixelate": ((36, 28, 22, 17, 13), lambda rng, x, side: np.asarray(
        Image.fromarray(to_uint8(x)).resize((side, side), Image.BOX).resize((CROP, CROP), Image.NEAREST)) / 255),
    "jpeg_compression": ((40, 25, 16, 10, 6), jpeg),
}
# fmt: on


def corrupt(rng: np.random.Generator, image: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Corrupt a CROP×CROP×3 uint8 image by one of CORRUPTIONS at a severity from 1 to 5; same size and type."""
    levels, function = CORRUPTIONS[name]
    return to_uint8(function(rng, image / np.float32(255), levels[severity - 1]))
