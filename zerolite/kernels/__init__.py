"""Fused kernels as `torch.library` ops, with a readable PyTorch implementation behind each.

The dispatcher chooses: the native library where it is built and loaded, else `reference`. Callers
contain no condition on device or instruction set.
"""

from zerolite.kernels.native import kernels_in_use, set_isa, set_threads, threads
from zerolite.kernels.ops import (
    ADAM_ROW,
    LIMBS,
    MOMENT_ROW,
    Packing,
    Window,
    exceeds_,
    flag_store_,
    flag_wait,
    pack_,
    reduce_,
    reduce_adam_,
    reduce_adam_moments_,
    reduce_squares_,
    square_sum_,
)
from zerolite.kernels.reference import join, split_

__all__ = [
    "ADAM_ROW",
    "LIMBS",
    "MOMENT_ROW",
    "Packing",
    "Window",
    "exceeds_",
    "flag_store_",
    "flag_wait",
    "join",
    "kernels_in_use",
    "pack_",
    "reduce_",
    "reduce_adam_",
    "reduce_adam_moments_",
    "reduce_squares_",
    "set_isa",
    "set_threads",
    "split_",
    "square_sum_",
    "threads",
]
