"""What one rank finds out, and all have to act on."""

from __future__ import annotations

from typing import Any

from zerolite.comm import Comm
from zerolite.comm.ledger import RankError


def together(comm: Comm, what: str, problem: Exception | None, told: Any, doing: str, differ: str) -> None:
    """Every rank succeeded and was told the same, or every rank raises (a collective).

    problem  why this rank failed; None: it did not
    told     small picklable data that has to be the same on every rank
    doing    what a failed rank "could not" do
    differ   the message for a {rank} that was told something else than rank 0
    """
    mine = (f"{type(problem).__name__}: {problem}", None) if problem is not None else ("", told)
    shared = comm.share(mine, what)
    if problem is not None:
        raise problem
    for rank, (failed, _) in enumerate(shared):
        if failed:
            raise RankError(f"rank {rank} could not {doing}: {failed}")
    for rank, (_, theirs) in enumerate(shared):
        if theirs != shared[0][1]:
            raise ValueError(differ.format(rank=rank))
