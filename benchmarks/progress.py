"""What runs and how long is left: one line that is rewritten on a terminal, a line for each job elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

WIDTH = 24


class Progress:
    """Jobs of known weight (seconds by a rough guess: only their proportions matter)."""

    def __init__(self, weights: list[float], out: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.weights = weights
        self.out = out or sys.stderr
        self.now = now
        self.start = now()
        self.done = 0

    @property
    def left(self) -> float:
        """Seconds until the end: the guess, corrected by how long the jobs so far took."""
        past, rest = sum(self.weights[: self.done]), sum(self.weights[self.done :])
        return rest * ((self.now() - self.start) / past if past else 1.0)

    def next(self, what: str) -> None:
        """A job begins."""
        part = sum(self.weights[: self.done]) / max(sum(self.weights), 1e-9)
        bar = "#" * round(part * WIDTH)
        line = f"[{bar:.<{WIDTH}}] {self.done}/{len(self.weights)} {what}, {show(self.left)} left"
        self.out.write(f"\r{line:<118.118}" if self.out.isatty() else line + "\n")
        self.out.flush()
        self.done += 1

    def say(self, text: str) -> None:
        """A line that stays."""
        self.out.write(("\r" + " " * 118 + "\r" if self.out.isatty() else "") + text + "\n")

    def skip(self, jobs: int) -> None:
        """Jobs that will not run: their share of the time is taken off."""
        del self.weights[self.done : self.done + jobs]

    def end(self, what: str) -> None:
        self.say(f"{what} after {show(self.now() - self.start)}")


def show(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
