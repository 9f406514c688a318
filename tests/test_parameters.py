"""Kinds of parameters, and optimizers other than Adam."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import Net, Run, equal, loss_of, make, seeded, tokens_for, train_on
from ranks import on_threads
from torch import nn

import zerolite
from zerolite.comm.local import LocalComm

stages = pytest.mark.parametrize("stage", [0, 1, 2, 3])


class Odd(nn.Module):
    """Scalars, one element, empty, primes, channels_last and transposed weights, mixed dtypes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(11, 7).t())
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.one = nn.Parameter(torch.ones(1))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.prime = nn.Parameter(torch.randn(101))
        self.narrow = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))

    def forward(self, x):
        y = self.conv(x).mean((2, 3)) * self.narrow.float()
        y = y @ self.turned * self.scalar + self.one + self.empty.sum()
        return (y.sum() * self.prime).pow(2).mean()


def images(step, rank):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(10 * step + rank))


@stages
@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("bucket_mb", [25.0, 1e-6])
def test_odd_parameters(stage, world, bucket_mb):
    def body(comm):
        model = seeded(Odd)
        strides = {name: p.stride() for name, p in model.named_parameters()}
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = zerolite.ZeroOptimizer(inner, model, stage=stage, bucket_mb=bucket_mb, process_group=comm)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
            name: tuple(p.shape) for name, p in seeded(Odd).named_parameters()
        }
        for step in range(4):
            model(images(step, comm.rank)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.full_params():
            assert {name: p.stride() for name, p in model.named_parameters()} == strides
        return {name: value.clone() for name, value in model.state_dict().items()}

    results = on_threads(world, body)
    assert all(equal(result, results[0]) for result in results)
    model = seeded(Odd)
    master = nn.Parameter(model.narrow.detach().float())
    params = [p if p is not model.narrow else master for p in model.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for step in range(4):
        (sum(model(images(step, rank)) for rank in range(world)) / world).backward()
        master.grad = model.narrow.grad.float()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.narrow.grad = None
        model.narrow.data.copy_(master)
    for name, value in model.state_dict().items():
        # lr 1e-2: 3e-5 is 0.3 % of an update; bf16 values may round to a neighbour
        torch.testing.assert_close(results[0][name], value, rtol=1e-2 if name == "narrow" else 3e-5, atol=3e-5)


@stages
def test_the_master_of_bf16_parameters(stage):
    """A03: equal to a hand-written master-weight loop in the same arithmetic, and parameters are bf16(master)."""
    run = Run(stage=stage, dtype=torch.bfloat16, steps=3)
    results = on_threads(2, train_on, run)
    for result in results:
        for name, state in result["states"].items():
            param, master = result["params"][name], state["master"]
            assert master.dtype == torch.float32 and param.dtype == torch.bfloat16
            gap = (master - param.float()).abs()
            assert bool((gap <= param.float().abs() * 2.0**-8).all()) and bool(gap.any())
    updates = torch.cat([state["exp_avg"].flatten() for state in results[0]["states"].values()])
    assert updates.abs().max() > 0


def test_an_fp32_model_is_cast_without_losing_its_low_bits():
    model = seeded(Net)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, optimizer = make(Run(stage=1, dtype=torch.bfloat16), LocalComm(), model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for bucket in optimizer._trained:
        for piece in bucket.pieces:
            entry = bucket.entries[piece.slot]
            master = bucket.master(slice(piece.offset, piece.offset + piece.stop - piece.start))
            assert torch.equal(master, before[entry.name].flatten()[piece.start : piece.stop])


@stages
@pytest.mark.parametrize(
    "write",
    [
        lambda m, o: m.norm.weight.mul_(2.0),
        lambda m, o: m.norm.weight.copy_(torch.full((13,), 2.0)),
        lambda m, o: m.load_state_dict({**m.state_dict(), "norm.weight": torch.full((13,), 2.0)}),
    ],
)
def test_writes_from_outside_are_seen(stage, write):
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), LocalComm())
    with torch.no_grad(), optimizer.full_params() if stage == 3 else nullcontext():
        write(model, optimizer)
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    if stage < 3:
        with pytest.warns(UserWarning, match="written outside of the optimizer"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(model.state_dict()["norm.weight"], torch.full((13,), 2.0, dtype=torch.bfloat16))
    assert torch.equal(optimizer.full_state()["norm.weight"]["master"], torch.full((13,), 2.0))


@stages
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_params_find_writes_that_no_version_counter_tells(stage, world, dtype):
    """Masters of written elements restart, all others keep their low bits, and a plain write before is not forgotten."""

    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=dtype), comm)
        loss_of(model, tokens_for(0, 0, comm.rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: state["master"].clone() for name, state in optimizer.full_state().items()}
        if stage < 3:
            with torch.no_grad():
                model.norm.bias.fill_(0.25)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with optimizer.full_params():
                model.blocks[0].up.weight.data.view(-1)[70:99].copy_(torch.full((29,), 1.5))
                model.norm.weight.data.mul_(2)
                model.norm.bias.data[3] = 0.5
        written = {name: value.clone() for name, value in model.state_dict().items()}
        return before, written, {name: state["master"].clone() for name, state in optimizer.full_state().items()}

    for before, written, after in on_threads(world, body):
        for name, master in after.items():
            expected = before[name].clone().flatten()
            if name == "blocks.0.up.weight":
                expected[70:99] = 1.5
            elif name == "norm.weight" or (name == "norm.bias" and stage < 3):
                expected = written[name].float().flatten()
            elif name == "norm.bias":
                expected[3] = 0.5
            assert torch.equal(master.flatten(), expected), name
            assert torch.equal(master.to(dtype), written[name]) or dtype == torch.bfloat16


@stages
@pytest.mark.parametrize("world", [1, 2])
def test_full_params_take_other_memory(stage, world):
    """p.data = ..., and what assigns it: vector_to_parameters, model.double(), an average that is swapped in."""

    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), comm)
        loss_of(model, tokens_for(0, 0, comm.rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        count = sum(p.numel() for p in model.parameters())
        with optimizer.full_params():
            nn.utils.vector_to_parameters(torch.arange(count).float(), model.parameters())
            model.double()
        with optimizer.full_params():
            found = nn.utils.parameters_to_vector(model.parameters()).clone()
        states = optimizer.full_state()
        master = torch.cat([states[name]["master"].flatten() for name, _ in model.named_parameters()])
        loss_of(model, tokens_for(0, 0, comm.rank)).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"norm\.weight': expected shape \(13,\), got \(2,\)"), optimizer.full_params():
            model.norm.weight.data = torch.ones(2)
        return found, master

    for found, master in on_threads(world, body):
        assert found.dtype == torch.bfloat16 and torch.equal(found, torch.arange(found.numel()).bfloat16())
        assert torch.equal(master, found.float())  # masters restart


def test_the_warning_names_what_was_written():
    model, optimizer = make(Run(stage=1, dtype=torch.bfloat16), LocalComm())
    with torch.no_grad():
        model.norm.bias.add_(1.0)
    with pytest.warns(UserWarning, match=r"parameter 'norm\.bias' was written outside of the optimizer"):
        optimizer.full_state()


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {"lr": 1e-3}),
    (torch.optim.NAdam, {"lr": 1e-3}),
    (torch.optim.RAdam, {"lr": 1e-3}),
    (torch.optim.ASGD, {"lr": 1e-2}),
    (torch.optim.Rprop, {"lr": 1e-3}),
    (torch.optim.AdamW, {"lr": 1e-3, "amsgrad": True}),
    (torch.optim.Adam, {"lr": 1e-3, "maximize": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 1e-3, "maximize": True}),
    (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    (torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(1e-3)}),
]


