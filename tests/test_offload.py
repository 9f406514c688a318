"""Offload with a CPU that plays a device (buffer/simulated.py): the same bits under any delays, and nobody reads old values."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models import Net, Run, equal, loss_of, make, seeded, tokens_for, train, train_on
from ranks import on_processes, on_threads, outcomes
from torch import nn

import zerolite
from zerolite import options, stream
from zerolite import updates as zerolite_updates
from zerolite.buffer.cuda import Cuda
from zerolite.buffer.room import Mapping
from zerolite.buffer.simulated import Simulated
from zerolite.comm.local import LocalComm
from zerolite.memory import storage_bytes
from zerolite.pending import PendingParameter

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WAYS = [{"update": "host"}, {"update": "stream"}, {"update": "auto"}, {"overlap": False}, {"resident": 0.5}]
WAYS += [{**way, "gradients": "device"} for way in WAYS]  # else on the host: this device does not say how much memory it has


@pytest.fixture
def device(monkeypatch):
    """device(delays) makes this process's CPU a device; chunks are small, and old parameters are NaN."""

    def play(delays: str = "1:2") -> None:
        monkeypatch.setenv("ZEROLITE_SIMULATE", delays)
        monkeypatch.setenv("ZEROLITE_DEBUG", "poison")
        monkeypatch.setattr(stream.Stream.__init__, "__defaults__", (128,))
        monkeypatch.setattr(options, "FEED", 128)

    return play


def variants(run: Run):
    for way in WAYS:
        for stage in (0, 1, 2, 3):
            yield replace(run, stage=stage, offload="states", more=tuple(way.items()))
        if "resident" not in way and "gradients" not in way:
            yield replace(run, stage=3, offload="all", more=tuple(way.items()))


@pytest.mark.parametrize(
    "world,dtype,micro,clip",
    [
        *((world, "bf16", micro, clip) for world in (1, 2) for micro, clip in ((1, 0.5), (3, None))),
        *((3, "bf16", 3, None), (1, "fp16", 1, 0.5), (2, "fp16", 3, None), (1, "fp32", 3, None), (2, "fp32", 1, 0.5)),
    ],
)
def test_same_bits_with_and_without_offload(device, world, micro, clip, dtype):
    run = Run(dtype=DTYPES[dtype], micro=micro, clip=clip, bucket_mb=2e-3, steps=2)
    expected = on_threads(world, train_on, run)
    device("1:0.5")
    for variant in variants(run):
        assert equal(on_threads(world, train_on, variant), expected), variant
    assert clip is None or max(expected[0]["norms"]) > clip


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_same_bits_with_rounded_moments(device, moments):
    run = Run(dtype=torch.bfloat16, clip=0.5, bucket_mb=2e-3, moments=moments)
    expected = on_threads(2, train_on, run)[0]
    device("2:0.5")
    for variant in variants(run):
        assert equal(on_threads(2, train_on, variant)[0], expected), variant


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stage,offload,gradients", [(2, "states", "host"), (2, "states", "device"), (3, "all", "host")])
def test_every_schedule_of_delays_gives_the_same_bits(device, seed, stage, offload, gradients):
    run = Run(stage=stage, dtype=torch.bfloat16, micro=1 + seed % 3, clip=0.5, bucket_mb=1e-3, no_sync=seed % 2 == 1)
    expected = on_threads(2, train_on, run)[0]
    device(f"{seed}:3")
    assert equal(on_threads(2, train_on, replace(run, offload=offload, more=(("gradients", gradients),)))[0], expected)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("gradients", ["host", "device"])
def test_a_whole_script_gives_the_same_bits(device, world, gradients):
    """Loss scaling, a step that is skipped, gradients by hand, parameters that are unfrozen later, and a checkpoint between."""

    def steps(comm, model, optimizer, first, last):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(first, last):
            model.blocks[0].requires_grad_(step > 1)
            for micro in range(1 + step % 2):
                scaler.scale(loss_of(model, tokens_for(step, micro, comm.rank))).backward()
            if step == 2:
                model.norm.weight.grad = torch.full_like(model.norm.weight, float("inf"))
            if step == 3:
                model.norm.weight.grad = torch.full_like(model.norm.weight, 0.25)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=step != 3)

    def body(comm, run):
        model = seeded(Net)
        model.blocks[0].requires_grad_(False)
        model, optimizer = make(run, comm, model)
        steps(comm, model, optimizer, 0, 4)
        saved = copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
        again, resumed = make(run, comm, seeded(Net, seed=9))
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        for pair in ((model, optimizer), (again, resumed)):
            steps(comm, *pair, 4, 6)
        assert equal(dict(model.state_dict()), dict(again.state_dict())) and equal(optimizer.full_state(), resumed.full_state())
        return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.full_state()

    run = Run(dtype=torch.bfloat16, bucket_mb=1e-3)
    expected = on_threads(world, body, run)
    device("5:1")
    for stage, update in ((0, "host"), (1, "auto"), (2, "stream"), (3, "host")):
        more = (("gradients", gradients), ("update", update))
        assert equal(on_threads(world, body, replace(run, stage=stage, offload="states", more=more)), expected), (stage, update)


