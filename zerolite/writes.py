"""What writes a bucket's master: an update, and a script that wrote to the parameters or replaced them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zerolite.buffer import Mark
from zerolite.dtypes import bits_dtype
from zerolite.entry import Entry
from zerolite.update import Target, Work, over_padding

if TYPE_CHECKING:
    from zerolite.bucket import Bucket
    from zerolite.feed import Feed

_dtype = attrgetter("dtype")
_version = attrgetter("_version")


@dataclass
class Pass:
    """One update of a bucket, ready to run once."""

    bucket: Bucket
    work: Work
    sources: list[Tensor]
    mean: float
    coming: Mark  # the sources are there
    feed: Feed | None = None  # the one source is on the device, and comes down through it; None: sources are beside the states

    def __call__(self) -> None:
        if self.feed is not None:
            self.feed.run(self)
            return
        self.coming.sync()
        self.work(self.bucket.mine, self.bucket.rest, self.sources, self.mean)


def adopt(bucket: Bucket, slots: Sequence[int], before: Tensor | None, quiet: bool) -> None:
    """Takes what was written to the parameters in `slots` into `mine` and the master.

    before  what `mine` held, where it is a view of `full` and so cannot tell. Without it an fp32 master tells, and next to a
            remainder all of a written parameter is new
    quiet   no warning that masters restart
    """
    # is `mine` no view of `full`?
    apart = bucket.plan.params.sharded or bucket.home is not None or bucket.mine is not bucket.own
    start = bucket.span[0]
    found: list[str] = []
    for piece in bucket.pieces:
        if piece.slot not in slots:
            continue
        part = slice(piece.offset, piece.offset + piece.stop - piece.start)
        at = bucket.layout.slots[piece.slot].offset + piece.start
        assert piece.offset == at - start
        new = bucket.full[at : at + piece.stop - piece.start].to(bucket.mine.device)
        bits = bits_dtype(new.dtype)
        if before is not None or apart:
            old = bucket.mine if before is None else before
            changed = new.view(bits) != old[part].view(bits)
        elif bucket.rest.numel() and bucket.rest.dtype != torch.int16:
            changed = new.view(bits) != bucket.rest[part].to(new.dtype).view(bits)
        else:
            changed = torch.ones_like(new, dtype=torch.bool)
        if before is not None or apart:
            bucket.mine[part] = new
            if bucket.apart and bucket.own is not bucket.mine:  # the device's shard, which the next gather takes
                bucket.own[part] = new
        if not quiet and bucket.rest.numel() and bool(changed.any()):
            found.append(bucket.entries[piece.slot].name)
        if bucket.rest.numel():
            fresh = torch.zeros_like(bucket.rest[part]) if bucket.rest.dtype == torch.int16 else new.float()
            bucket.rest[part] = torch.where(changed, fresh, bucket.rest[part])
    if found:
        more = f" and {len(found) - 1} more were" if len(found) > 1 else " was"
        warnings.warn(
            f"parameter '{found[0]}'{more} written outside of the optimizer: the fp32 master restarts from the written value.",
            stacklevel=3,
        )


def replaced(bucket: Bucket) -> list[Entry]:
    """Parameters that no longer use the memory that their bucket gave them."""
    dtype = bucket.full.dtype
    places = bucket.blank_places
    if bucket.whole and bucket.pending is None:
        base, width = bucket.full.data_ptr(), bucket.full.element_size()
        if bucket.places[0] != base:
            bucket.places = base, [base + slot.offset * width if slot.numel else 0 for slot in bucket.layout.slots]
        places = bucket.places[1]
    if list(map(Tensor.data_ptr, bucket.params)) == places and set(map(_dtype, bucket.params)) <= {dtype}:
        return []
    pairs = zip(bucket.entries, places, strict=True)
    return [entry for entry, place in pairs if entry.param.data_ptr() != place or entry.param.dtype is not dtype]


def check_storage(bucket: Bucket) -> None:
    """Raises RuntimeError where a parameter no longer uses the memory that is updated."""
    moved = bucket.home is not None and bucket.full.data_ptr() != bucket.home.place
    for entry in bucket.entries if moved else replaced(bucket):
        if moved or (entry.param.device.type == "cpu" and entry.param.is_shared()):
            raise RuntimeError(
                f"parameter '{entry.name}': torch moved its memory to share it with another process (model.share_memory(), "
                "a model or its state dict sent through torch.multiprocessing). Send clones: {name: value.clone() for name, "
                "value in model.state_dict().items()}."
            )
        raise RuntimeError(
            f"parameter '{entry.name}': its storage was replaced (p.data = ..., model.to(...), a new dtype or device). "
            "Do this before ZeroOptimizer is built, or write values with p.copy_(...), or inside full_params()."
        )


def check_blanks(bucket: Bucket) -> None:
    """Raises RuntimeError where someone wrote to a parameter while it was released, or gave it other memory: the value would be
    lost. (Torch refuses some writes to what is one NaN in all elements, but not a fill, nor any write to a single element.)"""
    check_storage(bucket)
    now, known = list(map(_version, bucket.params)), bucket.versions
    held = bucket.nothing.device.type != "cpu" or bool(bucket.nothing.isnan().all())  # a device would have to be waited for
    if held and now == known:
        return
    wrong = [a != b for a, b in zip(now, known, strict=True)] if held else bucket.nothing.isnan().logical_not_().tolist()
    names = [entry.name for entry, written in zip(bucket.entries, wrong, strict=True) if written and entry.param.numel()]
    bucket.nothing.fill_(math.nan)
    bucket.note_versions()
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise RuntimeError(
            f"parameter '{names[0]}'{more}: written while it is released, where it holds no value (stage 3). Write it inside "
            "`with optimizer.full_params():`, on every rank."
        )


def take_replaced(bucket: Bucket) -> None:
    """Takes the values of parameters that were given other memory (p.data = ...) where that is allowed, in full_params()."""
    for entry in replaced(bucket) if bucket.pending is None else []:
        view, new = bucket.views[entry.slot], entry.param.data
        if new.shape != view.shape:
            raise RuntimeError(
                f"parameter '{entry.name}': expected shape {tuple(view.shape)}, got {tuple(new.shape)} assigned to p.data."
            )
        view.copy_(new)
        entry.param.data = view


def targets(bucket: Bucket, present: list[Entry]) -> list[Target]:
    """What a step updates in the range that this rank updates, for the parameters that take part; neighbours that are updated
    alike in one target, where the rule needs no parameter for itself (10,000 small parameters make one target)."""
    assert bucket.state is not None
    found: list[Target] = []
    merge, entries, last, pieces = bucket.state.counted, bucket.entries, -2, bucket.pieces
    if merge and pieces and len(present) == len(entries):
        columns = [map(column.__getitem__, bucket.rows) for column in (entries[0].table.steps, entries[0].table.factors)]
        groups = set(map(id, map(entries[0].table.groups.__getitem__, bucket.rows)))
        p, stop = entries[0], pieces[-1].offset + pieces[-1].stop - pieces[-1].start
        if (
            p.group is not None
            and len(groups) == 1
            and over_padding(p.group)
            and all(len(set(column)) == 1 for column in columns)
        ):
            return [Target(0, pieces[0].offset, stop, p.group, p.steps + 1, p.factor)]
    taken = {entry.index for entry in present}
    group, steps, factor, joins = None, -1, 1.0, False  # of the run of neighbours that begins with piece `first`
    first = start = end = 0
    for number, piece in enumerate(pieces):
        entry = entries[piece.slot]
        if entry.group is None or entry.index not in taken:
            continue
        stop = piece.offset + piece.stop - piece.start
        alike = entry.group is group and entry.steps == steps and entry.factor == factor
        if joins and alike and number == last + 1:
            end = stop
        else:
            if group is not None:
                found.append(Target(first, start, end, group, steps + 1, factor))
            first, start, end = number, piece.offset, stop
            group, steps, factor = entry.group, entry.steps, entry.factor
            joins = merge and over_padding(group)
        last = number
    if group is not None:
        found.append(Target(first, start, end, group, steps + 1, factor))
    return found
