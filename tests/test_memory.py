"""Promise 2: live bytes equal the plan's; and what is whole when, at stage 3."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import Block, Net, Run, equal, loss_of, make, seeded, tokens_for, train
from ranks import on_threads
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerolite
from zerolite.build import BUILT
from zerolite.comm.local import LocalComm

DTYPES = [None, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offload", [None, "states"])
def test_live_storages_equal_the_plan(stage, world, dtype, offload):
    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=dtype, offload=offload, bucket_mb=4e-3), comm)
        found = []
        for step in range(2):
            loss_of(model, tokens_for(step, 0, comm.rank)).backward()
            found.append((optimizer.memory(), "gradients at rest"))
            optimizer.step()
            found.append((optimizer.memory(), "after the step"))
            optimizer.zero_grad()
        return found, optimizer.plan

    for found, plan in on_threads(world, body):
        for memory, when in found:
            planned = dict(plan.bytes_at_rest)
            if when == "after the step" and (world == 1 or not plan.grads.sharded):
                planned["grads"] = 0  # else the shard's memory is kept for the next average
            assert memory.live == planned, when
        assert {plan.states.home, plan.grads.home} == {"host" if offload else "device"}


@pytest.mark.parametrize("kind,width", [(torch.optim.SGD, 0), (torch.optim.RMSprop, 4), (torch.optim.NAdam, 8)])
def test_bytes_of_other_optimizers(kind, width):
    model = seeded(Net)
    optimizer = zerolite.ZeroOptimizer(kind(model.parameters(), lr=1e-3), model, stage=1, process_group=LocalComm())
    assert optimizer.plan.bytes_at_rest["states"] == sum(b.layout.numel for b in optimizer._trained) * width
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    # pieces hold no padding, and small optimizers keep one number a parameter beside: within 64 elements each
    live, planned = optimizer.memory().live["states"], optimizer.plan.bytes_at_rest["states"]
    assert planned - live <= 64 * width * len(list(model.parameters())) and live <= planned


def test_bytes_a_parameter_of_the_table():
    """The README's table, on a model whose sizes need no padding."""

    def body(comm, stage):
        model = seeded(lambda: nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)]))
        inner = torch.optim.AdamW(model.parameters())
        optimizer = zerolite.ZeroOptimizer(inner, model, stage=stage, param_dtype=torch.bfloat16, process_group=comm)
        model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        memory = optimizer.memory()
        return {term: value / memory.numel for term, value in memory.live.items()}

    expected = {0: (2, 2, 10), 1: (2, 2, 2.5), 2: (2, 0.5, 2.5), 3: (0.5, 0.5, 2.5)}
    for stage, row in expected.items():
        assert on_threads(4, body, stage)[3] == dict(zip(("params", "grads", "states"), row, strict=True))