def test_same_bits_over_processes(device, monkeypatch):
    run = Run(stage=2, dtype=torch.bfloat16, micro=2, clip=0.5, bucket_mb=2e-3)
    expected = on_processes(2, _train_group, run)
    env = {"ZEROLITE_SIMULATE": "3:2", "ZEROLITE_DEBUG": "poison"}
    for stage, offload, gradients in (
        (0, "states", "host"),
        (0, "states", "device"),
        (2, "states", "device"),
        (3, "all", "host"),
    ):
        more = (("gradients", gradients),)
        found = on_processes(2, _train_group, replace(run, stage=stage, offload=offload, more=more), env=env)
        assert equal(found, expected), (stage, offload, gradients)


def _train_group(rank, run):
    return train(None, rank, run)


def _groups(rank, stages, part=False):
    """Process groups that were made, while an optimizer lives and after it."""
    parts = [dist.new_group([0, 1]), dist.new_group([2])] if part else [None, None]
    known, found = dist.distributed_c10d._world.pg_map, []
    before = len(known)
    for stage in stages:
        model, optimizer = make(Run(stage=stage, offload="states", bucket_mb=2e-3), parts[rank // 2])
        loss_of(model, tokens_for(0, 0, rank)).backward()
        optimizer.step()
        inside = len(known) - before
        optimizer.remove_hooks()
        optimizer.remove_hooks()  # nothing is left to do
        found.append((inside, len(known) - before))
    return found


def _group_of_one(rank, part):
    """Rank 0 is in a group more than the others; then groups of two ranks where the world is larger."""
    parts = [dist.new_group([0, 1]), dist.new_group([2])] if part else []
    dist.new_group([0])
    if part and rank == 2:
        return "not in it"
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters())
    try:
        zerolite.ZeroOptimizer(inner, model, stage=2, offload="states", process_group=parts[0] if part else None)
    except ValueError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize("part", [False, True])
def test_ranks_in_different_numbers_of_groups(part):
    found = on_processes(2 + part, _group_of_one, part, env={"ZEROLITE_SIMULATE": "3:2"}, timeout=10)
    told = "expected ranks that are in equally many process groups, got [3, 2] groups"
    assert found == ["built"] * 2 if not part else all(told in text for text in found[:2]), found


def test_a_group_for_publishing_is_made_where_it_is_used_and_given_back():
    env = {"ZEROLITE_SIMULATE": "3:2"}
    group, memory = ({**env, "ZEROLITE_CONNECT": connect} for connect in ("group", "memory"))
    assert on_processes(2, _groups, (0, 1, 2, 1, 3), env=group) == [[(0, 0), (1, 0), (1, 0), (1, 0), (0, 0)]] * 2
    assert on_processes(2, _groups, (0, 2, 3), env=memory) == [[(0, 0)] * 3] * 2
    # torch would give the group of two ranks out of three a name that it has used
    assert on_processes(3, _groups, (1, 1), True, env=group)[:2] == [[(1, 1), (2, 2)]] * 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("gradients", ["host", "device"])
def test_other_optimizers_step_on_the_host(device, kind, gradients):
    run = Run(stage=2, optimizer=kind, lr=1e-3, clip=0.5, bucket_mb=2e-3)
    expected = train(LocalComm(), 0, run)
    device()
    assert equal(train(LocalComm(), 0, replace(run, offload="states", more=(("gradients", gradients),))), expected)
    with pytest.raises(ValueError, match="update='stream'"):
        make(replace(run, offload="states", more=(("update", "stream"),)), LocalComm())


# ---- readers


def after_a_step(offload="states", stage=2, **more):
    """A model and an optimizer right after step(), and the parameters that a reader must see."""
    run = Run(stage=stage, offload=offload, dtype=torch.bfloat16, bucket_mb=1e-3, more=tuple(more.items()))
    pair = []
    for overlap in (False, True):
        model, optimizer = make(replace(run, more=(*run.more, ("overlap", overlap))), LocalComm())
        loss_of(model, tokens_for(0, 0, 0)).backward()
        optimizer.step()
        pair.append((model, optimizer))
    expected = {name: p.detach().clone() for name, p in pair[0][0].state_dict().items()}
    return *pair[1], expected


READERS = {
    "state_dict": lambda model, name: model.state_dict()[name],
    "state_dict of a part": lambda model, name: model.get_submodule(name.rpartition(".")[0]).state_dict()[name.split(".")[-1]],
    "data": lambda model, name: model.get_parameter(name).data,
    "detach": lambda model, name: model.get_parameter(name).detach(),
    "clone": lambda model, name: model.get_parameter(name).clone(),
    "index": lambda model, name: model.get_parameter(name)[...],
    "in a list": lambda model, name: torch._foreach_mul([model.get_parameter(name)], 1.0)[0],
    "in a nested list": lambda model, name: torch.stack([model.get_parameter(name)])[0],
    "deepcopy of the model": lambda model, name: copy.deepcopy(model).get_parameter(name),
    "deepcopy": lambda model, name: copy.deepcopy(model.get_parameter(name)),
    "save": lambda model, name: saved(model.get_parameter(name)),
    "numpy": lambda model, name: torch.from_numpy(model.get_parameter(name).detach().float().numpy()).bfloat16(),
    "tolist": lambda model, name: torch.tensor(model.get_parameter(name).tolist()).bfloat16(),
    "vector": lambda model, name: nn.utils.parameters_to_vector([model.get_parameter(name)]).view(
        model.get_parameter(name).shape
    ),
    "functional_call": lambda model, name: torch.func.functional_call(
        Holder(), {"x": model.get_parameter(name)}, (torch.ones((), dtype=torch.bfloat16),)
    ),
    "weights of another module": lambda model, name: (
        nn.functional.linear(torch.eye(13, dtype=torch.bfloat16), model.get_parameter(name)).T
    ),
}


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(()))

    def forward(self, by):
        return self.x * by


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_between_step_and_forward_sees_the_new_value(device, reader):
    device("5:8")
    model, _, expected = after_a_step()
    name = "blocks.1.up.weight"
    assert type(model.get_parameter(name)) is PendingParameter
    value = READERS[reader](model, name)
    assert torch.equal(value, expected[name])
    assert type(model.get_parameter(name)) is nn.Parameter and type(value) is not PendingParameter


