"""kNN accuracy: in pieces it equals the plain definition, and it leaves the encoder as it is."""

import math

import pytest
import torch
from helpers import write_folder
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco.data import folders
from moco.distributed import DistContext
from moco.evaluation import classifier, knn

CPU = torch.device("cpu")


class Colours(torch.nn.Module):
    """A network whose features before fc are an image's pixels."""

    def __init__(self, width=48):
        super().__init__()
        self.fc = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    def forward(self, images):
        return self.fc(images.flatten(1))


def images_of(n, seed, classes=5):
    """n random images of 4 px, and labels that their mean colour tells in part."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    noise = torch.randint(200, (n, 3, 4, 4), generator=generator)
    return (noise + 11 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def batches_of(images, labels, size):
    return list(zip(images.split(size), labels.split(size)))


def plain(train, val, k, classes=5):
    """The definition in loops: each of the k nearest votes for its class with exp(cosine / 0.07)."""
    bank, queries = (
        torch.nn.functional.normalize(classifier.to_input(images, CPU).flatten(1)) for images, _ in (train, val)
    )
    hits = 0
    for cosines, label in zip((queries @ bank.T).tolist(), val[1].tolist()):
        nearest = sorted(zip(cosines, train[1].tolist()), reverse=True)[:k]
        votes = [sum(math.exp(cosine / 0.07) for cosine, own in nearest if own == c) for c in range(classes)]
        hits += votes.index(max(votes)) == label
    return 100 * hits / len(val[1])


@pytest.mark.parametrize("train, val, k", [(300, 70, 20), (300, 70, 1), (30, 9, 200), (1, 1, 5)])
@pytest.mark.parametrize("chunk, batch", [(512, 512), (7, 16), (1, 1)])
def test_in_pieces_it_equals_the_definition(train, val, k, chunk, batch, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", chunk)
    train, val = images_of(train, seed=1), images_of(val, seed=2)
    found = knn.accuracy(Colours(), batches_of(*train, batch), batches_of(*val, 8), 5, CPU, k=k)
    assert found == pytest.approx(plain(train, val, k), abs=1e-9)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor of floats that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        sizes = [leaf.untyped_storage().nbytes() for leaf in tensors if leaf.is_floating_point()]
        self.bytes = max(self.bytes, *sizes) if sizes else self.bytes
        return result


def test_features_of_the_training_images_are_never_all_kept(monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", 240)
    monkeypatch.setattr(knn, "CHUNK", 4)
    train, val = batches_of(*images_of(500, 1), 16), batches_of(*images_of(10, 2), 16)
    with Largest() as largest:
        knn.accuracy(Colours(), train, val, 5, CPU, k=20)
    assert largest.bytes <= 4 * 48 * 256 < 4 * 48 * 500


class InEvalMode(Colours):
    def forward(self, images):
        assert not self.training
        return super().forward(images)


def test_the_encoder_is_in_eval_mode_meanwhile_and_stays_as_it_is():
    encoder = InEvalMode().train()
    before = dict(encoder.__dict__), dict(encoder._modules)
    knn.accuracy(encoder, batches_of(*images_of(9, 1), 4), batches_of(*images_of(5, 2), 4), 5, CPU)
    assert (dict(encoder.__dict__), dict(encoder._modules)) == before
    assert all(module.training and not module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_computes_in_the_precision_of_the_run(dtype):
    formats = set()

    class Recording(Colours):
        def forward(self, images):
            images = torch.nn.functional.linear(images.flatten(1), torch.eye(48))
            formats.add(images.dtype)
            return self.fc(images)

    train, val = images_of(300, seed=1), images_of(70, seed=2)
    found = knn.accuracy(Recording(), batches_of(*train, 16), batches_of(*val, 8), 5, CPU, 20, dtype)
    assert formats == {dtype} and found == pytest.approx(plain(train, val, 20), abs=0 if dtype == torch.float32 else 5)


def test_a_compiled_encoder_is_not_compiled_again_for_knn():
    torch._dynamo.reset()
    encoder, counter = Colours(), CompileCounter()
    encoder.compile(backend=counter)
    for images in (4, 4, 6, 7, 8):
        encoder(torch.randn(4, 3, 4, 4)).sum().backward()
        loader = batches_of(*images_of(images, 0), 4)
        knn.accuracy(encoder, loader, loader, 5, CPU)
    assert counter.frame_count == 1


def test_knn_replaces_an_unreadable_image_by_one_of_its_class(tmp_path):
    folder = folders.list_images(write_folder(tmp_path, train=2) / "train")
    with open(folder.paths[0], "wb") as file:
        file.write(b"broken")
    (batches,) = knn.loaders([folder], 16, 4, 0, DistContext())
    ((images, labels),) = list(batches)
    assert labels.tolist() == [0, 0, 1, 1] and torch.equal(images[0], images[1])
