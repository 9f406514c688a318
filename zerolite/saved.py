"""save_pretrained: a model whose parameters are cut over ranks, streamed into safetensors files, one bucket at a time.

    each bucket   keep_writes -> collect_whole (every rank) -> rank 0 appends its parameters to the files

Files are written beside and renamed when all are complete, so a run that is killed leaves what was there before or all that
is new, at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zerolite.build import Built
from zerolite.comm.ledger import RankError
from zerolite.pretrained import at_rest, built_of, named_tensors
from zerolite.safetensors import INDEX, SINGLE, header
from zerolite.together import together

_DIFFER = "save_pretrained: expected the same `masters` on every rank, got another on rank {rank} than on rank 0."


class Item(NamedTuple):
    """One tensor to write."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, masters: bool = False, file_bytes: int = 5_000_000_000
) -> None:
    """Writes the model of a ZeroOptimizer as safetensors files, at any stage (a collective: every rank calls it).

    folder      gets model.safetensors, or several files and model.safetensors.index.json, from rank 0. What an earlier call
                wrote is replaced once everything is complete; other files stay
    masters     trained parameters as their exact fp32 masters; False: in compute dtype
    file_bytes  most bytes of values in a file; a tensor is never cut

    No rank holds more than one bucket (25 MiB, or one larger parameter) beyond its share. `load_pretrained`, transformers and
    the safetensors package read it; of tied parameters the first name is written. Raises on every rank: ValueError for a
    model without a ZeroOptimizer, RuntimeError inside full_params() or where rank 0 could not write.
    """
    instead = "without one, use safetensors.torch.save_file(model.state_dict(), path)"
    model, built = built_of(model, "save_pretrained", instead)
    problem: Exception | None = None
    try:
        if not isinstance(file_bytes, Integral) or file_bytes < 1:
            raise ValueError(f"file_bytes: expected a whole number, at least 1, got {file_bytes!r}")
        at_rest(built, "save_pretrained")
        for bucket in built.buckets:
            bucket.keep_writes(quiet=True)  # which raises where a released parameter was written to
    except Exception as error:
        problem = error
    together(built.comm, "set-up save_pretrained", problem, masters, "begin save_pretrained", _DIFFER)
    names = {tensor: name for name, tensor in reversed(named_tensors(model).items())}  # of tied ones the first
    files: Files | None = None
    if built.comm.rank == 0:
        try:
            files = Files(Path(folder), [item for item, _ in _tensors(built, names, masters, False)], file_bytes)
        except Exception as error:  # whatever it is: the other ranks wait to be told
            problem = error
    problem = _stream(files, _tensors(built, names, masters, True)) or problem
    if files is not None and problem is None:
        try:
            files.close()
        except Exception as error:
            problem = error
    if files is not None and problem is not None:
        files.give_up()
    told = f"{type(problem).__name__}: {problem}" if problem else ""
    told, placed = built.comm.share((told, files is not None and files.placed), "set-up save_pretrained")[0]
    if told:
        left = "the new files are in place, earlier ones could not be removed" if placed else "what was there before is"
        kind = RuntimeError if problem is not None else RankError
        raise kind(f"save_pretrained: rank 0 could not write to {folder} ({told}); {left}.") from problem


def _stream(files: Files | None, tensors: Iterator[tuple[Item, Tensor | None]]) -> Exception | None:
    """Writes them all, and gives back what went wrong: every rank goes through, whatever happens to rank 0's disk."""
    problem: Exception | None = None
    try:
        with torch.no_grad():
            for _, values in tensors:
                if files is not None and problem is None:
                    try:
                        assert values is not None
                        files.append(values)
                    except Exception as error:
                        problem = error
    except BaseException:  # another rank is lost
        if files is not None:
            files.give_up()
        raise
    return problem