@pytest.mark.parametrize("stage,offload", [(0, "states"), (2, "states"), (3, "states"), (3, "all")])
def test_readers_of_the_optimizer_wait_for_all(device, stage, offload):
    device("6:8")
    for read in (
        lambda m, o: o.full_state()["blocks.1.up.weight"]["exp_avg"],
        lambda m, o: o.state[m.get_parameter("blocks.1.up.weight")]["exp_avg"].view(-1, 13),
        lambda m, o: o.state_dict()["state"],
        lambda m, o: o.consolidate_state_dict() or o.state_dict()["state"],
    ):
        model, optimizer, expected = after_a_step(offload, stage)
        value = read(model, optimizer)
        assert not optimizer._built.updates.tasks
        if isinstance(value, torch.Tensor):
            assert torch.isfinite(value).all() and value.abs().sum() > 0
        with optimizer.full_params():
            assert all(torch.equal(model.get_parameter(n).detach(), expected[n]) for n in ("scale", "blocks.0.up.bias"))


def test_a_module_whose_kernel_reads_behind_torch_waits(device):
    class Raw(nn.Linear):
        def forward(self, x):
            with torch._C.DisableTorchFunctionSubclass():  # as a C++ extension does
                return nn.functional.linear(x, self.weight, self.bias)

    device("7:8")
    results = []
    for overlap in (False, True):
        model = seeded(lambda: nn.Sequential(Raw(8, 8), Raw(8, 8)))
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer = zerolite.ZeroOptimizer(inner, model, offload="states", bucket_mb=1e-4, overlap=overlap)
        for _ in range(3):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model(torch.ones(2, 8)))
    assert torch.equal(*results) and torch.isfinite(results[0]).all()


def gate(optimizer, number):
    """Holds the updates from bucket `number` (in forward order) on, until the event that is returned is set."""
    opened = threading.Event()
    way = optimizer._built.updates.ways[0]
    names = [bucket.name for bucket in optimizer._trained]
    run = way.run

    def wait(task):
        if names.index(task.bucket.name) >= number:
            assert opened.wait(30)
        run(task)

    way.run = wait
    return opened


def test_a_forward_waits_for_its_own_bucket_alone_and_what_reads_no_value_for_none(device):
    device("0")
    model = seeded(lambda: nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(4)]))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = zerolite.ZeroOptimizer(inner, model, offload="states", bucket_mb=2**-10, update="host")
    assert len(optimizer._trained) == 4
    model(torch.ones(1, 16)).sum().backward()
    opened = gate(optimizer, 2)
    optimizer.step()  # returns though two updates are held
    model.zero_grad()
    optimizer.zero_grad()
    x = model[1](model[0](torch.ones(1, 16)))
    kinds = [type(layer.weight) for layer in model]
    assert kinds == [nn.Parameter, nn.Parameter, PendingParameter, PendingParameter]
    p = model[3].weight
    assert (p.shape, p.dtype, p.grad, p.requires_grad, p.numel(), p.device.type) == ((16, 16), p.dtype, None, True, 256, "cpu")
    assert isinstance(p, nn.Parameter) and p in set(model.parameters()) and type(p) is PendingParameter
    reader = threading.Thread(target=lambda: model[3](model[2](x)).sum().backward())
    reader.start()
    time.sleep(0.1)
    assert reader.is_alive()  # it waits
    opened.set()
    reader.join(30)
    assert not reader.is_alive() and all(type(layer.weight) is nn.Parameter for layer in model)


