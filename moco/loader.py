"""From files to uint8 crops, in the loading processes; and the order in which all processes see the images."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision.transforms as transforms
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from moco import distributed, signals
from moco.options import BadInput

CROP_SCALE = (0.2, 1.0)          # MoCo's, for pre-training; torchvision's default for the linear probe
CROP_RATIO = (3 / 4, 4 / 3)


def list_photos(directory):
    """(paths, labels, classes) of a folder of class folders: paths sorted, labels 0.. by sorted class name.

    BadInput if the directory is missing, has no class folders, or one of them holds no image.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(f"{directory}: there is no such directory; it must hold one folder of images a class")
    classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    if not classes:
        raise BadInput(f"{directory}: it holds no class folders")
    paths, labels, empty = [], [], []
    for label, name in enumerate(classes):
        files = sorted(str(Path(folder, file)) for folder, _, names in os.walk(directory / name, followlinks=True)
                       for file in names if file.lower().endswith(IMG_EXTENSIONS))
        if not files:
            empty.append(name)
        paths += files
        labels += [label] * len(files)
    if empty:
        raise BadInput(f"{directory}: no image in {_first(empty)}; remove the empty class folders or fill them")
    return paths, labels, classes


def data_split(data, split):
    """DIR/split, or BadInput that says which of the two is missing."""
    if not os.path.isdir(data):
        raise BadInput(f"{data}: there is no such directory; DIR must hold {split}/ with one folder of images a class")
    path = os.path.join(data, split)
    if not os.path.isdir(path):
        raise BadInput(f"{data}: it has no {split}/ folder; DIR is the folder above {split}/, not {split}/ itself")
    return path


def photos_of(data):
    """X, the photos that the textures X-texture belong to; BadInput for another name."""
    root = Path(os.path.normpath(data))
    if not root.name.endswith("-texture"):
        raise BadInput(f"{data}: with --robust texture, DIR is the texture data set and its name ends in -texture,"
                       f" for example {root}-texture beside {root}")
    return root.with_name(root.name.removesuffix("-texture"))


def list_pairs(data):
    """(photos, textures, classes, unpaired) of `X-texture/train`, whose photos lie at the same relative paths under
    X/train. Photos without a texture are left out, and `unpaired` counts and names them ("" if there are none): a photo
    that cannot be read never gets one.

    BadInput for a missing sibling data set, and for textures without a photo: their number, the first five by name.
    """
    texture_root = Path(data_split(data, "train"))
    photo_root = Path(data_split(photos_of(data), "train"))
    textures, _, classes = list_photos(texture_root)
    photos, _, _ = list_photos(photo_root)
    texture_of = {os.path.splitext(os.path.relpath(path, texture_root))[0]: path for path in textures}
    photo_of = {os.path.splitext(os.path.relpath(path, photo_root))[0]: path for path in photos}
    lonely = sorted(texture_of[name] for name in texture_of.keys() - photo_of.keys())
    if lonely:
        raise BadInput(f"{data}: textures without their photo in {photo_root}: {_first(lonely)}")
    unpaired = sorted(photo_of[name] for name in photo_of.keys() - texture_of.keys())
    names = sorted(texture_of)
    return ([photo_of[name] for name in names], [texture_of[name] for name in names], classes,
            _first(unpaired) if unpaired else "")


def _first(names, count=5):
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{len(names)}: {', '.join(names[:count])}{more}"


def read_rgb(path):
    """An image file as uint8 (3, H, W). JPEGs by torchvision's decoder, what it refuses (CMYK, other formats) by PIL."""
    data = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
    if data[:3].tolist() == [0xFF, 0xD8, 0xFF]:
        try:
            return decode_jpeg(data, mode=ImageReadMode.RGB)
        except RuntimeError:  # CMYK or damaged: PIL converts the first, and names the damage in the second
            pass
    return TF.pil_to_tensor(open_rgb(path))


def open_rgb(path):
    """An image file as PIL's RGB image."""
    with Image.open(path) as image:
        return image.convert("RGB")