@pytest.mark.parametrize("kind,options", OPTIMIZERS, ids=[f"{k.__name__}-{i}" for i, (k, _) in enumerate(OPTIMIZERS)])
def test_other_optimizers(kind, options):
    """The same bits at every stage, and close to the optimizer itself on the whole batch."""

    def body(comm, stage, dtype, bucket_mb):
        model = seeded(Net)
        inner = kind(model.parameters(), **options)
        optimizer = zerolite.ZeroOptimizer(
            inner, model, stage=stage, param_dtype=dtype, bucket_mb=bucket_mb, process_group=comm
        )
        for step in range(5):
            loss_of(model, tokens_for(step, 0, comm.rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    for dtype in (None, torch.bfloat16):
        results = [on_threads(2, body, stage, dtype, mb)[1] for stage, mb in [(0, 25), (1, 25), (2, 1e-6), (3, 25)]]
        assert all(equal(result, results[0]) for result in results)
        if dtype is None:
            fp32 = results[0]
    model = seeded(Net)
    plain = kind(model.parameters(), **options)
    for step in range(5):
        (sum(loss_of(model, tokens_for(step, 0, rank)) for rank in range(2)) / 2).backward()
        plain.step()
        plain.zero_grad()
    for name, value in model.state_dict().items():
        # Rprop multiplies its step by the sign of a gradient product: noise at 0 may flip one, by lr at most
        torch.testing.assert_close(fp32[name], value, rtol=3e-5, atol=1e-3 if kind is torch.optim.Rprop else 3e-5)


def test_an_optimizer_that_has_stepped_before_it_is_wrapped():
    def body(wrap_at):
        model = seeded(Net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            if step == wrap_at:
                optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=3, process_group=LocalComm())
            loss_of(model, tokens_for(step, 0, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    wrapped, plain = body(3), body(99)
    for name, value in plain.items():
        torch.testing.assert_close(wrapped[name], value, rtol=3e-5, atol=3e-5)


@stages
def test_lora_like_frozen_base(stage):
    """D01, E22: frozen parameters get no state and no exchange, stay as they are, and are sharded at stage 3."""

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(16, 16)
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
            self.base.requires_grad_(False)

        def forward(self, x):
            return x + self.base(x) + self.up(self.down(x))

    def body(comm, wrap):
        model = seeded(lambda: nn.Sequential(*[Adapter() for _ in range(3)]))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        if wrap:
            optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=stage, process_group=comm)
            layouts = [bucket.layout.used for bucket in optimizer._trained]
            assert sum(layouts) == sum(p.numel() for p in trained)
        for step in range(3):
            ranks = [comm.rank] if wrap else [0, 1]
            batch = [torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + r)) for r in ranks]
            (sum(F.mse_loss(model(x), x * 2) for x in batch) / len(ranks)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    results, plain = on_threads(2, body, True), body(None, False)
    for name, value in plain.items():
        torch.testing.assert_close(results[0][name], value, rtol=3e-5, atol=3e-5)
        if "base" in name:
            assert torch.equal(results[0][name], value)


def test_tied_weights_stay_tied_with_one_state():
    for stage in (0, 1, 2, 3):
        model, optimizer = make(Run(stage=stage), LocalComm())
        loss_of(model, tokens_for(0, 0, 0)).backward()
        optimizer.step()
        assert model.head.weight is model.embed.weight
        names = list(optimizer.full_state())
        assert "embed.weight" in names and "head.weight" not in names
        state = model.state_dict()
        assert torch.equal(state["head.weight"], state["embed.weight"])