def test_gradients_on_the_device_are_free_when_their_bucket_is_updated(device):
    device("0")
    model = seeded(lambda: nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(4)]))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    options = {"offload": "states", "gradients": "device", "update": "host"}
    optimizer = zerolite.ZeroOptimizer(inner, model, bucket_mb=2**-10, **options)
    model(torch.ones(1, 16)).sum().backward()
    held = [weakref.ref(bucket.grads.average.value) for bucket in optimizer._trained]
    opened = gate(optimizer, 2)
    optimizer.step()
    model[1](model[0](torch.ones(1, 16)))
    assert [ref() is None for ref in held] == [True, True, False, False]
    opened.set()
    optimizer.state_dict()
    assert not any(ref() for ref in held)


# ---- failures


def test_a_failed_update_is_raised_at_the_next_call(device):
    device("0")
    for call in (
        lambda m, o: o.step(),
        lambda m, o: loss_of(m, tokens_for(1, 0, 0)),
        lambda m, o: m.blocks[0].up.weight.norm(),
        lambda m, o: o.state_dict(),
    ):
        model, optimizer = make(Run(offload="states", bucket_mb=1e-3, more=(("update", "host"),)), LocalComm())
        loss_of(model, tokens_for(0, 0, 0)).backward()

        def fail(task):
            raise ValueError("no such kernel")

        optimizer._built.updates.ways[0].run = fail
        with pytest.raises(RuntimeError, match=r"an offloaded update failed .*no such kernel.*checkpoint"):
            optimizer.step()  # perhaps it has failed before this returns
            call(model, optimizer)
        with pytest.raises(RuntimeError, match=r"an offloaded update failed"):
            optimizer.zero_grad()


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_an_infinite_gradient_on_one_rank_touches_no_state(device, gradients):
    def body(comm):
        model, optimizer = make(Run(stage=2, offload="states", bucket_mb=1e-3, more=(("gradients", gradients),)), comm)
        for step in range(2):
            loss_of(model, tokens_for(step, 0, comm.rank)).backward()
            if step == 1 and comm.rank == 1:
                model.blocks[0].up.weight.grad = torch.full_like(model.blocks[0].up.weight, float("inf"))
            elif step == 1:
                model.blocks[0].up.weight.grad = torch.zeros_like(model.blocks[0].up.weight)
            before = {n: v.clone() for n, v in model.state_dict().items()}, copy.deepcopy(optimizer.full_state())
            optimizer.step()
            optimizer.zero_grad()
        return equal((dict(model.state_dict()), optimizer.full_state()), before), optimizer.skipped_steps

    device("4:3")
    with pytest.warns(UserWarning, match="not finite"):
        assert on_threads(2, body) == [(True, 1), (True, 1)]


EXIT = """
import os, torch, zerolite
from torch import nn
model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, offload="states", bucket_mb=0.01)
model(torch.ones(1, 64)).sum().backward()
optimizer.step()
assert optimizer._built.updates.tasks
if {fork}:
    child = os.fork()
    if child == 0:
        try:
            model[7].weight.norm()
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
if {drop}:
    del optimizer
    assert torch.isfinite(model(torch.ones(1, 64))).all()
print("end")
"""


@pytest.mark.parametrize("fork,drop", [(0, 0), (1, 0), (0, 1)])
def test_the_process_ends_with_an_update_under_way(fork, drop):
    env = {**os.environ, "ZEROLITE_SIMULATE": "1:60", "ZEROLITE_DEBUG": "poison"}
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(fork=fork, drop=drop)], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "end"), done.stderr


def test_a_dropped_optimizer_ends_its_threads(device):
    device("0")
    before = threading.active_count()
    for _ in range(3):
        model, optimizer = make(Run(offload="states", bucket_mb=1e-3), LocalComm())
        loss_of(model, tokens_for(0, 0, 0)).backward()
        optimizer.step()
        loss_of(model, tokens_for(0, 0, 0))
        optimizer.remove_hooks()
        del model, optimizer
    import gc

    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    "options,message",
    [
        ({"update": "gpu"}, "update: expected one of 'auto', 'host', 'stream', got 'gpu'"),
        ({"resident": 1.5}, "resident: expected 'auto' or a part of the states from 0.0 to 1.0, got 1.5"),
        ({"resident": 0.5, "offload": None}, "resident=0.5: expected offload='states'"),
        ({"resident": 0.5, "offload": "all", "stage": 3}, "resident=0.5: expected offload='states'"),
        ({"gradients": "gpu"}, "gradients: expected one of 'auto', 'host', 'device', got 'gpu'"),
        (
            {"gradients": "device", "offload": "all", "stage": 3},
            "gradients='device': expected offload='states', got offload='all'",
        ),
        ({"gradients": "host", "offload": None}, "gradients='host': expected offload='states' or 'all', got offload=None"),
    ],
)
def test_options_that_do_not_exist_or_do_not_go_together(options, message):
    model = seeded(Net)
    with pytest.raises(ValueError, match=message):
        zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, **{"offload": "states", **options})
    if "gradients" in options:
        with pytest.raises(ValueError, match=message):
            zerolite.plan(model, **{"stage": 2, "offload": "states", **options})


