"""Readouts of what a backbone's features tell apart: the mechanism behind docs/effect.md's table.

Cosines between the features of a query, its key and its patch negative, and linear readouts of what the generator drew
for each image. Crops, colour changes and patches are made here, apart from the code that trains, so that the two can be
compared.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from moco.encoders import build_encoder

CROP, PATCH_RATIO = 56, (4, 18)  # px
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The same sketches in other tones: the images in [0, 1], black on white → images in [0, 1].
SKETCH_TONES = {
    "black on white": lambda images: images,
    "black on 0.8": lambda images: 0.8 * images,
    "black on 0.65": lambda images: 0.65 * images,
    "black on 0.5": lambda images: 0.5 * images,
    "black on 0.35": lambda images: 0.35 * images,
    "0.2 on 0.8": lambda images: 0.2 + 0.6 * images,
    "white on black": lambda images: 1 - images,
    "white on 0.5": lambda images: 1 - 0.5 * images,
}
AUGMENT = v2.Compose(
    [  # MoCo v2's
        v2.RandomResizedCrop(CROP, (0.2, 1)),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(17, (0.1, 2))], 0.5),
        v2.RandomHorizontalFlip(),
    ]
)

Encoder = Callable[[torch.Tensor], torch.Tensor]  # images (N, 3, CROP, CROP) in [0, 1] to features (N, d)


def load_classifier(checkpoint: Path) -> torch.nn.Module:
    """The network of a linear checkpoint of main_lincls.py, backbone and head."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = build_encoder(saved["arch"], len(saved["wnids"]))
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved["state_dict"].items()})
    return model


def load_backbone(checkpoint: Path) -> torch.nn.Module:
    """The network of load_classifier with the identity as its head."""
    model = load_classifier(checkpoint)
    model.fc = torch.nn.Identity()
    return model


def encoder(backbone: torch.nn.Module) -> Encoder:
    """The backbone's features of unnormalised images, in batches, in eval mode."""
    backbone.eval()

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> torch.Tensor:
        normalized = v2.functional.normalize(images, MEAN, STD)
        return torch.cat([backbone(batch).float() for batch in normalized.split(250)])

    return encode


def read(paths: list[Path]) -> torch.Tensor:
    """Images of one size, (N, 3, H, W) in [0, 1]."""
    return torch.stack([v2.functional.pil_to_tensor(Image.open(path).convert("RGB")) for path in paths]) / 255


