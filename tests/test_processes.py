"""Real processes over gloo: equality with threads and DDP, counted collectives, faults, what stays behind."""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import math
import mmap
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Net, Run, equal, loss_of, make, seeded, tokens_for, train, train_on
from ranks import GROUP, on_processes, on_threads, outcomes
from torch import nn

import zerolite
from zerolite import gradient, moments, parts
from zerolite.comm import shared
from zerolite.comm.group import GroupComm, Waiting
from zerolite.worker import Failure, Worker


def train_processes(rank, runs):
    return [train(None, rank, run) for run in runs]


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_same_bits_over_processes_as_over_threads(env):
    runs = [Run(stage=stage, dtype=dtype, micro=2, clip=0.5) for stage in (0, 1, 2, 3) for dtype in (None, torch.bfloat16)]
    for rank, results in enumerate(on_processes(3, train_processes, runs, env=env)):
        for run, result in zip(runs, results, strict=True):
            assert equal(result, on_threads(3, train_on, run)[rank]), run


def send_the_model_away(rank, way):
    model, optimizer = make(Run(stage=2, dtype=torch.bfloat16), None)
    loss_of(model, tokens_for(0, 0, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and way == "clones":
        for value in model.state_dict().values():
            value.clone().share_memory_()
    elif rank == 0:
        model.share_memory()
    loss_of(model, tokens_for(1, 0, rank)).backward()
    if rank == 0 and way == "itself":
        with pytest.raises(RuntimeError, match="torch moved its memory to share it with another process"):
            optimizer.step()
        return
    if way == "clones":
        optimizer.step()


def test_a_model_whose_memory_was_moved_to_another_process_is_noticed():
    for way in ("itself", "clones"):
        on_processes(2, send_the_model_away, way)


def begins_of_streams(rank):
    found = []

    def seen(param, rest, m, v, sources, *others):
        found.append([t.data_ptr() % mmap.PAGESIZE for t in (rest, m, v)])
        found.append([t.data_ptr() % mmap.PAGESIZE for t in sources])
        return update(param, rest, m, v, sources, *others)

    update, moments.reduce_adam_ = moments.reduce_adam_, seen
    p = nn.Parameter(torch.zeros(3 << 20, dtype=torch.bfloat16))
    optimizer = zerolite.ZeroOptimizer(torch.optim.Adam([p]), stage=1)
    p.sum().backward()
    optimizer.step()
    return found


def test_what_an_update_walks_side_by_side_begins_apart_in_its_pages():
    for states, sources in on_processes(2, begins_of_streams):
        assert len(set(states)) == 3 and len(set(sources)) == 2
        assert all(begin % 64 == 0 for begin in states + sources)


def shared_values(rank):
    comm = GroupComm()
    counts, found = [], []
    start, comm._start = comm._start, lambda *args: (counts.append(args[0]), start(*args))[1]
    for size in (0, 300, 600, 100_000):
        found.append(comm.share((rank, "x" * size if rank == 1 else None), "here"))
    return found, counts


def test_values_are_shared_in_one_collective_if_they_are_short_on_every_rank():
    expected = [[(0, None), (1, "x" * size), (2, None)] for size in (0, 300, 600, 100_000)]
    for found, counts in on_processes(3, shared_values):
        assert found == expected and counts == ["here"] * (1 + 1 + 2 + 2)


def share_what_cannot_be_pickled(rank):
    comm = GroupComm()
    with pytest.raises(Exception) as found:
        comm.share((lambda: rank) if rank == 1 else rank, "here")
    return type(found.value).__name__, str(found.value), comm.share(rank, "here")


def test_a_value_that_cannot_be_pickled_is_an_error_on_every_rank():
    (kind, message, after), (_, own, _) = on_processes(2, share_what_cannot_be_pickled, timeout=10)
    assert kind == "RankError" and "rank 1 in 'here': what it tells the others has to be picklable" in message
    assert "lambda" in own and "RankError" not in own and after == [0, 1]


def train_where_tensors_are_meta(rank, stage):
    torch.manual_seed(0)
    torch.set_default_device("meta")
    model = nn.Sequential(nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 3))
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage)
    for _ in range(2):
        model(torch.full((2, 70), rank + 1.0, device="cpu")).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.full_state()


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_a_default_device_does_not_reach_what_ranks_tell_each_other(env):
    first, second = on_processes(2, train_where_tensors_are_meta, 3, env=env)
    assert equal(first, second) and equal(first, on_processes(2, train_where_tensors_are_meta, 1, env=env)[0])


class Schedule:
    """What a user keeps in a param group; its repr is another one in each process, as an address is."""

    def __repr__(self):
        return f"<Schedule of {os.getpid()}>"