def _tensors(built: Built, names: dict[Tensor, str], masters: bool, read: bool) -> Iterator[tuple[Item, Tensor | None]]:
    """Every tensor to write, bucket by bucket; with its values on the CPU (a collective) if they are to be read."""
    covered: set[Tensor] = set()
    for bucket in built.buckets:
        exact = masters and bucket.trained
        full = None
        if read:
            bucket.keep_writes(quiet=True)
            full = bucket.collect_whole(bucket.master(slice(None)) if exact else bucket.mine, "read values of")
        for slot, entry in enumerate(bucket.entries):
            covered.add(entry.param)
            if entry.param in names:
                item = Item(names[entry.param], torch.float32 if exact else bucket.full.dtype, entry.param.shape)
                yield item, None if full is None else bucket._view(full, slot)
    for tensor, name in names.items():
        if tensor not in covered:
            yield Item(name, tensor.dtype, tensor.shape), tensor.detach() if read else None


class Files:
    """The files under way: headers first, then values in the same order."""

    def __init__(self, folder: Path, items: list[Item], most: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lock = _lock(folder)
        self.parts: list[list[Item]] = [[]]
        size = 0
        for item in items:
            if self.parts[-1] and size + item.nbytes > most:
                self.parts.append([])
                size = 0
            self.parts[-1].append(item)
            size += item.nbytes
        self.names = [SINGLE]
        try:
            self._name()
        except BaseException:
            self.unlock()
            raise
        self.todo = ((k, item) for k, part in enumerate(self.parts) for item in part)
        self.open: Any = None
        self.at = -1
        self.placed = False  # all new files
        self.places: dict[str, int] = {}  # in the file under way

    def _name(self) -> None:
        """Several files have names that are free: an earlier save is valid until the index is replaced."""
        number = 0
        while len(self.parts) > 1 and (number == 0 or any((self.folder / name).exists() for name in self.names)):
            stem = f"model_{number}" if number else "model"
            self.names = [f"{stem}-{k:05}-of-{len(self.parts):05}.safetensors" for k in range(1, len(self.parts) + 1)]
            number += 1

    def _new(self, name: str) -> Path:
        return self.folder / f"{name}.new"

    def append(self, values: Tensor) -> None:
        """The next tensor."""
        number, item = next(self.todo)
        if number != self.at:
            self._finish()
            self.at = number
            self.open = open(self._new(self.names[number]), "wb")  # noqa: SIM115
            head, self.places = header(self.parts[number])
            self.open.write(head)
        self.open.seek(self.places[item.name])
        flat = values.to("cpu", item.dtype).resolve_conj().resolve_neg().contiguous().view(-1)
        if flat.numel():
            self.open.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _finish(self) -> None:
        if self.open is not None:
            self.open.flush()
            os.fsync(self.open.fileno())
            self.open.close()
            self.open = None

    def close(self) -> None:
        """Puts the files in place. Readers take the index or, where there is none, the single file, so that what they find is
        the earlier save until the last name here has been replaced, and this one from then on."""
        self._finish()
        index = self.folder / INDEX
        old = _listed(index).difference(self.names)
        if len(self.names) > 1:
            where = {item.name: name for name, part in zip(self.names, self.parts, strict=True) for item in part}
            total = sum(item.nbytes for part in self.parts for item in part)
            self._new(INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n")
        for name in self.names:
            self._new(name).replace(self.folder / name)
        if len(self.names) > 1:
            self._new(INDEX).replace(index)
        else:
            index.unlink(missing_ok=True)
        self.placed = True
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
        self.unlock()

    def unlock(self) -> None:
        """Others may save here."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def give_up(self) -> None:
        """Takes away what was begun; what was there before stays."""
        if self.placed:
            self.unlock()
            return
        with contextlib.suppress(OSError):
            if self.open is not None:
                self.open.close()
        for name in [*self.names, INDEX]:
            with contextlib.suppress(OSError):
                self._new(name).unlink(missing_ok=True)
                if name not in (SINGLE, INDEX):
                    (self.folder / name).unlink(missing_ok=True)
        self.unlock()


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder for one save, also over processes and until a killed one is gone; -1 where its file
    system has no such locks. Raises RuntimeError where another save is under way."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RuntimeError(f"another save to {folder} is under way; wait for it, or save to another folder") from None
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _listed(index: Path) -> set[str]:
    """Files of an earlier save beside its index."""
    names = [SINGLE]
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):  # none, or not one of ours
        names += json.loads(index.read_text())["weight_map"].values()
    return {name for name in names if isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")}
