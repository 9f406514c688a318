"""Values for parameters that are cut over ranks already: the first ones of a meta model, those of a file, and rank 0's
for what is whole on every rank.

    begin(bucket)            -> put(bucket, piece, values) ... -> end(bucket)
    adopt outside writes        master into `mine` and `rest`     publish, every rank calls it

A home is written here as in a step: every rank is inside the same call, so nobody is in a forward, and `end` waits for
every owner.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zerolite.bucket import Bucket
from zerolite.comm import Comm
from zerolite.dtypes import dense_strides, rest_dtype
from zerolite.entry import Entry
from zerolite.kernels import split_
from zerolite.layout import Piece
from zerolite.meta import Recipes, groups, is_left, lost_buffer, make_real
from zerolite.partition import device_of


def begin(bucket: Bucket) -> None:
    """Makes `mine` this rank's range itself, with what the script wrote to the parameters before."""
    bucket.wait()
    bucket.keep_writes(quiet=True)
    if bucket.home is not None and bucket.mine is not bucket.shard:
        bucket.mine = bucket.shard.copy_(bucket.mine)


def put(bucket: Bucket, piece: Piece, values: Tensor, at: int = 0) -> None:
    """Writes values (1D, any float dtype) to elements of `piece` from `at` on; low bits go to the remainder or master."""
    part = slice(piece.offset + at, piece.offset + at + values.numel())
    param = bucket.mine[part]
    rest = (
        bucket.rest[part]
        if bucket.rest.numel()
        else torch.empty(values.numel(), dtype=rest_dtype(param.dtype), device=param.device)
    )
    split_(param, rest, values.to(param.device, torch.float32))


def end(bucket: Bucket) -> None:
    """Shows every rank what all have put (a collective)."""
    bucket.publish()
    bucket.finish_publish()
    bucket.wrote(bucket.entries)


class Materialise:
    """Fills what began on the meta device, one group of modules at a time. The same calls on every rank; rank 0's values."""

    def __init__(self, model: nn.Module, asleep: dict[nn.Parameter, torch.dtype], entries: Sequence[Entry], comm: Comm) -> None:
        self.model = model
        self.asleep = asleep  # dtype that the model gave to each parameter
        self.buckets = {entry.param: entry for entry in entries if entry.bucket is not None}
        self.names = {p: name for name, p in model.named_parameters()}
        self.comm = comm
        self.recipes = Recipes(model)
        self.done: set[nn.Parameter] = set()
        self._woken: dict[nn.Module, list[str]] = {}  # buffers that began on the meta device

    def run(self, buckets: Sequence[Bucket], units: set[nn.Module]) -> None:
        """Fills everything (a collective). Raises ValueError for what its recipe left out."""
        for p, dtype in self.asleep.items():
            if p not in self.buckets:  # frozen: whole on every rank, without a bucket
                make_real(p, blank(p, dtype))
        for bucket in buckets:
            begin(bucket)
            bucket._show(bucket.blanks)  # a recipe that reaches outside of its group fails instead of being lost
        wanted = {p for module in self.model.modules() for p in self._own(module)}
        for p in self.asleep:
            if p not in wanted:
                self._put(p, None)
        with torch.no_grad():
            for group in groups(self.model, units):
                self._fill(group)
        for bucket in buckets:
            bucket._show(bucket.views if bucket.whole else bucket.blanks)
            end(bucket)
        for bucket in {entry.bucket: None for entry in self.buckets.values() if entry.bucket is not None}:
            bucket.note_versions()  # recipes wrote beside parameters that have values

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module._parameters.values() if p is not None and p in self.asleep and not is_left(module, p)]

    def _fill(self, group: list[nn.Module]) -> None:
        scratch = {p: self._blank(p) for module in group for p in self._own(module)}
        fresh = [module for module in group if self._wake_buffers(module) or self._own(module)]
        if not fresh:
            return
        real = {p for module in fresh for p in module._parameters.values() if p is not None} - scratch.keys()
        before = {p: p.data for p in [*scratch, *real]}
        for p, values in scratch.items():
            p.data = values
        for p in real:  # what has values keeps them, whatever the recipe writes
            p.data = torch.empty_like(p, memory_format=torch.contiguous_format)
        first: set[nn.Parameter] = set()
        for module in group:
            recipe = self.recipes.of(module)
            bare = not any(True for p in module._parameters.values() if p is not None)  # it may fill its children
            if recipe is not None and (module in fresh or (bare and self.recipes.reaches_down(module, scratch))):
                self._call(module, recipe, first)
        for p, data in before.items():
            p.data = data
        for p, values in scratch.items():
            if p not in self.done:
                self._put(p, values)  # rank 0's: all find the same
                self._check(p, values)
                self.done.add(p)
        for module in fresh:
            self._check_module(module)

    def _blank(self, p: nn.Parameter) -> Tensor:
        """NaN to fill, with the strides that the parameter will have."""
        entry = self.buckets.get(p)
        like = p if entry is None or entry.bucket is None else entry.bucket.views[entry.slot]
        return blank(like, self.asleep[p])

    def _call(self, module: nn.Module, recipe: object, first: set[nn.Parameter]) -> None:
        """Runs one recipe. Tied parameters belong to the first module: a later one draws its numbers beside them."""
        assert callable(recipe)
        own = self._own(module)
        kept = {p: p.data for p in own if p in first}
        for p, values in kept.items():
            p.data = torch.empty_like(values)
        held = dict(module._parameters)
        recipe()
        for name, before in held.items():
            if module._parameters.get(name) is not before:
                raise ValueError(
                    f"module {type(module).__name__}: expected its initialisation to write to '{name}' in place, got another "
                    "parameter. Use torch.nn.init or p.copy_(...) there."
                )
        for p, values in kept.items():
            p.data = values
        first.update(own)

    def _check(self, p: nn.Parameter, values: Tensor) -> None:
        if values.numel() and bool(values.isnan().any()):
            raise ValueError(
                f"parameter '{self.names[p]}': expected its module's initialisation to fill it, got elements that it left out. "
                "Complete reset_parameters(), or build the model under zerolite.meta_init(init=function)."
            )

    def _put(self, p: nn.Parameter, values: Tensor | None) -> None:
        """Rank 0's values, or NaN, into this rank's range."""
        entry = self.buckets.get(p)
        if values is not None:
            flat = values.as_strided((values.numel(),), (1,))
            if flat.numel():
                self.comm.broadcast_(flat, f"set-up parameter {self.names[p]}")
            if entry is None:
                p.data = values
        if entry is None or entry.bucket is None:
            return
        for piece in entry.bucket.pieces:
            if piece.slot == entry.slot:
                count = piece.stop - piece.start
                put(entry.bucket, piece, flat[piece.start : piece.stop] if values is not None else nans(count))

    def _wake_buffers(self, module: nn.Module) -> list[str]:
        """Gives memory to the module's buffers on the meta device, filled with what no recipe leaves behind."""
        asleep = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in asleep:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = woken = torch.empty_like(buffer, device=device_of(()))
            _plain(woken).fill_(_nothing(woken.dtype))
        if asleep:
            self._woken[module] = asleep
        return asleep

    def _check_module(self, module: nn.Module) -> None:
        for name in self._woken.get(module, []):
            buffer = module._buffers[name]
            assert buffer is not None
            nothing = _nothing(buffer.dtype)
            if bool((buffer.isnan() if isinstance(nothing, float) else _plain(buffer) == nothing).any()):
                path = next(path for path, m in self.model.named_modules() if m is module)
                raise ValueError(lost_buffer(f"{path}.{name}".lstrip(".")))


