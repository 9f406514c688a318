"""The machine's measured ceilings: plain loops of stream.cpp, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import CACHE, ROOT
from zerolite.buffer import Room


@functools.cache
def library() -> ctypes.CDLL:
    """stream.cpp, compiled for this machine. Raises CalledProcessError or OSError without a compiler."""
    source, target = ROOT / "benchmarks" / "stream.cpp", Path(CACHE) / "stream.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}")
    options = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread"]
    subprocess.run([os.environ.get("CXX", "g++"), *options, str(source), "-o", str(part)], check=True)
    part.replace(target)
    loaded = ctypes.CDLL(str(target))
    loaded.flops.restype = ctypes.c_int64
    return loaded


def _call(name: str, tensors: list[torch.Tensor], n: int, threads: int) -> Callable[[], Any]:
    function, pointers = getattr(library(), name), [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    return lambda: (function(*pointers, ctypes.c_int64(n), ctypes.c_int(threads)), tensors)[0]  # keeps the tensors


def update(n: int, threads: int) -> Callable[[], Any]:
    """The streams of a bf16 update of n elements: 26 bytes each, in such memory as the update's."""
    room = Room(torch.device("cpu"))
    param, grad = torch.zeros(n, dtype=torch.int16), torch.zeros(n, dtype=torch.int16)
    states = [room.zeros(n, dtype) for dtype in (torch.int16, torch.float32, torch.float32)]
    return _call("update", [param, *states, grad], n, threads)


def read(n: int, threads: int) -> Callable[[], Any]:
    """Reads 4n bytes."""
    return _call("read_sum", [torch.zeros(n, dtype=torch.int32), torch.zeros(threads, dtype=torch.int32)], n, threads)


def copy(n: int, threads: int) -> Callable[[], Any]:
    """Reads and writes 4n bytes."""
    return _call("copy_words", [torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)], n, threads)


def flops(rounds: int, threads: int) -> Callable[[], int]:
    """Floating-point operations in registers; returns how many."""
    return _call("flops", [torch.zeros(threads)], rounds, threads)
