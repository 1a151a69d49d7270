"""kNN accuracy: in pieces and over ranks it equals the plain definition, and it leaves the encoder as it is."""

import pytest
import torch
from helpers import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco import classifier
from moco.builder import MoCo
from moco.distributed import DistContext
from moco.encoders import build_encoder

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


def batches_of(images, labels, size, ctx=DistContext()):  # noqa: B008
    share = slice(ctx.rank, None, ctx.world_size)
    return list(zip(images[share].split(size), labels[share].split(size))) if len(labels[share]) else []


def plain(train, val, k, classes=5):
    """The definition: all features at once, and all similarities in one matrix."""
    bank, queries = (
        torch.nn.functional.normalize(classifier.to_input(images, CPU).flatten(1)) for images, _ in (train, val)
    )
    return 100 * (classifier.knn_predict(queries, bank, train[1], classes, k) == val[1]).double().mean().item()


@pytest.mark.parametrize("train, val, k", [(300, 70, 20), (300, 70, 1), (30, 9, 200), (1, 1, 5)])
@pytest.mark.parametrize("chunk, block", [(512, 4096), (7, 16), (1, 1)])
def test_in_pieces_it_equals_the_definition(train, val, k, chunk, block):
    train, val = images_of(train, seed=1), images_of(val, seed=2)
    loaders = batches_of(*train, 8), batches_of(*val, 8)
    found = classifier.knn_accuracy(Colours(), *loaders, 5, CPU, k=k, chunk=chunk, block=block)
    assert found == pytest.approx(plain(train, val, k), abs=1e-9)


def over_ranks(ctx):
    """Accuracy with many images, with fewer validation images than ranks, and with fewer training images."""
    results = []
    for n_train, n_val, k in ((200, 50, 15), (200, 1, 15), (2, 50, 15)):
        loaders = [batches_of(*images_of(n, seed), 8, ctx) for n, seed in ((n_train, 1), (n_val, 2))]
        results.append(classifier.knn_accuracy(Colours(), *loaders, 5, ctx.device, k=k, chunk=7, block=16))
    return results


def evaluated(ctx):
    """The accuracy of two heads on a single image."""
    heads = [lambda images, c=c: torch.eye(3)[c].expand(len(images), 3) for c in (0, 1)]
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    batches = [] if ctx.rank else [(images, torch.tensor([1]))]
    return classifier.evaluate(lambda images: [head(images) for head in heads], batches, ctx.device)


def test_ranks_share_the_work_also_ranks_without_an_image(tmp_path):
    ranks = run_ranks(3, tmp_path, over_ranks, evaluated)
    expected = [
        plain(images_of(n_train, 1), images_of(n_val, 2), 15) for n_train, n_val in ((200, 50), (200, 1), (2, 50))
    ]
    assert expected == over_ranks(DistContext())
    assert ranks["over_ranks"] == [pytest.approx(expected, abs=1e-9)] * 3
    alone = evaluated(DistContext())
    assert [result["acc1"] for result in alone] == [0, 100] and alone[0]["n"] == 1
    assert ranks["evaluated"] == [alone] * 3


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor of floats that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        sizes = [leaf.untyped_storage().nbytes() for leaf in tensors if leaf.is_floating_point()]
        self.bytes = max(self.bytes, *sizes) if sizes else self.bytes
        return result


@pytest.mark.parametrize("images", [500, 4000])
def test_features_of_the_training_images_are_never_all_kept(images):
    train, val = batches_of(*images_of(images, 1), 16), batches_of(*images_of(10, 2), 16)
    with Largest() as largest:
        classifier.knn_accuracy(Colours(), train, val, 5, CPU, k=20, chunk=4, block=64)
    assert largest.bytes <= 4 * 48 * 80  # of one block; all are 4 * 48 * images


def test_the_encoder_stays_as_it_is():
    encoder = Colours().train()
    before = dict(encoder.__dict__), dict(encoder._modules)
    classifier.knn_accuracy(encoder, batches_of(*images_of(9, 1), 4), batches_of(*images_of(5, 2), 4), 5, CPU)
    assert (dict(encoder.__dict__), dict(encoder._modules)) == before
    assert all(module.training and not module._forward_pre_hooks for module in encoder.modules())


def test_a_compiled_encoder_is_not_compiled_again_for_knn():
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=8, K=16, mlp=True)
    model.encoder_q.compile(backend=counting)
    model.encoder_k.compile(backend=counting)

    def step():
        logits, labels = model(*torch.randn(2, 4, 3, 32, 32), torch.randn(4, 1, 3, 32, 32))
        torch.nn.functional.cross_entropy(logits, labels).backward()

    step()
    step()
    once = len(graphs)
    assert once == 2  # one of each encoder
    for images in (6, 7, 8, 9):
        pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
        loader = batches_of(pixels, torch.arange(images) % 2, 4)
        classifier.knn_accuracy(model.encoder_q, loader, loader, 2, CPU)
        step()
    assert len(graphs) == once
