"""Reads element ranges of tensors out of safetensors files, and makes the header of one.

    file     | u64 length n | JSON of n bytes: {name: {dtype, shape, data_offsets}} | data |
    index    model.safetensors.index.json: {"weight_map": {name: file}}; a directory without it has model.safetensors, or files
             of any name

A reader of our own: the safetensors package maps whole files into the process, which counts as its memory under a limit,
and its slices are whole rows. Here a rank reads the elements that it owns and nothing else.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes, as the format's own reader has it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    path: Path
    dtype: torch.dtype | None  # None: a dtype that is not read here
    kind: str  # the dtype as the file spells it
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)  # which cannot overflow

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order, 1D, in the file's dtype. Raises OSError where the file is short."""
        assert self.dtype is not None
        out = torch.empty(stop - start, dtype=self.dtype, device="cpu")
        width = self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * width)
            into: Any = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
            while len(into):
                count = file.readinto(into)
                if not count:
                    raise OSError(f"{self.path}: expected {len(into)} more bytes, got the end of the file. Copy it again.")
                into = into[count:]
        return out


def open_files(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, Stored]:
    """Tensors by name of a file, of several, or of a directory (with an index or without); reads headers only.

    Raises FileNotFoundError, and ValueError for what is not a safetensors file or names a tensor twice.
    """
    found: dict[str, Stored] = {}
    for file in _files(path):
        for name, stored in _header(file).items():
            if name in found:
                raise ValueError(f"{file}: tensor '{name}' is in {found[name].path.name} too. Pass the files of one model.")
            found[name] = stored
    return found


def header(tensors: Iterable[tuple[str, torch.dtype, torch.Size]]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file that holds these tensors, and where each one's values go, row-major.

    Wide elements come first: readers view memory of the file in the tensor's dtype, which needs aligned offsets.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        if dtype not in kinds:
            raise OSError(f"tensor '{name}': expected a dtype that the format has, got {dtype}")
        end = at + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {
        name: begin + entry["data_offsets"][0] for name, entry in entries.items() if "data_offsets" in entry
    }


def digest(found: dict[str, Stored]) -> int:
    """What ranks compare: names, dtypes and shapes."""
    return zlib.crc32(repr(sorted((name, s.kind, s.shape) for name, s in found.items())).encode())


def _files(path: Any) -> Sequence[Path]:
    if not isinstance(path, (str, os.PathLike)):
        return [file for part in path for file in _files(part)]
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a safetensors file, or a folder of them, got a path where nothing is.")
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if index.exists():
        return [path / name for name in _named(index)]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: expected {INDEX} or *.safetensors in it, got neither.")
    return files


def _named(index: Path) -> list[str]:
    """The files of an index."""
    told = _parsed(index, index.read_bytes(), "an index")
    names = told.get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index}: expected a 'weight_map' from names of tensors to files, got {names!r:.80}.")
    for name in names.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ValueError(f"{index}: expected names of files beside it, got {name!r:.80}.")
    return sorted(set(names.values()))


def _parsed(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without a name that comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what} of safetensors, got no JSON that can be read ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {what} of safetensors, a JSON object, got {type(value).__name__}.")
    return value


def _header(path: Path) -> dict[str, Stored]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, HEADER_LIMIT):
            kind = "what torch.save writes: save its tensors with safetensors.torch.save_file(tensors, path)"
            what = kind if head[:2] == b"PK" else f"a header of {length} bytes in a file of {size}"
            raise ValueError(f"{path}: expected a safetensors file, got {what}.")
        entries = _parsed(path, file.read(length), "a header")
    entries.pop("__metadata__", None)
    found, ranges = {}, []
    for name, entry in entries.items():
        kind, shape, start, stop = _entry(path, name, entry)
        stored = Stored(path, DTYPES.get(kind), kind, shape, 8 + length + start)
        if (stored.dtype is not None and stop - start != stored.numel * stored.dtype.itemsize) or 8 + length + stop > size:
            raise ValueError(
                f"{path}: tensor '{name}' of {kind} {shape} has bytes {start} to {stop} in a file of {size}. "
                "It is damaged or incomplete; copy it again."
            )
        found[name] = stored
        ranges.append((start, stop, name))
    at = 0
    for start, stop, name in sorted(ranges):
        if start != at:
            raise ValueError(
                f"{path}: expected the values of '{name}' from byte {at} on, got {start}: no gap, and nothing twice."
            )
        at = stop
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, and the range of bytes of one tensor in a header that may be anything."""
    if isinstance(entry, dict):
        kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(kind, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]:
            return kind, tuple(shape), offsets[0], offsets[1]
    raise ValueError(
        f"{path}: tensor '{name}': expected a dtype, a shape and data_offsets (from, to) as whole numbers, got {entry!r:.120}."
    )


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
