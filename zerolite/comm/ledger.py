"""What this rank has asked of the others, in order: counters, and a digest that ranks compare at every step.

Ranks that took different paths through the model would pair one rank's gather of block 3 with another's of
block 4, and equal sizes would hide it. The digests differ then, and `step()` refuses before it writes.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Callable

WHO = (
    "Every rank makes the same calls in the same order: a module that only some ranks use is gathered with its parent (stage "
    "3, units=...), and clipping, evaluating, state_dict() and full_params() are for all ranks or none."
)


class RankError(RuntimeError):
    """Another rank died, disagrees or did not answer in time."""


class Ledger:
    """The order and the volume of one rank's communication."""

    digest: int  # CRC-32 chain over every `what`
    calls: Counter[str]  # by phase
    sent: Counter[str]  # bytes that left this rank, by phase
    recent: deque[str]  # entries since ranks last agreed, the last thousands of them
    listener: Callable[[str, str], None] | None  # told of every verb; None: nobody listens

    def __init__(self) -> None:
        self.digest = 0
        self.calls = Counter()
        self.sent = Counter()
        self.recent = deque(maxlen=4096)
        self.listener = None

    def enter(self, what: str, sent: int) -> None:
        """Records one call that sends `sent` bytes from this rank."""
        phase = what.split(" ", 1)[0]
        self.digest = zlib.crc32(what.encode(), self.digest)
        self.calls[phase] += 1
        self.sent[phase] += sent
        self.recent.append(what)

    def agreed(self) -> None:
        """Ranks have found that their digests are equal."""
        self.recent.clear()

    def note(self, event: str, name: str) -> None:
        """One verb was done to the bucket `name`, or a phase's "begin" or "end" is reached."""
        if self.listener is not None:
            self.listener(event, name)


def parted(histories: list[list[str]]) -> str:
    """Where ranks' calls since they last agreed part, in words."""
    length = max(map(len, histories), default=0)
    place = next((k for k in range(length) if len({calls[k] if k < len(calls) else "" for calls in histories}) > 1), length)
    before = f"after '{histories[0][place - 1]}' " if place else ""
    did = [
        f"rank {rank} did '{calls[place]}'" if place < len(calls) else f"rank {rank} nothing more"
        for rank, calls in enumerate(histories)
    ]
    return before + ", ".join(did)
