"""Loading a state dict of checkpoint.py or torch.optim: read and checked on every rank, then written.

    load    read -> check -> ranks agree -> write; nothing is written anywhere before every rank has found its own good

What is checked: param groups, pieces, names, sizes and dtypes of states, counts of steps. Ranks compare counts of steps and
param groups; that values themselves belong together is not told.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.checkpoint import FORMAT, indexed, order_of, positions_of, range_of, state_of
from zerolite.comm import Comm
from zerolite.dtypes import bits_dtype
from zerolite.entry import Entry
from zerolite.kernels import split_
from zerolite.layout import Piece
from zerolite.together import together
from zerolite.update import Rule

MOST_STEPS = 2**53  # what a count of steps stays below, as a binary64


@dataclass
class Saved:
    """A state dict, read; keys are positions in the param groups."""

    state: dict[int, dict[str, Any]]
    masters: dict[int, Tensor]  # of parameters without a state
    groups: list[dict[str, Any]]
    about: dict[str, Any] | None  # of a part; None: the whole
    steps: dict[int, int]

    def late(self, entries: Sequence[Entry], groups: Sequence[dict[str, Any]]) -> list[list[Entry]]:
        """Parameters that are frozen now but were trained, as they lay together in the buckets that were saved."""
        params = list(chain.from_iterable(group["params"] for group in groups))
        wanted = {params[index] for index in self.state.keys() | self.steps.keys() | self.masters.keys()}
        left = {entry.param: entry for entry in entries if entry.handle is None and entry.param in wanted}
        cuts = [[params[index] for index in cut] for cut in self.about.get("buckets", [])] if self.about else []
        return [found for cut in [*cuts, list(left)] if (found := [left.pop(p) for p in cut if p in left])]

    @property
    def mark(self) -> int:
        """What has to be the same on every rank, in short."""
        plain = (int, float, str, tuple, list, type(None))
        told = [sorted((k, v) for k, v in g.items() if k != "params" and isinstance(v, plain)) for g in self.groups]
        return zlib.crc32(repr((sorted((k, n) for k, n in self.steps.items() if n), told)).encode())


@torch.inference_mode(False)  # states that are made here are updated outside of it
def load(
    given: Callable[[], dict[str, Any]],
    groups: Sequence[dict[str, Any]],
    entries: Sequence[Entry],
    trained: Callable[[], Sequence[Bucket]],
    rule: Rule,
    comm: Comm,
    adopt: Callable[[list[Entry]], None],
) -> list[dict[str, Any]]:
    """Replaces optimizer states by a part of this rank or the whole (a collective), which `given` returns or finds bad; returns
    its param groups. Parameters that are frozen now but were trained get theirs. Checks everything on every rank before any
    writes.

    Raises ValueError where groups, shapes, ranks or pieces differ, RuntimeError where another rank's do.
    """
    saved: Saved | None = None
    problem: Exception | None = None
    late: list[list[Entry]] = []
    try:
        state_dict = given()
        with _readable():
            saved = _read(state_dict, groups, rule)
            _check(saved, groups, trained(), comm)
            late = saved.late(entries, groups)
    except Exception as error:  # whatever it is: the other ranks wait to be told
        problem = error
    _agree(comm, problem, saved, late)
    assert saved is not None
    for part in late:
        adopt(part)
    if late:
        try:
            with _readable():
                _check(saved, groups, trained(), comm)
        except Exception as error:
            problem = error
        _agree(comm, problem, saved, late)
    _write(saved, groups, trained())
    return saved.groups


def hooked(optimizer: torch.optim.Optimizer, state_dict: Any) -> dict[str, Any]:
    """A copy, as the hooks that run before loading leave it. Raises TypeError for what is no dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict: expected a dict, as state_dict() gives it, got {type(state_dict).__name__}. Read the file on "
            "every rank."
        )
    state_dict = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    return state_dict


def _agree(comm: Comm, problem: Exception | None, saved: Saved | None, late: list[list[Entry]]) -> None:
    told = None if problem is not None or saved is None else (saved.mark, [[entry.name for entry in part] for part in late])
    together(
        comm,
        "load_state_dict",
        problem,
        told,
        "load its state dict",
        "load_state_dict: expected the same steps and param groups on every rank, got others on rank {rank} than on rank 0. "
        "Load what the same step saved.",
    )


