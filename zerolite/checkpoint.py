"""Optimizer state as a state dict: this rank's part, or the whole in the format of torch.optim.

    part    {"state": {index: {"step", "exp_avg", ..., "master"}}, "param_groups": [...], "zerolite": {...}}
            1D pieces, "zerolite" says which element range of which parameter each is; no communication
    whole   {"state": {index: {...}}, "param_groups": [...]} with tensors of the parameters' shapes;
            loads into torch.optim.AdamW, and from it

"master" is the fp32 master of bf16 and fp16 parameters; those of parameters without a state yet are in "masters" beside
"state". Loading checks a master against the parameter: where the parameter holds something else, the parameter is kept and
its master restarts from it, with one warning.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.comm import Comm
from zerolite.dtypes import bits_dtype
from zerolite.entry import Entry
from zerolite.kernels import split_
from zerolite.layout import Piece
from zerolite.together import together
from zerolite.update import Rule, State

FORMAT = 1


def packed_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Param groups with positions instead of parameters, as torch.optim.Optimizer.state_dict gives them."""
    packed, start = [], 0
    for group in groups:
        count = len(group["params"])
        packed.append({**{k: v for k, v in group.items() if k != "params"}, "params": list(range(start, start + count))})
        start += count
    return packed


def part_state_dict(groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket], comm: Comm) -> dict[str, Any]:
    """This rank's part; tensors are copies."""
    positions = _positions(groups)
    for bucket in buckets:
        bucket.keep_writes()
    state: dict[int, dict[str, Any]] = {}
    masters: dict[int, Tensor] = {}
    pieces: dict[int, list[int]] = {}
    orders: dict[int, list[list[int]]] = {}
    for bucket in buckets:
        for number, piece in enumerate(bucket.pieces):
            entry = bucket.entries[piece.slot]
            index = positions.get(entry.param)
            if index is None or not _put(state, masters, index, entry, read_piece(bucket, number, piece, entry)):
                continue
            pieces[index], orders[index] = [piece.start, piece.stop], _order(bucket, piece.slot)
    about = {"format": FORMAT, "rank": comm.rank, "ranks": comm.size, "pieces": pieces, "orders": orders}
    about["steps"] = {index: entry.steps for entry, index in _indexed(positions, buckets)}
    about["buckets"] = [[positions[e.param] for e in bucket.entries if e.param in positions] for bucket in buckets]
    return {**_dict_of(state, masters, groups), "zerolite": about}


def whole_state_dict(
    groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket], comm: Comm, keep: bool
) -> dict[str, Any] | None:
    """The whole state on the CPU of the ranks with `keep` (a collective, one bucket at a time)."""
    positions = _positions(groups)
    state: dict[int, dict[str, Any]] = {}
    masters: dict[int, Tensor] = {}
    for bucket in buckets:
        for entry, values in _whole_states(bucket, comm):
            if keep and entry.param in positions:
                _put(state, masters, positions[entry.param], entry, values)
    return _dict_of(dict(sorted(state.items())), masters, groups) if keep else None


def _put(
    state: dict[int, dict[str, Any]], masters: dict[int, Tensor], index: int, entry: Entry, values: dict[str, Any]
) -> bool:
    """Copies of a parameter's state, or of its master where it has none yet; whether there was anything."""
    if _begun(entry, values):
        state[index] = {name: _copy(value) for name, value in values.items()}
    elif "master" in values:
        masters[index] = _copy(values["master"])
    else:
        return False
    return True


