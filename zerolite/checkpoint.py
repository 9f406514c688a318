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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.comm import Comm
from zerolite.entry import Entry
from zerolite.layout import Piece
from zerolite.update import State

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
    positions = positions_of(groups)
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
            pieces[index], orders[index] = [piece.start, piece.stop], order_of(bucket, piece.slot)
    about = {"format": FORMAT, "rank": comm.rank, "ranks": comm.size, "pieces": pieces, "orders": orders}
    about["steps"] = {index: entry.steps for entry, index in indexed(positions, buckets)}
    about["buckets"] = [[positions[e.param] for e in bucket.entries if e.param in positions] for bucket in buckets]
    return {**_dict_of(state, masters, groups), "zerolite": about}


def whole_state_dict(
    groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket], comm: Comm, keep: bool
) -> dict[str, Any] | None:
    """The whole state on the CPU of the ranks with `keep` (a collective, one bucket at a time)."""
    positions = positions_of(groups)
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


def positions_of(groups: Sequence[dict[str, Any]]) -> dict[Tensor, int]:
    return {p: index for index, p in enumerate(p for group in groups for p in group["params"])}


def indexed(positions: dict[Tensor, int], buckets: Sequence[Bucket]) -> list[tuple[Entry, int]]:
    entries = [entry for bucket in buckets for entry in bucket.entries]
    return [(entry, positions[entry.param]) for entry in entries if entry.param in positions]


def order_of(bucket: Bucket | None, slot: int) -> list[list[int]]:
    """Shape and strides of a parameter: which element is where in its piece."""
    assert bucket is not None
    return [list(bucket.views[slot].shape), list(bucket.views[slot].stride())]


def state_of(bucket: Bucket | None) -> State:
    assert bucket is not None and bucket.state is not None
    return bucket.state


def _begun(entry: Entry, values: dict[str, Any]) -> bool:
    """Whether there is a state to save: after a step, or where the optimizer made one when it was built."""
    return entry.steps > 0 or (not state_of(entry.bucket).counted and not values.keys() <= {"master"})


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def read_piece(bucket: Bucket, number: int, piece: Piece, entry: Entry) -> dict[str, Any]:
    """The state of one piece; elements are views (rounded moments in fp32), the master a new tensor."""
    values = state_of(bucket).read(number)
    if state_of(bucket).counted:
        values = {"step": torch.tensor(float(entry.steps), dtype=torch.float32, device="cpu"), **values}
    if bucket.rest.numel():
        values["master"] = bucket.master(range_of(piece))
    return values


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
                mine[range_of(piece)] = value.reshape(-1)
        full = bucket.collect_whole(mine, f"read {name} of")
        for slot in range(len(bucket.entries)):
            if (slot, name) in holders:
                found[slot][name] = bucket._view(full, slot).contiguous()
    return list(zip(bucket.entries, found, strict=True))


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def range_of(piece: Piece) -> slice:
    return slice(piece.offset, piece.offset + piece.stop - piece.start)