def test_unknown_words_of_the_environment(monkeypatch):
    monkeypatch.setenv("ZEROLITE_SIMULATE", "soon")
    with pytest.raises(ValueError, match=r"ZEROLITE_SIMULATE: expected SEED.*, got 'soon'"):
        make(Run(offload="states"), LocalComm())
    monkeypatch.setenv("ZEROLITE_SIMULATE", "0")
    monkeypatch.setenv("ZEROLITE_DEBUG", "poisson")
    with pytest.raises(ValueError, match="ZEROLITE_DEBUG: expected 'poison' or nothing, got 'poisson'"):
        make(Run(offload="states"), LocalComm())


# ---- bytes


@pytest.mark.parametrize("stage,offload", [(0, "states"), (1, "states"), (2, "states"), (3, "states"), (3, "all")])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("moments", ["fp32", "int8"])
@pytest.mark.parametrize("resident", [0.0, 0.4])
@pytest.mark.parametrize("gradients", ["host", "device"])
def test_live_storages_equal_the_plan(device, monkeypatch, stage, offload, world, moments, resident, gradients):
    if offload == "all":
        resident, gradients = 0.0, "host"
    more = (("resident", resident), ("update", "host"), ("gradients", gradients))

    def body(comm):
        run = Run(stage=stage, offload=offload, dtype=torch.bfloat16, bucket_mb=2e-3, moments=moments, more=more)
        model, optimizer = make(run, comm)
        found = []
        for step in range(2):
            loss_of(model, tokens_for(step, 0, comm.rank)).backward()
            optimizer._built.updates.settle()
            found.append(optimizer.memory())
            optimizer.step()
            optimizer.zero_grad()
        feed = optimizer._built.staging.feed
        slots = storage_bytes([slot for slot in feed.ring.slots if slot is not None]) if feed is not None else 0
        return found, optimizer.plan, [bucket.kept for bucket in optimizer._trained], slots

    device("0")
    monkeypatch.setattr(options, "FEED", 512)
    for found, plan, kept, slots in on_threads(world, body):
        assert any(kept) == (resident > 0) and not all(kept)
        for memory in found:
            assert memory.live == plan.bytes_at_rest
        by_name = {term.name: term for term in plan.terms}
        assert by_name["moments"].home == "host" and (offload == "all" or by_name["host half"].home == "host")
        assert by_name["parameters"].home == ("host" if offload == "all" else "device")
        assert not resident or by_name["moments kept"].home == "device"
        assert by_name["gradients"].home == plan.grads.home == gradients and plan.states.home == "host"
        if gradients == "device":
            longest = max(plan._range(row) for row in plan.trained if not row.kept)
            assert by_name["slots of gradients"].rank == slots == 2 * 2 * min(longest, 512)
            assert not {"rounds on their way", "later rounds"} & by_name.keys()
        host = sum(term.rank for term in plan.terms if term.home == "host" and term.when == "always")
        half = 0 if offload == "all" else by_name["host half"].rank
        parts = ["parameters"] * (offload == "all") + ["master", "moments"] + ["gradients"] * (gradients == "host")
        assert host == half + sum(by_name[part].rank for part in parts) + slots