@contextmanager
def _readable() -> Iterator[None]:
    """What is not there, or something else, is told as such."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            "load_state_dict: expected a state dict as state_dict() gives it, got one that is damaged or of something else "
            f"({type(error).__name__}: {error})."
        ) from error


def _read(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], rule: Rule) -> Saved:
    """Raises ValueError where the param groups have other sizes, NotImplementedError where they have unknown options."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "load_state_dict: expected a dict of 'state' and 'param_groups', as state_dict() gives it, got one of "
            f"{list(map(str, state_dict))[:6]}. Of a checkpoint with model and optimizer, pass the optimizer's part."
        )
    theirs: list[dict[str, Any]] = state_dict["param_groups"]
    counts, got = [len(g["params"]) for g in groups], [len(g["params"]) for g in theirs]
    if counts != got:
        raise ValueError(f"load_state_dict: expected param groups of {counts} parameters, got {got}. Build the same groups.")
    for group, saved in zip(groups, theirs, strict=True):
        rule.check({**group, **saved})
    # as torch: whatever names the parameters, their order counts
    places = {name: place for place, name in enumerate(chain.from_iterable(g["params"] for g in theirs))}

    def placed(values: dict[Any, Any]) -> dict[int, Any]:
        for name in values:
            if name not in places:
                raise ValueError(f"load_state_dict: expected states of parameters in its param groups, got one of {name!r}.")
        return {places[name]: value for name, value in values.items()}

    state, masters = placed(state_dict["state"]), placed(state_dict.get("masters", {}))
    about = state_dict.get("zerolite")
    if about is not None and about["format"] > FORMAT:
        raise ValueError(f"load_state_dict: expected format {FORMAT} or older, got {about['format']}. Update zerolite.")
    if about is not None:
        steps = {index: _count(index, count) for index, count in about["steps"].items()}
    else:
        steps = {index: _count(index, values.get("step", 1)) for index, values in state.items()}
    return Saved(state, masters, theirs, about, steps)


def _count(index: int, step: Any) -> int:
    """The number of steps of parameter number `index`."""
    count = float(step) if not isinstance(step, Tensor) or step.numel() == 1 else -1.0
    if not 0.0 <= count < MOST_STEPS:
        raise ValueError(
            f"parameter number {index}: expected a count of steps, a number from 0 on, got {step!r}. The state dict is damaged."
        )
    return int(count)


def _check(saved: Saved, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket], comm: Comm) -> None:
    """Raises ValueError for states that do not fit the buckets that there are."""
    positions = positions_of(groups)
    known = {index: entry for entry, index in indexed(positions, buckets)}
    for index, values in saved.state.items():
        needed = state_of(known[index].bucket).needed if index in known else frozenset()
        if values and not needed <= values.keys():
            raise ValueError(
                f"parameter '{known[index].name}': expected states {sorted(needed)}, got {sorted(values)}. They are of another "
                "optimizer."
            )
        if _counted(known.get(index)) and not values and saved.about is None:
            saved.steps[index] = 0  # this one begins anew
    if saved.about is not None:
        pieces = {positions.get(b.entries[p.slot].param): [p.start, p.stop] for b in buckets for p in b.pieces}
        _check_part(saved, known, pieces, comm)
    for index, key, value in _elements(saved, known):
        name, shape = known[index].name, known[index].param.shape
        if saved.about is not None:
            start, stop = saved.about["pieces"].get(index, (0, 0))
            shape = torch.Size((stop - start,))
        if not isinstance(value, Tensor) or not (value.is_floating_point() or key not in _exact(known[index])):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"parameter '{name}': expected state '{key}' as a tensor of real numbers, got {got}.")
        if value.shape != shape and not (saved.about is not None and value.numel() == shape.numel()):
            raise ValueError(
                f"parameter '{name}': expected state '{key}' of shape {tuple(shape)}, got {tuple(value.shape)}. It is of "
                "another model, damaged, or one rank's part without its 'zerolite' entry."
            )


def _counted(entry: Entry | None) -> bool:
    """Whether its state has a count of steps (and begins with all that it needs)."""
    return entry is not None and "step" in state_of(entry.bucket).needed


def _exact(entry: Entry) -> frozenset[str]:
    """States that are known to have a number for each element."""
    return (state_of(entry.bucket).needed - {"step"}) | {"master"}


def _elements(saved: Saved, known: dict[int, Entry]) -> Iterator[tuple[int, str, Any]]:
    """What has to have a number for each element: index, name and value."""
    for index, values in [*saved.state.items(), *((k, {"master": v}) for k, v in saved.masters.items())]:
        for key, value in values.items() if index in known else ():
            if key in _exact(known[index]) or (isinstance(value, Tensor) and value.dim() > 0):
                yield index, key, value


