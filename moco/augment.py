"""The augmentation recipes of MoCo v1 and v2, for whole batches, on the device that trains.

Crops come from the loader; here follow colour, blur, flip and normalisation. Each operation equals torchvision's
functional one for the same parameters, and every image has its own parameters, drawn as torchvision draws them.
Drawing and applying are apart, so that a texture negative can be given its query's draws.
"""

import math
from typing import NamedTuple

import torch

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
    """The random parameters of N images, on one device. `order[:, j]` is the j-th of brightness, contrast and
    saturation to be applied, and hue comes before the `hue_slot`-th of them (3: after all)."""

    factors: torch.Tensor    # N×3
    order: torch.Tensor      # N×3
    hue_shift: torch.Tensor  # N
    hue_slot: torch.Tensor   # N
    jittered: torch.Tensor   # N, bool
    gray: torch.Tensor       # N, bool
    sigma: torch.Tensor      # N, pixels; 0 leaves the image sharp
    flip: torch.Tensor       # N, bool


def draw(recipe, n, device):
    """Draw the parameters of n images from the device's default generator."""
    def uniform(low, high, *shape):
        return torch.rand(n, *shape, device=device) * (high - low) + low

    def chance(p):
        return torch.rand(n, device=device) < p

    factors = [uniform(max(0, 1 - s), 1 + s) for s in (recipe.brightness, recipe.contrast, recipe.saturation)]
    sigma = uniform(*recipe.blur_sigma)
    return Draws(
        factors=torch.stack(factors, dim=1),
        order=uniform(0, 1, 3).argsort(dim=1),
        hue_shift=uniform(-recipe.hue, recipe.hue),
        hue_slot=torch.randint(4, (n,), device=device),
        jittered=chance(recipe.jitter_p),
        gray=chance(recipe.gray_p),
        sigma=torch.where(chance(recipe.blur_p), sigma, 0),
        flip=chance(0.5),
    )


def apply(recipe, draws, images):
    """uint8 crops (N, 3, S, S) to normalised float32 images (N, 3, S, S)."""
    x = images.float() / 255
    if recipe.gray_first:
        x = grayscale(x, draws.gray)
    x = color_jitter(x, draws)
    if not recipe.gray_first:
        x = grayscale(x, draws.gray)
    if recipe.blur_p:
        x = gaussian_blur(x, draws.sigma, recipe.blur_sigma[1])
    x = torch.where(_per_image(draws.flip), x.flip(3), x)
    return normalize(x)


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
    costly one, runs once for the whole batch; the blends that an image has on the other side of it get factor 1.
    """
    factors = draws.factors.gather(1, draws.order)
    for slot in range(3):
        x = _blend(x, draws.order[:, slot], factors[:, slot], where=draws.jittered & (slot < draws.hue_slot))
    x = torch.where(_per_image(draws.jittered), shift_hue(x, draws.hue_shift), x)
    for slot in range(3):
        x = _blend(x, draws.order[:, slot], factors[:, slot], where=draws.jittered & (slot >= draws.hue_slot))
    return x


def _blend(x, operation, factor, where):
    """Brightness, contrast and saturation are one blend, with black, the mean gray or each pixel's gray."""
    gray = _luma(x)
    target = _per_image(operation == SATURATION) * gray
    target += _per_image(operation == CONTRAST) * gray.mean(dim=(2, 3), keepdim=True)
    return torch.lerp(target, x, _per_image(torch.where(where, factor, 1))).clamp_(0, 1)


def shift_hue(x, shift):
    """Turn the hue of RGB images (N, 3, H, W) in [0, 1] by shift (N,), in turns of the colour wheel."""
    r, g, b = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(value == r, (g - b) / divisor,
                          torch.where(value == g, (b - r) / divisor + 2, (r - g) / divisor + 4))
    sextant = sextant + 6 * shift.view(-1, 1, 1)
    # HSV to RGB in closed form: every channel is value minus chroma times a trapezoid of its distance in hue.
    offset = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)        # red, green, blue
    distance = (sextant.unsqueeze(1) + offset).remainder(6)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(distance, 4 - distance).clamp(0, 1)


def grayscale(x, where):
    """Replace the images chosen by `where` (N,) with their gray ones."""
    return torch.where(_per_image(where), _luma(x), x)


def gaussian_blur(x, sigma, max_sigma):
    """Blur each image (N, C, S, S) with its own sigma (N,), pixels, reflecting at the borders; 0 changes nothing.

    Equals torchvision's gaussian_blur with a kernel of 2 * ceil(4 * max_sigma) + 1 taps. The blur of a row is a
    matrix product whose matrix holds the taps along its diagonal, and again mirrored where they leave the image.
    """
    n, channels, size, _ = x.shape
    radius = min(math.ceil(4 * max_sigma), size - 1)
    taps = torch.arange(radius + 2, device=x.device) / sigma.clamp(min=0.05).view(-1, 1)
    taps = torch.exp(-0.5 * taps.square())                           # N×(radius + 2); 0.05 px: neighbours weigh 0
    taps[:, radius + 1] = 0
    taps /= 2 * taps.sum(dim=1, keepdim=True) - 1
    i = torch.arange(size, device=x.device).view(-1, 1)
    j = i.T
    distance = torch.stack([(i - j).abs(), i + j, 2 * (size - 1) - i - j])  # direct, and over either border
    distance[1, :, 0] = distance[2, :, size - 1] = radius + 1        # which are not mirrored onto themselves
    matrix = taps[:, distance.clamp(max=radius + 1)].sum(dim=1).transpose(1, 2)  # N×S×S
    for _ in range(2):                                                # along the rows, then along the columns
        x = (x.reshape(n, channels * size, size) @ matrix).view(n, channels, size, size).transpose(2, 3)
    return x


def _luma(x):
    r, g, b = x.unbind(1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(1)


def _per_image(values):
    return values.view(-1, 1, 1, 1)