def test_what_a_gather_brings_up_is_free_when_it_is_released(device, monkeypatch):
    """The allocator, told of a copy into memory that release() frees, would keep it until the prefetch after it is done."""
    device("1:1")
    asked = []
    up = Simulated.up

    def watch(self, out, *args, **options):
        asked.append(options.get("kept", False))
        return up(self, out, *args, **options)

    monkeypatch.setattr(Simulated, "up", watch)
    model, optimizer = make(Run(stage=3, offload="all", bucket_mb=1e-3, more=(("update", "host"),)), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    assert asked and all(asked)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_two_bytes_a_parameter_cross_each_way(device, monkeypatch, gradients):
    device("0")
    seen = []
    start = Simulated.__init__

    def watch(self, *args):
        start(self, *args)
        seen.append(self)

    monkeypatch.setattr(Simulated, "__init__", watch)
    more = (("update", "host"), ("gradients", gradients))
    model, optimizer = make(Run(offload="states", dtype=torch.bfloat16, more=more), LocalComm())
    elements = sum(bucket.layout.numel for bucket in optimizer._trained)
    for step in range(3):
        loss_of(model, tokens_for(step, 0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()
    assert seen[0].copied == {"down": 3 * 2 * elements, "up": 3 * 2 * elements}


@pytest.mark.parametrize(
    "gradients,update,moments,expected",
    [
        ("auto", "auto", "fp32", 14.0),  # nobody says how much memory the device has
        ("host", "auto", "fp32", 14.0),
        ("host", "auto", "int8", 8.03),
        ("device", "auto", "fp32", 12.01),
        ("device", "auto", "int8", 6.04),
        ("device", "stream", "fp32", 12.0),
    ],
)
def test_host_bytes_a_parameter_of_a_plan(gradients, update, moments, expected):
    """Exact: half 2, remainder 2, moments 8, gradients 2 or slots; DeepSpeed: 18 to 20 (peers measured in docs/offload.md)."""
    options = {"param_dtype": torch.bfloat16, "gradients": gradients, "update": update, "moments": moments}
    plan = zerolite.plan(10**9, stage=2, offload="states", device="cuda", **options)
    assert plan.host_peak / plan.numel == pytest.approx(expected, rel=1e-3)


def test_gradients_rest_on_the_device_where_it_has_room_for_them(device):
    parameters = sum(p.numel() for p in seeded(Net).parameters())
    run = Run(stage=2, offload="states", dtype=torch.bfloat16, bucket_mb=1e-3, more=(("update", "host"),))
    expected = on_threads(2, train_on, replace(run, offload=None))
    homes = []
    for size in (5 * parameters, 20 * parameters):  # parameters 2, gradients 2/N, and buckets in flight
        device(f"0:0:{size}")
        assert equal(on_threads(2, train_on, run), expected)
        plans = on_threads(2, lambda comm: make(run, comm)[1].plan)
        assert plans[0] == plans[1] and plans[0].used("device") <= size
        homes.append(plans[0].grads.home)
    assert homes == ["host", "device"]
    chosen = make(replace(run, stage="auto"), LocalComm())[1].plan
    assert chosen.grads.home == "device" and "gradients='device', the fastest" in chosen.notes[0]
    small, large = (
        zerolite.plan(10**9, stage=2, offload="states", param_dtype=torch.bfloat16, device_bytes=size) for size in ("5G", "8G")
    )
    assert (small.grads.home, large.grads.home) == ("host", "device") and "gradients='device'" in large.label
    assert small.used("device") < large.used("device") and small.host_peak > large.host_peak
    with pytest.raises(
        ValueError, match=r"host memory: .* The nearest that fit: .*stage 2, offload='states', gradients='device'"
    ):
        zerolite.plan(
            10**9, stage=2, offload="states", param_dtype=torch.bfloat16, device_bytes="8G", host_bytes="13G", gradients="host"
        )


def test_as_much_stays_on_the_device_as_its_memory_takes(device):
    run = Run(stage=2, offload="states", dtype=torch.bfloat16, bucket_mb=1e-3, more=(("resident", "auto"), ("update", "host")))
    states = 10 * sum(p.numel() for p in seeded(Net).parameters())
    found = []
    for size in (1000, states, 2 * states, 8 * states):
        device(f"0:0:{size}")
        try:
            model, optimizer = make(run, LocalComm())
        except ValueError as error:
            found.append(str(error))
            continue
        loss_of(model, tokens_for(0, 0, 0)).backward()
        optimizer.step()
        found.append(optimizer.plan.resident)
        assert optimizer.plan.used("device") <= size
        kept = sum(b.layout.used for b in optimizer._trained if b.kept)
        assert 0 <= found[-1] * states / 10 - kept <= max(b.layout.used for b in optimizer._trained)
    assert "device memory: expected at most 1,000 bytes" in found[0]
    assert 0.0 < found[1] < found[2] < 1.0 == found[3]


def test_a_plan_says_what_part_of_the_states_fits_on_the_device():
    at = {"stage": 2, "offload": "states", "param_dtype": torch.bfloat16, "resident": "auto"}
    parts = [zerolite.plan(10**9, device_bytes=size, **at).resident for size in ("8G", "12G", "40G")]
    assert 0.0 < parts[0] < parts[1] < parts[2] == 1.0


def test_a_host_without_enough_memory_is_refused_before_anything_is_allocated(device):
    device("0")
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(1 << 16, 1 << 16, bias=False) for _ in range(200)])
    with pytest.raises(ValueError, match=r"host memory: expected at most .* bytes a host, got a peak of"):
        zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3, offload="all")


def test_pinning_is_of_the_links_device_whichever_is_current(monkeypatch):
    called = []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            called.append("register")
            return 0

        def cudaHostUnregister(self, address):
            called.append("unregister")

    @contextlib.contextmanager
    def current(device):
        called.append(("device", device))
        yield

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: called.append(("synchronize", device)))
    link = Cuda.__new__(Cuda)  # streams need a GPU
    link.device, link._node, link._said = torch.device("cuda", 1), None, False
    region, memory = Mapping(-1, 4096), torch.zeros(8)
    link._pin(region)
    link.register(memory)
    del region, memory
    device = torch.device("cuda", 1)
    assert called == [("device", device), "register"] * 2 + [("synchronize", device), "unregister"] * 2


# ---- torch.compile


def test_a_compiled_model_waits_in_step_and_gives_the_same_bits(device, caplog):
    torch._dynamo.reset()

    def run(compiled, offload):
        model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer = zerolite.ZeroOptimizer(inner, model, offload=offload, bucket_mb=1e-4)
        forward = torch.compile(model, backend="eager") if compiled else model
        for _ in range(5):
            forward(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict()), optimizer

    expected, _ = run(False, None)
    device("3:4")
    got, optimizer = run(True, "states")
    assert equal(got, expected) and not optimizer._built.updates.overlap
    assert sum("torch.compile" in record.message for record in caplog.records) == 1
    torch._dynamo.reset()


