"""What may be asked of offload: what of it stays on the device, and how gradients that rest there reach the host."""

from __future__ import annotations

import math
from numbers import Real

from zerolite.layout import Layout

UPDATES = ("auto", "host", "stream")
GRADIENTS = ("auto", "host", "device")  # where gradients rest with offload
FEED = 2 << 20  # elements of a chunk of gradients on its way to the host (feed.py): shorter, as there is more work for each


def check_gradients(gradients: object, offload: object) -> None:
    """Raises ValueError where gradients cannot rest as asked for."""
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients: expected one of {', '.join(map(repr, GRADIENTS))}, got {gradients!r}")
    if gradients == "device" and offload == "all":
        raise ValueError(
            "gradients='device': expected offload='states', got offload='all', with which nothing rests on the device. Use "
            "offload='states', or gradients='host'."
        )
    if gradients == "host" and not offload:
        raise ValueError(
            "gradients='host': expected offload='states' or 'all', got offload=None, with which gradients rest where they are "
            "computed. Use offload='states', or gradients='auto'."
        )


def check_resident(resident: object, offload: object) -> float:
    """The part of the states that stays on the device; 0.0 while it is left to the plan. Raises ValueError where none can."""
    if resident == "auto":
        return 0.0
    if isinstance(resident, bool) or not isinstance(resident, (int, float)) or not 0.0 <= resident <= 1.0:
        raise ValueError(f"resident: expected 'auto' or a part of the states from 0.0 to 1.0, got {resident!r}")
    if resident and offload != "states":
        raise ValueError(
            f"resident={resident}: expected offload='states', of which a part may stay on the device, got offload={offload!r}."
        )
    return float(resident)


def check_bucket_mb(value: object) -> None:
    """Raises ValueError for what is no size of a bucket."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) * 2**20 < math.inf:
        raise ValueError(f"bucket_mb: expected more than 0, and finite, got {value!r}")


def check_update(update: object) -> None:
    """Raises ValueError for an update that does not exist."""
    if update not in UPDATES:
        raise ValueError(f"update: expected one of {', '.join(map(repr, UPDATES))}, got {update!r}")


def check_in_backward(step_in_backward: object, sharded: bool, stage: object, offload: object) -> None:
    """Raises ValueError where a backward cannot update parameters.

    sharded  parameters rest sharded, so that a unit that is in use is not what is updated
    """
    if not isinstance(step_in_backward, bool):
        raise ValueError(f"step_in_backward: expected True or False, got {step_in_backward!r}")
    if step_in_backward and not sharded:
        raise ValueError(
            f"step_in_backward=True: expected stage=3, got stage={stage!r}, at which other ranks may still be using the "
            "parameters that a backward would update. Use stage=3."
        )
    if step_in_backward and offload:
        raise ValueError(
            f"step_in_backward=True: expected offload=None, got offload={offload!r}, with which gradients rest on the host and "
            "the update overlaps with the next forward. Use one of the two."
        )


def check_run(world: object, here: object, device: object) -> None:
    """Raises ValueError for ranks that there cannot be, or a device that is not known.

    here  ranks of a host
    """
    for name, value in (("world", world), ("ranks_per_host", here)):
        _check_whole(name, value)
    if here > world or world % here:  # type: ignore[operator]
        raise ValueError(f"ranks_per_host: expected a divisor of world={world}, got {here}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")


def check_loop(step_in_backward: object, micro_batches: object, clip: object) -> None:
    """Raises ValueError for a training loop that a plan cannot be of."""
    _check_whole("micro_batches", micro_batches)
    if step_in_backward is True and micro_batches != 1:
        raise ValueError(
            f"micro_batches: expected 1 with step_in_backward=True, where each synchronised backward() is a step, got "
            f"{micro_batches}. Sum micro-batches under no_sync()."
        )
    if clip is not None and not isinstance(clip, (bool, int, float)):
        raise ValueError(f"clip: expected True or False, got {clip!r}")


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


class Keeper:
    """Which buckets keep their states on the device: the first in forward order, as far as their part goes."""

    def __init__(self, resident: float, elements: int) -> None:
        self.left = resident * elements

    def take(self, layout: Layout) -> bool:
        """Whether the next trained bucket is kept."""
        self.left -= layout.used
        return self.left >= 0


def feed_size(update: object, threaded: bool) -> int:
    """Most elements of a gradient that are on their way to an update on the host (Setting.feed).

    threaded  the update can be cut into chunks and runs beside the training loop
    """
    return 0 if update == "stream" else FEED if threaded else 1 << 62


def is_auto(value: object) -> bool:
    """Whether the planner is to choose."""
    return value == "auto"