def _dict_of(state: dict[int, dict[str, Any]], masters: dict[int, Tensor], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    more = {"masters": masters} if masters else {}
    return {"state": state, "param_groups": packed_groups(groups), **more}


def whole_states(buckets: Sequence[Bucket], comm: Comm) -> dict[str, dict[str, Any]]:
    """State by parameter name, whole, on every rank (a collective)."""
    return {
        entry.name: {name: _copy(value) for name, value in values.items()}
        for bucket in buckets
        for entry, values in _whole_states(bucket, comm)
        if _begun(entry, values)
    }


# ---- loading


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


def load(
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    entries: Sequence[Entry],
    trained: Callable[[], Sequence[Bucket]],
    rule: Rule,
    comm: Comm,
    adopt: Callable[[list[Entry]], None],
) -> None:
    """Replaces optimizer states by a part of this rank or the whole (a collective). Parameters that are frozen now but were
    trained get theirs. Checks everything on every rank before any writes.

    Raises ValueError where groups, shapes, ranks or pieces differ, RuntimeError where another rank's do.
    """
    saved: Saved | None = None
    problem: Exception | None = None
    try:
        saved = _read(state_dict, groups, rule)
        _check(saved, groups, trained(), comm)
    except Exception as error:
        problem = error
    _agree(comm, problem, saved)
    assert saved is not None
    late = saved.late(entries, groups)
    for part in late:
        adopt(part)
    if late:
        try:
            _check(saved, groups, trained(), comm)
        except ValueError as error:
            problem = error
        _agree(comm, problem, saved)
    _write(saved, groups, trained())


def _agree(comm: Comm, problem: Exception | None, saved: Saved | None) -> None:
    together(
        comm,
        "load_state_dict",
        problem,
        saved.mark if problem is None and saved is not None else None,
        "load its state dict",
        "load_state_dict: expected the same steps and param groups on every rank, got others on rank {rank} than on rank 0. "
        "Load what the same step saved.",
    )


def _read(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], rule: Rule) -> Saved:
    """Raises ValueError where the param groups have other sizes, NotImplementedError where they have unknown options."""
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
    steps = about["steps"] if about is not None else {index: int(values.get("step", 1)) for index, values in state.items()}
    return Saved(state, masters, theirs, about, steps)


def _check(saved: Saved, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket], comm: Comm) -> None:
    """Raises ValueError for states that do not fit the buckets that there are."""
    positions = _positions(groups)
    known = {index: entry for entry, index in _indexed(positions, buckets)}
    for index, values in saved.state.items():
        needed = _state(known[index].bucket).needed if index in known else frozenset()
        if values and not needed <= values.keys():
            raise ValueError(
                f"parameter '{known[index].name}': expected states {sorted(needed)}, got {sorted(values)}. They are of another "
                "optimizer."
            )
    if saved.about is not None:
        lost = sorted(saved.about["pieces"].keys() - saved.state.keys() - saved.masters.keys())
        if lost:
            raise ValueError(
                f"load_state_dict: expected states of {len(saved.about['pieces'])} parameters, got none of {len(lost)} (first: "
                f"number {lost[0]}). To begin anew, load {{'state': {{}}, 'param_groups': ...}} without 'zerolite'."
            )
        pieces = {positions.get(b.entries[p.slot].param): [p.start, p.stop] for b in buckets for p in b.pieces}
        _check_part(saved.about, known, pieces, comm)
        return
    for index, values in [*saved.state.items(), *((k, {"master": v}) for k, v in saved.masters.items())]:
        for key, value in values.items():
            shape = known[index].param.shape if index in known else None
            if isinstance(value, Tensor) and value.dim() > 0 and shape is not None and value.shape != shape:
                raise ValueError(
                    f"parameter '{known[index].name}': expected state '{key}' of shape {tuple(shape)}, got "
                    f"{tuple(value.shape)}. It is of another model, or one rank's part without its 'zerolite' entry."
                )


def _check_part(about: dict[str, Any], known: dict[int, Entry], pieces: dict[int | None, list[int]], comm: Comm) -> None:
    if (about["ranks"], about["rank"]) != (comm.size, comm.rank):
        raise ValueError(
            f"load_state_dict: expected the part of rank {comm.rank} of {comm.size}, got rank {about['rank']} of "
            f"{about['ranks']}. Save with consolidate_state_dict() to load at another world size."
        )
    for index, entry in known.items():
        ours, saved = pieces.get(index), about["pieces"].get(index)
        if ours != (saved and list(saved)) and (saved is not None or about["steps"].get(index, 0) > 0):
            raise ValueError(
                f"parameter '{entry.name}': this rank holds elements {ours}, the state dict holds {saved}. It was saved with "
                "another stage or bucket_mb; consolidate_state_dict() allows that."
            )
        order = _order(entry.bucket, entry.slot)
        if about.get("orders", {}).get(index, order) != order:
            raise ValueError(
                f"parameter '{entry.name}': expected shape and strides {order}, got {about['orders'][index]}. It was saved in "
                "another memory format; consolidate_state_dict() allows that."
            )


