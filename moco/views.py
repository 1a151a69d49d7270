"""The views of a training step: query, key and negatives of a batch."""

import numpy as np
import torch

from moco import augment
from moco.distributed import to_device
from moco.negatives import cut_patches, draw_patches


def training_views(
    crops: torch.Tensor,
    rng: np.random.Generator,
    *,
    recipe: augment.Recipe,
    robust: str,
    num_nonsem: int,
    patch_ratio: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Augment the loader's uint8 crops (N, 2 or 3, 3, S, S): query, key[, texture]; and make the negatives.

    Query and key are augmented independently. robust "patch": `num_nonsem` patch negatives of the augmented query;
    "texture": the third crop with the query's parameters; "none": no negatives.
    Returns normalised query (N, 3, S, S), key (N, 3, S, S) and negatives (N, n, 3, S, S) on the device of the crops.
    """
    n, size = len(crops), crops.shape[-1]
    query_params, key_params = augment.draw(recipe, n, rng), augment.draw(recipe, n, rng)
    drawn = draw_patches(n, size, *patch_ratio, rng, num_nonsem) if robust == "patch" else ()
    query_plan, key_plan, patches = to_device(
        [augment.plan(query_params), augment.plan(key_params), drawn], crops.device
    )
    query = augment.apply(recipe, query_params, crops[:, 0], query_plan)
    key = augment.apply(recipe, key_params, crops[:, 1], key_plan)
    if robust == "patch":
        negatives = cut_patches(query, *patches)
    elif robust == "texture":
        negatives = augment.apply(recipe, query_params, crops[:, 2], query_plan).unsqueeze(1)
    else:
        negatives = query.new_empty(len(query), 0, *query.shape[1:])
    return query, key, negatives
