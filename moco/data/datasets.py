"""Transforms of image files, and the data sets of random crops and of labelled images."""

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as transforms
from torch.utils.data import Dataset
from torchvision.transforms import v2

from moco.data.images import BadImage, open_rgb, read_rgb

CROP_SCALE, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # MoCo's pre-training crops
REPLACEMENTS = 10  # images of the same class that are tried in place of an unreadable one


# Transforms: image path → uint8 image (3, size, size)


def train_transform(size: int) -> Callable[[str], torch.Tensor]:
    """The linear probe's training view: random resized crop and flip."""
    return transforms.Compose([read_rgb, v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])


def eval_transform(size: int, read: Callable = open_rgb) -> Callable[[str], torch.Tensor]:
    """Resize the shorter side to 256/224 of the crop and crop the centre.

    read: open_rgb, to do this with PIL as in all published results, or read_rgb, to decode as in training, faster.
    """
    shorter = round(size * 256 / 224)
    reader = functools.partial(read, resizable_to=shorter)
    return transforms.Compose([reader, v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])


# Data sets


class TwoCrops(Dataset):
    """Two random crops of a photo and, with `textures`, the crop of its texture that belongs to the first one.

    An item is uint8 (2 or 3, 3, size, size): query, key[, texture].
    """

    def __init__(self, photos: Sequence[str], size: int, textures: Sequence[str] | None = None):
        self.photos, self.textures, self.size = photos, textures, size

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> torch.Tensor:
        photo = read_rgb(self.photos[index])
        boxes = [transforms.RandomResizedCrop.get_params(photo, CROP_SCALE, CROP_RATIO) for _ in range(2)]
        crops = [self._crop(photo, *box) for box in boxes]
        if self.textures is not None:
            texture = read_rgb(self.textures[index])
            crops.append(self._crop(texture, *texture_box(boxes[0], photo.shape[1:], texture.shape[1:])))
        return torch.stack(crops)

    def _crop(self, image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
        # What torchvision's v2 does, without a tenth of its time; v1 converts to float first, four times as slow.
        crop = image[None, :, top : top + height, left : left + width]
        return F.interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)[0]


def texture_box(box: Sequence[int], photo: Sequence[int], texture: Sequence[int]) -> tuple[int, ...]:
    """The crop (top, left, height, width) of a texture for its photo's: the same aspect, share of area and place."""
    scale = min((math.prod(texture) / math.prod(photo)) ** 0.5, texture[0] / box[2], texture[1] / box[3])  # fits
    sizes = [max(1, round(scale * size)) for size in box[2:]]
    shares = [at / room if (room := whole - size) else 0.5 for at, size, whole in zip(box, box[2:], photo)]
    return *(round(share * (whole - size)) for share, size, whole in zip(shares, sizes, texture)), *sizes


class ImageList(Dataset):
    """Labelled images: item i is (transform(paths[i]), labels[i]). Raises BadImage: a test counts every image."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], transform: Callable[[str], torch.Tensor]):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.paths[index]), int(self.labels[index])


class RetryDataset(Dataset):
    """A training set that replaces an unreadable image by another of its class.

    Indexed with the (index, seed) pairs of GlobalBatchSampler; the item's random numbers follow from the seed alone,
    whatever worker makes it. Items are (dataset[index], unreadable), the latter a list of (path, reason), normally
    empty. Raises BadImage if REPLACEMENTS others of the class cannot be read either.
    """

    def __init__(self, dataset: Dataset, labels: Sequence[int]):
        self.dataset, self.labels = dataset, np.asarray(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[tuple[str, str]]]:
        index, seed = key
        unreadable = []
        for candidate in self._candidates(index, seed):
            try:
                with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from PyTorch's CPU generator
                    torch.default_generator.manual_seed(seed)
                    return self.dataset[candidate], unreadable
            except BadImage as bad:
                unreadable.append(bad.args)
        (path, reason), *others = unreadable
        bad = f"{path} ({reason}), and {len(others)} others of its class"
        raise BadImage(f"{bad} cannot be read; is the data still there?")

    def _candidates(self, index: int, seed: int) -> Iterator[int]:
        yield index
        same_class = np.flatnonzero(self.labels == self.labels[index]).tolist()
        chosen = random.Random(seed).sample(same_class, min(REPLACEMENTS + 1, len(same_class)))
        yield from [other for other in chosen if other != index][:REPLACEMENTS]
