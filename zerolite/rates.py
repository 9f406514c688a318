"""How fast this machine moves what a step moves: measured in under two seconds, and cached.

The cache is a JSON file under XDG_CACHE_HOME (default ~/.cache), one for each host, processor, number of cores and version. It
says how busy the machine was: other programs only make a measurement slower, so what was measured among them is measured
again by later runs, a few times, and the best of each rate stays. ZEROLITE_RATES names another file, to be read as it
is: a plan for another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from zerolite.buffer import Room
from zerolite.host import usable_cores
from zerolite.kernels import kernels_in_use, reduce_, set_threads, threads
from zerolite.moments import MOMENTS
from zerolite.version import __version__

log = logging.getLogger("zerolite")
ELEMENTS = 8 << 20  # of a measurement: 112 MiB do not fit in most caches
BUSY = 0.5  # load a core from which a measurement is not trusted
TRIES = 8  # a machine that is always busy is measured so often, and then believed
_SLOW = 1.0  # GB/s, where a connection cannot be measured
_PATIENCE = 10.0  # seconds
_MARKS = {"load": BUSY, "tries": 0}  # of a cache file beside the rates; without them it is measured again
_STEP = (1.0, 0.0, 0.999, 0.1, 0.999, 0.001, 1e-8, 1e-3, 1.0)  # kernels.MOMENT_ROW: an ordinary step of AdamW


@dataclass(frozen=True)
class Rates:
    """Of one host with all its cores. Rates of a GPU are taken as given until they can be measured (`assumed`)."""

    fp32: float  # ns a parameter of an update (bf16 parameters) with moments in fp32,
    bf16: float  # bf16,
    int8: float  # int8
    average: float  # GB/s of gradients that are read and averaged in memory
    link: float  # GB/s between processes, one way (loopback TCP, as gloo's)
    device_memory: float = 2000.0  # GB/s read and written on a GPU
    device_link: float = 50.0  # GB/s between GPUs, one way, of each
    bus: float = 20.0  # GB/s between a GPU and its host, one way

    assumed = ("device_memory", "device_link", "bus")


def rates() -> Rates:
    """This machine's rates: from ZEROLITE_RATES, from the cache, or measured now."""
    given = os.environ.get("ZEROLITE_RATES")
    if given:
        return read(Path(given))
    path, known, tries = cache_path(), None, 0
    with contextlib.suppress(OSError, ValueError):  # an unreadable cache is measured again
        known, marks = _read(path)
        tries = int(marks["tries"])
        if marks["load"] < BUSY or tries >= TRIES:
            return known
    load = _load()
    found = measure()
    if known is not None:
        found = best_of(known, found)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**asdict(found), "load": load, "tries": tries + 1}, indent=1) + "\n")
        part.replace(path)
    except OSError:  # a read-only home: measured each time
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return found


def best_of(one: Rates, other: Rates) -> Rates:
    """The faster of each rate: fewer ns, more GB/s."""
    pairs = zip(asdict(one).items(), asdict(other).values(), strict=True)
    return Rates(**{name: (min if name in MOMENTS else max)(a, b) for (name, a), b in pairs})


def _load() -> float:
    """Programs that want a core, for each core that this process may use, over the last minute."""
    try:
        return os.getloadavg()[0] / usable_cores()
    except OSError:
        return 0.0


def cache_path() -> Path:
    """The cache file of this host, processor and version."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        root = Path(tempfile.gettempdir())
    key = [
        socket.gethostname(),
        platform.machine(),
        _processor(),
        usable_cores(),
        kernels_in_use(),
        torch.__version__,
        __version__,
    ]
    return root / "zerolite" / f"rates-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def read(path: Path) -> Rates:
    """Rates of a file. Raises OSError where it cannot be read, ValueError where it holds something else."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Rates, dict[str, float]]:
    """The same, and the marks of a cache file."""
    try:
        values = json.loads(path.read_text())
    except RecursionError:
        raise ValueError(f"rates in {path}: expected numbers, got lists in lists. Delete the file to measure again.") from None
    except ValueError as error:
        raise ValueError(f"rates in {path}: expected JSON, got {error}. Delete the file to measure again.") from None
    names = {field.name for field in fields(Rates)}
    needed = names - set(Rates.assumed)
    if not isinstance(values, dict) or not needed <= set(values) <= names | set(_MARKS):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"rates in {path}: expected numbers for {sorted(names)}, got {got}. Delete the file to measure again.")
    marks = {name: values.pop(name, default) for name, default in _MARKS.items()}
    if not all(type(value) in (int, float) and 0 < value < math.inf for value in values.values()):
        raise ValueError(f"rates in {path}: expected numbers above 0, got {values}. Delete the file to measure again.")
    if not all(type(value) in (int, float) and 0 <= value < math.inf for value in marks.values()):
        raise ValueError(f"rates in {path}: expected numbers of at least 0, got {marks}. Delete the file to measure again.")
    return Rates(**values), marks


def measure() -> Rates:
    """Measures what can be measured here: on the CPU, whatever torch's default device is."""
    with torch.device("cpu"):
        return _measure()


def _measure() -> Rates:
    sources = [torch.ones(ELEMENTS, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
    out = torch.zeros_like(sources[0])
    before = threads()
    set_threads(usable_cores())  # torchrun sets one thread for each rank; the rates are the host's
    try:
        updates = {name: _update(name) for name in MOMENTS}
        average = 2 * out.nbytes / _best(lambda: reduce_(out, sources, 0.5, False))
    finally:
        set_threads(before)
    return Rates(**updates, average=average, link=_link())


def _best(call: Callable[[], object], rounds: int = 4) -> float:
    """Nanoseconds of the fastest of a few calls, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return float(min(times))


def _update(name: str) -> float:
    """ns a parameter of one fused update: bf16 gradient, parameter and remainder."""
    numel = ELEMENTS if kernels_in_use() != "reference" else ELEMENTS // 16
    moments = MOMENTS[name](numel, Room(torch.device("cpu")))
    param, rest = torch.ones(numel, dtype=torch.bfloat16, device="cpu"), torch.zeros(numel, dtype=torch.int16, device="cpu")
    grad = torch.full((numel,), 1e-3, dtype=torch.bfloat16, device="cpu")
    spans = torch.tensor([[0, numel, 0]], device="cpu")
    return _best(lambda: moments.update(param, rest, [grad], spans, [_STEP], 1.0)) / numel


def _link(size: int = 16 << 20) -> float:
    """GB/s of a TCP connection to this machine itself, or what is assumed of one where there can be none."""
    try:
        return _loopback(size)
    except OSError as problem:
        log.warning("zerolite: no connection of this machine to itself can be measured (%s); taken as %g GB/s", problem, _SLOW)
        return _SLOW


def _loopback(size: int) -> float:
    block = bytes(1 << 20)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=_PATIENCE) as out,
    ):
        server.settimeout(_PATIENCE)
        connection = server.accept()[0]
        connection.settimeout(_PATIENCE)

        def send() -> None:
            with contextlib.suppress(OSError):  # whoever receives is told by the end
                for _ in range(size // len(block)):
                    out.sendall(block)
                out.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        came, room = 0, bytearray(1 << 20)
        with connection:
            start = time.perf_counter_ns()
            while got := connection.recv_into(room):
                came += got
        thread.join()
    return came / (time.perf_counter_ns() - start)
