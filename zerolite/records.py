"""What a plan is made of: placements, widths, rows of buckets, the setting, terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from zerolite.layout import ALIGN, Layout


@dataclass(frozen=True)
class Placement:
    """How one kind of tensor rests: cut over ranks or whole, and in which memory ("device" or "host")."""

    sharded: bool
    home: str = "device"


@dataclass(frozen=True)
class Widths:
    """Bytes of one element: of a parameter in compute dtype, and of all its states (remainder or master, moments)."""

    param: int
    states: int
    group: int = 0  # bytes of states beside, for each ALIGN elements (scales)
    rest: int = 0  # of `states`, what completes a parameter to its fp32 master: remainder or master

    def states_of(self, elements: int) -> int:
        """Bytes of the states of `elements`, a multiple of ALIGN."""
        return elements * self.states + elements // ALIGN * self.group


class Row(NamedTuple):
    """One bucket of a plan."""

    layout: Layout
    widths: Widths
    trained: bool
    unit: int = 0  # which unit it belongs to, 0: the root
    kept: bool = False  # its states and gradients stay on the device, though others are offloaded
    early: int = 0  # elements of the root that are listed after the first unit's, so that their gradients come first

    @property
    def full(self) -> int:
        """Bytes of the whole bucket in compute dtype."""
        return self.layout.numel * self.widths.param

    @property
    def unpacked(self) -> bool:
        """Whether it is one parameter without padding, whose gradient needs no packing."""
        return len(self.layout.slots) == 1 and self.layout.used == self.layout.numel


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on beside the placements."""

    here: int = 1  # ranks on this host
    shared: bool = False  # they share memory (comm/shared.py)
    device: str = "cpu"  # "cpu": device memory is host memory
    stream: bool = True  # offloaded states may be updated on the device, in chunks
    micro_batches: int = 1  # synchronised backward() calls before a step
    clip: bool = True  # the norm of the gradients is read before the step
    activations: int | None = None  # bytes that autograd saves for one backward, as measured
    beside: int = 0  # bytes of frozen parameters without a bucket, and of the model's buffers
    slots: bool = False  # rounds of several devices pass through shared pinned memory (comm/pinned.py)
    feed: int = 0  # most elements of a gradient at once on its way from the device to an update on the host (options.feed_size)


class Term(NamedTuple):
    """Bytes of one purpose."""

    name: str
    when: str  # "always", or only in the "backward" or in the "step"
    home: str  # "device" or "host"
    rank: int  # bytes of one rank
    host: int  # bytes of all ranks of one host: less than their sum where they share memory
