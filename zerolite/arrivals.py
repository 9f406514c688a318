"""What autograd has brought of one bucket."""

from __future__ import annotations

from torch import Tensor


class Arrivals:
    """Gradients since the bucket was packed, and until when its hooks may add to them by themselves."""

    __slots__ = ("gone", "grads", "repeats", "task", "wanted")
    grads: dict[int, Tensor]  # slot -> gradient; the same dict for ever
    task: int  # first gradients in this backward need no more than to be put here; -1: none do
    wanted: int  # with so many here the round is complete, or there are enough to pack
    gone: set[int]  # slots whose gradient of this backward has gone out
    repeats: dict[int, Tensor]  # slot -> gradient that came a second time in this backward

    def __init__(self) -> None:
        self.grads, self.task, self.wanted = {}, -1, 0
        self.gone, self.repeats = set(), {}