# ---- devices that no fast link connects


@pytest.mark.parametrize(
    "world,stage,offload,micro",
    [(2, 0, "states", 1), (3, 1, "states", 3), (2, 2, "states", 1), (2, 3, "states", 2), (3, 3, "all", 1)],
)
def test_same_bits_through_shared_pinned_memory(world, stage, offload, micro):
    run = Run(stage=stage, dtype=torch.bfloat16, micro=micro, clip=0.5, bucket_mb=2e-3, no_sync=micro == 3)
    expected = on_processes(world, _train_group, run, env={"ZEROLITE_SHARED": "0"})
    # gradients="auto" takes the host here, however much memory the devices have
    env = {"ZEROLITE_SIMULATE": "3:2:1000000000", "ZEROLITE_DEBUG": "poison", "ZEROLITE_CONNECT": "memory"}
    found = on_processes(world, _train_pinned, replace(run, offload=offload), env=env)
    assert equal([result for result, _ in found], expected)
    assert all(connected for _, connected in found)


def _train_pinned(rank, run):
    _, optimizer = make(run, None)
    connected = type(optimizer._built.comm).__name__ == "PinnedComm"
    optimizer.remove_hooks()
    return train(None, rank, run), connected


def test_ranks_are_asked_how_devices_are_connected(monkeypatch):
    monkeypatch.setenv("ZEROLITE_SIMULATE", "0")
    monkeypatch.setenv("ZEROLITE_CONNECT", "wire")
    with pytest.raises(ValueError, match="ZEROLITE_CONNECT: expected 'auto', 'memory' or 'group', got 'wire'"):
        make(Run(offload="states"), LocalComm())


def _die(rank):
    model, optimizer = make(Run(stage=2, offload="states", bucket_mb=2e-3), None)
    for step in range(3):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        if rank == 1 and step == 1:
            os._exit(3)
        optimizer.step()
        optimizer.zero_grad()
    return "trained"


@pytest.mark.parametrize("connect", ["memory", "group"])
def test_a_rank_that_dies_is_an_error_on_the_others(connect):
    env = {"ZEROLITE_SIMULATE": "1:1", "ZEROLITE_CONNECT": connect}
    start = time.monotonic()
    first, second = outcomes(2, _die, timeout=20, env=env)
    assert second == ("died", 3) and first[0] == "error" and first[1][0] == "RankError", first
    assert time.monotonic() - start < 60


# ---- found in review


@pytest.mark.parametrize("stage,offload", [(1, "states"), (2, "states"), (3, "states"), (3, "all")])
@pytest.mark.parametrize("world", [1, 2])
def test_writes_in_full_params_are_what_the_next_forward_and_the_master_have(device, stage, offload, world):
    def body(comm, way):
        model, optimizer = make(Run(stage=stage, offload=way, dtype=torch.bfloat16, bucket_mb=2e-3), comm)
        losses = []
        for step in range(3):
            loss = loss_of(model, tokens_for(step, 0, comm.rank))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with optimizer.full_params():
                for p in model.parameters():
                    p.mul_(0.5)
            losses.append(loss.item())
        return losses, {name: value.clone() for name, value in model.state_dict().items()}

    expected = on_threads(world, body, None)
    device("3:2")
    assert equal(on_threads(world, body, offload), expected)