@contextmanager
def seeded(seed):
    """torchvision's transforms draw from PyTorch's CPU generator: lend it this seed, then give it back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class ViewPairs(Dataset):
    """Two random crops of every photo and, with `textures`, the first crop's box of its texture.

    Indexed by (index, seed), as ShuffledBatches gives them; items are uint8 (2 or 3, 3, size, size):
    query, key[, texture]. The crops depend on the seed alone, not on the worker that makes them.
    """

    def __init__(self, photos, size, textures=None):
        self.photos, self.textures, self.size = photos, textures, size

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, key):
        index, seed = key
        photo = read_rgb(self.photos[index])
        with seeded(seed):
            boxes = [transforms.RandomResizedCrop.get_params(photo, CROP_SCALE, CROP_RATIO) for _ in range(2)]
        views = [self._crop(photo, *box) for box in boxes]
        if self.textures is not None:
            texture = read_rgb(self.textures[index])
            views.append(self._crop(texture, *_rescale(boxes[0], photo.shape[1:], texture.shape[1:])))
        return torch.stack(views)

    def _crop(self, image, top, left, height, width):
        # version 2 resizes uint8 as it is; version 1 goes by way of floats, four times as slow
        return v2.functional.resized_crop(image, top, left, height, width, [self.size, self.size], antialias=True)


def _rescale(box, old, new):
    """The box (top, left, height, width) of an image of old (H, W), in the same relative place of a new (H, W)."""
    top, left, height, width = (round(value * new[i % 2] / old[i % 2]) for i, value in enumerate(box))
    height, width = max(height, 1), max(width, 1)
    return min(top, new[0] - height), min(left, new[1] - width), height, width


class Labelled(Dataset):
    """(uint8 image (3, size, size), label) pairs, the images by `view` of their path. Indexed by (index, seed) for
    random views, or by index."""

    def __init__(self, paths, labels, view):
        self.paths, self.labels, self.view = paths, labels, view

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        with seeded(seed):
            return self.view(self.paths[index]), self.labels[index]


def probe_view(size):
    """The linear probe's training view: a random resized crop, flipped or not."""
    return transforms.Compose([read_rgb, v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])


def test_view(size):
    """Resize the shorter side to 256/224 of the crop, then crop the centre. PIL resizes, as in all published figures."""
    return transforms.Compose([open_rgb, transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size),
                               transforms.PILToTensor()])


def center_view(size):
    """The centre of the image, at its own size."""
    return transforms.Compose([open_rgb, transforms.CenterCrop(size), transforms.PILToTensor()])


class ShuffledBatches(Sampler):
    """This process's share of every global batch, as lists of (index, seed).

    The order and the seeds follow from (seed, epoch) alone: with any number of processes, a step sees the same
    global batch. `batch_size` is one process's; what does not fill a global batch at the end is left out.
    Set `epoch`, and `first_step` to begin within it, before each pass. BadInput where there is not even one batch.
    """

    def __init__(self, images, batch_size, seed, place):
        self.images, self.batch_size, self.seed, self.place = images, batch_size, seed, place
        self.epoch = self.first_step = 0
        self.global_batch = batch_size * place.world_size
        if images < self.global_batch:
            raise BadInput(f"--batch-size: {images} training images do not fill one batch of {self.global_batch}"
                           " (all nodes); use a smaller batch")

    def __len__(self):
        return self.images // self.global_batch

    def __iter__(self):
        generator = torch.Generator().manual_seed(distributed.derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.images,), generator=generator).tolist()
        for step in range(self.first_step, len(self)):
            start = step * self.global_batch + self.place.rank * self.batch_size
            yield [(order[i], seeds[i]) for i in range(start, start + self.batch_size)]


def training_loader(dataset, batches, workers, device):
    """A DataLoader over ShuffledBatches. Its workers stay for all passes."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=signals.left_to_the_trainer())


def prepared(batches, prepare, device):
    """prepare(batch), a tuple of tensors, for every batch.

    A GPU prepares on a stream of its own: the host, which only queues a step, comes here while the step still runs,
    so that the next batch is copied and augmented beside it.
    """
    if device.type != "cuda":
        yield from map(prepare, batches)
        return
    training, preparing = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(preparing):
            tensors = prepare(batch)
        training.wait_stream(preparing)
        for tensor in tensors:
            tensor.record_stream(training)                           # its memory is not reused before the step is done
        yield tensors


def evaluation_loader(dataset, batch_size, workers, place):
    """Every image exactly once over all processes: rank r takes images r, r + world, … without padding."""
    share = list(range(place.rank, len(dataset), place.world_size))
    return DataLoader(dataset, batch_size, sampler=share, num_workers=workers, pin_memory=place.device.type == "cuda",
                      worker_init_fn=signals.left_to_the_trainer())