def shuffled(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A patch negative of one image (3, S, S): tiles of d×d px, d ~ U{PATCH_RATIO}, each from a random place of it."""
    size, side = image.shape[1], int(rng.integers(*PATCH_RATIO, endpoint=True))
    canvas = torch.empty_like(image)
    for top in range(0, size, side):
        for left in range(0, size, side):
            y, x = rng.integers(0, size - side, 2, endpoint=True)
            height, width = min(side, size - top), min(side, size - left)
            canvas[:, top : top + height, left : left + width] = image[:, y : y + height, x : x + width]
    return canvas


def cosines(encode: Encoder, paths: list[Path], seed: int = 0) -> dict[str, float]:
    """Mean cosine of a query's features with those of its key, its patch negative, and another image's query.

    The same crops and patches for every encoder with the same seed. `closer`: in percent, how often the negative is
    closer to the query than the key is.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = read(paths)
    query, key = (torch.stack([AUGMENT(image) for image in images]) for _ in range(2))
    negative = torch.stack([shuffled(image, rng) for image in query])
    q, k, t = (F.normalize(encode(views), dim=1) for views in (query, key, negative))
    to_key, to_negative = (q * k).sum(1), (q * t).sum(1)
    return {
        "key": to_key.mean().item(),
        "negative": to_negative.mean().item(),
        "other": (q * q.roll(1, 0)).sum(1).mean().item(),
        "closer": 100 * (to_negative > to_key).float().mean().item(),
    }


def readouts(encode: Encoder, data: Path, seed: int) -> dict[str, float]:
    """Accuracy of linear readouts of what the generator drew, trained on train/, tested on val/.

    data, seed: a folder of preprocess/shapes.py and its seed. Returns R² in percent of the image's mean colour (mean
    over R, G and B) and of the log of the texture's period, and accuracies in percent of texture family and shape.
    """
    drawn = {split: latents(data, split, seed) for split in ("train", "val")}
    features = {split: encode(one["image"]) for split, one in drawn.items()}
    result = {}
    for name in ("colour", "period"):
        result[name] = regression_r2(*(features[split] for split in drawn), *(drawn[split][name] for split in drawn))
    for name in ("texture", "shape"):
        result[name] = classification_accuracy(
            *(features[split] for split in drawn), *(drawn[split][name] for split in drawn)
        )
    return result


def second_probe(encode: Encoder, data: Path, seed: int = 0) -> dict[str, float]:
    """Accuracy in percent of a converged linear probe on val, sketch, stylized and rendition.

    A logistic regression on standardized features of a centre crop and one random crop of each training image: another
    probe than main_lincls.py's, to see what depends on the probe.
    """
    torch.manual_seed(seed)
    crop = v2.Compose([v2.RandomResizedCrop(CROP, (0.2, 1)), v2.RandomHorizontalFlip()])
    train, labels = labelled(data / "train")
    views = torch.cat([v2.functional.center_crop(train, [CROP, CROP]), torch.stack([crop(image) for image in train])])
    features, twice = encode(views), labels.repeat(2)
    places = {"val": "val", "Sketch": "sketch", "Stylized": "stylized/val", "Rendition": "rendition"}
    result = {}
    weights = logistic_regression(standardized(features, features)[0], twice)
    for column, place in places.items():
        images, wanted = labelled(data / place)
        x = standardized(features, encode(v2.functional.center_crop(images, [CROP, CROP])))[1]
        result[column] = 100 * ((x @ weights).argmax(1) == wanted).float().mean().item()
    return result


def sketch_tones(checkpoint: Path, data: Path) -> dict[str, float]:
    """Accuracy in percent of a linear checkpoint on the sketches in each of SKETCH_TONES."""
    classify = encoder(load_classifier(checkpoint))
    images, wanted = labelled(data / "sketch")
    images = v2.functional.center_crop(images, [CROP, CROP])
    return {
        name: 100 * (classify(tone(images)).argmax(1) == wanted).float().mean().item()
        for name, tone in SKETCH_TONES.items()
    }


def labelled(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The images (N, 3, H, W) of a folder of class folders, and the classes' places in sorted order (N,)."""
    paths = sorted(folder.glob("*/*.png"))
    classes = sorted({path.parent.name for path in paths})
    return read(paths), torch.tensor([classes.index(path.parent.name) for path in paths])


def latents(data: Path, split: str, seed: int) -> dict[str, torch.Tensor]:
    """{"image": centre crops, "colour": mean (N, 3), "period": its log (N, 1), "texture", "shape": indices (N,)}"""
    paths = sorted((data / split).glob("*/*.png"))
    scenes = [
        shapes.scene_of(seed, split, list(shapes.SHAPES).index(path.parent.name), int(path.stem))[0] for path in paths
    ]
    images = v2.functional.center_crop(read(paths), [CROP, CROP])
    return {
        "image": images,
        "colour": images.mean(dim=(2, 3)),
        "period": torch.tensor([[np.log(scene.period)] for scene in scenes], dtype=torch.float32),
        "texture": torch.tensor([list(shapes.TEXTURES).index(scene.texture) for scene in scenes]),
        "shape": torch.tensor([list(shapes.SHAPES).index(scene.shape) for scene in scenes]),
    }


def standardized(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, d), (M, d) by the first's mean and standard deviation, with a column of ones: (N, d+1), (M, d+1)."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    return tuple(F.pad((features - mean) / deviation, (0, 1), value=1.0) for features in (train, test))


def regression_r2(train: torch.Tensor, test: torch.Tensor, wanted: torch.Tensor, wanted_test: torch.Tensor) -> float:
    """R² in percent, on the test features, of a ridge regression to (N, m) targets; the mean over the targets."""
    x, x_test = standardized(train, test)
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ wanted)
    error = (x_test @ weights - wanted_test).square().mean(0)
    return 100 * (1 - error / wanted_test.var(0, correction=0)).mean().item()


def classification_accuracy(
    train: torch.Tensor, test: torch.Tensor, labels: torch.Tensor, labels_test: torch.Tensor
) -> float:
    """Accuracy in percent, on the test features, of a logistic regression."""
    x, x_test = standardized(train, test)
    return 100 * ((x_test @ logistic_regression(x, labels)).argmax(1) == labels_test).float().mean().item()


def logistic_regression(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weights (d, classes) of a logistic regression on (N, d), by L-BFGS with a penalty of 5e-4 times their squares."""
    weights = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights, labels) + 5e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
