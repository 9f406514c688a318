"""Loads the compiled libraries beside this package, as far as they were built.

`ZEROLITE_KERNELS=reference` leaves it out. `ZEROLITE_ISA=baseline|avx2|avx512|avx512vbmi` forces an instruction set,
`ZEROLITE_THREADS` the threads of a rank's kernels.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from zerolite.kernels import ops as _ops  # schemas first

log = logging.getLogger("zerolite")

LIBRARY = Path(_ops.__file__).parent / "_native.so"
CUDA_LIBRARY = LIBRARY.with_name("_cuda.so")
_loaded = False


def _load() -> bool:
    choice = os.environ.get("ZEROLITE_KERNELS", "auto")
    if choice not in ("auto", "native", "reference"):
        raise ValueError(f"ZEROLITE_KERNELS: expected 'auto', 'native' or 'reference', got {choice!r}")
    if choice == "reference":
        return False
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        if choice == "native":
            raise
        reason = "it was not built" if not LIBRARY.exists() else str(error)
        log.warning(
            "zerolite: no native kernels (%s); the PyTorch reference is used, with the same results, slower. "
            "Install a C++ compiler and reinstall with `pip install --no-build-isolation .`",
            reason,
        )
        return False
    return True


def _load_cuda() -> bool:
    """Registers the CUDA kernels. Where it is False, CUDA tensors meet the PyTorch reference, with the same results.

    The question is whether torch was built with CUDA, not whether a device is there: `torch.cuda.is_available()` asks the
    driver, after which forked workers (data loaders) can no longer use CUDA. Loading the library registers
    functions and touches no device; they are called with CUDA tensors alone, and so only where there is one.
    """
    if os.environ.get("ZEROLITE_KERNELS") == "reference" or torch.version.cuda is None or not CUDA_LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        if os.environ.get("ZEROLITE_KERNELS") == "native":
            raise
        log.warning("zerolite: no CUDA kernels (%s); the PyTorch reference is used on GPUs, slower. Reinstall.", error)
        return False
    return True


def set_isa(name: str) -> None:
    """Forces the kernels of one instruction set: 'baseline', 'avx2', 'avx512', 'avx512vbmi' or 'auto'."""
    if not (_loaded and torch.ops.zerolite.use_isa(name)):
        raise ValueError(
            f"instruction set {name!r}: expected 'auto', 'baseline', 'avx2', 'avx512' or 'avx512vbmi' as far as this processor "
            f"and build have it (kernels in use: {kernels_in_use()})"
        )


def kernels_in_use() -> str:
    """'reference', or the instruction set of the native kernels."""
    return torch.ops.zerolite.isa() if _loaded else "reference"


def set_threads(count: int) -> None:
    """Threads of this process's kernels, at least 1."""
    if count < 1:
        raise ValueError(f"kernel threads: expected at least 1, got {count}")
    if _loaded:
        torch.ops.zerolite.threads(count)


def threads() -> int:
    """Threads in use by the native kernels (PyTorch's own for the reference)."""
    return torch.ops.zerolite.threads(0) if _loaded else torch.get_num_threads()


_loaded = _load()
_load_cuda()
if _loaded and "ZEROLITE_ISA" in os.environ:
    set_isa(os.environ["ZEROLITE_ISA"])
if "ZEROLITE_THREADS" in os.environ:
    if not os.environ["ZEROLITE_THREADS"].isdigit():
        raise ValueError(f"ZEROLITE_THREADS: expected a number, got {os.environ['ZEROLITE_THREADS']!r}")
    set_threads(int(os.environ["ZEROLITE_THREADS"]))
