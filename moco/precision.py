"""In which number format the encoders run.

Only they do: weights, momenta, momentum update, BatchNorm statistics, features once they are normalised, logits and
loss are fp32 with every choice. With bf16 or fp16, autocast casts weights and activations for the convolutions and
linear layers, whose sums the hardware keeps in fp32. fp16 needs the loss scaled (torch.amp.GradScaler), bf16 does not.
"""

import contextlib

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, dtype):
    """The context to run an encoder in; for float32, none."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def configure_cudnn(strict_fp32, deterministic):
    """How NVIDIA GPUs convolve: fp32 with TF32's 11 significant bits unless `strict_fp32`; by whichever algorithm is
    the fastest for the shapes at hand, or always by the same ones. Matrix products, logits among them, keep 24 bits."""
    torch.backends.cudnn.allow_tf32 = not strict_fp32
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
