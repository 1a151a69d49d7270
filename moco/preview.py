"""A labelled grid of images, for looking at what training sees."""

from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from moco import augment

LABEL_HEIGHT = 14


def save_views(path, query, key, negatives):
    """Write the views of a step, normalised images (N, 3, S, S) and negatives (N, n, 3, S, S), as a picture."""
    columns = {"query": query, "key": key} | {f"NS {i + 1}": negatives[:, i] for i in range(negatives.shape[1])}
    save_grid(path, {label: augment.denormalize(images) for label, images in columns.items()})


def save_grid(path, columns):
    """Write `path`, a picture with one labelled column for each {label: images (N, 3, S, S) in [0, 1]}."""
    size = next(iter(columns.values())).shape[3]
    rows = len(next(iter(columns.values())))
    cell = max(size, 72) + 4                                          # room for the label over small images
    sheet = Image.new("RGB", (cell * len(columns), LABEL_HEIGHT + rows * (size + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (label, images) in enumerate(columns.items()):
        pen.text((column * cell + 2, 1), label, fill="black")
        for row, image in enumerate(images.cpu()):
            sheet.paste(to_pil_image(image), (column * cell + 2, LABEL_HEIGHT + row * (size + 4)))
    sheet.save(path)