@pytest.mark.parametrize("stage,offload", [(3, None), (3, "states"), (3, "all")])
@pytest.mark.parametrize("world", [1, 2])
def test_a_write_during_the_forward_is_what_the_update_begins_with(device, stage, offload, world):
    """Of a block, and of a leaf, whose parameters rest on the host and come for their own forward alone."""

    def halve(module, _):
        with torch.no_grad():
            module.weight.mul_(0.5)

    def body(comm, stage, offload):
        run = Run(stage=stage, offload=offload, dtype=torch.bfloat16, bucket_mb=7e-4)
        model, optimizer = make(run, comm, seeded(lambda: Net(tied=False)))
        assert stage < 3 or any(unit.is_leaf for unit in optimizer._built.schedule.units)
        for module in (model.blocks[1].up, model.head):
            module.register_forward_pre_hook(halve)
        losses = []
        for step in range(3):
            losses.append(loss_of(model, tokens_for(step, 0, comm.rank)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses).detach(), {name: value.clone() for name, value in model.state_dict().items()}

    expected = on_threads(world, body, 2, None)
    device("3:2")
    assert equal(on_threads(world, body, stage, offload), expected)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_gradients_that_were_cleared_leave_nothing_behind(device, gradients):
    """Sums of further rounds are added by a worker, perhaps after zero_grad()."""

    def body():
        more = (("gradients", gradients),)
        model, optimizer = make(Run(stage=2, offload="states", dtype=torch.bfloat16, bucket_mb=1e-3, more=more), LocalComm())
        for step in range(3):
            for micro in range(3):
                loss_of(model, tokens_for(step, micro, 0)).backward()
            optimizer.zero_grad()
            for micro in range(2):
                loss_of(model, tokens_for(step, micro, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    device("0")
    expected = body()
    for seed in range(4):
        device(f"{seed}:4")
        assert equal(body(), expected), seed


def test_a_failure_while_parameters_are_published_wakes_everyone(device):
    device("0")
    model, optimizer = make(Run(offload="states", bucket_mb=1e-3), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()

    def fail(*_):
        raise RuntimeError("no bus")

    optimizer._trained[1].publish = fail
    with pytest.raises(RuntimeError, match=r"an offloaded update failed .*no bus"):
        optimizer.step()
        loss_of(model, tokens_for(1, 0, 0))
    with pytest.raises(RuntimeError, match=r"an offloaded update failed"):
        optimizer.state_dict()


def test_a_model_dropped_with_an_update_under_way_is_garbage(device):
    import gc

    device("1:5")
    model, optimizer = make(Run(offload="states", bucket_mb=1e-3), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    seen = weakref.ref(model), weakref.ref(optimizer._trained[0])
    del model, optimizer
    deadline = time.monotonic() + 20
    while any(ref() is not None for ref in seen) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert [ref() for ref in seen] == [None, None]


def test_plain_ranks_with_devices_use_the_group_whatever_connects_them():
    run = Run(stage=1, dtype=torch.bfloat16, micro=2, clip=0.5, bucket_mb=1e-3)
    expected = on_processes(2, _train_group, run, env={"ZEROLITE_SHARED": "0"})
    env = {"ZEROLITE_SIMULATE": "3:1", "ZEROLITE_CONNECT": "memory"}
    for stage, more in ((1, ()), (2, (("resident", 0.5),)), (2, (("gradients", "device"),))):
        offload = "states" if more else None
        found = on_processes(2, _train_pinned, replace(run, stage=stage, offload=offload, more=more), env=env)
        assert equal([result for result, _ in found], expected) and not any(connected for _, connected in found)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_gradients_read_after_a_step_wait_for_it(device, gradients):
    """zero_grad(set_to_none=False) and a read make a new average in memory that the update under way reads."""

    def body(overlap):
        more = (("overlap", overlap), ("gradients", gradients))
        model, optimizer = make(Run(offload="states", bucket_mb=1e-3, more=more), LocalComm())
        for step in range(3):
            loss_of(model, tokens_for(step, 0, 0)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            assert not model.norm.weight.grad.clone().any() and not any(g.any() for g in optimizer.full_grads().values())
        return {name: value.clone() for name, value in model.state_dict().items()}

    device("2:8")
    assert equal(body(True), body(False))


def test_fp32_writes_through_data_in_full_params(device):
    device("0")
    model, optimizer = make(Run(stage=2, offload="states", bucket_mb=1e-3), LocalComm())
    with optimizer.full_params():
        model.norm.weight.data.fill_(3.0)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    assert (model.norm.weight - 3.0).abs().max() < 0.1


def test_another_thread_reads_a_parameter_and_is_held_up(device):
    """It has waited for one update, and is scheduled again when the next one is under way."""
    device("1:20")
    model, optimizer = make(Run(stage=2, offload="states"), LocalComm())

    def step(number):
        optimizer.zero_grad()
        loss_of(model, tokens_for(number, 0, 0)).backward()
        optimizer.step()

    step(0)
    bucket = optimizer._built.buckets[0]
    job = optimizer._built.updates.tasks[bucket].job
    waited, go, wait = threading.Event(), threading.Event(), job.wait

    def held():
        wait()
        if threading.current_thread() is reader:
            waited.set()
            go.wait()

    job.wait, seen, param = held, [], bucket.entries[0].param
    reader = threading.Thread(target=lambda: seen.append(param.sum()))
    reader.start()
    waited.wait()
    step(1)
    assert type(param) is PendingParameter
    go.set()
    reader.join()
    assert bool(seen[0].isfinite()) and bool(param.isfinite().all()) and type(param) is nn.Parameter  # old values are NaN


def test_another_thread_waits_for_an_update_while_it_is_handed_over(device, monkeypatch):
    """It is done before the parameters are told to wait for it."""
    device("1:5")
    model, optimizer = make(Run(stage=2, offload="states", bucket_mb=1e-3), LocalComm())
    updates = optimizer._built.updates
    mark = zerolite_updates.mark

    def late(params, wait):
        reader = threading.Thread(target=optimizer.state_dict)
        reader.start()
        reader.join(0.2)  # it waits for a lock, or is through
        return mark(params, wait)

    for number in range(2):
        loss_of(model, tokens_for(number, 0, 0)).backward()
        monkeypatch.setattr(zerolite_updates, "mark", late)
        optimizer.step()
        monkeypatch.setattr(zerolite_updates, "mark", mark)
        optimizer.zero_grad()
    updates.settle()
    assert not updates.tasks and all(type(p) is nn.Parameter and bool(p.isfinite().all()) for p in model.parameters())
