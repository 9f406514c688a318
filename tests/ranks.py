"""Runs a function on several ranks: as threads of this process, or as processes with gloo."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from zerolite.comm.threads import Meeting

GROUP = {"ZEROLITE_SHARED": "0"}  # messages over gloo, as between hosts
_context = multiprocessing.get_context("forkserver")
# What each rank would import anew: 0.3 s, and 3 s for what the first optimizer imports.
_context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "zerolite", "pytest"])


def on_threads(size: int, body: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """[body(comm, *args) for each rank]; the first exception of a rank is raised here."""
    meeting = Meeting(size, timeout)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int, comm: Any) -> None:
        try:
            results[rank] = body(comm, *args)
        except BaseException as error:
            failures.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(meeting.comms())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a rank hangs"
    if failures:
        raise failures[0]
    return results


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _process(rank: int, size: int, port: int, timeout: float, env: dict, body: Callable, args: tuple, pipe: Any) -> None:
    os.environ.update(env, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))
        outcome = ("ok", body(rank, *args))
        dist.destroy_process_group()
    except BaseException as error:
        outcome = ("error", (type(error).__name__, str(error), traceback.format_exc()))
    buffer = io.BytesIO()
    torch.save(outcome, buffer)  # by value: a pipe would share file descriptors of tensors
    pipe.send_bytes(buffer.getvalue())
    pipe.close()


def outcomes(size: int, body: Callable[..., Any], *args: Any, timeout: float = 30.0, env: dict | None = None) -> list[Any]:
    """("ok", result) or ("error", (type, message, trace)) or ("died", exit code) of body(rank, *args) on each rank."""
    port = free_port()
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _context.Process(target=_process, args=(rank, size, port, timeout, env or {}, body, args, pipes[rank][1]), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    found = []
    for process, (receiver, _) in zip(processes, pipes, strict=True):
        try:
            assert receiver.poll(timeout + 45), "a rank neither returned nor failed within its timeout"
            found.append(torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False))
        except EOFError:
            process.join(10)
            found.append(("died", process.exitcode))
    for process in processes:
        process.join(20)
        if process.is_alive():
            process.kill()
            process.join()
    return found


def on_processes(size: int, body: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """[body(rank, *args) for each rank] over gloo; a rank's failure fails the test with its trace."""
    found = outcomes(size, body, *args, **options)
    for kind, value in found:
        assert kind == "ok", value[2] if kind == "error" else value
    return [value for _, value in found]
