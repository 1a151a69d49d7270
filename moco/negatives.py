"""Patch negatives: images that keep the texture of a query and lose its shape.

Ge et al., NeurIPS 2021, section 3.2.
"""

import torch

from moco import augment


def patch_negatives(images, low, high, rng, count=1):
    """Tile a canvas with windows of each image, taken at random places.

    images: (N, C, S, S), any dtype and device. For every image and negative a side d ~ U{low..high} (pixels,
    inclusive) is drawn; the S×S canvas is tiled from the top left with d×d windows of the image, each at its own
    uniform position, neither flipped nor rotated; the last row and column are cut at the canvas. rng: a NumPy generator.
    Returns (N, count, C, S, S). Raises ValueError unless 1 <= low <= high <= S and the images are square.
    """
    n, channels, size, width = images.shape
    if size != width:
        raise ValueError(f"patch negatives take square images, got {size}×{width}")
    if not 1 <= low <= high <= size:
        raise ValueError(f"patch sizes {low}..{high} do not fit images of {size} px")
    tiles = -(-size // low)                                          # a side, for the smallest windows
    sides = rng.integers(low, high, (n, count, 1, 1, 1), endpoint=True)
    corners = rng.integers(0, size - sides, (n, count, 2, tiles, tiles), endpoint=True)

    negatives = images.new_empty(n, count, channels, size, size)
    for part in augment.in_cache(images):
        side, corner = (torch.from_numpy(drawn[part]).to(images.device, non_blocking=True) for drawn in (sides, corners))
        pixels = torch.arange(size, device=images.device)
        tile, inside = pixels // side.view(-1, count, 1), pixels % side.view(-1, count, 1)  # n×count×S: which tile, where in it
        tile = (tile.unsqueeze(3) * tiles + tile.unsqueeze(2)).flatten(2).unsqueeze(2)      # n×count×1×S²: each pixel's tile
        top, left = corner.flatten(3).gather(3, tile.expand(-1, -1, 2, -1)).unflatten(3, (size, size)).unbind(2)
        source = (top + inside.unsqueeze(3)) * size + left + inside.unsqueeze(2)            # n×count×S×S: each pixel's source
        source = source.flatten(2).unsqueeze(2).expand(-1, -1, channels, -1)
        flat = images[part].flatten(2).unsqueeze(1).expand(-1, count, -1, -1)
        negatives[part] = flat.gather(3, source).unflatten(3, (size, size))
    return negatives


def training_views(crops, recipe, robust, count, patch_ratio, rng):
    """What one step of training sees, from the loader's uint8 crops (N, 2 or 3, 3, S, S), on their device.

    Query and key are augmented independently. `robust` says what the negatives are: "patch": `count` patch negatives
    of the augmented query; "texture": the third crop, with the query's draws; "none": there are none.
    rng: the NumPy generator of all draws. Returns normalised query (N, 3, S, S), key (N, 3, S, S) and negatives
    (N, n, 3, S, S).
    """
    draws = augment.draw(recipe, len(crops), rng)
    query = augment.apply(recipe, draws, crops[:, 0])
    key = augment.apply(recipe, augment.draw(recipe, len(crops), rng), crops[:, 1])
    if robust == "patch":
        negatives = patch_negatives(query, *patch_ratio, rng, count)
    elif robust == "texture":
        negatives = augment.apply(recipe, draws, crops[:, 2]).unsqueeze(1)
    else:
        negatives = query.new_empty(len(query), 0, *query.shape[1:])
    return query, key, negatives