def _write(saved: Saved, groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> None:
    positions = _positions(groups)
    stale: list[str] = []
    unused: list[str] = []
    for bucket in buckets:
        bucket.keep_writes(quiet=True)  # the model may have been loaded just now
    for bucket in buckets:
        state = _state(bucket)
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


def _positions(groups: Sequence[dict[str, Any]]) -> dict[Tensor, int]:
    return {p: index for index, p in enumerate(p for group in groups for p in group["params"])}


def _indexed(positions: dict[Tensor, int], buckets: Sequence[Bucket]) -> list[tuple[Entry, int]]:
    entries = [entry for bucket in buckets for entry in bucket.entries]
    return [(entry, positions[entry.param]) for entry in entries if entry.param in positions]


def _order(bucket: Bucket | None, slot: int) -> list[list[int]]:
    """Shape and strides of a parameter: which element is where in its piece."""
    assert bucket is not None
    return [list(bucket.views[slot].shape), list(bucket.views[slot].stride())]


def _state(bucket: Bucket | None) -> State:
    assert bucket is not None and bucket.state is not None
    return bucket.state


def _begun(entry: Entry, values: dict[str, Any]) -> bool:
    """Whether there is a state to save: after a step, or where the optimizer made one when it was built."""
    return entry.steps > 0 or (not _state(entry.bucket).counted and not values.keys() <= {"master"})


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def read_piece(bucket: Bucket, number: int, piece: Piece, entry: Entry) -> dict[str, Any]:
    """The state of one piece; elements are views (rounded moments in fp32), the master a new tensor."""
    values = _state(bucket).read(number)
    if _state(bucket).counted:
        values = {"step": torch.tensor(float(entry.steps), dtype=torch.float32), **values}
    if bucket.rest.numel():
        values["master"] = bucket.master(_range(piece))
    return values


def _write_master(bucket: Bucket, piece: Piece, master: Tensor) -> bool:
    """False where the saved master does not belong to the parameter's present value."""
    part = _range(piece)
    param, rest = bucket.mine[part], bucket.rest[part]
    fresh = torch.zeros_like(rest) if rest.dtype == torch.int16 else param.float()
    hi, lo = torch.empty_like(param), torch.empty_like(rest)
    split_(hi, lo, master.to(param.device, torch.float32))
    same = hi.view(bits_dtype(hi.dtype)) == param.view(bits_dtype(hi.dtype))
    rest.copy_(torch.where(same, lo, fresh))
    return bool(same.all())


def _whole_states(bucket: Bucket, comm: Comm) -> list[tuple[Entry, dict[str, Any]]]:
    assert bucket.state is not None
    bucket.keep_writes()
    local = {
        (piece.slot, name): (piece, value)
        for number, piece in enumerate(bucket.pieces)
        for name, value in read_piece(bucket, number, piece, bucket.entries[piece.slot]).items()
    }
    plain = {key: value for key, (_, value) in local.items() if not _is_elementwise(value)}
    tensors = {key: str(value.dtype).split(".")[1] for key, (_, value) in local.items() if _is_elementwise(value)}
    found: list[dict[str, Any]] = [{} for _ in bucket.entries]
    kinds: dict[str, str] = {}
    holders: set[tuple[int, str]] = set()
    for theirs, elementwise in comm.share((plain, tensors), f"read states of {bucket.name}"):
        for (slot, name), value in theirs.items():
            found[slot][name] = value
        for (slot, name), dtype in elementwise.items():
            kinds[name] = dtype
            holders.add((slot, name))
    for name, dtype in sorted(kinds.items()):
        mine = torch.zeros(bucket.mine.numel(), dtype=getattr(torch, dtype), device=bucket.mine.device)
        for (_, key), (piece, value) in local.items():
            if key == name and _is_elementwise(value):
                mine[_range(piece)] = value.reshape(-1)
        full = bucket.collect_whole(mine, f"read {name} of")
        for slot in range(len(bucket.entries)):
            if (slot, name) in holders:
                found[slot][name] = bucket._view(full, slot).contiguous()
    return list(zip(bucket.entries, found, strict=True))


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _range(piece: Piece) -> slice:
    return slice(piece.offset, piece.offset + piece.stop - piece.start)


def _flat_piece(name: str, value: Any, entry: Entry, piece: Piece) -> Any:
    """One piece of a whole state tensor, in the parameter's memory order; other values as they are."""
    if name == "step" or not isinstance(value, Tensor) or value.shape != entry.param.shape:
        return value
    assert entry.bucket is not None
    like = entry.bucket.views[entry.slot]
    ordered = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype).copy_(value)
    return ordered.as_strided((ordered.numel(),), (1,))[piece.start : piece.stop]
