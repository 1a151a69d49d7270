"""From files to uint8 crops, in the loading processes; and the order in which all processes see the images."""

from contextlib import contextmanager

import torch
import torchvision.transforms as transforms
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from moco import distributed, signals
from moco.failures import BadInput, RunFailed
from moco.images import BadImage, open_rgb, read_rgb

CROP_SCALE = (0.2, 1.0)          # MoCo's, for pre-training; torchvision's default for the linear probe
CROP_RATIO = (3 / 4, 4 / 3)
REPLACEMENTS = 10                # images of a class that are tried for one that cannot be read


@contextmanager
def seeded(seed):
    """torchvision's transforms draw from PyTorch's CPU generator: lend it this seed, then give it back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class RandomViews(Dataset):
    """Random views of the images of a training split: view(index) for every (index, seed) of ShuffledBatches, whose
    draws follow from the seed alone, not from the worker that makes them.

    An image that cannot be read gives way to another of its class. Items are (view, faults): the (path, reason) of the
    files that could not be read, none as a rule. RunFailed where REPLACEMENTS others of the class cannot be read either.
    """

    def __init__(self, labels, view):
        self.labels, self.view = labels, view

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, seed = key
        faults = []
        for candidate in self._candidates(index, seed):
            try:
                with seeded(seed):
                    return self.view(candidate), faults
            except BadImage as bad:
                faults.append((bad.path, bad.reason))
        path, reason = faults[0]
        raise RunFailed(f"{path} ({reason}), and {len(faults) - 1} others of its class cannot be read; is the data still there?")

    def _candidates(self, index, seed):
        yield index
        others = [other for other, label in enumerate(self.labels) if label == self.labels[index] and other != index]
        generator = torch.Generator().manual_seed(seed)
        yield from (others[place] for place in torch.randperm(len(others), generator=generator)[:REPLACEMENTS].tolist())


class ViewPairs:
    """Two random crops of a photo and, with `textures`, the first crop's box of its texture.

    Called with an index, returns uint8 (2 or 3, 3, size, size): query, key[, texture].
    """

    def __init__(self, photos, size, textures=None):
        self.photos, self.textures, self.size = photos, textures, size

    def __call__(self, index):
        photo = read_rgb(self.photos[index])
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


class LabelledViews:
    """Called with an index: `view` of that image's path, a uint8 image (3, size, size), and its label."""

    def __init__(self, paths, labels, view):
        self.paths, self.labels, self.view = paths, labels, view

    def __call__(self, index):
        return self.view(self.paths[index]), self.labels[index]


class Labelled(Dataset):
    """LabelledViews to test on. All images count: one that cannot be read is a RunFailed."""

    def __init__(self, paths, labels, view):
        self.views = LabelledViews(paths, labels, view)

    def __len__(self):
        return len(self.views.paths)

    def __getitem__(self, index):
        try:
            return self.views(index)
        except BadImage as bad:
            raise RunFailed(f"{bad}; a test counts every image: get this one anew") from bad


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

    def of_step(self, step):
        """The images' indices of a step's global batch in this epoch, steps counted from 0."""
        everywhere = ShuffledBatches(self.images, self.global_batch, self.seed, distributed.Place())
        everywhere.epoch, everywhere.first_step = self.epoch, step
        return [index for index, _ in next(iter(everywhere))]


def training_loader(views, batches, workers, device):
    """A DataLoader of RandomViews over ShuffledBatches: (batch, faults). Its workers stay for all passes."""
    return DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                      collate_fn=_collate, persistent_workers=workers > 0, worker_init_fn=signals.left_to_the_trainer())


def _collate(items):
    views, faults = zip(*items)
    return default_collate(views), sum(faults, [])


def prepared(batches, prepare, device, first_step=0):
    """(prepare(step, crops), faults) for every (crops, faults) of `batches`; prepare returns tensors.

    A GPU prepares on a stream of its own: the host, which only queues a step, comes here while the step still runs,
    so that the next batch is copied and augmented beside it.
    """
    on_gpu = device.type == "cuda"
    training, preparing = (torch.cuda.current_stream(device), torch.cuda.Stream(device)) if on_gpu else (None, None)
    for step, (crops, faults) in enumerate(batches, first_step):
        with torch.cuda.stream(preparing):                           # does nothing without one
            tensors = prepare(step, crops)
        if on_gpu:
            training.wait_stream(preparing)
            for tensor in tensors:
                tensor.record_stream(training)                       # its memory is not reused before the step is done
        yield tensors, faults


def evaluation_loader(dataset, batch_size, workers, place):
    """Every image exactly once over all processes, without padding: of a data set rank r takes images r, r + world, …

    dataset: one, or a list whose members follow each other, no batch holding images of two. Its workers stay for all
    passes: CPython may hang in a process forked while a thread of the last pass's workers is ending.
    """
    parts = dataset if isinstance(dataset, list) else [dataset]
    batches, start = [], 0
    for part in parts:
        share = range(start + place.rank, start + len(part), place.world_size)
        batches += [share[at:at + batch_size] for at in range(0, len(share), batch_size)]
        start += len(part)
    return DataLoader(ConcatDataset(parts), batch_sampler=batches, num_workers=workers, pin_memory=place.device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=signals.left_to_the_trainer())
