"""A GPU and its host: pinned memory, and copies on a stream for each direction.

NVIDIA CUDA Runtime API: a stream's work is in order, streams are ordered by events; copies run beside kernels only from
and to page-locked host memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import platform
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerolite.buffer.link import Mark
from zerolite.buffer.room import Mapping, Room

log = logging.getLogger("zerolite")

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process
_MBIND = {"x86_64": 237, "aarch64": 235}  # mbind(2), which the C library does not wrap
_PREFERRED = 1  # its policy MPOL_PREFERRED


class Event:
    """A recorded event."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = stream.record_event()
        self.stream = stream
        self.device = stream.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def sync(self) -> None:
        self.event.synchronize()

    def meet(self, other: Mark) -> None:
        with torch.cuda.stream(self.stream):
            other.wait()


class Cuda:
    """The link of a GPU."""

    kind, separate = "cuda", True

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        self.host = Room(torch.device("cpu"), self._pin)
        self.near = Room(self.device)
        self._down, self._up, self._aside = (torch.cuda.Stream(self.device) for _ in range(3))
        self._node = _node_of(self.device)
        self._said = False

    def now(self) -> Mark:
        return Event(torch.cuda.current_stream(self.device))

    def down(self, out: Tensor, source: Tensor, kept: bool = False) -> Mark:
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            out.copy_(source, non_blocking=True)
        if not kept:
            source.record_stream(self._down)
        return Event(self._down)

    def up(self, out: Tensor, source: Tensor, after: Mark, alone: bool = False, kept: bool = False) -> Mark:
        if not alone:
            self._up.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._up):
            after.wait()
            out.copy_(source, non_blocking=True)
        if not kept:  # when freed, it stays until all is done that the stream was given by then: later copies too
            out.record_stream(self._up)
        return Event(self._up)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self._aside):  # a thread begins on device 0
            yield

    def register(self, memory: Tensor) -> None:
        address = memory.data_ptr()
        if self._registered(address, memory.numel() * memory.element_size()):
            weakref.finalize(memory.untyped_storage(), _unpin, torch.cuda.cudart(), address, self.device)

    def linked(self, ranks: int) -> bool:
        return reach(ranks)

    def _pin(self, region: Mapping) -> None:
        address = region.address
        if hasattr(mmap, "MADV_DONTFORK"):
            region.madvise(mmap.MADV_DONTFORK)  # a forked data loader's copy on write must not move what a device copies from
        if self._registered(address, len(region)):
            region.unpin = functools.partial(_unpin, torch.cuda.cudart(), address, self.device)

    def _registered(self, address: int, size: int) -> bool:
        """Pins in place, on the GPU's side of the host; pageable memory, said once, where that is refused."""
        if self._node is not None:
            _prefer(address, size, self._node)
        runtime: Any = torch.cuda.cudart()
        try:
            with torch.cuda.device(self.device):  # not a context on whichever device is current, too
                code = int(runtime.cudaHostRegister(address, size, _PORTABLE))
            reason = f"cudaHostRegister returned {code}"
        except RuntimeError as error:
            code, reason = -1, str(error).splitlines()[0]
        if code != 0:
            with contextlib.suppress(RuntimeError):  # the runtime tells of a refusal again at the next launch: take it there
                torch.ones(1, device=self.device)
        if code != 0 and not self._said:
            self._said = True
            log.warning(
                "zerolite: %d bytes of host memory cannot be pinned (%s); copies between host and GPU are slower and do not "
                "overlap. Raise the limit of locked memory (ulimit -l) or free memory.",
                size,
                reason,
            )
        return code == 0


def reach(ranks: int) -> bool:
    """Link.linked of GPUs."""
    count = min(torch.cuda.device_count(), ranks)
    return all(torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b)


def _unpin(runtime: Any, address: int, device: torch.device) -> None:
    with contextlib.suppress(Exception):  # at exit the driver may be gone, and the pages with it
        torch.cuda.synchronize(device)  # no copy is under way
        runtime.cudaHostUnregister(address)


def _node_of(device: torch.device) -> int | None:
    """The NUMA node of a GPU, as sysfs has it; None where there is one node, or none is named."""
    values = torch.cuda.get_device_properties(device)
    found = [getattr(values, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    numbers = [number for number in found if number is not None]
    if len(numbers) < 3:
        return None
    path = Path("/sys/bus/pci/devices/{:04x}:{:02x}:{:02x}.0/numa_node".format(*numbers))
    with contextlib.suppress(OSError, ValueError):
        node = int(path.read_text())
        return node if node >= 0 else None
    return None


def _prefer(address: int, size: int, node: int) -> None:
    """Asks for pages of one NUMA node (a wish: where it has none left, others serve)."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return
    mask = (ctypes.c_ulong * 16)()
    mask[node // 64] = 1 << (node % 64)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).syscall(
            number, ctypes.c_void_p(address), ctypes.c_ulong(size), _PREFERRED, mask, ctypes.c_ulong(16 * 64), 0
        )
