"""Misplaced tensors and hidden waits of a step on a GPU, found without one.

Fake cuda tensors go through augmentation, negatives and forward (backward needs a real GPU there); meta tensors go
through a whole step. Both refuse .item() and other looks at values; OneDevice refuses what slips through them.
"""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco import augment
from moco.builder import MoCo
from moco.encoders import build_encoder
from moco.evaluation import classifier
from moco.training import metrics
from moco.views import training_views

HERE_IS_A_GPU = torch.cuda.is_available()
CASES = [("patch", 2), ("texture", 1), ("none", 0)]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """Fake tensors cannot be pinned, so that nothing is: also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class OneDevice(TorchDispatchMode):
    """Refuses any operation whose tensors, inputs and outputs, sit on two devices, but copies that wait for nothing.

    Those it counts. It also refuses a bmm with an inner size of 1, which PyTorch 2.14 gives to Triton on CUDA: that
    needs a C compiler.
    """

    copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        if function is torch.ops.aten._to_copy.default and kwargs.get("non_blocking"):
            self.copies += len(devices) > 1
        elif len(devices) > 1:
            raise RuntimeError(f"{function} on {' and '.join(sorted(devices))}")
        if function is torch.ops.aten.bmm.default and args[0].shape[2] == 1:
            raise RuntimeError(f"bmm of {tuple(args[0].shape)} and {tuple(args[1].shape)}")
        return result


def build(device):
    with torch.device(device):
        return MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=8, K=10, mlp=True, alpha=2.0)


def views(device, robust, count, recipe=augment.V2):
    crops = torch.empty(4, 3 if robust == "texture" else 2, 3, 32, 32, dtype=torch.uint8, device=device)
    options = {"recipe": recipe, "robust": robust, "num_nonsem": count, "patch_ratio": (4, 10)}
    made = training_views(crops, np.random.default_rng(0), **options)
    assert all(view.device.type == device and view.dtype == torch.float32 for view in made)
    return made


@pytest.mark.parametrize("recipe", [augment.V1, augment.V2], ids=["v1", "v2"])
@pytest.mark.parametrize("robust, count", CASES)
def test_views_and_forward_never_wait_for_a_gpu(robust, count, recipe):
    with FakeTensorMode():
        model = build("cuda")
        with OneDevice() as watched:
            logits, labels = model(*views("cuda", robust, count, recipe))
    assert logits.shape == (4, 1 + 10 + count)
    assert watched.copies == 2 + (robust != "none")  # for each augmented view and for patches, whatever the batch
    assert {t.device.type for t in (logits, labels, model.queue, *model.similarities.values())} == {"cuda"}


@pytest.mark.parametrize("robust, count", CASES)
def test_a_whole_step_never_looks_at_values(robust, count):
    model = build("meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    means = metrics.RunningMeans()
    with OneDevice():
        for _ in range(2):
            logits, labels = model(*views("meta", robust, count))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accuracy = classifier.correct_counts(logits, labels, ks=(1,))[0] / len(labels)
            means.add({"loss": loss, "contrast_acc": accuracy, **model.similarities})
    assert means.sums.device.type == "meta" and means.steps == 2


FAULTS = {
    "mixed add": lambda x: x + torch.ones(3, device="cpu"),
    "cpu index": lambda x: x[torch.tensor([0, 2], device="cpu")],
    "cpu index_copy": lambda x: x.index_copy(0, torch.tensor([0], device="cpu"), x[:1]),
    "waiting copy": lambda x: torch.ones(3, device="cpu").to(x.device),
    "outer product": lambda x: x.view(1, 3, 1) @ x.view(1, 1, 3),
    "item": lambda x: x.sum().item(),
    "boolean index": lambda x: x[x > 0],
    "tensor of python numbers": lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_the_checks_above_catch(fault, device):
    if fault == "tensor of python numbers" and (device == "meta" or HERE_IS_A_GPU):
        pytest.skip("seen on fake cuda tensors only, where there is no GPU")
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        x = torch.ones(3, device=device)
        with pytest.raises((RuntimeError, TypeError)), OneDevice():
            FAULTS[fault](x)
