"""load_pretrained: safetensors files streamed into a model whose parameters are cut over ranks.

Each rank reads the elements that it owns, a few MiB at a time, into its shard and its remainder or master: an fp32 file
keeps all its bits in a bf16 model. Parameters that rest whole are completed by the publish that ends every step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zerolite.bucket import Bucket, Entry
from zerolite.build import BUILT, Built
from zerolite.layout import Piece
from zerolite.safetensors import Stored, digest, open_files
from zerolite.together import together
from zerolite.values import begin, end, put, written_once

CHUNK = 1 << 20  # elements that a rank reads at once
SHOWN = 8  # names in an error
_DOING = "load pretrained values"
_DIFFER = (
    "load_pretrained: expected the same files on every rank, got other names, dtypes or shapes on rank {rank} than on rank 0. "
    "Put the same files on every host."
)


class Loaded(NamedTuple):
    """What strict=False left out, as torch's load_state_dict returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    strict: bool = True,
    rename: Callable[[str], str] | None = None,
) -> Loaded:
    """Loads safetensors files into the model of a ZeroOptimizer, at any stage (a collective: every rank calls it).

    path    a file, several, or a directory: what its model.safetensors.index.json lists, else its model.safetensors, else
            all its *.safetensors
    strict  every parameter and persistent buffer is in the files, and nothing else; tied ones need one of their names
    rename  the files' name for one of the model's names

    Optimizer states stay as they are. Raises on every rank, before anything is written: ValueError for names and shapes that
    do not fit or ranks that see different files, RuntimeError where another rank failed.
    """
    instead = "without one, use model.load_state_dict(safetensors.torch.load_file(path))"
    model, built = built_of(model, "load_pretrained", instead)
    problem: Exception | None = None
    told: Any = None
    wanted = Wanted(model)
    try:
        at_rest(built, "load_pretrained")
        if rename is not None and not callable(rename):
            raise TypeError(f"load_pretrained: expected rename= to be a function of a name, got {rename!r:.80}")
        files = open_files(path)
        result = wanted.match(files, rename or (lambda name: name), strict)
        told = digest(files)
    except Exception as error:  # told to the other ranks, then raised
        problem = error
    together(built.comm, "set-up pretrained names", problem, told, _DOING, _DIFFER)
    if built.schedule is not None:
        built.schedule.give_back()
        built.schedule.release_all()
    buckets = [b for b in built.buckets if any(entry.param in wanted.params for entry in b.entries)]
    with torch.no_grad():
        try:
            for bucket in buckets:
                begin(bucket)
                _fill(bucket, wanted.params)
            covered = {entry.param for bucket in buckets for entry in bucket.entries}
            whole = [(t, s) for t, s in [*wanted.params.items(), *wanted.buffers.items()] if t not in covered]
            for tensor, stored in whole:
                with torch.inference_mode(tensor.is_inference()):
                    once = written_once(tensor)
                    tensor[once].copy_(stored.read(0, stored.numel).view(stored.shape)[once])
        except Exception as error:
            problem = error
        together(built.comm, "set-up pretrained values", problem, None, _DOING, _DIFFER)
        for bucket in buckets:
            end(bucket)
    return result


def built_of(model: nn.Module, caller: str, instead: str) -> tuple[nn.Module, Built]:
    """The model that a ZeroOptimizer was built with, this one or what torch.compile wrapped in it, and what was made of it.
    Raises ValueError where there is none."""
    for known in (model, getattr(model, "_orig_mod", model)):
        reference = BUILT.get(known)
        built = reference() if reference is not None else None
        if built is not None and not built.closed:
            return known, built
    raise ValueError(
        f"{caller}: expected the model that a ZeroOptimizer was built with, got another one. Build "
        f"ZeroOptimizer(optimizer, model) first; {instead}."
    )


def at_rest(built: Built, caller: str) -> None:
    """No update is under way, and nobody holds parameters. Raises RuntimeError inside full_params(), and for parameters that
    were replaced."""
    if built.inside:
        raise RuntimeError(f"{caller}: expected to be called outside of full_params(), got called inside.")
    built.updates.settle()
    built.check_replaced()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by every name that they have."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


class Wanted:
    """The tensors of a model that files can fill, and where each one's values are."""

    def __init__(self, model: nn.Module) -> None:
        self.names = named_tensors(model)
        self.params: dict[Tensor, Stored] = {}
        self.buffers: dict[Tensor, Stored] = {}

    def match(self, files: dict[str, Stored], rename: Callable[[str], str], strict: bool) -> Loaded:
        """Finds each tensor's values. Raises ValueError with the names that do not fit."""
        used, wrong = set(), []
        sources: dict[Tensor, Stored] = {}
        for name, tensor in self.names.items():
            key = rename(name)
            stored = files.get(key)
            if stored is None:
                continue
            used.add(key)
            sources[tensor] = stored
            if stored.shape != tuple(tensor.shape):
                wrong.append(f"'{name}': expected shape {tuple(tensor.shape)}, got {stored.shape}")
            elif stored.dtype is None or _sort(stored.dtype) != _sort(tensor.dtype):
                wrong.append(f"'{name}': expected values for {tensor.dtype}, got {stored.kind}")
        missing = [name for name, tensor in self.names.items() if tensor not in sources]
        unexpected = [name for name in files if name not in used]
        lines = [_list("do not fit", wrong)] if wrong else []
        if strict and missing:
            lines.append(_list("expected, and not in the files", missing))
        if strict and unexpected:
            lines.append(_list("in the files, and not expected", unexpected))
        if lines:
            raise ValueError(
                "load_pretrained: the files do not fit the model. "
                + " ".join(lines)
                + " Pass rename=(the model's name -> the files' name) where names differ, strict=False to load what fits. "
                "What transformers fuses as it reads (experts) is in no file under one name: docs/large.md, Loading."
            )
        self.params = {tensor: s for tensor, s in sources.items() if isinstance(tensor, nn.Parameter)}
        self.buffers = {tensor: s for tensor, s in sources.items() if not isinstance(tensor, nn.Parameter)}
        return Loaded(missing, unexpected)


def _sort(dtype: torch.dtype) -> tuple[bool, bool]:
    """Values of one sort are converted, others do not fit."""
    return dtype.is_floating_point, dtype.is_complex


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}."


def _fill(bucket: Bucket, sources: dict[Tensor, Stored]) -> None:
    """This rank's range of one bucket."""
    for piece in bucket.pieces:
        entry = bucket.entries[piece.slot]
        stored = sources.get(entry.param)
        if stored is None:
            continue
        if bucket.views[piece.slot].is_contiguous():
            for start in range(piece.start, piece.stop, CHUNK):
                put(bucket, piece, stored.read(start, min(start + CHUNK, piece.stop)), start - piece.start)
        else:
            put(bucket, piece, _reordered(bucket, entry, piece, stored))


def _reordered(bucket: Bucket, entry: Entry, piece: Piece, stored: Stored) -> Tensor:
    """One piece of a parameter whose memory is in another order than the file's (channels_last): read whole."""
    like = bucket.views[entry.slot]
    assert stored.dtype is not None
    ordered = torch.empty_strided(like.shape, like.stride(), dtype=stored.dtype, device="cpu")
    ordered.copy_(stored.read(0, stored.numel).view(stored.shape))
    return ordered.as_strided((ordered.numel(),), (1,))[piece.start : piece.stop]