def _check_part(saved: Saved, known: dict[int, Entry], pieces: dict[int | None, list[int]], comm: Comm) -> None:
    about = saved.about
    assert about is not None
    if (about["ranks"], about["rank"]) != (comm.size, comm.rank):
        raise ValueError(
            f"load_state_dict: expected the part of rank {comm.rank} of {comm.size}, got rank {about['rank']} of "
            f"{about['ranks']}. Save with consolidate_state_dict() to load at another world size."
        )
    begun = {index for index, values in saved.state.items() if values or not _counted(known.get(index))}
    lost = sorted(about["pieces"].keys() - begun - saved.masters.keys())
    if lost:
        raise ValueError(
            f"load_state_dict: expected states of {len(about['pieces'])} parameters, got none of {len(lost)} (first: number "
            f"{lost[0]}). To begin anew, load {{'state': {{}}, 'param_groups': ...}} without 'zerolite'."
        )
    for index, values in saved.state.items():
        count = saved.steps.get(index, 0)
        if _counted(known.get(index)) and count != _count(index, values["step"]):
            raise ValueError(
                f"parameter '{known[index].name}': expected {count} steps, as 'zerolite' counts them, got a state after "
                f"{float(values['step']):g}. Load both as they were saved."
            )
    for index, entry in known.items():
        ours, theirs = pieces.get(index), about["pieces"].get(index)
        if ours != (theirs and list(theirs)) and (theirs is not None or about["steps"].get(index, 0) > 0):
            raise ValueError(
                f"parameter '{entry.name}': this rank holds elements {ours}, the state dict holds {theirs}. It was saved with "
                "another stage or bucket_mb; consolidate_state_dict() allows that."
            )
        order = order_of(entry.bucket, entry.slot)
        if about.get("orders", {}).get(index, order) != order:
            raise ValueError(
                f"parameter '{entry.name}': expected shape and strides {order}, got {about['orders'][index]}. It was saved in "
                "another memory format; consolidate_state_dict() allows that."
            )


def _write(saved: Saved, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> None:
    positions = positions_of(groups)
    stale: list[str] = []
    unused: list[str] = []
    for bucket in buckets:
        bucket.keep_writes(quiet=True)  # the model may have been loaded just now
    for bucket in buckets:
        state = state_of(bucket)
        for number, piece in enumerate(bucket.pieces):
            entry = bucket.entries[piece.slot]
            index = positions.get(entry.param, -1)
            values = saved.state.get(index)
            master = saved.masters.get(index) if values is None else values.get("master")
            if saved.about is None:
                values = {k: _flat_piece(k, v, entry, piece) for k, v in values.items()} if values is not None else None
                master = None if master is None else _flat_piece("master", master, entry, piece)
            if values is not None or entry.steps > 0 or state.counted:  # else what the optimizer made when it was built
                state.write(number, {k: v for k, v in (values or {}).items() if k != "master"})
            if master is not None and not bucket.rest.numel():
                unused.append(entry.name)
            elif master is not None and not _write_master(bucket, piece, master):
                stale.append(entry.name)
        bucket.note_versions()  # values loaded before are known, and their masters are set
        for entry in bucket.entries:
            entry.steps = int(saved.steps.get(positions.get(entry.param, -1), 0))
    if stale:
        warnings.warn(
            f"load_state_dict: {len(stale)} parameter(s), first '{stale[0]}', hold other values than when the optimizer was "
            "saved; they are kept, and their fp32 masters restart from them. Load the model before the optimizer.",
            stacklevel=5,
        )
    if unused:
        warnings.warn(
            f"load_state_dict: {len(unused)} parameter(s), first '{unused[0]}', are fp32 here and were saved with fp32 masters "
            "beside rounded values: what the model was loaded with stays. save_pretrained(..., masters=True) keeps them whole.",
            stacklevel=5,
        )


def _write_master(bucket: Bucket, piece: Piece, master: Tensor) -> bool:
    """False where the saved master does not belong to the parameter's present value."""
    part = range_of(piece)
    param, rest = bucket.mine[part], bucket.rest[part]
    fresh = torch.zeros_like(rest) if rest.dtype == torch.int16 else param.float()
    hi, lo = torch.empty_like(param), torch.empty_like(rest)
    split_(hi, lo, master.to(param.device, torch.float32))
    same = hi.view(bits_dtype(hi.dtype)) == param.view(bits_dtype(hi.dtype))
    rest.copy_(torch.where(same, lo, fresh))
    return bool(same.all())


def _flat_piece(name: str, value: Any, entry: Entry, piece: Piece) -> Any:
    """One piece of a whole state tensor, in the parameter's memory order; other values as they are."""
    if name == "step" or not isinstance(value, Tensor) or value.shape != entry.param.shape:
        return value
    assert entry.bucket is not None
    like = entry.bucket.views[entry.slot]
    ordered = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device="cpu").copy_(value)
    return ordered.as_strided((ordered.numel(),), (1,))[piece.start : piece.stop]
