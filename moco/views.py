"""A training step's views of a batch: query, key and negatives."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from moco import augment
from moco.distributed import to_device
from moco.negatives import NEGATIVES

TILE = 224  # px; smaller crops are enlarged to about this side in a picture
LABEL_HEIGHT, GAP = 34, 6  # px


def training_views(
    crops: torch.Tensor, rng: np.random.Generator, *, recipe: augment.Recipe, robust: str, **options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Augment the loader's uint8 crops (N, 2 or 3, 3, S, S): query, key[, texture]; and make the negatives.

    Query and key are augmented independently. robust: a key of NEGATIVES, or "none" for no negatives; options:
    those that this kind of negative reads (patch: patch_ratio, num_nonsem).
    Returns normalised query (N, 3, S, S), key (N, 3, S, S) and negatives (N, n, 3, S, S) on the device of the crops.
    """
    query_params, key_params = augment.draw(recipe, len(crops), rng), augment.draw(recipe, len(crops), rng)
    query_plan, key_plan = to_device([augment.plan(query_params), augment.plan(key_params)], crops.device)
    query = augment.apply(recipe, query_params, crops[:, 0], query_plan)
    key = augment.apply(recipe, key_params, crops[:, 1], key_plan)
    if robust == "none":
        return query, key, query.new_empty(len(query), 0, *query.shape[1:])
    kind, texture = NEGATIVES[robust], None
    if kind.needs_texture:
        texture = augment.apply(recipe, query_params, crops[:, 2], query_plan)
    return query, key, kind.make(query, texture, rng, options)


def save_views(
    path: str, query: torch.Tensor, key: torch.Tensor, negatives: torch.Tensor, title: str = "negative"
) -> None:
    """Write a picture of a step's views: normalised images (N, 3, S, S) and negatives (N, n, 3, S, S)."""
    count = negatives.shape[1]
    columns = {"query": query, "key": key}
    columns |= {f"{title} {i + 1}" if count > 1 else title: negatives[:, i] for i in range(count)}
    save_grid(path, {label: augment.denormalize(images) for label, images in columns.items()})


def save_grid(path: str, columns: dict[str, torch.Tensor]) -> None:
    """Write a picture with one labelled column per {label: images (N, 3, S, S) in [0, 1]}, small images enlarged."""
    first = next(iter(columns.values()))
    scale = max(1, TILE // first.shape[3])
    side, rows = scale * first.shape[3], len(first)
    cell = side + GAP
    sheet = Image.new("RGB", (cell * len(columns) + GAP, LABEL_HEIGHT + rows * (side + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(min(side, TILE) // 9)
    for column, (label, images) in enumerate(columns.items()):
        left = GAP + column * cell
        pen.text((left + 2, 5), label, fill="black", font=font)
        for row, image in enumerate(images.cpu()):
            tile = to_pil_image(image).resize((side, side), Image.BICUBIC)
            sheet.paste(tile, (left, LABEL_HEIGHT + row * (side + GAP)))
    sheet.save(path)
