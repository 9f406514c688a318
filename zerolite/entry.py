"""One parameter, as zerolite knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from zerolite.bucket import Bucket


class Entry:
    """A parameter, its param group, and where its gradient stands."""

    def __init__(self, name: str, param: nn.Parameter, group: dict[str, Any] | None) -> None:
        self.name = name
        self.param = param
        self.group = group  # the user's param group; None: in the model, not in the optimizer
        self.index = -1  # position among all entries
        self.slot = -1  # position in the bucket
        self.bucket: Bucket | None = None  # None: frozen since the start, and parameters rest whole
        self.handle: Tensor | None = None  # the lazy p.grad; None: not trained yet
        self.task = -1  # the backward in which the last gradient arrived
        self.live = False  # gradients were collected since the last zero_grad or step
        self.consumed = False  # a step used them up and p.grad was not cleared since
        self.factor = 1.0  # recorded by clipping and unscaling
        self.steps = 0  # updates applied
        self.version = 0  # p._version after our own last write
