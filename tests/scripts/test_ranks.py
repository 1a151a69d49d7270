"""DDP warns of gradients in another layout than their weights', which for 1×1 kernels means nothing."""

import warnings

import torch
from helpers import run_ranks

from moco import distributed


def warned(ctx):
    """What DDP says when a 1×1 kernel's gradient has the strides that 16-bit training on a GPU gives it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = torch.nn.Conv2d(4, 8, 1).to(memory_format=torch.channels_last)
        model.weight.register_hook(lambda gradient: gradient.clone().as_strided(gradient.shape, (4, 1, 1, 1)))
        ddp_model = distributed.wrap_ddp(model, ctx.device)
        ddp_model(torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    return [str(warning.message) for warning in caught], model.weight.stride(), model.weight.grad.stride()


def test_strides_of_1x1_kernels_cause_no_warning(tmp_path):
    for texts, weight, gradient in run_ranks(2, tmp_path, warned)["warned"]:
        assert weight != gradient and not any("Grad strides" in text for text in texts)
