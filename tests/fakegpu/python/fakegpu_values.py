"""Values good enough for a program that looks at some of them, though no kernel computes anything.

1. torch.isfinite is true for whatever lies on a fake GPU, and NaN and infinities read from there are read as 0.
2. A few operations are also computed by the CPU, in the same memory, after their fake kernel was launched: copies and
   fills and, where every tensor is small, sums and the like. So counts, sizes and weights are right; losses and
   features are whatever the memory held.
Neither launches a kernel more, nor one less.
"""

import ctypes
import math
import warnings

import torch
from torch.utils._pytree import tree_leaves, tree_map

LARGE = 16 << 20  # bytes; beyond, copies and fills are left out, too
SMALL = 65536  # elements
COPIES = ("copy_", "_foreach_copy_", "fill_.Scalar", "fill_.Tensor", "zero_")
SUMS = (
    "cat", "add.Tensor", "add_.Tensor", "sub.Tensor", "sub_.Tensor", "mul.Tensor", "mul_.Tensor", "div.Tensor",
    "div_.Tensor", "eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "sum", "sum.dim_IntList", "argmax",
    "remainder_.Scalar", "arange.start_step",
)  # fmt: skip
ALWAYS = ("all", "all.dim", "any", "any.dim")  # of what isfinite gave, which may be large

_library = torch.library.Library("aten", "IMPL")
_isfinite = torch.isfinite


def install():
    also_compute(COPIES, lambda tensor: tensor.nbytes <= LARGE)
    also_compute(SUMS, lambda tensor: tensor.numel() <= SMALL)
    also_compute(ALWAYS, lambda tensor: True)
    read = torch.library.get_kernel("aten::_local_scalar_dense", "CUDA")

    def number(keys, tensor):
        value = read.call_boxed(keys, tensor)
        return 0.0 if isinstance(value, float) and not math.isfinite(value) else value

    replace("_local_scalar_dense", number)
    replace("equal", lambda keys, one, other: torch.equal(host(one), host(other)))
    torch.isfinite = torch.Tensor.isfinite = always_finite


def always_finite(input):
    result = _isfinite(input)
    if input.device.type == "cuda" and real(result):
        host(result).fill_(True)
    return result


def also_compute(names, fits):
    """Let the operations also be computed on the CPU, if all their tensors fit."""
    for name in names:
        replace(name, computed(name, lambda leaf: not isinstance(leaf, torch.Tensor) or real(leaf) and fits(leaf)))


def computed(name, fits):
    kernel = torch.library.get_kernel(f"aten::{name}", "CUDA")
    operation, _, overload = name.partition(".")
    on_cpu = getattr(getattr(torch.ops.aten, operation), overload or "default")

    def run(keys, *args, **kwargs):
        if overload == "Tensor":  # a number came in a tensor, which was unpacked on the way
            one = next(value for value in args if isinstance(value, torch.Tensor))
            args = [as_tensor(value, one) for value in args]
        result = kernel.call_boxed(keys, *args, **kwargs)
        if all(map(fits, tree_leaves([args, kwargs, result]))):
            there = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
            host_args, host_kwargs = tree_map(host, (args, there))
            value = on_cpu(*host_args, **host_kwargs)
            if not operation.endswith("_"):  # what works in place has written to the memory
                host(result).copy_(value)
        if operation == "copy_" and result.device.type == "cpu" and result.is_floating_point() and real(result):
            result.nan_to_num_(0, 0, 0)
        return result

    return run


def as_tensor(value, other):
    if not isinstance(value, (int, float)):
        return value
    return torch.tensor(value, dtype=torch.result_type(other, value), device="cpu")


def replace(name, function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions of torch warn of it
        _library.impl(name, function, "CUDA", with_keyset=True, allow_override=True)


def real(leaf):
    return type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.device.type in ("cpu", "cuda")


def host(tensor):
    """The memory of a tensor on the fake GPU, as a CPU tensor."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return empty.set_(flat, tensor.storage_offset(), tensor.size(), tensor.stride())