def build_with_objects(rank, other):
    p = nn.Parameter(torch.ones(3))
    group = {"params": [p], "schedule": Schedule(), "lr": torch.tensor(0.1), "decay": 0.5 + (rank if other else 0)}
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW([group]), stage=1)
    p.sum().backward()
    optimizer.step()
    return p.tolist()


def test_objects_in_param_groups_are_told_apart_by_their_type():
    first, second = on_processes(2, build_with_objects, False)
    assert first == second and first[0] < 1
    for kind, value in outcomes(2, build_with_objects, True):
        assert kind == "error" and value[0] == "ValueError" and "ranks differ" in value[1] and "'decay': 1.5" in value[1]


class Completed:
    """A collective that completes just after the first wait for it has timed out."""

    def __init__(self, error=None):
        self.error, self.waits = error, 0

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise RuntimeError(self.error)

    def is_completed(self):
        return True


def wait_for_completed(rank):
    comm = GroupComm()
    assert Waiting(comm, Completed(), torch.ones(1), "here").wait().item() == 1
    found = []
    for error in ("Timed out waiting 1800000ms for recv", "Connection closed by peer"):
        with pytest.raises(zerolite.RankError) as caught:
            Waiting(comm, Completed(error), torch.ones(1), "here").wait()
        found.append(str(caught.value))
    return found


def test_a_collective_that_completes_as_its_wait_times_out_ends_as_it_ended():
    for rank, (late, lost) in enumerate(on_processes(2, wait_for_completed)):
        assert f"rank {rank} waited 30 s in 'here'" in late
        assert "the process group failed" in lost and "Connection closed by peer" in lost


def notes_of_groups_beside(rank):
    comm = GroupComm()
    return [other._post(0) for other in (comm, comm.beside(), comm.beside())]


def test_groups_beside_the_same_group_do_not_mix_up_their_notes():
    first, second = on_processes(2, notes_of_groups_beside)
    assert first == second and len(set(first)) == 3


def train_on_hosts(rank, hosts, runs):
    os.environ["ZEROLITE_HOST"] = hosts[rank]
    results = [train(None, rank, run) for run in runs]
    model, optimizer = make(Run(stage=2, dtype=torch.bfloat16), None)
    return results, optimizer._parts.comm.hosts, sent_in_two_steps(model, optimizer, rank)


@pytest.mark.parametrize("hosts", ["aabb", "abab", "aab"])
def test_same_bits_where_only_some_ranks_share_a_host(hosts):
    runs = [Run(stage=stage, dtype=torch.bfloat16, micro=2, clip=0.5) for stage in (0, 1, 2, 3)]
    size = len(hosts)
    expected = [on_threads(size, train_on, run) for run in runs]
    for rank, (results, found, sent) in enumerate(on_processes(size, train_on_hosts, hosts, runs)):
        assert sorted(map(tuple, found)) == sorted(tuple(r for r in range(size) if hosts[r] == h) for h in "ab")
        for run, result, threads in zip(runs, results, expected, strict=True):
            assert equal(result, threads[rank]), run
        # Two steps send the slices for the ranks of the other host, and this rank's shard once to it; bf16.
        numel = sum(bucket.layout.numel for bucket in make(Run(stage=0, dtype=torch.bfloat16), None)[1]._parts.buckets)
        shard = -(-numel // size // 64) * 64
        away = sum(host != hosts[rank] for host in hosts)
        assert sent["exchange"] == 2 * 2 * shard * away and sent["gather"] == 2 * 2 * shard


def grads_and_ddp(rank, stage):
    model, optimizer = make(Run(stage=stage), None)
    loss_of(model, tokens_for(0, 0, rank)).backward()
    ours = {name: value.clone() for name, value in optimizer.full_grads().items()}
    read = {name: p.grad.clone() for name, p in model.named_parameters()}
    model = nn.parallel.DistributedDataParallel(seeded(Net))
    loss_of(model, tokens_for(0, 0, rank)).backward()
    theirs = {name: p.grad for name, p in model.module.named_parameters()}
    return equal(ours, theirs), equal(read, theirs)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_gradients_equal_ddp_at_two_ranks(stage, env):
    # at two ranks the sum has one order and the half is exact, so fp32 gradients are DDP's to the last bit
    assert on_processes(2, grads_and_ddp, stage, env=env) == [(True, True)] * 2


def train_beside_ddp(rank, stage, steps):
    results = train(None, rank, Run(stage=stage, steps=steps, lr=1e-3, clip=1.0))["losses"]
    model = nn.parallel.DistributedDataParallel(seeded(Net))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        loss = loss_of(model, tokens_for(step, 0, rank))
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return results, losses


@pytest.mark.parametrize("stage", [1, 3])
def test_losses_follow_ddp(stage):
    for ours, theirs in on_processes(2, train_beside_ddp, stage, 20):
        # identical gradients; each AdamW update differs by some 20 x 2^-24 of itself, 20 steps
        assert ours == pytest.approx(theirs, abs=1e-5)


class Wire:
    """Counts what really goes through torch.distributed: bytes that leave this rank, by function."""

    NAMES = ("all_to_all_single", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast")

    def __init__(self):
        self.calls, self.bytes = {}, {}
        for name in self.NAMES:
            if hasattr(dist, name):
                setattr(dist, name, self.wrap(name, getattr(dist, name)))
        import zerolite.comm.group as group

        group._all_gather = self.wrap("all_gather", group._all_gather)

    def wrap(self, name, real):
        def counted(*args, **kwargs):
            size = dist.get_world_size()
            tensor = args[0]
            share = {"all_to_all_single": (size - 1) / size, "all_gather": (size - 1) / size}.get(name, 1.0)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + int(tensor.numel() * tensor.element_size() * share)
            return real(*args, **kwargs)

        return counted

    def take(self):
        found, self.calls, self.bytes = (self.calls, self.bytes), {}, {}
        return found


def wire_of_a_step(rank, stage, micro, no_sync):
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), None)
    wire = Wire()
    for step in range(2):
        counts = []
        for k in range(micro):
            with optimizer.no_sync() if no_sync and k + 1 < micro else torch.enable_grad():
                loss_of(model, tokens_for(step, k, rank)).backward()
            counts.append(wire.calls.get("all_to_all_single", 0))
        optimizer.step()
        optimizer.zero_grad()
        found = wire.take()
    layouts = [bucket.layout for bucket in optimizer._trained]
    root = sum(b.layout.numel for b in optimizer._trained if b.name.startswith("root"))
    last = sum(b.layout.numel for b in optimizer._trained if b.name.startswith("blocks.2"))
    return found, counts, [layout.numel for layout in layouts], root + last, len(layouts)


