"""Memory for what stays: optimizer states, averaged gradients, the host's half of offloaded parameters.

On the host it is mapped for each tensor in huge pages where the system allows them (`madvise`), apart from the
allocator's heap: a step's short-lived tensors leave no holes between them, a first touch costs one fault for 2 MiB instead
of 512, and the update walks over several streams with few translation misses. Each begins somewhere else in its page, so that
those streams do not meet in the same places of a cache. Memory that a device copies from and to
is pinned in place, to the byte (rounded up to a page), where torch's pinned allocator rounds up to a power of two.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from zerolite.layout import STAGGER

HUGE = 2 << 20  # bytes of a huge page on x86-64, and a multiple of other systems' pages
_made = itertools.count(1)  # mappings, for where in a page they begin


class Mapping(mmap.mmap):
    """Private memory of the process that gives up its pinning when it goes."""

    unpin: Callable[[], None] | None = None

    @property
    def address(self) -> int:
        """Where it begins."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self))

    def __del__(self) -> None:
        if self.unpin is not None:
            self.unpin()


class Room:
    """Where tensors rest.

    pin  makes a mapping's pages stay for a device's copies, before anything touches them; None: nothing copies from here
    """

    def __init__(self, device: torch.device, pin: Callable[[Mapping], None] | None = None) -> None:
        self.device = device
        self.pin = pin

    @torch.inference_mode(False)  # what is made inside of inference_mode() could not be updated outside
    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A 1D tensor of zeros; on the host, memory that no one has touched yet."""
        size = numel * dtype.itemsize
        if self.device.type != "cpu" or (size < HUGE and self.pin is None) or size == 0:
            return torch.zeros(numel, dtype=dtype, device=self.device)
        start = next(_made) * STAGGER % mmap.PAGESIZE
        region = Mapping(-1, start + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: plain ones do
                region.madvise(mmap.MADV_HUGEPAGE)
        if self.pin is not None:
            self.pin(region)
        return torch.frombuffer(region, dtype=dtype, count=numel, offset=start)


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room.zeros of memory that no device copies from."""
    return Room(device).zeros(numel, dtype)
