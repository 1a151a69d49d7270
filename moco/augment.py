"""The augmentation recipes of MoCo v1 and v2, for whole batches, on the device that trains.

Crops come from the loader; here follow flip, colour, blur and normalisation. Each operation equals torchvision's
functional one for the same parameters, and every image has its own parameters, drawn as torchvision draws them.
Drawing and applying are apart, so that a texture negative can be given its query's draws. Parameters are drawn on the
host, where looking at them costs nothing: what no image of a batch needs is not computed, and no GPU is waited for.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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


class Draws(NamedTuple):
    """The random parameters of N images, NumPy arrays. `order[:, j]` is the j-th of brightness, contrast and
    saturation to be applied, and hue comes before the `hue_slot`-th of them (3: after all)."""

    factors: np.ndarray    # N×3
    order: np.ndarray      # N×3
    hue_shift: np.ndarray  # N
    hue_slot: np.ndarray   # N
    jittered: np.ndarray   # N, bool
    gray: np.ndarray       # N, bool
    sigma: np.ndarray      # N, pixels; 0 leaves the image sharp
    flip: np.ndarray       # N, bool


def draw(recipe, n, rng):
    """Draw the parameters of n images from a NumPy generator."""
    def uniform(low, high):
        return rng.uniform(low, high, n).astype(np.float32)

    factors = [uniform(max(0, 1 - s), 1 + s) for s in (recipe.brightness, recipe.contrast, recipe.saturation)]
    return Draws(
        factors=np.stack(factors, axis=1),
        order=rng.random((n, 3)).argsort(axis=1),
        hue_shift=uniform(-recipe.hue, recipe.hue),
        hue_slot=rng.integers(4, size=n),
        jittered=rng.random(n) < recipe.jitter_p,
        gray=rng.random(n) < recipe.gray_p,
        sigma=uniform(*recipe.blur_sigma) * (rng.random(n) < recipe.blur_p),
        flip=rng.random(n) < 0.5,
    )


def apply(recipe, draws, images):
    """uint8 crops (N, 3, S, S) to normalised float32 images (N, 3, S, S)."""
    result = torch.empty(images.shape, device=images.device)
    for part in in_cache(images):
        result[part] = _apply(recipe, Draws(*(parameter[part] for parameter in draws)), images[part])
    return result


def in_cache(images):
    """The slices of a batch to be worked on one after the other: all of it on a GPU; on a CPU single images, whose
    many intermediate results then stay in its cache, which is several times as fast."""
    step = 1 if images.device.type == "cpu" else max(1, len(images))
    return [slice(start, start + step) for start in range(0, len(images), step)]


def _apply(recipe, draws, images):
    x = _where(draws.flip, lambda x: x.flip(3), images).float().div_(255)
    if recipe.gray_first:
        x = grayscale(x, draws.gray)
    x = color_jitter(x, draws)
    if not recipe.gray_first:
        x = grayscale(x, draws.gray)
    if draws.sigma.any():
        x = gaussian_blur(x, draws.sigma, recipe.blur_sigma[1])
    return normalize(x)


def _where(chosen, change, x):
    """change(x) for the chosen images, a boolean array (N,), and x for the others."""
    if not chosen.any():
        return x
    return change(x) if chosen.all() else torch.where(_per_image(chosen, x), change(x), x)


def _per_image(values, x):
    """Values (N,) of the host as (N, 1, 1, 1) beside x. Not blocking: a copy of so few bytes waits for no GPU."""
    return torch.as_tensor(values).to(x.device, non_blocking=True).view(-1, 1, 1, 1)


def normalize(x):
    """(N, 3, H, W) in [0, 1] to zero mean and unit variance a channel, by ImageNet's statistics."""
    # Python numbers, not a tensor of them: making one on a GPU would wait for the GPU.
    return torch.stack([(channel - mean) / std for channel, mean, std in zip(x.unbind(1), MEAN, STD)], dim=1)


def denormalize(x):
    """The inverse of normalize, cut to [0, 1]."""
    return torch.stack([channel * std + mean for channel, mean, std in zip(x.unbind(1), MEAN, STD)], dim=1).clamp(0, 1)


