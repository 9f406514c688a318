"""When buckets are exchanged, and what ranks agree on before a step.

Buckets go out in one fixed order, last parameters first, on every rank: a bucket that is complete waits for
the ones before it. So ranks that use different parameters still exchange the same buckets in the same order;
what a rank lacks counts as 0.
"""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from zerolite.backward import most_ahead
from zerolite.bucket import Bucket, Entry
from zerolite.comm import Comm
from zerolite.comm.ledger import WHO, RankError, parted
from zerolite.gradient import Gradients
from zerolite.kernels import exceeds_
from zerolite.placement import Plan

_task = torch._C._current_graph_task_id


def _nothing() -> None:
    return None


class History:
    """What was done to gradients since all were cleared or used up, which has to be alike on all ranks when a step begins."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.rounds = 0  # synchronised backwards
        self.dropped: set[tuple[int, int]] = set()  # (rounds before, entry) of averages that were dropped or zeroed
        self.scaled: list[tuple[int, int]] = []  # (rounds before, checksum of all factors) where further backwards followed


class Reducer:
    """Gradients of all buckets."""

    plan: Plan
    comm: Comm
    order: list[Bucket]  # trained buckets in the order in which they go out
    large: list[bool]  # which of them are averaged before the next one is packed
    suspect: Tensor  # int64 [1]: see Gradients.suspect
    sync: bool  # False inside no_sync()
    task: int  # the last one's number
    open: bool  # a synchronised backward left something that has not gone out
    local: bool  # a backward under no_sync() did
    next: int  # position in `order` of the next bucket to go out in this backward
    finished: set[int]  # ids of buckets of which no more comes in this backward
    version: int  # counts changes of gradients, but for what hooks take by themselves: see `moment`
    wait: Callable[[], None]  # until no update reads gradients any more
    going: Callable[[Bucket], None]  # a bucket is about to go out, where rounds go out in the backward
    take: Callable[[Bucket], None]  # takes in what has gone out of a bucket: averages it
    tell: Callable[[], list[bool]]  # what else ranks tell each other after a backward (step_in_backward): see Early.tell
    told: list[bool]  # what any rank has told
    names: tuple[str, ...]  # of the options that the optimizer has
    options: Callable[[], list[tuple[object, ...]]]  # their values in each param group, as far as ranks can compare them
    at_start: list[Callable[[], None]]  # called when a backward begins
    at_end: list[Callable[[], None]]  # called when a backward is over

    def __init__(self, plan: Plan, comm: Comm, device: torch.device) -> None:
        self.plan = plan
        self.comm = comm
        self.order, self.large = [], []
        self.suspect = torch.zeros(1, dtype=torch.int64, device=device)
        self.sync = True
        self.version = 0
        self.task = -1
        self.wait = lambda: None
        self.going = lambda bucket: None
        self.take = lambda bucket: grads_of(bucket).finish()
        self.tell = lambda: []
        self.told = []
        self.names, self.options = (), list
        self.at_start = []
        self.at_end = []
        self.reset()

    def reset(self) -> None:
        """Forgets every gradient and any backward that was under way."""
        for bucket in self.order:
            grads_of(bucket).clear()
        self._under_way: Callable[[], object] = _nothing  # what autograd calls at the end of the backward, while it does
        self.open = self.local = False
        self.next = 0
        self.finished = set()
        self.version += 1
        self.suspect.zero_()

    def add(self, buckets: list[Bucket]) -> None:
        """Takes trained buckets, in the order of the forward pass."""
        self.order = list(reversed(buckets)) + self.order
        sizes = [bucket.layout.numel * bucket.full.element_size() for bucket in self.order]
        self.large = list(map(most_ahead(self.plan, sizes).__lt__, sizes))

    @property
    def moment(self) -> tuple[int, int]:
        """Changes with any gradient, for caches."""
        return self.version, sum(grads_of(bucket).came for bucket in self.order) if self.active else -1

    # ---- backward

    @property
    def active(self) -> bool:
        """Whether a backward is under way. One that fails takes its callback with it, and nobody tells."""
        return self._under_way() is not None

    def enter(self) -> None:
        """A backward is under way: what an earlier one left goes out first, and `leave` follows at its end."""
        if self.active:
            return
        for call in self.at_start:
            call()
        if self.sync and self.open:
            self._send()
        for bucket in self.order if self.sync else []:  # else it is read as the next round is packed, which a rank may never do
            grads_of(bucket).finish()
        if self.sync and self.local:
            self._widen()
        for bucket in self.order:
            grads_of(bucket).expect(bucket.params)
        leave = functools.partial(self.leave)  # of this backward alone
        self._under_way = weakref.ref(leave)
        self.task = _task()
        self.next = 0
        self.finished = set()
        self.comm.ledger.note("backward", "begin")
        torch.autograd.Variable._execution_engine.queue_callback(leave)  # type: ignore[attr-defined]

    def collect(self, entry: Entry, grad: Tensor) -> None:
        """Takes one parameter's gradient from autograd."""
        if not self.active:
            self.enter()
        self.version += 1
        grads = entry.bucket.grads  # type: ignore[union-attr]
        assert grads is not None
        entry.state = _task()
        if not self.sync:
            self.local = True
            grads.hold(entry.slot, grad)
            return
        self.open = True
        slot = entry.slot
        if slot in grads.arrived or slot in grads.packed or slot in grads.arrivals.gone:
            if self.plan.step_in_backward:
                raise RuntimeError(
                    f"parameter '{entry.name}': its gradient came again in one backward (a reentrant checkpoint that uses it "
                    "twice). With step_in_backward=True it has to come once: checkpoint with use_reentrant=False."
                )
            self.local = True  # until `union`, when the backward is over
            grads.repeat(slot, grad)
        elif grads.put(slot, grad):
            self._advance()
        elif not torch.is_grad_enabled():  # else a gradient may have a graph
            grads.open(entry.state)

    def filled(self, bucket: Bucket) -> None:
        """Hooks have brought the last gradient of a round."""
        self.version += 1
        if grads_of(bucket).filled():
            self._advance()

    def over(self, buckets: list[Bucket]) -> None:
        """No more gradients of these come in this backward: they go out in their turn, complete or not, at a moment that is
        the same on ranks that used all of their parameters and on ranks that did not."""
        if self.active and self.sync:
            self.finished.update(map(id, buckets))
            self._advance()

    def _advance(self) -> None:
        """Sends complete buckets (and those that are `over`) while they are next in order, where gradients rest sharded; the
        one sent before is averaged meanwhile, and what is there at once at once."""
        if not self.plan.grads.sharded:
            return
        while self.next < len(self.order):
            grads = grads_of(self.order[self.next])
            if not (grads.complete or id(self.order[self.next]) in self.finished):
                return
            self._go_out()

    def _go_out(self) -> None:
        """Sends the next bucket."""
        bucket = self.order[self.next]
        grads = grads_of(bucket)
        self.going(bucket)
        grads.start()
        if self.next > 0:
            self.take(self.order[self.next - 1])
        if self.large[self.next] or not any(flight.pending.under_way for flight in grads.flights):
            self.take(bucket)
        self.next += 1

    def leave(self) -> None:
        """The backward is over: where gradients rest sharded, what is left goes out."""
        if self.active and self.plan.grads.sharded and self.sync:
            while self.next < len(self.order):
                self._go_out()
            for bucket in self.order:
                self.take(bucket)
            self.open = False
        for bucket in self.order:
            grads_of(bucket).close()
        self._under_way = _nothing
        self.next = 0
        for call in self.at_end:
            call()
        self.comm.ledger.note("backward", "end")

    def flush(self) -> None:
        """Everything collected goes out, in order, and is averaged where it cannot last as it is: the round of a
        synchronised backward, then what no_sync() has left, in the order that it has where gradients rest sharded."""
        if self.open:
            self._send()
        if self.local:
            self._widen()
            self._send()

    def _send(self) -> None:
        """Every bucket goes out; the one before it is averaged meanwhile where it cannot last as it is, so that slices of two
        are held, not of all."""
        for k, bucket in enumerate(self.order):
            grads_of(bucket).start()  # averages the earlier round whose memory it needs
            self._average(k - 1)
        self._average(len(self.order) - 1)
        self.open = False

    def _average(self, position: int) -> None:
        if position >= 0 and not grads_of(self.order[position]).lane.lasting:
            grads_of(self.order[position]).finish()

    def _widen(self) -> None:
        """The local sums become the beginning of a round, on all ranks."""
        for bucket in self.order:
            grads_of(bucket).widen()
        self.local, self.open = False, True

    def settle(self, what: str) -> None:
        """Every rank's gradients have gone out (a collective; ranks agree first on whether anything is open)."""
        self.wait()
        state = torch.tensor([int(self.open), int(self.local)], device="cpu")
        self.comm.max_(state, what)
        self.open, self.local = bool(state[0]), bool(state[1])
        self.flush()

    # ---- before a step

    def union(self, present: list[bool], what: str) -> list[bool]:
        """Which parameters have a gradient on any rank (one small all-reduce where ranks agree already). What is left of this
        backward where gradients rest sharded (a bucket was taken for over too early), and what came again, goes out now."""
        late = [self.plan.grads.sharded and grads_of(bucket).left for bucket in self.order]
        again = [grads_of(bucket).again for bucket in self.order]
        self.told = self.tell()
        mine = [*present, *late, *again, *self.told]
        mark, options = zlib.crc32(bytes(mine)), self._options() if self.plan.step_in_backward else []
        told = [mark, _checksum(options)] if self.plan.step_in_backward else [mark]
        marks = torch.tensor([sign * value for value in told for sign in (1, -1)], device="cpu")
        self.comm.max_(marks, what)
        if self.plan.step_in_backward and int(marks[2]) != -int(marks[3]):
            self._refuse_options(options, "This backward has updated parameters with them (step_in_backward=True).")
        if int(marks[0]) != -int(marks[1]):
            flags = self._union(mine, f"{what} presence")
            first, second = len(present), len(present) + len(late)
            third = second + len(again)
            present, late, again, self.told = flags[:first], flags[first:second], flags[second:third], flags[third:]
        if self.plan.step_in_backward:
            self._check_once(late, again, self.told[0])
        for bucket, plain, wide in zip(self.order, late, again, strict=True):
            if plain or (wide and not self.plan.grads.sharded):
                grads_of(bucket).start()
            if wide:
                grads_of(bucket).widen()
                grads_of(bucket).start()
            if plain or wide:
                grads_of(bucket).finish()
        self.local = False
        return present

    def _check_once(self, late: list[bool], again: list[bool], bad: bool) -> None:
        """Raises where an update in the backward was made of a part of a gradient, or of one that is not finite."""
        which = [bucket.name for bucket, *more in zip(self.order, late, again, strict=True) if any(more)]
        if bad or which:
            what = "a gradient is not finite" if bad else f"gradients of bucket '{which[0]}' came after their turn"
            raise (FloatingPointError if bad else RuntimeError)(
                f"{what}, on some rank, and step_in_backward=True has updated parameters with it: this step cannot be skipped "
                "or repaired. Load a checkpoint, call optimizer.zero_grad(), and go on; or build the ZeroOptimizer without "
                "step_in_backward."
            )

    def _union(self, present: list[bool], what: str) -> list[bool]:
        flags = torch.tensor(present, dtype=torch.int64, device="cpu")
        self.comm.max_(flags, what)
        return [bool(flag) for flag in flags.tolist()]

    def agree(self, entries: list[Entry], present: list[bool], replaced: list[int], history: History) -> list[bool]:
        """Which parameters have a gradient on any rank; compares ledgers, factors, replaced gradients and what was done to them
        before over ranks, and shares the suspicion of non-finite values.

        Raises RankError where ranks took different paths, ValueError where their gradients were treated differently.
        Leaves `suspect`, `open` and `local` equal on all ranks.
        """
        ledger, table = self.comm.ledger, entries[0].table
        digest = ledger.digest
        rounds = history.rounds
        dropped = sorted(history.dropped)
        marks = [zlib.crc32(repr(treated).encode()) for treated in ((replaced, dropped), (history.scaled, table.mark))]
        marks += [zlib.crc32(bytes(present)), rounds]
        for bucket in self.order:
            grads_of(bucket).look()
        values = [digest, -digest, int(self.suspect), int(self.open), int(self.local)]
        options = self._options()
        values += [sign * mark for mark in (*marks, _checksum(options)) for sign in (1, -1)]
        agreed = torch.tensor(values, device="cpu")
        self.comm.max_(agreed, "step agreement")
        if int(agreed[0]) != -int(agreed[1]):
            recent = self.comm.share(list(ledger.recent), "step disagreement")
            raise RankError(f"ranks took different paths before step(): {parted(recent)}. No state was changed. {WHO}")
        ledger.agreed()
        if int(agreed[5]) != -int(agreed[6]):
            names = [entries[index].name for index in dict.fromkeys(replaced + [index for _, index in dropped])]
            raise ValueError(
                f"p.grad was assigned, zeroed or set to None on some ranks only, or between other backwards (here: {names}). "
                "Expected the same on every rank, since gradients are averages over ranks. No state was changed."
            )
        if int(agreed[11]) != -int(agreed[12]):
            raise ValueError(
                f"gradients were cleared on some ranks only (they are of {rounds} synchronised backward(s) here, elsewhere of "
                f"{-int(agreed[12])} to {int(agreed[11])}). Call zero_grad() on every rank alike. No state was changed."
            )
        if int(agreed[7]) != -int(agreed[8]):
            raise ValueError(
                "gradients were scaled by different factors on different ranks, or between other backwards. Clip and unscale "
                "the same parameters on every rank, at the same moment; after no_sync() alone a rank has no p.grad of what "
                "only others use: run the last backward before clipping without it. No state was changed."
            )
        if int(agreed[13]) != -int(agreed[14]):
            self._refuse_options(options, "No state was changed.")
        self.suspect.fill_(agreed[2])
        self.open, self.local = bool(agreed[3]), bool(agreed[4])
        return present if int(agreed[9]) == -int(agreed[10]) else self._union(present, "step presence")

    def _options(self) -> list[tuple[object, ...]]:
        return self.options() if self.comm.size > 1 else []

    def _refuse_options(self, options: list[tuple[object, ...]], what: str) -> None:
        """Raises ValueError with the first option of a param group that ranks have different values of."""
        found = self.comm.share(options, "step options")
        rows = [
            {(k, name): repr(value) for k, group in enumerate(each) for name, value in zip(self.names, group, strict=True)}
            for each in found
        ]
        which, name = next(at for row in rows for at in row if any(other.get(at) != row[at] for other in rows))
        got = [row.get((which, name), "none") for row in rows]
        raise ValueError(
            f"param group {which}: expected the same '{name}' on every rank, got {', '.join(got[:8])} on ranks 0, 1, ... A "
            f"scheduler that looks at a loss has to be told the same one everywhere. {what}"
        )

    def finite(self) -> bool:
        """Whether every averaged gradient is finite on every rank; exact where a large value was seen, else free."""
        if not bool(self.suspect):
            return True
        self.flush()
        bad = torch.zeros(1, dtype=torch.int64, device=self.suspect.device)
        for bucket in self.order:
            grads_of(bucket).finish()
            average = grads_of(bucket).average.settled()
            if average is not None:
                here = bad if average.device == bad.device else torch.zeros(1, dtype=torch.int64, device=average.device)
                exceeds_(here, average, float("inf"))
                bad = here if here is bad else bad + here.to(bad.device)
        self.comm.max_(bad, "step finite")
        return not bool(bad)

    def begin(self, buckets: list[Bucket]) -> None:
        """Starts the exchange of buckets that are about to be updated, if anything has not gone out."""
        if self.local:
            self.flush()
        for bucket in buckets if self.open else []:
            grads_of(bucket).start()


def _checksum(options: list[tuple[object, ...]]) -> int:
    return zlib.crc32(repr(options).encode())


def grads_of(bucket: Bucket | None) -> Gradients:
    """The gradients of a trained bucket."""
    assert bucket is not None and bucket.grads is not None
    return bucket.grads
