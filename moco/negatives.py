"""Patch negatives: images that keep the texture of a query and lose its shape.

Ge et al., NeurIPS 2021, section 3.2.
"""

import torch

from moco import augment


def patch_negatives(images, low, high, count=1):
    """Tile a canvas with windows of each image, taken at random places.

    images: (N, C, S, S), any dtype and device. For every image and negative a side d ~ U{low..high} (pixels,
    inclusive) is drawn; the S×S canvas is tiled from the top left with d×d windows of the image, each at its own
    uniform position, neither flipped nor rotated; the last row and column are cut at the canvas.
    Returns (N, count, C, S, S). Randomness: the default generator of the images' device.
    Raises ValueError unless 1 <= low <= high <= S and the images are square.
    """
    n, channels, size, width = images.shape
    if size != width:
        raise ValueError(f"patch negatives take square images, got {size}×{width}")
    if not 1 <= low <= high <= size:
        raise ValueError(f"patch sizes {low}..{high} do not fit images of {size} px")
    device = images.device

    side = torch.randint(low, high + 1, (n * count, 1, 1), device=device)
    tiles = -(-size // low)                                          # a side, for the smallest windows
    # The modulo of a large integer is uniform to 1e-7 and, unlike a scaled float, never reaches its bound.
    corner = torch.randint(2**31, (2, n * count, tiles, tiles), device=device) % (size - side + 1)

    at = torch.arange(size, device=device)
    tile, inside = at // side, at % side                             # nN×1×S: which tile, where in it
    tile = tile.transpose(1, 2) * tiles + tile                       # nN×S×S: index of each pixel's tile
    top, left = corner.flatten(2).gather(2, tile.flatten(1).expand(2, -1, -1)).unflatten(2, (size, size))
    source = (top + inside.transpose(1, 2)) * size + left + inside   # nN×S×S: index of each pixel's source
    source = source.view(n, 1, count, size * size).transpose(1, 2).expand(-1, -1, channels, -1)
    return images.flatten(2).unsqueeze(1).expand(-1, count, -1, -1).gather(3, source).unflatten(3, (size, size))


def training_views(crops, recipe, robust, count, patch_ratio):
    """What one step of training sees, from the loader's uint8 crops (N, 2 or 3, 3, S, S), on their device.

    Query and key are augmented independently. `robust` says what the negatives are: "patch": `count` patch negatives
    of the augmented query; "texture": the third crop, with the query's draws; "none": there are none.
    Returns normalised query (N, 3, S, S), key (N, 3, S, S) and negatives (N, n, 3, S, S).
    """
    draws = augment.draw(recipe, len(crops), crops.device)
    query = augment.apply(recipe, draws, crops[:, 0])
    key = augment.apply(recipe, augment.draw(recipe, len(crops), crops.device), crops[:, 1])
    if robust == "patch":
        negatives = patch_negatives(query, *patch_ratio, count)
    elif robust == "texture":
        negatives = augment.apply(recipe, draws, crops[:, 2]).unsqueeze(1)
    else:
        negatives = query.new_empty(len(query), 0, *query.shape[1:])
    return query, key, negatives
