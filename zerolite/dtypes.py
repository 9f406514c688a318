"""Dtypes and strides that go with a parameter's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack


def rest_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of what completes a parameter to its fp32 master: int16 remainder of bf16, fp32 master of fp16."""
    return {torch.bfloat16: torch.int16, torch.float16: torch.float32, torch.float32: torch.float32}[dtype]


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype of the same width, to compare bits (NaN included)."""
    return torch.int32 if dtype == torch.float32 else torch.int16


def own_storage(view: Tensor) -> Tensor:
    """The same memory, under a storage of this view alone: who saves tensors by their storages (safetensors, accelerate,
    torch.save of one module) finds no more and no less than its values."""
    return from_dlpack(to_dlpack(view)) if view.numel() else torch.empty_like(view)


def is_flat(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether a tensor of these strides is contiguous (strides of dimensions of size 1 do not matter)."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def fills(block: Tensor, numel: int) -> bool:
    """Whether a contiguous tensor has `numel` elements and memory of its own."""
    return block.numel() == numel and block.untyped_storage().nbytes() == numel * block.itemsize


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides of p where it is dense without overlap (channels_last, transposed), else contiguous ones."""
    return torch.empty_like(p, device="meta").stride()


def is_dense(p: Tensor) -> bool:
    """Whether each element has memory of its own, without gaps."""
    return p.layout is torch.strided and p.stride() == dense_strides(p)
