"""Encoders: architectures by name, a small ResNet for 64-px images, and the number format that an encoder runs in.

With bf16 or fp16 only the backbone runs in that format, under autocast. Weights, momenta, the momentum update,
BatchNorm statistics, the head (fc), features, logits and loss stay fp32. fp16 needs loss scaling
(torch.amp.GradScaler), bf16 does not.
"""

import argparse
import contextlib
import ctypes

import torch
import torch.nn as nn
import torchvision.models
from torchvision.models.resnet import BasicBlock

from moco.errors import UsageError, first_line

FAMILIES = ("resnet", "resnext", "wide_resnet", "regnet", "shufflenet")  # all end in one linear layer named fc
WIDTHS = {"resnet10": (32, 64, 128, 256), "resnet10_x0_5": (16, 32, 64, 128)}  # of ResNet10's four stages
ARCHS = [*WIDTHS, *(name for name in torchvision.models.list_models(torchvision.models) if name.startswith(FAMILIES))]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arch_name(text: str) -> str:
    """A value of --arch. argparse.ArgumentTypeError unless it is one of ARCHS."""
    if text not in ARCHS:
        known = f"{', '.join(WIDTHS)}, torchvision's {', '.join(f'{name}*' for name in FAMILIES)}, which end in fc"
        raise argparse.ArgumentTypeError(f"{text}: not among {known}; for others: docs/own-loop.md#in-this-project")
    return text


def build_encoder(arch: str, num_classes: int) -> nn.Module:
    """The randomly initialised network `arch` (one of ARCHS), whose `fc` has `num_classes` outputs."""
    if arch in WIDTHS:
        return ResNet10(num_classes, WIDTHS[arch])
    device = torch.get_default_device()
    # torchvision computes a regnet's widths with tensors, which have no values on the meta device.
    with torch.device("cpu" if arch.startswith("regnet") else device):
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    return model.to(device)


class ResNet10(nn.Module):
    """A small ResNet for 64-px images on a CPU: one BasicBlock per stage, half or a quarter of ResNet-18's widths.

    (N, 3, H, W) → (N, num_classes); 1.2 million weights, with half the widths 0.3.
    """

    def __init__(self, num_classes: int = 1000, widths: tuple[int, ...] = WIDTHS["resnet10"]):
        super().__init__()
        self.stem = nn.Sequential(
            _conv_bn(3, widths[0], 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
        )
        blocks = [BasicBlock(widths[0], widths[0])]
        for narrow, wide in zip(widths, widths[1:]):
            blocks.append(BasicBlock(narrow, wide, stride=2, downsample=_conv_bn(narrow, wide, 1, stride=2)))
        self.stages = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm1d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # torchvision's initialisation
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.stages(self.stem(x)).mean(dim=(2, 3))))


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context that runs an encoder in `dtype`; none for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Float32Linear(nn.Linear):
    """A linear layer that autocast leaves in the format of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def float32_linear(layer: nn.Linear) -> Float32Linear:
    """A Float32Linear that shares the weight and bias of `layer`.

    Used for the head of a 2-byte encoder. Features of different images are close together, above all early in training,
    and a bf16 head rounds away much of what tells them apart: the loss curve is then 2 % off fp32's.
    """
    head = Float32Linear(layer.in_features, layer.out_features, device="meta")  # draws no random numbers
    head.weight, head.bias = layer.weight, layer.bias
    return head


def check_input(encoder: nn.Module, arch: str, batch_size: int, image_size: int) -> None:
    """Raise UsageError if the encoder, on the meta device, does not accept such a batch of square images."""
    try:
        encoder(torch.empty(batch_size, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError) as error:  # only shapes can be wrong here
        raise UsageError(
            f"--arch {arch} does not accept {batch_size} images of {image_size} px per process ({first_line(error)});"
            " 32 images of 224 px work"
        ) from error


def configure_device(device: torch.device, strict_fp32: bool, deterministic: bool) -> None:
    """Set how this process computes on its device.

    strict_fp32: NVIDIA GPUs compute fp32 in full instead of in TF32 (11 significant bits), which PyTorch uses for
    convolutions, and for matrix products where the surroundings ask for it, as NVIDIA's containers do.
    deterministic: always the same cuDNN algorithms instead of the fastest for each shape.
    """
    if strict_fp32:
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.cudnn, "conv"):
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        else:  # PyTorch below 2.9
            torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # glibc keeps the memory that PyTorch frees. By default each large block goes back to the kernel, which zeroes the
    # pages again for the next step: a sixth of an fp32 ResNet-50 step on a CPU.
    libc = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)  # no separate mapping for a large block
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the top of the heap is never returned
