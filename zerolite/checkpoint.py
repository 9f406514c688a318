"""Optimizer state as a state dict: this rank's part, or the whole in the format of torch.optim.

    part    {"state": {index: {"step", "exp_avg", ..., "master"}}, "param_groups": [...], "zerolite": {...}}
            1D pieces, "zerolite" says which element range of which parameter each is; no communication
    whole   {"state": {index: {...}}, "param_groups": [...]} with tensors of the parameters' shapes;
            loads into torch.optim.AdamW, and from it

"master" is the fp32 master of bf16 and fp16 parameters. Loading checks it against the parameter: where the
parameter holds something else, the parameter is kept and its master restarts from it, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.comm import Comm
from zerolite.dtypes import bits_dtype
from zerolite.entry import Entry
from zerolite.kernels import split_
from zerolite.layout import Piece

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
    pieces: dict[int, list[int]] = {}
    for bucket in buckets:
        for number, piece in enumerate(bucket.pieces):
            entry = bucket.entries[piece.slot]
            index = positions.get(entry.param)
            if index is None:
                continue
            values = read_piece(bucket, number, piece, entry)
            if not _begun(entry, values):
                continue
            state[index] = {name: _copy(value) for name, value in values.items()}
            pieces[index] = [piece.start, piece.stop]
    about = {"format": FORMAT, "rank": comm.rank, "ranks": comm.size, "pieces": pieces, "steps": _steps(positions, buckets)}
    return {"state": state, "param_groups": packed_groups(groups), "zerolite": about}


def whole_state_dict(
    groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket], comm: Comm, keep: bool
) -> dict[str, Any] | None:
    """The whole state on the CPU of the ranks with `keep` (a collective, one bucket at a time)."""
    positions = _positions(groups)
    state: dict[int, dict[str, Any]] = {}
    for bucket in buckets:
        for entry, values in _whole_states(bucket, comm):
            if keep and entry.param in positions and _begun(entry, values):
                state[positions[entry.param]] = {name: _copy(value) for name, value in values.items()}
    if not keep:
        return None
    return {"state": dict(sorted(state.items())), "param_groups": packed_groups(groups)}


def whole_states(buckets: Sequence[Bucket], comm: Comm) -> dict[str, dict[str, Any]]:
    """State by parameter name, whole, on every rank (a collective)."""
    return {
        entry.name: {name: _copy(value) for name, value in values.items()}
        for bucket in buckets
        for entry, values in _whole_states(bucket, comm)
        if _begun(entry, values)
    }


def load_state(saved: dict[str, Any], groups: Sequence[dict[str, Any]], buckets: Sequence[Bucket], comm: Comm) -> None:
    """Replaces optimizer states by `saved`, a part of this rank or the whole; checks everything before it writes.

    Raises ValueError where groups, shapes, ranks or pieces differ.
    """
    positions = _positions(groups)
    names = {index: entry.name for entry, index in _indexed(positions, buckets)}
    check_groups(saved, groups)
    about = saved.get("zerolite")
    if about is not None:
        _check_part(about, names, positions, buckets, comm)
    else:
        _check_whole(saved, names, positions, buckets)
    stale: list[str] = []
    for bucket in buckets:
        bucket.keep_writes(quiet=True)  # the model may have been loaded just now
    for bucket in buckets:
        for number, piece in enumerate(bucket.pieces):
            entry = bucket.entries[piece.slot]
            values = saved["state"].get(positions.get(entry.param))
            if values is None and entry.steps == 0 and not _counted(bucket):
                continue  # what the optimizer made when it was built, as Adagrad does
            if values is None:
                values = {}
            elif about is None:
                values = {k: _flat_piece(k, v, entry, piece) for k, v in values.items()}
            if not _write(bucket, number, piece, values):
                stale.append(entry.name)
        bucket.note_versions()  # values loaded before are known, and their masters are set
    steps = about["steps"] if about is not None else {i: _step_of(values) for i, values in saved["state"].items()}
    for entry, index in _indexed(positions, buckets):
        entry.steps = int(steps.get(index, 0))
    if stale:
        warnings.warn(
            f"load_state_dict: {len(stale)} parameter(s), first '{stale[0]}', hold other values than when the optimizer was "
            "saved; they are kept, and their fp32 masters restart from them. Load the model before the optimizer.",
            stacklevel=3,
        )


def check_groups(saved: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where the saved param groups have other sizes."""
    ours, theirs = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved["param_groups"]]
    if ours != theirs:
        raise ValueError(f"load_state_dict: expected param groups of {ours} parameters, got {theirs}. Build the same groups.")


