"""Which link a device has."""

from __future__ import annotations

import os

import torch

from zerolite.buffer.link import Link, Same


def link_for(device: torch.device) -> Link:
    """The link of a device. `ZEROLITE_SIMULATE=SEED[:MILLISECONDS[:BYTES]]` makes a CPU play a device, for tests."""
    if device.type == "cuda":
        from zerolite.buffer.cuda import Cuda

        return Cuda(device)
    simulate = os.environ.get("ZEROLITE_SIMULATE")
    if simulate is not None:
        from zerolite.buffer.simulated import Simulated

        return Simulated.parse(simulate)
    return Same()


def linked(device: torch.device, ranks: int) -> bool:
    """Link.linked of a device, without a link."""
    if device.type != "cuda":
        return True
    from zerolite.buffer.cuda import reach

    return reach(ranks)


def device_memory(device: torch.device) -> tuple[str, tuple[int, int] | None]:
    """Which link a device has (Link.kind), and its bytes of memory, free and in all; None where that is the host's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return "cuda", (int(free), int(total))
    simulate = os.environ.get("ZEROLITE_SIMULATE")
    if simulate is None:
        return "cpu", None
    size = simulate.split(":")[2:]
    return "simulated", (int(size[0]), int(size[0])) if size else None
