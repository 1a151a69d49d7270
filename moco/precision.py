"""In which number format the encoders run.

Only their backbones do: weights, momenta, momentum update, BatchNorm statistics, the head (fc), features, logits and
loss are fp32 with every choice. With bf16 or fp16, autocast casts weights and activations for the convolutions, whose
sums the hardware keeps in fp32. fp16 needs the loss scaled (torch.amp.GradScaler), bf16 does not.
"""

import contextlib

import torch
import torch.nn as nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, dtype):
    """The context to run an encoder in; for float32, none."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Float32Linear(nn.Linear):
    """A linear layer that autocast passes over."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def keep_fp32(head):
    """Let autocast pass over the linear layers of a head; their weights and names stay.

    Features of different images lie close together, in early training above all. A head in bf16 rounds away much of
    what tells them apart: the loss curve is then 2 % from fp32's, otherwise no farther than fp32's own rounding takes it.
    """
    for layer in head.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Float32Linear


def configure_cudnn(strict_fp32, deterministic):
    """How NVIDIA GPUs convolve: fp32 with TF32's 11 significant bits unless `strict_fp32`; by whichever algorithm is
    the fastest for the shapes at hand, or always by the same ones. Matrix products, logits among them, keep 24 bits."""
    torch.backends.cudnn.allow_tf32 = not strict_fp32
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
