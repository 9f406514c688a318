"""Communication: a protocol of one page, and its backends.

    local    a world of one: nothing moves
    group    a torch.distributed process group (gloo, NCCL)
    shared   ranks of one host: gradients are read in place, parameters exist once; control data over the group
    threads  ranks as threads of one process, for tests

Tensors are 1D and contiguous. `what` names the phase and the bucket, for the ledger and for error messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from zerolite.comm.ledger import Ledger

if TYPE_CHECKING:
    from zerolite.comm.lane import Lane, LaneSpec
    from zerolite.comm.shared import Home


class Pending(Protocol):
    """A transfer under way."""

    @property
    def result(self) -> Any:
        """What `wait` returns, perhaps not there yet: to count its bytes."""
        ...

    @property
    def under_way(self) -> bool:
        """Whether nobody has waited for it yet."""
        ...

    def wait(self) -> Tensor:
        """Returns the result once it is there; raises RankError where a rank died, disagrees or is late."""
        ...


class Comm(Protocol):
    """What a bucket needs from other ranks. Every call is made by all ranks, in the same order."""

    rank: int
    size: int
    ledger: Ledger

    def exchange(self, full: Tensor, what: str) -> Pending:
        """All-to-all of slices: result[r] is rank r's slice `rank` of its `full`; shape (size, numel / size)."""
        ...

    def gather(self, full: Tensor, shard: Tensor, what: str) -> Pending:
        """All-gather of `shard` into `full` (which `shard` may be a range of); the result is `full`."""
        ...

    def sum_(self, values: Tensor, what: str) -> None:
        """In-place sum over ranks of an integer tensor (control data: exact in any order)."""
        ...

    def max_(self, values: Tensor, what: str) -> None:
        """In-place maximum over ranks (control data)."""
        ...

    def broadcast_(self, values: Tensor, what: str) -> None:
        """In-place copy of rank 0's tensor."""
        ...

    def share(self, value: Any, what: str) -> list[Any]:
        """Every rank's `value`, in rank order (small picklable control data)."""
        ...

    def lanes(self, specs: Sequence[LaneSpec], device: torch.device) -> list[Lane]:
        """What carries the gradient rounds of buckets, listed in the order in which they go out."""
        ...

    def beside(self) -> Comm:
        """A Comm of the same ranks for another thread (a collective)."""
        ...

    def home(self, numel: int, dtype: torch.dtype, sharded: bool) -> Home | None:
        """One bucket's parameters in memory that all ranks of a host share, or None: every rank has its own.

        sharded  parameters rest sharded: None unless a host's ranks are all there are
        """
        ...
