"""One parameter, as zerolite knows it, and the columns in which all parameters keep what changes with every step."""

from __future__ import annotations

import sys
import zlib
from array import array
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from zerolite.bucket import Bucket

#: States of a gradient below 0. From 0 on something was collected since the last zero_grad or step: the number of the
#: backward (autograd's) that brought it last, or HELD.
NONE = -1  # nothing was collected
USED = -2  # a step used it up and p.grad was not cleared since
DONE = -3  # its update was made in the backward, and step() is still to come
HELD = sys.maxsize  # it came from no backward: assigned, zeroed, or from other ranks alone


class Table:
    """Columns by Entry.index, so that what a step does for each parameter is a loop in C. The lists are never replaced: hooks
    hold some of them (and must not hold `params`: the garbage collector does not look into hooks)."""

    def __init__(self) -> None:
        self.params: list[nn.Parameter] = []
        self.handles: list[Tensor | None] = []  # the lazy p.grad; None: not trained yet
        self.state: list[int] = []  # where the gradient stands, see above
        self.factors: list[float] = []  # recorded by clipping and unscaling
        self.steps: list[int] = []  # updates applied
        self.groups: list[dict[str, Any] | None] = []  # the users' param groups
        self.trained = 0  # handles
        self.numbers: dict[int, int] = {}  # id(param) -> position

    def add(self, name: str, param: nn.Parameter, group: dict[str, Any] | None) -> Entry:
        """One more parameter."""
        entry = Entry(name, param, self)
        self.numbers[id(param)] = len(self.params)
        self.params.append(param)
        self.handles.append(None)
        self.state.append(NONE)
        self.factors.append(1.0)
        self.steps.append(0)
        self.groups.append(group)
        return entry

    @property
    def plain(self) -> bool:
        """Whether nothing was clipped or unscaled."""
        return self.factors.count(1.0) == len(self.factors)

    @property
    def mark(self) -> int:
        """A checksum of all factors; 0 where nothing was clipped or unscaled."""
        return 0 if self.plain else zlib.crc32(array("d", self.factors))

    def clear(self, state: int = NONE) -> None:
        """One state for all, without factors."""
        self.state[:] = [state] * len(self.state)
        self.factors[:] = [1.0] * len(self.factors)


#: Who trains a parameter, for as long as that lives and has not been closed.
TRAINED: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Entry:
    """A parameter, its param group, and where its gradient stands."""

    def __init__(self, name: str, param: nn.Parameter, table: Table) -> None:
        self.name = name
        self.param = param
        self.table = table
        self.index = len(table.params)  # position among all entries
        self.slot = -1  # position in the bucket
        self.bucket: Bucket | None = None  # None: frozen since the start, and parameters rest whole

    @property
    def group(self) -> dict[str, Any] | None:
        """The user's param group; None: in the model, not in the optimizer."""
        return self.table.groups[self.index]

    @group.setter
    def group(self, group: dict[str, Any]) -> None:
        self.table.groups[self.index] = group

    @property
    def handle(self) -> Tensor | None:
        """The lazy p.grad; None: not trained yet."""
        return self.table.handles[self.index]

    @handle.setter
    def handle(self, handle: Tensor) -> None:
        self.table.trained += self.table.handles[self.index] is None
        self.table.handles[self.index] = handle

    @property
    def state(self) -> int:
        """Where the gradient stands: NONE, USED, DONE, a backward's number, or HELD."""
        return self.table.state[self.index]

    @state.setter
    def state(self, state: int) -> None:
        self.table.state[self.index] = state

    @property
    def live(self) -> bool:
        """Whether gradients were collected since the last zero_grad or step."""
        return self.state >= 0

    @property
    def consumed(self) -> bool:
        """Whether an update used them up and p.grad was not cleared since."""
        return self.state <= USED

    @property
    def factor(self) -> float:
        """What clipping and unscaling recorded."""
        return self.table.factors[self.index]

    @factor.setter
    def factor(self, factor: float) -> None:
        self.table.factors[self.index] = factor

    @property
    def steps(self) -> int:
        """Updates applied."""
        return self.table.steps[self.index]

    @steps.setter
    def steps(self, steps: int) -> None:
        self.table.steps[self.index] = steps
