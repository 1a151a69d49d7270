"""The augmentation recipes of MoCo v1 and v2, batched, on the training device.

The loader crops; flip, colour, blur and normalisation follow here. Each operation equals torchvision's functional one
for the same parameters, and every image has its own parameters, drawn as torchvision draws them. Drawing is separate
from applying, so that a texture negative can share its query's parameters. They are drawn on the host: operations that
no image of a batch needs are skipped without a CPU-GPU sync.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from moco.distributed import to_device

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
BRIGHTNESS, CONTRAST, SATURATION = range(3)


class Recipe(NamedTuple):
    brightness: float
    contrast: float
    saturation: float
    hue: float
    jitter_p: float
    gray_p: float
    gray_first: bool
    blur_p: float
    blur_sigma: tuple[float, float] = (0.1, 2.0)


V1 = Recipe(0.4, 0.4, 0.4, hue=0.4, jitter_p=1.0, gray_p=0.2, gray_first=True, blur_p=0.0)
V2 = Recipe(0.4, 0.4, 0.4, hue=0.1, jitter_p=0.8, gray_p=0.2, gray_first=False, blur_p=0.5)


class Plan(NamedTuple):
    """The random operations on N images: NumPy arrays on the host, tensors on the device.

    Each image has its own order of brightness, contrast and saturation. Its j-th blend is with black, its mean gray
    (`contrast`) or each pixel's gray (`saturation`).
    """

    before: np.ndarray | torch.Tensor  # N×3: the factors of the blends before the change of hue; 1 where there is none
    after: np.ndarray | torch.Tensor  # N×3: of those after it
    contrast: np.ndarray | torch.Tensor  # N×3, bool
    saturation: np.ndarray | torch.Tensor  # N×3, bool
    hue_shift: np.ndarray | torch.Tensor  # N
    jittered: np.ndarray | torch.Tensor  # N, bool: whether blends and hue change the image
    gray: np.ndarray | torch.Tensor  # N, bool
    sigma: np.ndarray | torch.Tensor  # N, pixels; 0 leaves the image sharp
    flip: np.ndarray | torch.Tensor  # N, bool


def draw(recipe: Recipe, n: int, rng: np.random.Generator) -> Plan:
    """Draw the operations on n images."""

    def uniform(low, high):
        return rng.uniform(low, high, n).astype(np.float32)

    factors = [uniform(max(0, 1 - s), 1 + s) for s in (recipe.brightness, recipe.contrast, recipe.saturation)]
    order = rng.random((n, 3)).argsort(axis=1)
    factors = np.take_along_axis(np.stack(factors, axis=1), order, axis=1)
    hue_shift = uniform(-recipe.hue, recipe.hue)
    before_hue = np.arange(3) < rng.integers(4, size=(n, 1))
    jittered = rng.random((n, 1)) < recipe.jitter_p
    return Plan(
        before=np.where(jittered & before_hue, factors, np.float32(1)),
        after=np.where(jittered & ~before_hue, factors, np.float32(1)),
        contrast=order == CONTRAST,
        saturation=order == SATURATION,
        hue_shift=hue_shift,
        jittered=jittered[:, 0],
        gray=rng.random(n) < recipe.gray_p,
        sigma=uniform(*recipe.blur_sigma) * (rng.random(n) < recipe.blur_p),
        flip=rng.random(n) < 0.5,
    )


class _Unknown:
    """In place of a plan's array on the host: skips nothing, so that all batches run the same operations."""

    any, all = (lambda self: True), (lambda self: False)
    __getitem__ = __or__ = __ne__ = lambda self, other: self


def apply(recipe: Recipe, plan: Plan, images: torch.Tensor, compile: bool = False) -> torch.Tensor:
    """uint8 crops (N, 3, S, S) → normalised float32 images (N, 3, S, S). compile: with torch.compile, at once."""
    (device,) = to_device([plan], images.device)  # in one copy
    if compile:
        return _compiled()(recipe, Plan(*len(plan) * [_Unknown()]), Plan(*device), images)
    result = torch.empty(images.shape, device=images.device)
    for chunk in chunks(images):
        own = (Plan(*(values[chunk] for values in each)) for each in (plan, device))
        result[chunk] = _transform(recipe, *own, images[chunk])
    return result


def _transform(recipe: Recipe, host: Plan, device: Plan, images: torch.Tensor) -> torch.Tensor:
    # Here and below, `host` decides what is skipped and `device` holds the same values where the images are.
    x = _where(host.flip, device.flip, lambda x: x.flip(3), images).float().div_(255)
    if recipe.gray_first:
        x = _where(host.gray, device.gray, grayscale, x)
    x = color_jitter(x, host, device)
    if not recipe.gray_first:
        x = _where(host.gray, device.gray, grayscale, x)
    if recipe.blur_p and host.sigma.any():
        x = gaussian_blur(x, device.sigma, recipe.blur_sigma[1])
    return normalize(x)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_transform, dynamic=False)