@pytest.mark.parametrize("world", [2, 4])
def test_stages_1_and_2_move_two_bytes_twice_a_parameter(world):
    for stage in (1, 2):
        for (calls, sent), _, numels, _, buckets in on_processes(world, wire_of_a_step, stage, 1, False, env=GROUP):
            each = sum(numels) * 2 * (world - 1) // world
            assert sent["all_to_all_single"] == each and sent["all_gather"] == each
            assert calls["all_to_all_single"] == calls["all_gather"] == buckets
            assert (
                sent["all_reduce"] == 8 * (2 + 15) and calls["all_reduce"] == 2
            )  # agreements after backward and before the step


def test_stage_3_moves_one_gather_more():
    for (calls, sent), _, numels, once, buckets in on_processes(2, wire_of_a_step, 3, 1, False, env=GROUP):
        each = sum(numels) * 2 // 2
        assert sent["all_to_all_single"] == each
        # forward and backward, but the root and the last unit stay gathered in between
        assert sent["all_gather"] == 2 * each - once * 2 // 2 and sent["all_gather"] <= 2 * each
        assert calls["all_to_all_single"] == buckets


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_sync_moves_nothing_until_the_last_micro_batch(stage):
    for _, counts, _, _, buckets in on_processes(2, wire_of_a_step, stage, 3, True, env=GROUP):
        assert counts[:2] == [0, 0] and counts[2] == (buckets if stage >= 2 else 0)


# ---- faults