class Watched(Net):
    """Records which units are whole while each block runs."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x)
            self.seen.append((number, [unit.name for unit in self.optimizer._built.schedule.units if unit.buckets[0].whole]))
        return self.head(self.norm(x))


def test_stage_3_gathers_unit_by_unit_with_one_prefetched():
    model = seeded(lambda: Watched(blocks=5))
    model.seen = []
    _, optimizer = make(Run(stage=3), LocalComm(), model)
    object.__setattr__(model, "optimizer", optimizer)
    for step in range(2):
        model.seen.clear()
        loss_of(model, tokens_for(step, 0, 0)).backward()
        assert not any(unit.buckets[0].whole for unit in optimizer._built.schedule.units)
        optimizer.step()
        optimizer.zero_grad()
    # the second time the order is known: after block n only the next is being gathered, and the last one is kept
    assert model.seen == [(n, ["root", f"blocks.{min(n + 1, 4)}"]) for n in range(5)]


def test_a_backward_releases_a_unit_before_the_next_is_prefetched():
    model, optimizer = make(Run(stage=3, bucket_mb=2e-3), LocalComm(), seeded(lambda: Net(blocks=5, tied=False)))
    units = [unit for unit in optimizer._built.schedule.units if not unit.is_root]
    seen, phase = [], ["forward"]

    def hear(event, name):
        if event == "backward":
            phase[0] = name
        whole = {unit.name for unit in units if any(bucket.whole for bucket in unit.buckets)}
        seen.append((phase[0], whole))

    optimizer._built.comm.ledger.listener = hear
    for step in range(2):
        seen.clear()
        loss_of(model, tokens_for(step, 0, 0)).backward()
        phase[0] = "forward"
        optimizer.step()
        optimizer.zero_grad()
    backward = [whole for when, whole in seen if when == "begin"]
    assert max(map(len, backward)) == 2 and {"blocks.3", "blocks.4"} in backward and not backward[-1]


# ---- leaves: embeddings and heads


class Odd(Net):
    """A model that uses its embedding for the head without tying it, as a module or as a plain function."""

    def __init__(self, first=False):
        super().__init__(tied=False)
        self.first = first

    def forward(self, tokens):
        weight = self.embed.weight if self.first else None
        x = F.embedding(tokens, weight) if self.first else self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x * self.scale, use_reentrant=False)
        return F.linear(self.norm(x), self.embed.weight) + self.head(x)


def test_embeddings_and_heads_come_and_go_like_blocks():
    model, optimizer = make(Run(stage=3, bucket_mb=1e-3), LocalComm(), seeded(lambda: Net(tied=False)))
    schedule = optimizer._built.schedule
    assert [unit.name for unit in schedule.units if unit.is_leaf] == ["embed", "head"]
    whole = []
    for module in (model.blocks[1], model.head):
        module.register_forward_pre_hook(lambda m, _: whole.append({u.name for u in schedule.units if u.shown}))
    for step in range(2):
        whole.clear()
        loss_of(model, tokens_for(step, 0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert whole == [{"root", "blocks.1"}, {"root", "head"}]
    assert not any(unit.is_root for unit in schedule.units[1:])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_leaf_that_others_read_stays_with_the_root_and_that_is_said_once(first, world, caplog):
    run = Run(stage=3, bucket_mb=1e-3, clip=0.5)
    expected = on_threads(world, lambda comm: train(comm, comm.rank, replace(run, stage=2), seeded(lambda: Odd(first))))

    def body(comm):
        model = seeded(lambda: Odd(first))
        result = train(comm, comm.rank, run, model)
        optimizer = BUILT[model]()
        assert [unit.name for unit in optimizer.schedule.units if unit.is_root] == ["root", "embed"]
        assert [row.unit for row in optimizer.plan.rows[:3]] == [0, 0, 3] and {type(p) for p in model.parameters()} == {
            nn.Parameter
        }
        return result

    assert equal(on_threads(world, body), expected)
    assert sum("'embed' are used outside" in record.message for record in caplog.records) == world


def test_a_leaf_is_read_between_forward_and_backward_and_in_parts_of_the_model():
    model, optimizer = make(Run(stage=3, bucket_mb=1e-3), LocalComm(), seeded(lambda: Net(tied=False)))
    like = seeded(lambda: Net(tied=False))
    assert model.embed.weight.isnan().all()  # nothing is in use
    tokens = tokens_for(0, 0, 0)
    losses = []
    for m in (model, like):
        hidden = m.blocks[0](m.embed(tokens))
        losses.append(F.linear(hidden, m.embed.weight).square().sum() + m.head(hidden).square().sum())
        losses[-1].backward()
    assert torch.equal(*losses)
    grads = optimizer.full_grads()
    assert all(torch.equal(grads[name], p.grad) for name, p in like.named_parameters() if p.grad is not None)
    assert model.embed.weight.isnan().all() and not model.embed.__dict__.get("_zerolite_wait")


def test_a_forward_that_fails_leaves_leaves_as_they_are_read():
    model, _ = make(Run(stage=3, bucket_mb=1e-3), LocalComm(), seeded(lambda: Net(tied=False)))
    expected = loss_of(seeded(lambda: Net(tied=False)), tokens_for(0, 0, 0))
    handle = model.norm.register_forward_pre_hook(lambda m, _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, tokens_for(0, 0, 0))
    handle.remove()
    state = model.state_dict()
    assert torch.equal(state["embed.weight"], seeded(lambda: Net(tied=False)).embed.weight)
    assert torch.equal(loss_of(model, tokens_for(0, 0, 0)), expected)


def test_released_parameters_keep_shape_dtype_and_device_and_never_lie():
    model, _ = make(Run(stage=3, dtype=torch.bfloat16), LocalComm())
    like = seeded(Net)
    for (name, p), q in zip(model.named_parameters(), like.parameters(), strict=True):
        assert (p.shape, p.numel(), p.device, p.dtype) == (q.shape, q.numel(), q.device, torch.bfloat16), name
        assert bool(torch.isnan(p).all()), name
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        model.norm.weight.add_(1.0)


def test_full_params_and_state_dicts_are_whole_at_stage_3():
    def body(comm):
        model, optimizer = make(Run(stage=3), comm)
        whole = {name: value.clone() for name, value in model.state_dict().items()}
        part = {name: value.clone() for name, value in model.blocks[1].state_dict().items()}
        with optimizer.full_params():
            inside = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.scale.fill_(3.0)
        optimizer._built.schedule.give_back()
        return whole, part, inside, model.state_dict()["scale"].item()

    expected = seeded(Net).state_dict()
    for whole, part, inside, scale in on_threads(3, body):
        assert equal(whole, dict(expected)) and scale == 3.0
        assert equal(part, {k.removeprefix("blocks.1."): v for k, v in expected.items() if k.startswith("blocks.1.")})
        assert all(torch.equal(value, expected[name]) for name, value in inside.items())


def test_load_state_dict_of_the_model_and_of_a_part_at_stage_3():
    def body(comm):
        model, _ = make(Run(stage=3), comm)
        other = seeded(Net, seed=5)
        model.load_state_dict(other.state_dict())
        first = equal(dict(model.state_dict()), dict(other.state_dict()))
        third = seeded(Net, seed=6)
        model.blocks[0].load_state_dict(third.blocks[0].state_dict())
        result = model.state_dict()
        return first, torch.equal(result["blocks.0.up.weight"], third.blocks[0].up.weight)

    assert on_threads(2, body) == [(True, True)] * 2


def test_a_write_during_the_forward_is_kept_at_stage_3():
    model = seeded(lambda: nn.Sequential(Block(8), Block(8)))
    _, optimizer = make(Run(stage=3, lr=0.0), LocalComm(), model)
    handle = model[0].register_forward_pre_hook(lambda m, _: m.norm.weight.data.add_(0) and None)
    handle.remove()

    def clamp(module, _):
        with torch.no_grad():
            module.up.weight.clamp_(-0.01, 0.01)

    model[0].register_forward_pre_hook(clamp)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert model.state_dict()["0.up.weight"].abs().max() <= 0.01 + 1e-9


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_dropped_model_and_optimizer_free_their_memory(stage):
    model, optimizer = make(Run(stage=stage), LocalComm())
    for step in range(2):
        loss_of(model, tokens_for(step, 0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


def test_units_option_chooses_what_is_gathered_as_one():
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters())
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=3, units=[nn.Linear], process_group=LocalComm())
    names = [unit.name for unit in optimizer._built.schedule.units]
    assert "blocks.0.up" in names and "blocks.0" not in names and "root" in names


def test_a_submodule_called_without_the_model():
    model, optimizer = make(Run(stage=3), LocalComm())
    expected = seeded(Net)
    x = torch.randn(2, 3, 13, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.norm(x), expected.norm(x)) and torch.equal(model.blocks[1](x), expected.blocks[1](x))
    model.norm(model.blocks[1](x)).pow(2).sum().backward()
    expected.norm(expected.blocks[1](x)).pow(2).sum().backward()
    grads = optimizer.full_grads()
    assert all(torch.equal(grads[name], p.grad) for name, p in expected.named_parameters() if p.grad is not None)


def test_reading_gradients_before_the_step():
    model, optimizer = make(Run(stage=2), LocalComm())
    expected = seeded(Net)
    for m in (model, expected):
        loss_of(m, tokens_for(0, 0, 0)).backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert p.grad.shape == q.grad.shape and p.grad.dtype == q.grad.dtype, name
        assert torch.equal(p.grad.clone(), q.grad) and torch.equal(p.grad * 2, q.grad * 2)
        assert float(p.grad.norm()) == pytest.approx(float(q.grad.norm()), rel=1e-6)
        assert p.grad.isfinite().all() and "LazyGrad" in repr(p.grad)
    assert set(optimizer.full_grads()) == {name for name, _ in model.named_parameters()}
