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
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        return torch.Size(self.shape).numel()

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order, 1D, in the file's dtype. Raises OSError where the file is short."""
        assert self.dtype is not None
        out = torch.empty(stop - start, dtype=self.dtype)
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
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index}: expected names of files beside it, got {outside[0]!r}.")
        return [path / name for name in names]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: expected {INDEX} or *.safetensors in it, got neither.")
    return files


def _header(path: Path) -> dict[str, Stored]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, HEADER_LIMIT):
            raise ValueError(f"{path}: expected a safetensors file, got a header of {length} bytes in a file of {size}.")
        try:
            entries = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: expected a safetensors file, got a header that is not JSON ({error}).") from None
    found = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        stored = Stored(path, DTYPES.get(entry["dtype"]), entry["dtype"], shape, 8 + length + start)
        wrong = stored.dtype is not None and stop - start != stored.numel * stored.dtype.itemsize
        if wrong or start < 0 or 8 + length + stop > size:
            raise ValueError(
                f"{path}: tensor '{name}' of {entry['dtype']} {shape} has bytes {start} to {stop} in a file of {size}. "
                "It is damaged or incomplete; copy it again."
            )
        found[name] = stored
    return found