def _nothing(dtype: torch.dtype) -> float | int:
    """What a recipe hardly leaves behind; of bools a byte that is neither."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 2 if dtype == torch.bool else torch.iinfo(dtype).min or torch.iinfo(dtype).max


def _plain(buffer: Tensor) -> Tensor:
    """The same memory, of bools as bytes."""
    return buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer


def nans(count: int) -> Tensor:
    return torch.full((count,), float("nan"), device="cpu")


def blank(p: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN of a parameter's shape and dense strides, where its model would have been built."""
    return torch.empty_strided(p.shape, dense_strides(p), dtype=dtype, device=device_of(())).fill_(float("nan"))


def copy_the_rest(entries: Sequence[Entry], dtype: torch.dtype | None, model: nn.Module | None, comm: Comm) -> None:
    """Rank 0's values of parameters without a bucket (frozen ones) and of buffers; casts those parameters too."""
    covered = {entry.param for entry in entries if entry.bucket is not None}
    named = {p: name for name, p in model.named_parameters()} if model is not None else {}
    named |= {entry.param: entry.name for entry in entries}
    rounded: list[str] = []
    for p, name in named.items():
        if p in covered or not p.numel():
            continue
        _copy_from_rank_0(p.data, f"set-up parameter {name}", comm)
        if dtype is not None and p.dtype == torch.float32:
            rounded += [name] if p.requires_grad else []
            p.data = p.data.to(dtype)
    if rounded:
        warnings.warn(
            f"zerolite: parameter '{rounded[0]}' ({len(rounded)} in all) requires a gradient and is not in this optimizer: it "
            f"was rounded to {dtype}. Another ZeroOptimizer that trains it begins from that value; freeze it if none does.",
            stacklevel=2,
        )
    for name, buffer in model.named_buffers() if model is not None else []:
        if buffer.numel() and buffer.layout is torch.strided:  # sparse ones: one rank alone, see check()
            _copy_from_rank_0(buffer, f"set-up buffer {name}", comm)


def written_once(tensor: Tensor) -> tuple[slice, ...]:
    """The index of what is to be written of a tensor that may repeat memory (expand())."""
    return tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())


def _copy_from_rank_0(tensor: Tensor, what: str, comm: Comm) -> None:
    """Bytes of a dense copy, so that any dtype and any strides travel."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    comm.broadcast_(dense.view(-1).view(torch.uint8), what)
    once = written_once(tensor)
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # a buffer that an evaluation made
        tensor[once].copy_(dense[once])