def _check_part(
    about: dict[str, Any], names: dict[int, str], positions: dict[Tensor, int], buckets: Sequence[Bucket], comm: Comm
) -> None:
    if about["format"] > FORMAT:
        raise ValueError(f"load_state_dict: expected format {FORMAT} or older, got {about['format']}. Update zerolite.")
    if (about["ranks"], about["rank"]) != (comm.size, comm.rank):
        raise ValueError(
            f"load_state_dict: expected the part of rank {comm.rank} of {comm.size}, got rank {about['rank']} of "
            f"{about['ranks']}. Save with consolidate_state_dict() to load at another world size."
        )
    ours = {
        positions[bucket.entries[piece.slot].param]: [piece.start, piece.stop]
        for bucket in buckets
        for piece in bucket.pieces
        if bucket.entries[piece.slot].param in positions
    }
    for index, piece in about["pieces"].items():
        if ours.get(index) != list(piece):
            raise ValueError(
                f"parameter '{names.get(index, index)}': this rank holds elements {ours.get(index)}, the state dict holds "
                f"{list(piece)}. It was saved with another stage or bucket_mb; consolidate_state_dict() allows that."
            )


def _check_whole(saved: dict[str, Any], names: dict[int, str], positions: dict[Tensor, int], buckets: Sequence[Bucket]) -> None:
    shapes = {index: entry.param.shape for entry, index in _indexed(positions, buckets)}
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0 and index in shapes and value.shape != shapes[index]:
                raise ValueError(
                    f"parameter '{names[index]}': expected state '{key}' of shape {tuple(shapes[index])}, got "
                    f"{tuple(value.shape)}. It is of another model, or one rank's part without its 'zerolite' entry."
                )


def _positions(groups: Sequence[dict[str, Any]]) -> dict[Tensor, int]:
    return {p: index for index, p in enumerate(p for group in groups for p in group["params"])}


def _indexed(positions: dict[Tensor, int], buckets: Sequence[Bucket]) -> list[tuple[Entry, int]]:
    entries = [entry for bucket in buckets for entry in bucket.entries]
    return [(entry, positions[entry.param]) for entry in entries if entry.param in positions]


def _steps(positions: dict[Tensor, int], buckets: Sequence[Bucket]) -> dict[int, int]:
    return {index: entry.steps for entry, index in _indexed(positions, buckets)}


def _step_of(values: dict[str, Any]) -> int:
    return int(values.get("step", 1))


def _counted(bucket: Bucket) -> bool:
    assert bucket.state is not None
    return bucket.state.counted


def _begun(entry: Entry, values: dict[str, Any]) -> bool:
    """Whether there is a state to save: after a step, or where the optimizer made one when it was built."""
    return entry.steps > 0 or (entry.bucket is not None and not _counted(entry.bucket) and not values.keys() <= {"master"})


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def read_piece(bucket: Bucket, number: int, piece: Piece, entry: Entry) -> dict[str, Any]:
    """The state of one piece; elements are views (rounded moments in fp32), the master a new tensor."""
    assert bucket.state is not None
    values = bucket.state.read(number)
    if bucket.state.counted:
        values = {"step": torch.tensor(float(entry.steps)), **values}
    if bucket.rest.numel():
        values["master"] = bucket.master(_range(piece))
    return values


def _write(bucket: Bucket, number: int, piece: Piece, values: dict[str, Any]) -> bool:
    """False where the saved master does not belong to the parameter's present value."""
    assert bucket.state is not None
    master = values.get("master")
    bucket.state.write(number, {name: value for name, value in values.items() if name != "master"})
    part = _range(piece)
    if not bucket.rest.numel():
        return True
    param, rest = bucket.mine[part], bucket.rest[part]
    if master is None:
        return True  # a state without masters (of torch.optim): the parameter's low bits stay
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