def color_jitter(x, draws):
    """Brightness, contrast, saturation and hue in each image's own random order, where `draws.jittered`.

    A random order of four is a random order of three with the fourth, hue, put in at a random place. So hue, the
    costly one, runs once for the whole batch, and the three blends before and after it.
    """
    factors = np.take_along_axis(draws.factors, draws.order, axis=1)
    for slot in range(3):
        x = _blend(x, draws.order[:, slot], factors[:, slot], where=draws.jittered & (slot < draws.hue_slot))
    x = _where(draws.jittered, lambda x: shift_hue(x, draws.hue_shift), x)
    for slot in range(3):
        x = _blend(x, draws.order[:, slot], factors[:, slot], where=draws.jittered & (slot >= draws.hue_slot))
    return x


def _blend(x, operation, factor, where):
    """Brightness, contrast and saturation are one blend, with black, the mean gray or each pixel's gray."""
    if not where.any():
        return x
    target = torch.zeros((), device=x.device)
    if (operation[where] != BRIGHTNESS).any():
        gray = _luma(x)
        target = _per_image(operation == SATURATION, x) * gray
        target += _per_image(operation == CONTRAST, x) * gray.mean(dim=(2, 3), keepdim=True)
    return torch.lerp(target, x, _per_image(np.where(where, factor, 1).astype(np.float32), x)).clamp_(0, 1)


def shift_hue(x, shift):
    """Turn the hue of RGB images (N, 3, H, W) in [0, 1] by shift (N,), in turns of the colour wheel, -0.5 to 0.5."""
    r, g, b = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # A gray pixel has no hue; any will do, since its chroma of 0 multiplies it in the end.
    sixth = (6 * chroma).clamp_(min=torch.finfo(x.dtype).tiny).reciprocal_()
    turns = torch.where(value == r, (g - b) * sixth, torch.where(value == g, (b - r) * sixth + 1 / 3, (r - g) * sixth + 2 / 3))
    turns += _per_image(shift, x)
    # HSV to RGB in closed form: every channel is value minus chroma times a trapezoid of its distance in hue.
    distance = torch.cat([turns + 2, turns + 5 / 3, turns + 4 / 3], dim=1).frac_()  # red, green, blue; none is negative
    return distance.sub_(0.5).abs_().mul_(-6).add_(2).clamp_(0, 1).mul_(chroma).neg_().add_(value)


def grayscale(x, where):
    """Replace the images chosen by `where` (N,) with their gray ones."""
    return _where(where, lambda x: _luma(x).expand_as(x), x)


def gaussian_blur(x, sigma, max_sigma):
    """Blur each image (N, C, S, S) with its own sigma (N,), pixels, reflecting at the borders; 0 changes nothing.

    Equals torchvision's gaussian_blur with a kernel of 2 * ceil(4 * max_sigma) + 1 taps. Rows, then columns, are cut
    into overlapping windows, and one small matrix with the taps along its diagonals turns every window into the
    blurred tile at its middle.
    """
    n, channels, size, _ = x.shape
    radius = min(math.ceil(4 * max_sigma), size - 1)
    tile = min(16, size - radius)
    window = tile + 2 * radius
    offset = torch.arange(window, device=x.device).view(-1, 1) - radius - torch.arange(tile, device=x.device)
    matrix = torch.exp(-0.5 * (offset / _per_image(sigma, x).clamp(min=0.05)).square())  # at 0.05 px neighbours weigh 0
    matrix = (matrix * (offset.abs() <= radius)).view(n, window, tile)
    matrix /= matrix.sum(dim=1, keepdim=True)
    for _ in range(2):                                                # along the rows, then along the columns
        windows = F.pad(x, (radius, radius + -size % tile, 0, 0), mode="reflect").unfold(3, window, tile)
        x = (windows.reshape(n, -1, window) @ matrix).view(n, channels, size, -1)[..., :size].transpose(2, 3)
    return x


def _luma(x):
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)
