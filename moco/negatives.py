"""Non-semantic negatives (NS): images that keep the local texture of a query and lose its shape.

Ge et al., NeurIPS 2021, section 3.2. To add a kind, write a function and give it an entry in NEGATIVES.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from moco import augment
from moco.distributed import to_device


def patch_negatives(
    images: torch.Tensor, low: int, high: int, rng: np.random.Generator | torch.Generator, count: int = 1
) -> torch.Tensor:
    """Tile a canvas with windows of each image, taken at random positions.

    images: (N, C, S, S), any dtype and device. For each image and negative a patch size d ~ U{low..high} (pixels,
    inclusive) is drawn. The S×S canvas is tiled from the top left with d×d windows of the image, each at its own
    uniform position, neither flipped nor rotated; the last row and column are cut off at the canvas. Returns (N,
    count, C, S, S). PyTorch's generator gives one number, which seeds the draws. Raises ValueError unless
    1 <= low <= high <= S and the images are a batch of square ones.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"patch negatives need a batch of square images (N, C, S, S), got the shape {tuple(images.shape)}; of one"
            " image, images.unsqueeze(0) makes a batch"
        )
    if isinstance(rng, torch.Generator):
        rng = np.random.default_rng(torch.randint(2**62, (), generator=rng, device=rng.device).item())
    drawn = draw_patches(len(images), images.shape[3], low, high, rng, count)
    (patches,) = to_device([drawn], images.device)
    return cut_patches(images, *patches)


def draw_patches(
    n: int, size: int, low: int, high: int, rng: np.random.Generator, count: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the patch sizes (n, count, 1, 1, 1) and the windows' offsets (n, count, 2, tiles, tiles) of n images' NS.

    Both in pixels of an image of size × size; offsets are from the top and from the left. Raises ValueError unless
    1 <= low <= high <= size.
    """
    if not 1 <= low <= high <= size:
        raise ValueError(f"patch sizes {low}..{high} do not fit images of {size} px")
    tiles = -(-size // low)  # per side, for the smallest patches
    patch_sizes = rng.integers(low, high, (n, count, 1, 1, 1), endpoint=True)
    offsets = rng.integers(0, size - patch_sizes, (n, count, 2, tiles, tiles), endpoint=True)
    return patch_sizes.astype(np.int32), offsets.astype(np.int32)  # half of what travels to the device


def cut_patches(images: torch.Tensor, patch_sizes: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The negatives (N, count, C, S, S) that `draw_patches` has drawn for these images."""
    n, channels, size, _ = images.shape
    count, tiles = offsets.shape[1], offsets.shape[-1]
    negatives = images.new_empty(n, count, channels, size, size)
    pixels = torch.arange(size, device=images.device)
    for chunk in augment.chunks(images):
        d, offset = patch_sizes[chunk].to(torch.int64), offsets[chunk].to(torch.int64)
        d = d.view(-1, count, 1)
        tile, inside = pixels // d, pixels % d  # n×count×S: the tile of each row (column), and the place in it
        # n×count×1×S²: each pixel's tile
        tile = (tile.unsqueeze(3) * tiles + tile.unsqueeze(2)).flatten(2).unsqueeze(2)
        top, left = offset.flatten(3).gather(3, tile.expand(-1, -1, 2, -1)).unflatten(3, (size, size)).unbind(2)
        source = (top + inside.unsqueeze(3)) * size + left + inside.unsqueeze(2)  # n×count×S×S: each pixel's source
        source = source.flatten(2).unsqueeze(2).expand(-1, -1, channels, -1)
        flat = images[chunk].flatten(2).unsqueeze(1).expand(-1, count, -1, -1)
        negatives[chunk] = flat.gather(3, source).unflatten(3, (size, size))
    return negatives


class Negative(NamedTuple):
    """A kind of negative, a choice of --robust.

    make(query, texture, rng, options): the negatives (N, n, 3, S, S) of augmented, normalised queries (N, 3, S, S).
    texture: with `needs_texture`, the crops (N, 3, S, S) of the texture images, augmented with their queries'
    parameters, else None. rng: a NumPy generator of this step. options: {name: value} of the script's.
    names: of the options that have an effect with this kind. refusal(options): why they do not suit it, "" if they do.
    """

    make: Callable[[torch.Tensor, torch.Tensor | None, np.random.Generator, Mapping], torch.Tensor]
    names: tuple[str, ...] = ("num_nonsem", "alpha")
    needs_texture: bool = False
    refusal: Callable[[Mapping], str] = lambda options: ""


def _patch_refusal(options: Mapping) -> str:
    (low, high), size = options["patch_ratio"], options["image_size"]
    wrong = f"--patch-ratio {low} {high}: needs LO <= HI <= {size}, the crop size; for example 16 72 at 224 px"
    return "" if low <= high <= size else wrong


def _texture_refusal(options: Mapping) -> str:
    count = options["num_nonsem"]
    return "" if count == 1 else f"--num-nonsem {count}: there is one texture per photo; with --robust texture use 1"


NEGATIVES = {
    "patch": Negative(
        lambda query, texture, rng, options: patch_negatives(
            query, *options["patch_ratio"], rng, options["num_nonsem"]
        ),
        names=("num_nonsem", "alpha", "patch_ratio"),
        refusal=_patch_refusal,
    ),
    "texture": Negative(  # made beforehand, by preprocess/imagenet_texture_syn.py
        lambda query, texture, rng, options: texture.unsqueeze(1), needs_texture=True, refusal=_texture_refusal
    ),
}
PUBLISHED_NAMES = {"nonsem": "patch", "texture_syn": "texture"}  # the published script's values of --robust
