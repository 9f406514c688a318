"""Real processes whose ranks do not all do the same with their gradients: thrown away, unused on some, cleared on one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import Block, Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import GROUP, on_processes, on_threads, outcomes
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerolite

everywhere = pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])


class Expert(Block):
    """A block with a part that a rank may leave out."""

    def __init__(self, width):
        super().__init__(width)
        self.expert = nn.Linear(width, width)
        self.used = True

    def forward(self, x, memory=None):
        x = super().forward(x)
        if memory is not None:
            x = x + self.down(torch.tanh(self.up(memory)))
        return x + self.expert(x) if self.used else x


class Experts(Net):
    order = (0, 1, 2, 3)  # in which blocks run
    reentrant = False  # whether each is recomputed in a backward of its own
    memory = False  # whether each takes what an encoder made, whose gradient comes last

    def __init__(self):
        super().__init__(blocks=0)
        self.blocks = nn.ModuleList(Expert(13) for _ in range(4))

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        more = (self.norm(x),) if self.memory else ()
        for k in self.order:
            x = checkpoint(self.blocks[k], x, *more, use_reentrant=True) if self.reentrant else self.blocks[k](x, *more)
        return self.head(self.norm(x))

    def use(self, flags):
        for block, flag in zip(self.blocks, flags, strict=True):
            block.used = flag


def finish(model, optimizer):
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.full_params():
        return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.full_state()


def uneven(group, rank, stage, bucket_mb, micro, how="plain", steps=3, more=()):
    """Each rank leaves out other experts, and in the first micro-batch others than in the second."""
    run = Run(stage=stage, bucket_mb=bucket_mb, dtype=torch.bfloat16, more=more)
    model, optimizer = make(run, group, seeded(Experts))
    model.reentrant = how.startswith("reentrant")
    model.memory = how.endswith("memory")
    if how == "order":
        model.order = (2, 0, 3, 1)
    elif how.endswith("shared"):
        model.order = (0, 0, 1, 2, 1, 3, 0)
    best = None
    for step in range(steps):
        for part in range(micro):
            model.use([(step + part + rank + k) % 3 != 0 and not (how == "held" and k == 1) for k in range(4)])
            loss = loss_of(model, tokens_for(step, part, rank))
            loss.backward()
            if how == "held" and rank == 0 and best is None:
                best = loss  # and its graph
            if how == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        result = finish(model, optimizer)
    return result


HOW = ["clip", "held", "order", "shared", "memory", "reentrant", "reentrant shared", "reentrant memory"]


@pytest.mark.parametrize("how", HOW)
def test_experts_beside_what_else_loops_do(how):
    def run(comm):
        return [uneven(comm, comm.rank, stage, bucket_mb, 3, how) for bucket_mb in (25.0, 1e-6) for stage in (0, 1, 2, 3)]

    for results in on_threads(2, run):
        assert [equal(result, results[0]) for result in results] == [True] * 8


@everywhere
def test_experts_beside_what_else_loops_do_in_processes(env):
    expected = [on_threads(2, lambda comm, how=how: uneven(comm, comm.rank, 0, 1e-6, 3, how, 1)) for how in HOW]
    found = on_processes(2, every_way, env={**env, "ZEROLITE_PATIENCE": "1"}, timeout=15)
    for rank, results in enumerate(found):
        assert [[equal(result, one[rank]) for result in each] for one, each in zip(expected, results, strict=True)] == [
            [True] * 4
        ] * len(HOW)


def every_way(rank):
    return [uneven_process(rank, 1e-6, 3, how, 1) for how in HOW]


def uneven_process(rank, *args):
    return [uneven(None, rank, stage, *args) for stage in (0, 1, 2, 3)]


@everywhere
@pytest.mark.parametrize("bucket_mb", [25.0, 1e-6])
@pytest.mark.parametrize("micro", [1, 2])
def test_experts_that_only_some_ranks_use(env, bucket_mb, micro):
    expected = on_threads(2, lambda comm: uneven(comm, comm.rank, 0, bucket_mb, micro))
    for rank, found in enumerate(on_processes(2, uneven_process, bucket_mb, micro, env={**env, "ZEROLITE_PATIENCE": "1"})):
        assert [equal(result, expected[rank]) for result in found] == [True] * 4


def released(rank):
    model, optimizer = make(Run(stage=3, bucket_mb=1e-6), None, seeded(Experts))
    model.use([rank == 0] * 4)
    most = []
    units = optimizer._parts.schedule.units
    for unit in units:
        for bucket in unit.buckets:
            for p in bucket.params:
                p.register_hook(lambda g: most.append(sum(u.shown for u in units if not u.is_root)))
    loss_of(model, tokens_for(0, 0, rank)).backward()
    return max(most)


def test_a_block_with_an_unused_expert_is_released_like_others():
    assert on_processes(2, released, env=GROUP) == [1, 1]  # without what is prefetched


CASES = [(stage, how) for stage in (0, 1, 2, 3) for how in ("zero_grad", "none", "nan")]


def thrown_away(rank):
    return [case for case in CASES if not nothing_is_left(rank, *case)]


def nothing_is_left(rank, stage, how):
    def run(disturb):
        model, optimizer = make(Run(stage=stage), None)
        if disturb:
            loss_of(model, tokens_for(7, 0, rank)).backward()
            if how == "zero_grad":
                optimizer.zero_grad()
            elif how == "none":
                model.zero_grad()
                optimizer.step()
            else:
                list(model.parameters())[-1].grad.mul_(float("nan"))
                optimizer.step()
                optimizer.zero_grad()
        for part in range(2):
            loss_of(model, tokens_for(0, part, rank)).backward()
        return finish(model, optimizer)

    return equal(run(True), run(False))


@everywhere
def test_a_backward_that_is_thrown_away_leaves_nothing(env):
    assert on_processes(2, thrown_away, env=env, timeout=15) == [[], []]


def dropped_and_unused(rank):
    return [stage for stage in (0, 1, 2, 3) if not stays_dropped(rank, stage)]


def stays_dropped(rank, stage):
    """Gradients set to None after a first backward do not come back on the rank that does not use the parameter again."""

    def run(first):
        model, optimizer = make(Run(stage=stage, bucket_mb=1e-6), None, seeded(Experts))
        if first:
            loss_of(model, tokens_for(7, 0, rank)).backward()
            model.zero_grad()
        model.use([rank == 0] * 4)
        loss_of(model, tokens_for(0, 0, rank)).backward()
        return finish(model, optimizer)

    return equal(run(True), run(False))


@everywhere
def test_a_dropped_gradient_does_not_come_back(env):
    assert on_processes(2, dropped_and_unused, env=env) == [[], []]


REFUSED = {
    "zero_grad": "cleared on some ranks only",
    "zero_": "zeroed or set to None",
    "zero_ earlier": "zeroed or set to None on some ranks only, or between other backwards",
    "zero_ of an average": "zeroed or set to None",
    "scaled": "different factors",
    "scaled between": "different factors on different ranks, or between other backwards",
}


def treated_on_one(rank):
    return [refused(rank, stage, how) for stage in (0, 1, 2, 3) for how in REFUSED]


def refused(rank, stage, how):
    model, optimizer = make(Run(stage=stage), None)
    with optimizer.no_sync() if how == "zero_ of an average" else nullcontext():
        loss_of(model, tokens_for(0, 0, rank)).backward()
    weight = model.blocks[0].norm.weight
    if how == "zero_ of an average":  # the norm is of what was exchanged
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if rank == 1 and how == "zero_grad":
        optimizer.zero_grad()
    elif rank == 1 and how.startswith("zero_"):
        weight.grad.zero_()
    elif rank == 1 and how.startswith("scaled"):
        weight.grad.mul_(0.5)
    if how in ("zero_ earlier", "scaled between"):
        loss_of(model, tokens_for(0, 1, rank)).backward()
    if rank == 0 and how == "zero_ earlier":
        weight.grad.zero_()
    try:
        optimizer.step()
    except ValueError as error:
        message = str(error)
    optimizer.zero_grad()  # and goes on
    loss_of(model, tokens_for(0, 0, rank)).backward()
    clean = finish(model, optimizer)
    other, optimizer = make(Run(stage=stage), None)
    loss_of(other, tokens_for(0, 0, rank)).backward()
    return message, equal(clean, finish(other, optimizer))


def test_gradients_treated_otherwise_on_one_rank_are_refused_on_all():
    for found in on_processes(2, treated_on_one, timeout=15):
        for (message, same), text in zip(found, [*REFUSED.values()] * 4, strict=True):
            assert text in message and same


def cleared_alike(rank, stage):
    """What is this rank's own, or cleared on all ranks by whatever call, is not refused."""
    model, optimizer = make(Run(stage=stage), None)
    weight = model.blocks[0].norm.weight
    with optimizer.no_sync():
        loss_of(model, tokens_for(0, 0, rank)).backward()
    if rank == 1:
        weight.grad.zero_()  # of this rank's own sum
    loss_of(model, tokens_for(0, 1, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    for part in range(3):
        loss_of(model, tokens_for(1, part, rank)).backward()
        (model if rank == 0 else optimizer).zero_grad()
    loss_of(model, tokens_for(1, 3, rank)).backward()
    assert optimizer._parts.grads._history.rounds == 1 and not optimizer._parts.grads._history.dropped
    weight.grad.zero_()
    if rank == 1:
        weight.grad.zero_()  # again
    return finish(model, optimizer)


def test_gradients_cleared_alike_are_not_refused():
    for results in on_processes(2, all_cleared_alike, timeout=15):
        assert all(equal(result, results[0]) for result in results)


def all_cleared_alike(rank):
    return [cleared_alike(rank, stage) for stage in (0, 1, 2, 3)]


def thawed(rank, clip):
    model = seeded(Net)
    model.norm.weight.requires_grad_(False)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.norm.weight.grad = torch.ones(13)
    inner.step()  # it has a state though it is frozen
    model.zero_grad()
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=1)
    model.norm.weight.requires_grad_(True)
    for part in range(2):
        loss_of(model, tokens_for(0, part, rank)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return norm.item()


def test_parameters_that_come_with_a_state_and_are_thawed_later():
    a, b = on_processes(2, thawed, 0.1)
    assert a == b


def outsider(rank):
    groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2])]
    model = seeded(Net)
    zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, process_group=groups[0])


def test_a_rank_outside_of_the_group_is_told():
    found = outcomes(3, outsider)
    assert [kind for kind, _ in found] == ["ok", "ok", "error"]
    assert "expected a group with this rank in it, got one that rank 2 is not part of" in found[2][1][1]


def late_at_every_stage(rank):
    return [late_on_one(rank, stage) for stage in (0, 1, 2, 3)]


def late_on_one(rank, stage):
    """A parameter that is trained from a second micro-batch on, by one rank."""
    model = seeded(Experts)
    model.blocks[1].expert.requires_grad_(False)
    model, optimizer = make(Run(stage=stage), None, model)
    loss_of(model, tokens_for(0, 0, rank)).backward()
    model.blocks[1].expert.requires_grad_(True)
    model.use([True, rank == 0, True, True])
    for part in range(2):
        loss_of(model, tokens_for(1, part, rank)).backward()
    return finish(model, optimizer)


@everywhere
def test_a_parameter_that_one_rank_begins_to_train(env):
    for results in on_processes(2, late_at_every_stage, env=env, timeout=15):
        assert all(equal(result, results[0]) for result in results)