def chunks(images: torch.Tensor) -> list[slice]:
    """Slices of a batch to process one after the other: the whole batch on a GPU, few images on a CPU.

    A CPU is several times as fast if intermediate results stay in its cache: one image of 224 px, 16 of 56 px.
    """
    step = max(1, 224**2 // images.shape[2:].numel() if images.device.type == "cpu" else len(images))
    return [slice(start, start + step) for start in range(0, len(images), step)]


def _where(host, device, change, x):
    """change(x) for the images that a boolean (N,), given on host and device, selects, and x for the others."""
    if not host.any():
        return x
    return change(x) if host.all() else torch.where(device.view(-1, 1, 1, 1), change(x), x)


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Normalise images (N, 3, H, W) in [0, 1] by ImageNet's mean and standard deviation per channel."""
    # Python numbers: creating a tensor of them on a GPU would be a CPU-GPU sync.
    return torch.stack([(channel - mean) / std for channel, mean, std in zip(x.unbind(1), MEAN, STD)], dim=1)


def denormalize(x: torch.Tensor) -> torch.Tensor:
    """The inverse of normalize, clamped to [0, 1]."""
    return torch.stack([channel * std + mean for channel, mean, std in zip(x.unbind(1), MEAN, STD)], dim=1).clamp(0, 1)


def color_jitter(x: torch.Tensor, host: Plan, device: Plan) -> torch.Tensor:
    """Brightness, contrast, saturation and hue of images (N, 3, H, W) in [0, 1], in each one's own random order.

    A random order of four is a random order of three with the fourth, hue, inserted at a random place. So hue, the
    expensive one, runs once for the whole batch, with the three blends before and after it.
    """
    x = _blend(x, host, device, host.before, device.before)
    x = _where(host.jittered, device.jittered, lambda x: shift_hue(x, device.hue_shift), x)
    return _blend(x, host, device, host.after, device.after)


def _blend(x, host, device, host_factors, factors):
    """The three blends, where the factor is not 1: with black, with an image's mean gray or each pixel's gray."""
    for slot in range(3):
        chosen = host_factors[:, slot] != 1
        if not chosen.any():
            continue
        own = (values[:, slot].view(-1, 1, 1, 1) for values in (factors, device.saturation, device.contrast))
        factor, saturation, contrast = own
        if (host.saturation | host.contrast)[chosen, slot].any():
            gray = _luma(x)
            target = (saturation * gray).add_(contrast * gray.mean(dim=(2, 3), keepdim=True))
            x = torch.lerp(target, x, factor).clamp_(0, 1)
        else:
            x = (factor * x).clamp_(0, 1)
    return x


def shift_hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate the hue of RGB images (N, 3, H, W) in [0, 1] by shift (N,), in turns of the colour wheel, -0.5 to 0.5."""
    r, g, b = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # A gray pixel has no hue; any value will do, because its chroma of 0 cancels it in the end.
    sixth = (6 * chroma).clamp_(min=torch.finfo(x.dtype).tiny).reciprocal_()
    turns = torch.where(
        value == r, (g - b) * sixth, torch.where(value == g, (b - r) * sixth + 1 / 3, (r - g) * sixth + 2 / 3)
    )
    turns += shift.view(-1, 1, 1, 1)
    # HSV to RGB in closed form: every channel is value minus chroma times a trapezoid of its distance in hue.
    distance = torch.cat([turns + 2, turns + 5 / 3, turns + 4 / 3], dim=1).frac_()  # red, green, blue; none is negative
    return distance.sub_(0.5).abs_().mul_(-6).add_(2).clamp_(0, 1).mul_(chroma).neg_().add_(value)


def grayscale(x: torch.Tensor) -> torch.Tensor:
    """RGB images (N, 3, H, W) in gray, with three equal channels."""
    return _luma(x).expand_as(x)


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """Blur each image (N, C, S, S) with its own sigma (N,), in pixels, with reflected borders; 0 leaves it sharp.

    Equals torchvision's gaussian_blur with a kernel of 2 * ceil(4 * max_sigma) + 1 taps. Rows, then columns, are cut
    into overlapping windows; one small banded matrix of the taps maps every window to the blurred tile at its centre.
    """
    n, channels, size, _ = x.shape
    radius = min(math.ceil(4 * max_sigma), size - 1)
    tile = min(16, size - radius)
    window = tile + 2 * radius
    offset = torch.arange(window, device=x.device).view(-1, 1) - radius - torch.arange(tile, device=x.device)
    # At 0.05 px neighbours have weight 0.
    matrix = torch.exp(-0.5 * (offset / sigma.view(-1, 1, 1, 1).clamp(min=0.05)).square())
    matrix = (matrix * (offset.abs() <= radius)).view(n, window, tile)
    matrix /= matrix.sum(dim=1, keepdim=True)
    for _ in range(2):  # along the rows, then along the columns
        windows = F.pad(x, (radius, radius + -size % tile, 0, 0), mode="reflect").unfold(3, window, tile)
        x = (windows.reshape(n, -1, window) @ matrix).view(n, channels, size, -1)[..., :size].transpose(2, 3)
    return x


def _luma(x):
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)
