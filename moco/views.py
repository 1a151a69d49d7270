"""A training step's views of a batch: query, key and negatives."""

import numpy as np
import torch

from moco import augment
from moco.negatives import NEGATIVES


def training_views(
    crops: torch.Tensor, rng: np.random.Generator, *, recipe: augment.Recipe, robust: str, compile=False, **options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Augment the loader's uint8 crops (N, 2 or 3, 3, S, S): query, key[, texture]; and make the negatives.

    Query and key are augmented independently. compile: augment with torch.compile. robust: a key of NEGATIVES, or
    "none" for no negatives; options: those that this kind of negative reads (patch: patch_ratio, num_nonsem).
    Returns normalised query (N, 3, S, S), key (N, 3, S, S) and negatives (N, n, 3, S, S) on the device of the crops.
    """
    query_plan, key_plan = (augment.draw(recipe, len(crops), rng) for _ in range(2))
    query = augment.apply(recipe, query_plan, crops[:, 0], compile)
    key = augment.apply(recipe, key_plan, crops[:, 1], compile)
    if robust == "none":
        return query, key, query.new_empty(len(query), 0, *query.shape[1:])
    kind = NEGATIVES[robust]
    texture = augment.apply(recipe, query_plan, crops[:, 2], compile) if kind.needs_texture else None
    return query, key, kind.make(query, texture, rng, options)