class Die(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        os.kill(os.getpid(), signal.SIGKILL)


def die_somewhere(rank, stage, where):
    model, optimizer = make(Run(stage=stage), None)
    for step in range(3):
        kill = rank == 1 and step == 1
        if kill and where == "forward":
            model.blocks[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if kill and where == "backward":
            model.blocks[1].register_forward_hook(lambda m, i, out: Die.apply(out))
        loss_of(model, tokens_for(step, 0, rank)).backward()
        if kill and where == "step":
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        start = time.monotonic()
    return start


@pytest.mark.parametrize("stage,env", [(1, {}), (3, {}), (3, GROUP)], ids=["1-shared", "3-shared", "3-gloo"])
@pytest.mark.parametrize("where", ["forward", "backward", "step"])
def test_a_killed_rank_is_an_error_on_the_others(stage, env, where):
    start = time.monotonic()
    found = outcomes(3, die_somewhere, stage, where, timeout=30, env=env)
    assert found[1] == ("died", -signal.SIGKILL)
    for rank in (0, 2):
        kind, (name, message, _) = found[rank]
        assert kind == "error" and name == "RankError" and "another rank" in message and f"rank {rank} of 3 in '" in message
    assert time.monotonic() - start < 25


def raise_on_one(rank):
    model, optimizer = make(Run(stage=2), None)
    if rank == 1:
        raise ZeroDivisionError("in the user's code")
    loss_of(model, tokens_for(0, 0, rank)).backward()
    optimizer.step()


def test_an_exception_on_one_rank_ends_the_others():
    found = outcomes(2, raise_on_one, timeout=30)
    assert found[1][1][0] == "ZeroDivisionError" and found[0][1][0] == "RankError"


class Skipping(Net):
    """Rank 1 leaves out block `skip`, as a whole unit."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            if not (number == self.skip[0] and dist.get_rank() == 1):
                x = block(x)
        return self.head(self.norm(x))


def disagree(rank, stage):
    model = seeded(Skipping)
    model.skip = (1,)
    _, optimizer = make(Run(stage=stage), None, model)
    before = [p.detach().clone() for p in optimizer._built.buckets[0].entries[0].param.unsqueeze(0)]
    try:
        for step in range(2):
            loss_of(model, tokens_for(step, 0, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
    except zerolite.RankError as error:
        return "refused", str(error), len(before)
    return "trained", [value.sum().item() for value in model.state_dict().values()], len(before)


def test_ranks_that_use_different_blocks():
    assert [row[0] for row in on_processes(2, disagree, 2)] == ["trained"] * 2
    start = time.monotonic()
    found = on_processes(2, disagree, 3, env={"ZEROLITE_PATIENCE": "1"}, timeout=60)
    assert time.monotonic() - start < 40  # not the group's timeout
    for kind, message, _ in found:
        assert kind == "refused" and ("different paths" in message or "another rank" in message), message


def stop_one(rank):
    model, optimizer = make(Run(stage=2), None)
    if rank == 1:
        time.sleep(9)  # stuck, not dead
        return None
    loss_of(model, tokens_for(0, 0, rank)).backward()
    optimizer.step()


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_a_stuck_rank_is_an_error_within_the_timeout(env):
    found = outcomes(2, stop_one, timeout=4, env={"ZEROLITE_PATIENCE": "1", **env})
    kind, (name, message, _) = found[0]
    assert (kind, name) == ("error", "RankError") and "waited 4 s in 'exchange" in message


def ask_a_store_that_does_not_answer(rank):
    from zerolite.comm import group

    group.PATIENCE, GroupComm = 1.0, group.GroupComm
    comm = GroupComm(None)
    start = time.monotonic()
    found = [comm.store.ask(lambda store: time.sleep(60) or "late"), comm.store.ask(lambda store: "now")]
    slow, undone = GroupComm(None), []
    slow.store.ask(lambda store: time.sleep(1.5), undo=undone.append)  # an answer that nobody waits for any more
    slow.store._thread.join(10)
    found.append(len(undone))
    other = GroupComm(None)
    other.compare("here", 1, [])
    other.retract()
    return found, time.monotonic() - start, other.store.ask(lambda store: store.get(other._post(rank)).decode())


def test_a_store_that_does_not_answer_holds_nobody_up():
    """Its host is stopped, not dead: no timeout of the store's clients applies."""
    for found, seconds, post in on_processes(2, ask_a_store_that_does_not_answer):
        assert found == [None, None, 1] and seconds < 10 and post == ""


def test_who_is_interrupted_in_a_wait_waits_again():
    from zerolite.comm.group import Waiting

    class Work:
        waits = 0

        def wait(self, _):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt

    comm = SimpleNamespace(timeout=60.0, ledger=SimpleNamespace(calls={}))
    work = Work()
    waiting = Waiting(comm, work, torch.zeros(1), "gather")
    with pytest.raises(KeyboardInterrupt):
        waiting.wait()
    assert waiting.under_way
    waiting.wait()
    assert work.waits == 2 and not waiting.under_way


def straggle(rank):
    model, optimizer = make(Run(stage=3), None)
    for step in range(2):
        if rank == 1:
            time.sleep(3)
        loss_of(model, tokens_for(step, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return True


def test_a_slow_rank_is_only_slow():
    assert on_processes(2, straggle, env={"ZEROLITE_PATIENCE": "0.5"}) == [True, True]


def differ(rank, what):
    model = seeded(lambda: Net(width=13 if rank == 0 or what != "shape" else 14))
    lr = 1e-2 if rank == 0 or what != "lr" else 2e-2
    if rank == 1 and what == "frozen":
        model.scale.requires_grad_(False)
    inner = torch.optim.AdamW(model.parameters(), lr=lr)
    try:
        zerolite.ZeroOptimizer(inner, model, stage=2 if rank == 0 or what != "stage" else 1)
    except (ValueError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize("what,text", [("shape", "(31, 13)"), ("lr", "0.02"), ("frozen", "'scale'"), ("stage", "stage=1")])
def test_ranks_that_differ_are_named_on_every_rank(what, text):
    messages = on_processes(2, differ, what)
    assert messages[0] == messages[1] and "ranks differ" in messages[0] and "rank 1" in messages[0] and text in messages[0]


def one_bad(rank):
    model = seeded(Net)
    try:
        zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=7 if rank == 1 else 2)
    except (ValueError, RuntimeError) as error:
        return str(error)


def test_a_mistake_on_one_rank_is_told_to_all():
    messages = on_processes(2, one_bad)
    assert "stage: expected 0, 1, 2 or 3, got 7" in messages[1] and "rank 1 could not build" in messages[0]


def begin_different(rank):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), seed=rank)
    model[1].running_mean.fill_(rank)
    zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_ranks_begin_equal_to_rank_0():
    results = on_processes(2, begin_different)
    assert equal(results[0], results[1])
    torch.manual_seed(0)
    assert torch.equal(results[0]["0.weight"], nn.Linear(4, 4).weight)
    assert results[1]["1.running_mean"].sum() == 0


def no_group(rank):
    dist.destroy_process_group()
    model = seeded(Net)
    try:
        zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model)
    except RuntimeError as error:
        message = str(error)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return message


def test_torchrun_without_a_process_group():
    assert all("init_process_group" in message and "WORLD_SIZE=2" in message for message in on_processes(2, no_group))


def subgroup(rank):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=3, process_group=groups[rank % 2])
    for step in range(2):
        F.cross_entropy(model(tokens_for(step, 0, rank)).flatten(0, 1), tokens_for(step, 1, rank).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer._parts.comm.size, {name: value.clone() for name, value in model.state_dict().items()}


def test_a_process_group_of_its_own():
    results = on_processes(4, subgroup)
    assert [size for size, _ in results] == [2] * 4
    assert equal(results[0][1], results[2][1]) and equal(results[1][1], results[3][1])
    assert not equal(results[0][1], results[1][1])


def leave_nothing(rank):
    train(None, rank, Run(stage=3, steps=2))
    dist.destroy_process_group()
    import threading

    shared = [name for name in os.listdir("/dev/shm") if "zerolite" in name] if os.path.isdir("/dev/shm") else []
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return shared, threading.active_count()


def nothing_is_sent(rank, stage):
    return sent_in_two_steps(*make(Run(stage=stage, dtype=torch.bfloat16), None), rank)


def sent_in_two_steps(model, optimizer, rank):
    before = dict(optimizer._parts.comm.ledger.sent)
    for step in range(2):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = optimizer._parts.comm.ledger.sent
    return {phase: after[phase] - before.get(phase, 0) for phase in ("exchange", "gather")}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_of_one_host_send_no_gradient_and_no_parameter(stage):
    assert on_processes(2, nothing_is_sent, stage) == [{"exchange": 0, "gather": 0}] * 2


def late_load(rank, stage):
    """Rank 0 loads at once, rank 1 half a second later, after a forward with the old values."""
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), None)
    loss_of(model, tokens_for(0, 0, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = optimizer.state_dict()
    dist.barrier()
    time.sleep(0.5 * rank)
    with torch.no_grad():
        before = loss_of(model, tokens_for(0, 0, 0)).item()
    model.load_state_dict({name: torch.ones_like(value) for name, value in seeded(Net).state_dict().items()})
    optimizer.load_state_dict(saved)
    optimizer.state_dict()
    with torch.no_grad():
        loaded = loss_of(model, tokens_for(0, 0, 0)).item()
    dist.barrier()
    masters = [values["master"] for values in optimizer.full_state().values()]
    whole = all(bool((master == 1).all()) for master in masters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # decay and update are nothing: the step only publishes
    loss_of(model, tokens_for(1, 0, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.full_params():
        published = all(bool((p == 1).all()) for p in model.parameters() if p.requires_grad)
    return before, loaded, whole, published


@pytest.mark.filterwarnings("ignore:load_state_dict", "ignore:parameter")
@pytest.mark.parametrize("stage,env", [(1, {}), (2, {}), (3, {}), (1, GROUP), (2, GROUP)])
def test_what_a_rank_loads_early_or_late_never_reaches_another_in_between(stage, env):
    first, second = on_processes(2, late_load, stage, env=env)
    assert first == second and first[0] != first[1]
    assert first[2] and first[3]


def write_as_if_alone(rank, stage):
    """An average-weights swap, as scripts do it: save, replace, use, put back; and a scaled parameter."""
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16, lr=0.0, options=(("weight_decay", 0.0),)), None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = {name: p.data.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data.fill_(rank + 1.0)
    time.sleep(0.3 * rank)  # a rank that is late must not save what another has written
    inside = all(bool((p == rank + 1.0).all()) for p in model.parameters())
    for name, p in model.named_parameters():
        p.data.copy_(saved[name])
    restored = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        model.norm.weight.mul_(2.0)  # once on each rank, so twice the value, not 2 ** ranks
        model.scale.data.add_(1.0)  # past autograd's version counter
    loss_of(model, tokens_for(0, 0, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    weight, scale = model.norm.weight.clone(), model.scale.item()
    loss_of(model, tokens_for(1, 0, rank)).backward()
    optimizer.step()
    masters = optimizer.full_state()
    return inside, restored, weight, scale, masters["norm.weight"]["master"], masters["scale"]["master"].item()


@pytest.mark.filterwarnings("ignore:parameter")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_write_to_a_shared_parameter_stays_with_its_rank(stage):
    for inside, restored, weight, scale, master, scale_master in on_processes(2, write_as_if_alone, stage):
        assert inside and restored
        assert torch.equal(weight, torch.full((13,), 2.0, dtype=torch.bfloat16)) and scale == 2.0
        assert torch.equal(master, torch.full((13,), 2.0)) and scale_master == 2.0


def write_in_inference_mode(rank):
    model, optimizer = make(Run(stage=3, dtype=torch.bfloat16), None)
    for step in range(2):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode(), optimizer.full_params():
            model.norm.weight.mul_(2.0)
    with optimizer.full_params():
        return model.norm.weight.clone()


def test_writes_in_inference_mode_are_trained_on():
    first, second = on_processes(2, write_in_inference_mode)
    assert torch.equal(first, second) and bool((first > 3).all())


def refused(rank, what, missing):
    """A step where one rank is refused something that sharing needs, or its platform does not have it."""
    seen = []
    logging.getLogger("zerolite").addHandler(
        type("H", (logging.Handler,), {"emit": lambda self, r: seen.append(r.getMessage())})()
    )
    if what == "memfd_create" if rank == 0 else what != "memfd_create":
        allowed = getattr(os, what)
        paths = what == "open"

        def denied(*args, **kwargs):
            if paths and not str(args[0]).startswith("/proc/"):
                return allowed(*args, **kwargs)
            raise AttributeError("no such call") if missing else PermissionError("no access")

        setattr(os, what, denied)
    result = train(None, rank, Run(stage=2, steps=2))
    return result["losses"], seen


@pytest.mark.parametrize("what, missing", [("open", False), *itertools.product(["memfd_create", "pidfd_open"], [False, True])])
def test_ranks_that_cannot_share_use_the_process_group_and_say_so_once(what, missing):
    plain = on_processes(2, train_processes, [Run(stage=2, steps=2)], env=GROUP)
    why = "OSError: no such call" if missing else "PermissionError: no access"
    for rank, (losses, seen) in enumerate(on_processes(2, refused, what, missing)):
        assert losses == plain[rank][0]["losses"]
        assert len(seen) == (1 if rank == 0 else 0) and all(f"cannot share memory ({why})" in text for text in seen)


def locked(rank):
    """Under mlockall() a private mapping is copied as it is made: it would show zeros for ever."""
    if ctypes.CDLL(None).mlockall(2) != 0:  # MCL_FUTURE
        return None
    return train(None, rank, Run(stage=2, steps=2))["losses"]


def test_ranks_under_mlockall_use_the_process_group():
    found = on_processes(2, locked)
    if None in found:
        pytest.skip("mlockall() is not allowed here")
    assert found == [rows[0]["losses"] for rows in on_processes(2, train_processes, [Run(stage=2, steps=2)], env=GROUP)]


def wishes(rank, name, value):
    if rank == 1:
        os.environ[name] = value
    with pytest.raises(ValueError, match=f"{name}: expected the same on every rank, got .*'{value}'"):
        make(Run(stage=2), None)


@pytest.mark.parametrize("name,value", [("ZEROLITE_SHARED", "0"), ("ZEROLITE_CONNECT", "group")])
def test_ranks_that_are_to_reach_each_other_in_different_ways(name, value):
    on_processes(2, wishes, name, value)


def shared_bytes(rank):
    before = set(os.listdir("/proc/self/fd"))
    model, optimizer = make(Run(stage=2, dtype=torch.bfloat16), None)
    at_rest = []
    for step in range(2):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        at_rest.append((optimizer.memory().live, optimizer.plan.bytes_at_rest))
        optimizer.step()
        optimizer.zero_grad()
    open_now = [f"/proc/self/fd/{fd}" for fd in set(os.listdir("/proc/self/fd")) - before]
    kept = [path for path in open_now if os.path.lexists(path) and "zerolite" in os.readlink(path)]
    mapped = "zerolite" in Path("/proc/self/maps").read_text()
    del model, optimizer
    gc.collect()
    return at_rest, kept, mapped, "zerolite (deleted)" in Path("/proc/self/maps").read_text()


def test_shared_memory_is_counted_and_keeps_no_descriptor():
    for at_rest, files, mapped, mapped_after in on_processes(2, shared_bytes):
        assert all(live == planned for live, planned in at_rest) and files == []
        assert mapped and not mapped_after


def test_nothing_stays_behind():
    assert on_processes(2, leave_nothing) == [([], 1)] * 2


def destroyed(rank):
    model, optimizer = make(Run(stage=2), None)
    loss_of(model, tokens_for(0, 0, rank)).backward()
    dist.destroy_process_group()
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        name = type(error).__name__
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return name


def test_a_destroyed_group_is_a_clear_error():
    assert on_processes(2, destroyed) == ["RankError"] * 2


def evaluates_on_one_rank(rank):
    model, optimizer = make(Run(stage=3), None)
    for step in range(2):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        if rank == 0 and step == 1:
            model.state_dict()
        optimizer.step()
        optimizer.zero_grad()


def test_the_first_call_that_differs_is_named():
    """state_dict() on one rank moves nothing where ranks share memory, and the calls after it are alike."""
    for kind, (name, message, _) in outcomes(2, evaluates_on_one_rank):
        assert kind == "error" and name == "RankError"
        found = re.search(r"step\(\): after 'step backward' rank 0 did '(.*?)', rank 1 did '(.*?)'\. No state", message)
        assert found and found[1].startswith("gather") and found[2] == "step agreement", message
        assert "state_dict() and full_params() are for all ranks or none" in message


def little_shared_memory(rank):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    model = nn.Linear(900, 900)
    zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=2)


def test_shared_memory_that_is_too_large_names_the_cure():
    for kind, found in outcomes(2, little_shared_memory):
        assert kind == "error" and found[0] == "OSError", found
        assert "shared memory of" in found[1] and "set ZEROLITE_SHARED=0" in found[1]


def clip_on_one_rank(rank):
    model, optimizer = make(Run(stage=2), None)
    loss_of(model, tokens_for(0, 0, rank)).backward()
    try:
        if rank == 0:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    except zerolite.RankError as error:
        return str(error)
    return "trained"


def test_ranks_on_different_paths_are_told_at_once_what_each_waits_for():
    start = time.monotonic()
    for message in on_processes(2, clip_on_one_rank):
        assert "rank 0: 'norm agreement (16 bytes)'; rank 1: 'step agreement (120 bytes)'" in message, message
    assert time.monotonic() - start < 60  # neither the group's timeout, 30 minutes, nor two looks of ZEROLITE_PATIENCE decide


def meet(rank):
    comm = make(Run(stage=2), None)[1]._parts.comm
    results = []
    for number in range(5):
        for shape, dtype in (((1,), torch.int64), ((3, 7), torch.int64), ((), torch.float64), ((1 << 16,), torch.int64)):
            values = torch.arange(max(math.prod(shape), 1)).reshape(shape).to(dtype) * (rank + 1) + number
            most = values.clone()
            comm.sum_(values, "sum")
            comm.max_(most, "max")
            results.append((values, most))
    return results


def test_small_sums_and_maxima_are_those_of_the_group():
    here, there = on_processes(2, meet), on_processes(2, meet, env=GROUP)
    for ours, theirs in zip(here, there, strict=True):
        assert len(ours) == 20
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.equal(here[0][1][0], torch.arange(21).view(3, 7) * 3)


def wait_in_two_threads(rank):
    comm = make(Run(stage=2), None)[1]._parts.comm
    shared._SLICE = 0.0
    end = time.monotonic() + 1.0
    worker = Worker("waits", Failure())
    job = worker.submit(lambda: comm.wait_for(lambda _: time.monotonic() > end, "worker"))
    comm.wait_for(lambda _: time.monotonic() > end, "training")
    job.wait()
    dist.barrier()
    return "waited"


def test_two_threads_may_wait_at_once():
    assert on_processes(2, wait_in_two_threads) == ["waited"] * 2


def wait_for_different_things(rank, beside):
    comm = make(Run(stage=2), None)[1]._parts.comm
    shared._SLICE, shared.PATIENCE = 0.02, 0.1
    dist.barrier()
    end = time.monotonic() + 1.0
    what = ["exchange bucket 0", "exchange (a slot still read)"][rank]
    worker = Worker("waits", Failure())

    def wait():
        comm.wait_for(lambda _: time.monotonic() > end, what)

    try:
        worker.submit(wait).wait() if beside and rank == 0 else wait()
    except zerolite.RankError as error:
        return str(error)
    finally:
        dist.barrier()
    return "waited"


@pytest.mark.parametrize("beside", [False, True])
def test_what_a_worker_waits_for_is_not_compared(beside):
    """A rank whose training thread waits is slow, not on another path, where the other rank's worker waits for it."""
    found = on_processes(2, wait_for_different_things, beside)
    told = "rank 0: 'exchange bucket 0'; rank 1: 'exchange (a slot still read)'"
    assert found == ["waited"] * 2 if beside else any(told in text for text in found), found


def train_scattered(rank, runs):
    import zerolite.placement

    zerolite.placement.SCATTER_RANKS = 2
    results = [train(None, rank, run) for run in runs]
    model, optimizer = make(runs[0], None)
    before = dict(optimizer._parts.comm.ledger.calls)
    loss_of(model, tokens_for(0, 0, rank)).backward()
    optimizer.step()
    after = optimizer._parts.comm.ledger.calls
    return results, str(optimizer.plan), after["exchange"] - before.get("exchange", 0)


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_small_slices_are_reduced_by_the_group_and_the_plan_says_so(env):
    runs = [Run(stage=stage, dtype=dtype, micro=2, clip=0.5) for stage in (1, 2, 3, 0) for dtype in (None, torch.bfloat16)]
    found = on_processes(2, train_scattered, runs, env=env)
    for (results, plan, exchanges), rank in zip(found, (0, 1), strict=True):
        assert "reduced by the process group" in plan and "smaller than 16 KiB" in plan and exchanges > 0
        for run, result in zip(runs, results, strict=True):
            # Two ranks' sums have one order, so here the group's bits are ours; with more ranks they are its own.
            assert equal(result, on_threads(2, train_on, run)[rank]), run


# ---- parts of rounds


def train_in_parts(rank, hosts, portion, runs):
    """With so few bytes a part that every bucket of a few thousand elements goes out in several; packed as a whole, or before
    it is complete."""
    parts.PART, gradient._PORTION = 1024, portion
    os.environ.update({"ZEROLITE_HOST": hosts[rank]} if hosts else {})
    found = [train(None, rank, run) for run in runs]
    lanes = [bucket.grads.lane for bucket in make(runs[0], None)[1]._built.buckets]
    return found, max(len(lane.cuts(torch.bfloat16)) for lane in lanes)


@pytest.mark.parametrize("size,hosts,portion", [(2, "", 2), (3, "", 256), (3, "aab", 2)])
def test_rounds_in_parts_have_the_bits_of_whole_ones(size, hosts, portion):
    shape = {"dtype": torch.bfloat16, "clip": 0.5}
    runs = [Run(stage=2, **shape), Run(stage=3, micro=2, **shape), Run(stage=2, micro=3, no_sync=True, bucket_mb=4e-3, **shape)]
    expected = [on_threads(size, train_on, run) for run in runs]
    for rank, (found, most) in enumerate(on_processes(size, train_in_parts, hosts, portion, runs)):
        assert most > parts.REGIONS
        assert all(equal(result, threads[rank]) for result, threads in zip(found, expected, strict=True))


def odd_gradients(rank):
    """A gradient that lies in memory unlike its parameter, and parameters of 0 elements, in a bucket of several parts."""
    parts.PART = 1024
    model = seeded(lambda: nn.ParameterList([nn.Parameter(torch.randn(n, 40)) for n in (40, 0, 30)]))
    optimizer = zerolite.ZeroOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), stage=2)
    loss = sum((p.T.contiguous() ** 2).sum() for p in model) * (rank + 1)
    loss.backward()
    optimizer.step()
    lane = optimizer._built.buckets[0].grads.lane
    return [p.detach().clone() for p in model], len(lane.cuts(torch.float32))


def test_gradients_of_any_strides_go_out_in_parts():
    expected = [p - (2 * p + 4 * p) * 0.5 for p in seeded(lambda: [torch.randn(n, 40) for n in (40, 0, 30)])]
    for found, count in on_processes(2, odd_gradients):
        assert count > 4 and equal(found, expected)


def sync_on_rank_0(rank):
    parts.PART = 2048
    model, optimizer = make(Run(stage=2, dtype=torch.bfloat16), None)
    with optimizer.no_sync():
        loss_of(model, tokens_for(0, 0, rank)).backward()
    if rank == 0:  # forgets what the others still have, so that its round is not wide
        optimizer.zero_grad()
        optimizer._built.reducer.local = False
    loss_of(model, tokens_for(0, 1, rank)).backward()


def test_rounds_of_different_dtypes_are_told_apart():
    for kind, found in outcomes(2, sync_on_rank_0, timeout=20):
        assert kind == "error" and found[0] == "RankError", found


def test_a_worker_whose_thread_cannot_start_tries_again(monkeypatch):
    worker = Worker("late", Failure())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            worker.submit(lambda: None)
    done = []
    worker.submit(lambda: done.append(1)).wait()
    assert done == [1]
