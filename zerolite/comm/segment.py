"""Memory that the ranks of one host share, without a name.

Rank 0 makes an anonymous file (memfd_create, mode 0600), the others open it through /proc/PID/fd. It has no name in any file
system, so nothing can outlive the processes and no size of /dev/shm applies.

A segment can be mapped twice: *shared*, where every write is everyone's, and *private*, where reads see the shared
contents and a write stays with this process (copy on write). nn.Parameters view the private mapping, so a script that
writes to a parameter changes its own rank's copy, as it would without sharing; `dirty` finds those pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
# Bits of /proc/self/pagemap: in memory or swapped out; a file's page, that is, not copied on write. (The PAGEMAP_SCAN ioctl
# of newer kernels takes as long: both look up every page.)
_HELD, _FILE = 3 << 62, 1 << 61


def attempt(call: Callable[[], None]) -> OSError | None:
    """What this rank alone may fail at, perhaps because its platform or its Python has no such call, for others to be told."""
    try:
        call()
    except OSError as error:
        return error
    except AttributeError as error:
        return OSError(str(error))
    return None


class Segment:
    """One shared region of `size` bytes; `share` exchanges small values between the ranks, and raises an OSError that any rank
    put in on all of them."""

    size: int
    shared: Tensor  # uint8 [size]
    private: Tensor | None  # uint8 [size], the same contents until this process writes

    def __init__(self, size: int, rank: int, share: Any, private: bool) -> None:
        self.size = -(-max(size, 1) // PAGE) * PAGE
        self._fd = -1
        try:
            problem = attempt(self._make) if rank == 0 else None
            pid, number = share(problem or (os.getpid(), self._fd))[0]
            path = None if rank == 0 else f"/proc/{pid}/fd/{number}"
            share(attempt(lambda: self._map(path, private)))  # everyone has mapped it before rank 0 closes
        finally:
            if self._fd >= 0:
                os.close(self._fd)

    def _make(self) -> None:
        self._fd = os.memfd_create("zerolite", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, self.size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"shared memory of {self.size} bytes for this host's ranks: {error.strerror} (limits on the sizes of files, "
                "`ulimit -f`, count). Raise the limit, or set ZEROLITE_SHARED=0: then the process group carries everything",
            ) from None

    def _map(self, path: str | None, private: bool) -> None:
        if path is not None:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fd = self._fd
        found = os.fstat(fd).st_size
        if found != self.size:
            raise OSError(f"shared segment: expected {self.size} bytes, got {found}")
        self.shared = _map(fd, self.size, mmap.MAP_SHARED)
        self.private = _map(fd, self.size, mmap.MAP_PRIVATE) if private else None

    def dirty(self) -> bool:
        """Whether this process has written to the private mapping (any write, also through p.data)."""
        assert self.private is not None
        first = self.private.data_ptr() // PAGE
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * 8)
            entries = np.frombuffer(file.read(self.size // PAGE * 8), dtype=np.uint64)
        return bool(((entries & np.uint64(_HELD) != 0) & (entries & np.uint64(_FILE) == 0)).any())

    def refresh(self) -> None:
        """Drops this process's own pages: the private mapping shows the shared contents again."""
        assert self.private is not None
        _advise(self.private.data_ptr(), self.size, mmap.MADV_DONTNEED)

    def check(self) -> None:
        """Raises OSError where the private mapping does not do what it is for: under mlockall() all of it is copied at once."""
        assert self.private is not None
        self.shared[0] = 1
        fresh = not self.dirty() and int(self.private[0]) == 1
        self.private[0] = 2
        written = self.dirty() and int(self.shared[0]) == 1
        self.refresh()
        if not (fresh and written and int(self.private[0]) == 1 and not self.dirty()):
            raise OSError("a private mapping of a shared file is copied before it is written to, as mlockall() makes it")

    def free(self, start: int, stop: int) -> None:
        """Gives the memory of whole pages inside [start, stop) back; they read as zero again."""
        start, stop = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if start < stop:
            _advise(self.shared.data_ptr() + start, stop - start, mmap.MADV_REMOVE)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _map(fd: int, size: int, flags: int) -> Tensor:
    """uint8 [size] over a mapping of `fd`, unmapped with the last tensor that views it. (The mmap module would keep a
    file descriptor for each mapping, and a large model has hundreds of buckets.)"""
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes of shared memory: {os.strerror(ctypes.get_errno())}")

    class Region(ctypes.c_char * size):  # type: ignore[misc]
        """A class of its own can be referred to weakly."""

    region = Region.from_address(address)
    weakref.finalize(region, _libc.munmap, address, size).atexit = False
    return torch.frombuffer(region, dtype=torch.uint8)


def _advise(address: int, size: int, advice: int) -> None:
    if _libc.madvise(address, size, advice) != 0:
        raise OSError(ctypes.get_errno(), f"madvise on shared memory: {os.strerror(ctypes.get_errno())}")
