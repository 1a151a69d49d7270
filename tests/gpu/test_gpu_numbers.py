"""On the GPU the same numbers as on the CPU: losses, gradients, views, kNN and accuracies."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import GOLDEN, build, golden_model, golden_steps

from moco import augment
from moco.distributed import DistContext, to_device
from moco.encoders import build_encoder
from moco.evaluation import classifier, knn
from moco.negatives import cut_patches, draw_patches
from moco.views import training_views

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def moco(arch="resnet50", dtype=torch.float32):
    torch.manual_seed(0)
    return build(arch, K=256, T=0.2, mlp=True, alpha=2.0, dtype=dtype)


def batch(n=16, size=64):
    generator = torch.Generator().manual_seed(1)
    query, key, negative = torch.randn(3, n, 3, size, size, generator=generator)
    return query, key, negative.unsqueeze(1)


def first_step(arch, device, dtype=torch.float32, memory_format=torch.channels_last, scale=1.0, compiled=False):
    """The loss of a step and the gradients of all weights, on the CPU.

    A ResNet-50 uses running statistics: with those of a small batch its first gradients differ by some percent between
    two memory layouts on the same CPU.
    """
    model = moco(arch, dtype).to(device, memory_format=memory_format).train(arch == "resnet10")
    if compiled:
        model.encoder_q.compile()
        model.encoder_k.compile()
    logits, labels = model(*(view.to(device) for view in batch()))
    loss = F.cross_entropy(logits, labels)
    (loss * scale).backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.encoder_q.parameters()]) / scale
    return loss.item(), gradient.cpu()


def difference(one, other):
    """The length of the difference, relative to the other's."""
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("golden", GOLDEN, ids=["alpha2-n1", "alpha3-n3"])
def test_float64_losses_equal_the_published_codes(golden, device):
    result = golden_steps(golden["case"], golden_model(golden["case"]).to(device), ctx=DistContext(device=device))
    assert result["loss"] == pytest.approx(golden["rank"][0]["loss"], abs=1e-7, rel=0)


@pytest.fixture(scope="module", params=["resnet10", "resnet50"])
def reference(request):
    """A network, its loss and gradients on the CPU, in fp32 and PyTorch's usual layout."""
    return request.param, *first_step(request.param, CPU, memory_format=torch.contiguous_format)


def test_an_fp32_step_equals_the_cpus(device, reference):
    arch, expected, expected_gradient = reference
    loss, gradient = first_step(arch, device)
    assert loss == pytest.approx(expected, abs=1e-4)
    assert difference(gradient, expected_gradient) < 2e-3  # 1.0e-3 for a ResNet-50 on an H200


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_a_16_bit_step_is_near_the_fp32_step(device, reference, dtype, scale):
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("this GPU only emulates bf16")
    arch, expected, expected_gradient = reference
    loss, gradient = first_step(arch, device, dtype, scale=scale)
    assert loss == pytest.approx(expected, rel=0.02)
    assert gradient.isfinite().all() and F.cosine_similarity(gradient, expected_gradient, dim=0) > 0.9


@pytest.mark.parametrize("recipe", [augment.V1, augment.V2], ids=["v1", "v2"])
@pytest.mark.parametrize("robust", ["patch", "texture"])
def test_views_equal_the_cpus(device, recipe, robust):
    generator = torch.Generator().manual_seed(2)
    crops = torch.randint(256, (16, 3, 3, 224, 224), dtype=torch.uint8, generator=generator)

    def views_on(device):
        rng = np.random.default_rng(3)
        options = {"recipe": recipe, "robust": robust, "num_nonsem": 1, "patch_ratio": (16, 72)}
        query, key, negatives = training_views(crops.to(device), rng, **options)
        return [augment.denormalize(view).cpu() for view in (query, key, negatives[:, 0])]

    for here, there in zip(views_on(CPU), views_on(device)):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=0)  # of pixel values from 0 to 1


def test_patches_equal_the_cpus_exactly(device):
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(4))
    drawn = draw_patches(16, 224, 16, 72, np.random.default_rng(5), count=2)
    here, there = (cut_patches(images.to(where), *to_device([drawn], where)[0]) for where in (CPU, device))
    assert torch.equal(there.cpu(), here)


def labelled(n, seed, size=64, classes=5):
    """Batches of random images with a tint that tells their class in part."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    images = torch.randint(200, (n, 3, size, size), generator=generator) + 11 * labels.view(-1, 1, 1, 1)
    return list(zip(images.to(torch.uint8).split(16), labels.split(16)))


def test_knn_equals_the_cpus(device):
    train, val = labelled(200, 6), labelled(100, 7)
    accuracies = [
        knn.accuracy(moco("resnet18").encoder_q.to(where), train, val, 5, where, k=20) for where in (CPU, device)
    ]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=1)  # one image, where two votes are equal but for rounding


def test_accuracies_of_heads_equal_the_cpus(device):
    def accuracies(where):
        torch.manual_seed(8)
        backbone = build_encoder("resnet18", 5).eval()
        heads = classifier.LinearHeads(torch.nn.Linear(512, 5) for _ in range(2))
        backbone.fc = torch.nn.Identity()
        backbone.to(where, memory_format=torch.channels_last)
        heads.to(where)
        evaluate = lambda images: heads(classifier.extract_features(backbone, images))
        return classifier.evaluate(evaluate, labelled(100, 9), where)

    for here, there in zip(accuracies(CPU), accuracies(device)):
        assert there["n"] == here["n"] == 100 and there["acc1"] == pytest.approx(here["acc1"], abs=1)


def test_a_compiled_step_equals_the_eager_one(device):
    torch._dynamo.reset()
    eager, compiled = (first_step("resnet10", device, compiled=compiled) for compiled in (False, True))
    assert compiled[0] == pytest.approx(eager[0], abs=1e-4) and difference(compiled[1], eager[1]) < 1e-3
