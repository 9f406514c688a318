"""Training loops that people write, unchanged: each against the same loop with a plain optimizer in one process.

Rank r of N sees the loss on its own tokens; the plain loop sees the mean over all ranks' tokens.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import on_threads
from torch import nn

import zerolite
from zerolite.average import Parts
from zerolite.comm.local import LocalComm
from zerolite.lazy_grad import LazyGrad

STAGES = [0, 1, 2, 3]
stages = pytest.mark.parametrize("stage", STAGES)


def assert_like_plain(stage, loop, world=2, make_model=Net, rel=3e-5, **options):
    """loop(model, optimizer, ranks) on `world` ranks and plainly on all; parameters agree."""

    def body(comm):
        model = seeded(make_model)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = zerolite.ZeroOptimizer(inner, model, stage=stage, process_group=comm, **options)
        loop(model, optimizer, [comm.rank])
        return {name: value.clone() for name, value in model.state_dict().items()}

    results = on_threads(world, body)
    assert all(equal(result, results[0]) for result in results)
    model = seeded(make_model)
    loop(model, torch.optim.AdamW(model.parameters(), lr=1e-2), list(range(world)))
    for name, value in model.state_dict().items():
        # lr 1e-2 bounds an update; Adam normalises rounding noise of small gradients, hence 3e-5 = 0.3 % of one
        torch.testing.assert_close(results[0][name], value, rtol=rel, atol=rel)
    return results


def mean_loss(model, step, micro, ranks):
    return sum(loss_of(model, tokens_for(step, micro, rank)) for rank in ranks) / len(ranks)


@stages
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_different_number_of_backwards_each_step(stage, world):
    def loop(model, optimizer, ranks):
        for step, count in enumerate([1, 3, 2, 1]):
            for micro in range(count):
                (mean_loss(model, step, micro, ranks) / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)

    assert_like_plain(stage, loop, world)


@stages
def test_two_forwards_before_one_backward_and_several_losses(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            first, second = mean_loss(model, step, 0, ranks), mean_loss(model, step, 1, ranks)
            (first + second).backward(retain_graph=True)
            second.backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
def test_zero_grad_of_the_model_and_of_p_grad(stage):
    def loop(model, optimizer, ranks):
        for step in range(4):
            mean_loss(model, step, 5, ranks).backward()  # thrown away in four ways
            if step == 0:
                model.zero_grad()
            elif step == 1:
                model.zero_grad(set_to_none=False)
            elif step == 2:
                for p in model.parameters():
                    p.grad = None
            else:
                optimizer.zero_grad(set_to_none=False)
            mean_loss(model, step, 0, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
def test_scheduler_and_param_groups(stage):
    def body(comm, wrap):
        model = seeded(Net)
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.3, "lr": 1e-2},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0, "betas": (0.8, 0.9)},
        ]
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        if wrap:
            optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=stage, process_group=comm)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            mean_loss(model, step, 0, [0, 1] if not wrap else [comm.rank]).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            optimizer.param_groups[1]["lr"] *= 1.5
        return {name: value.clone() for name, value in model.state_dict().items()}, scheduler.get_last_lr()

    results, plain = on_threads(2, body, True), body(None, False)
    assert results[0][1] == plain[1]
    for name, value in plain[0].items():
        torch.testing.assert_close(results[0][0][name], value, rtol=3e-5, atol=3e-5)


class Unused(Net):
    """Blocks that only some steps or ranks use."""

    def __init__(self):
        super().__init__(tied=False)
        self.extra = nn.Linear(13, 13)
        self.skip = False

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        x = self.blocks[0](x)
        if not self.skip:
            x = x + self.extra(x)
        return self.head(self.norm(x))


@stages
def test_unused_parameters_get_no_decay_and_no_step(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            model.skip = step == 1
            mean_loss(model, step, 0, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop, make_model=Unused)


@stages
@pytest.mark.parametrize("bucket_mb", [25.0, 1e-6])
def test_parameters_used_on_some_ranks_only(stage, bucket_mb):
    def loop(model, optimizer, ranks):
        for step in range(3):
            losses = []
            for rank in ranks:
                model.skip = rank == 1
                losses.append(loss_of(model, tokens_for(step, 0, rank)))
            (sum(losses) / len(ranks)).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop, make_model=Unused, bucket_mb=bucket_mb)


class Shared(Net):
    """One block called several times."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(self.blocks[0](x)))


@stages
def test_modules_called_several_times(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            mean_loss(model, step, 0, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop, make_model=Shared)


class Checkpointed(Shared):
    reentrant = False

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in [*self.blocks, self.blocks[0]]:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


class Reentrant(Checkpointed):
    reentrant = True


@stages
@pytest.mark.parametrize("make_model", [Checkpointed, Reentrant])
def test_activation_checkpointing(stage, make_model):
    def loop(model, optimizer, ranks):
        for step in range(3):
            for micro in range(2):
                mean_loss(model, step, micro, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop, make_model=make_model)


@stages
def test_eval_and_no_grad_in_between(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            model.eval()
            with torch.no_grad():
                mean_loss(model, step, 7, ranks)
            with torch.inference_mode():
                mean_loss(model, step, 8, ranks)
            model.train()
            mean_loss(model, step, 0, ranks).backward()
            with torch.no_grad():
                mean_loss(model, step, 9, ranks)
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_and_a_clean_step_after_it(stage, where):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "forward":
                raise ZeroDivisionError
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    def loop(model, optimizer, ranks):
        for step in range(3):
            handle = model.blocks[1].register_forward_hook(lambda m, i, out: Failing.apply(out))
            with pytest.raises(ZeroDivisionError):
                mean_loss(model, step, 3, ranks).backward()
            handle.remove()
            optimizer.zero_grad()
            mean_loss(model, step, 0, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
def test_freezing_and_unfreezing_on_the_way(stage):
    def loop(model, optimizer, ranks):
        for step in range(6):
            model.blocks[0].requires_grad_(step >= 2)
            model.head.weight.requires_grad_(step not in (3, 4))
            mean_loss(model, step, 0, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.blocks[0].requires_grad_(False)

    assert_like_plain(stage, loop, make_model=Frozen)


@stages
def test_add_param_group_before_and_after_the_first_step(stage):
    def loop(model, optimizer, ranks):
        for step in range(4):
            if step == 2:
                model.blocks[0].requires_grad_(True)
                optimizer.add_param_group({"params": list(model.blocks[0].parameters()), "lr": 5e-3})
            mean_loss(model, step, 0, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    def body(comm, wrap):
        model = seeded(Net)
        model.blocks[0].requires_grad_(False)
        kept = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(kept, lr=1e-2)
        if wrap:
            optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=stage, process_group=comm)
        loop(model, optimizer, [comm.rank] if wrap else [0, 1])
        return {name: value.clone() for name, value in model.state_dict().items()}

    results, plain = on_threads(2, body, True), body(None, False)
    for name, value in plain.items():
        torch.testing.assert_close(results[0][name], value, rtol=3e-5, atol=3e-5)


class Outputs(nn.Module):
    """Blocks that return a dict, a list and a dataclass."""

    class Item:
        def __init__(self, value):
            self.value = value

    def __init__(self):
        super().__init__()

        class ToDict(nn.Linear):
            def forward(self, x):
                return {"x": super().forward(x["x"] if isinstance(x, dict) else x), "note": "text"}

        class ToList(nn.Linear):
            def forward(self, x):
                return [None, [super().forward(x["x"])]]

        class ToItem(nn.Linear):
            def forward(self, x):
                return Outputs.Item(super().forward(x[1][0]))

        self.embed = nn.Embedding(31, 11)
        self.blocks = nn.Sequential(ToDict(11, 11), ToList(11, 11), ToItem(11, 31))

    def forward(self, tokens):
        return self.blocks(self.embed(tokens)).value


@stages
def test_dict_list_and_object_outputs(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            mean_loss(model, step, 0, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop, make_model=Outputs)


@stages
def test_autocast(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = mean_loss(model, step, 0, ranks)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # each rank's gradient and the sum of losses round differently in bf16: a few per cent of lr=1e-2 over 3 steps
    assert_like_plain(stage, loop, rel=3e-3)


@stages
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_grad_scaler_skips_on_all_ranks(stage, dtype):
    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=dtype, lr=1e-3), comm)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales, snapshots = [], []
        for step in range(6):
            loss = loss_of(model, tokens_for(step, 0, comm.rank))
            if step == 2 and comm.rank == 1:
                loss = loss * float("inf")  # on one rank only
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            snapshots.append({name: value.clone() for name, value in model.state_dict().items()})
        with pytest.raises(RuntimeError, match="already been called"):
            loss_of(model, tokens_for(9, 0, comm.rank)).backward()
            scaler.unscale_(optimizer)
            scaler.unscale_(optimizer)
        return scales, snapshots, {name: state["step"].item() for name, state in optimizer.full_state().items()}

    for scales, snapshots, steps in on_threads(2, body):
        assert scales == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11, 2.0**11]
        assert equal(snapshots[1], snapshots[2]) and not equal(snapshots[2], snapshots[3])
        assert set(steps.values()) == {5.0}


@stages
def test_grad_scaler_equals_no_scaler(stage):
    def body(comm, scale):
        model, optimizer = make(Run(stage=stage), comm)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scale)
        for step in range(3):
            scaler.scale(loss_of(model, tokens_for(step, 0, comm.rank))).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    # a scale that is a power of two is exact, except where fp32 gradients are subnormal (they are not here)
    assert equal(on_threads(2, body, True)[0], on_threads(2, body, False)[0])


@stages
def test_clipping_part_of_the_parameters_and_by_value(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            mean_loss(model, step, 0, ranks).backward()
            nn.utils.clip_grad_norm_(model.blocks[0].parameters(), 0.01)
            nn.utils.clip_grad_norm_([model.scale], 0.001, foreach=False)
            nn.utils.clip_grad_value_(model.blocks[1].parameters(), 1e-3)
            model.norm.weight.grad = model.norm.weight.grad * 3.0
            model.norm.bias.grad.mul_(0.25)
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
@pytest.mark.parametrize("first", ["sync", "no_sync", None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_after_no_sync_that_is_not_finite_changes_nothing(stage, first, bad):
    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), comm)
        for step in range(2):
            if first is not None:
                with optimizer.no_sync() if first == "no_sync" else contextlib.nullcontext():
                    loss_of(model, tokens_for(step, 0, comm.rank)).backward()
            before = {name: value.clone() for name, value in model.state_dict().items()}, optimizer.full_state()
            with optimizer.no_sync():
                loss = loss_of(model, tokens_for(step, 1, comm.rank))
                (loss * (bad if step == comm.rank else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert equal(before, (dict(model.state_dict()), optimizer.full_state()))
        return optimizer.skipped_steps

    assert on_threads(2, body) == [2, 2]


@stages
def test_ops_on_gradients_that_were_kept_see_what_was_written(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            mean_loss(model, step, 0, ranks).backward()
            kept = [p.grad for p in model.blocks[1].parameters()]
            torch._foreach_clamp_min_(kept, -1e-3)  # as clip_grad_value_(..., foreach=True)
            torch._foreach_clamp_max_(kept, 1e-3)
            assert all(g.norm(float("inf")) <= 1e-3 and g.abs().max() <= 1e-3 for g in kept)
            assert all(
                torch.linalg.vector_norm(g, 2.0) == p.grad.norm()
                for g, p in zip(kept, model.blocks[1].parameters(), strict=True)
            )
            first, second, third, *rest = kept
            first.mul_(0.5)
            second.zero_()
            torch._foreach_mul_([third, model.scale.grad], 0.25)
            torch._foreach_div_(rest, 2.0)
            assert not second.any() and (model.scale.grad - 0).abs() > 0
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
def test_clipping_lists_of_all_kinds_of_gradients(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            mean_loss(model, step, 0, ranks).backward()
            model.norm.weight.grad = model.norm.weight.grad * 3.0  # a plain tensor among handles
            if step == 1:
                model.norm.bias.grad = None
            if step == 2:
                model.scale.grad.clamp_(-1e-3, 1e-3)  # written through its handle
            nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=1.0 + step)
            nn.utils.clip_grad_norm_(model.blocks[0].parameters(), 0.05, foreach=step % 2 == 0)
            grads = [p.grad for p in model.blocks.parameters()]
            torch._foreach_mul_(grads, [0.5 + k for k in range(len(grads))])
            torch._foreach_div_([grads[0], grads[0]], 2.0)
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
def test_clipping_asks_for_all_handles_at_once(stage, monkeypatch):
    def body(comm):
        model, optimizer = make(Run(stage=stage), comm)
        loss_of(model, tokens_for(0, 0, comm.rank)).backward()
        grads = [p.grad for p in model.parameters()]
        one_by_one = [torch.linalg.vector_norm(grad) for grad in grads]
        assert all(map(torch.equal, torch._foreach_norm(grads), one_by_one))
        wide = [*torch._foreach_norm(grads, 2.0, torch.float64), torch.linalg.vector_norm(grads[0], dtype=torch.float64)]
        assert all(map(torch.equal, wide, [norm.double() for norm in [*one_by_one, one_by_one[0]]]))
        with monkeypatch.context() as patched:
            patched.setattr(LazyGrad, "__torch_dispatch__", None)  # which would be called for each
            assert all(map(torch.equal, torch._foreach_norm(grads, 2.0), one_by_one))
            total = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        factors = set(optimizer._built.grads.table.factors)
        return torch.equal(total, torch.linalg.vector_norm(torch.stack(one_by_one))), len(factors), *factors

    (same, count, factor), *_ = on_threads(1, body)
    assert same and count == 1 and factor < 1.0


def test_clipping_the_parameters_of_two_optimizers_at_once():
    def body(comm, together):
        pairs = [make(Run(stage=2), comm), make(Run(stage=3), comm)]
        for step in range(2):
            for k, (model, _) in enumerate(pairs):
                loss_of(model, tokens_for(step, k, comm.rank)).backward()
            grads = [[p.grad for p in model.parameters()] for model, _ in pairs]
            if together:
                norms = torch._foreach_norm([*grads[0], *grads[1]])
                torch._foreach_mul_([*grads[1], *grads[0]], torch.tensor(0.5))
            else:
                norms = [torch.linalg.vector_norm(grad) for both in grads for grad in both]
                for grad in [*grads[0], *grads[1]]:
                    grad.mul_(0.5)
            for _, optimizer in pairs:
                optimizer.step()
                optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="earlier gradient"):
            torch._foreach_norm(grads[0])
        with pytest.raises(RuntimeError, match="earlier gradient"):
            torch._foreach_mul_(grads[0], 0.5)
        return norms, [(dict(model.state_dict()), optimizer.full_state()) for model, optimizer in pairs]

    assert equal(on_threads(2, body, True)[0], on_threads(2, body, False)[0])


def _augmented(p):
    p.grad += 0.01 * torch.ones_like(p)
    p.grad *= torch.arange(p.numel()).view(p.shape) % 2
    p.grad -= 0.001


def _assigned(p):
    p.grad = p.grad.clamp_(-1e-3, 1e-3)


def _kept_views(p):
    first, rest = p.grad.view(-1)[:1], p.grad.view(-1)[1:]
    p.grad.mul_(0.5)  # what would be recorded alone is seen by views
    assert torch.equal(torch.cat([first, rest]), p.grad.flatten())
    kept = torch.cat([first, rest])
    p.grad.mul_(torch.full_like(p.grad, 0.5))  # as is what is not recorded
    assert torch.equal(torch.cat([first, rest]), p.grad.flatten()) and torch.equal(torch.cat([first, rest]), 0.5 * kept)
    rest.mul_(3.0)
    first.zero_()


def _data(p):
    p.grad.data = p.grad.data.clamp(-1e-3, 1e-3)
    p.grad.data *= 0.5
    p.grad.data.mul_(2.0)


def _scaled_data(p):
    for _ in range(2):
        p.grad.data *= 0.5
    view = p.grad.view(-1)
    assert p.grad.data.norm() > 0
    view[0] = 0.25


def _read_views(p):
    assert p.grad.view(-1)[0].isfinite() and float(p.grad.abs().max()) == p.grad.cpu().numpy().__abs__().max()
    assert p.grad.flatten().tolist() == p.grad.clone().flatten().tolist()


EDITS = {
    "augmented": _augmented,
    "assigned": _assigned,
    "slice": lambda p: p.grad.__setitem__(slice(0, 2) if p.dim() else ..., 0.25),
    "index": lambda p: p.grad.view(-1).__setitem__(0, 0.5),
    "row": lambda p: p.grad[0].zero_() if p.dim() else p.grad.zero_(),
    "transposed": lambda p: p.grad.t().mul_(2.0) if p.dim() == 2 else None,
    "kept views": _kept_views,
    "data": _data,
    "scaled data": _scaled_data,
    "read": _read_views,
}


@stages
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("clip", [None, "torch", "ours"])
def test_edits_of_gradients_count(stage, edit, clip):
    """Also those that Python assigns back to p.grad (+=), and those of views of it."""

    def loop(model, optimizer, ranks):
        for step in range(3):
            for micro in range(2):
                sum(loss_of(model, tokens_for(step, micro, rank)) for rank in ranks).div(len(ranks) * 2).backward()
                if micro == 0 and edit in ("slice", "kept views"):
                    EDITS[edit](model.norm.weight)  # between two backwards
            for p in model.parameters():
                EDITS[edit](p)
            if clip == "torch" or (clip == "ours" and not isinstance(optimizer, zerolite.ZeroOptimizer)):
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            elif clip == "ours":
                optimizer.clip_grad_norm_(0.05)
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
def test_a_view_that_one_rank_keeps_changes_nothing(stage):
    """All ranks read; one keeps a view, as a logger does. Clipping is recorded on all, and the view shows it."""

    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), comm)
        kept = []
        for step in range(3):
            loss_of(model, tokens_for(step, 0, comm.rank)).backward()
            view = model.norm.weight.grad.view(-1)
            before = view.clone()
            kept += [view] if comm.rank == 0 else []
            del view
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            assert isinstance(model.norm.weight.grad, LazyGrad)
            assert comm.rank or (kept[-1].norm() < 0.1 * before.norm() and kept[-1].norm() > 0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        return model.state_dict()

    def plain(comm):
        model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), comm)
        for step in range(3):
            loss_of(model, tokens_for(step, 0, comm.rank)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    assert equal(on_threads(2, body), on_threads(2, plain))


def test_an_edit_counts_where_two_optimizers_are_clipped_at_once():
    pair = [make(Run(stage=2), LocalComm(), seeded(Net)) for _ in range(2)]
    for model, _ in pair:
        loss_of(model, tokens_for(0, 0, 0)).backward()
    pair[1][0].embed.weight.grad[:9] = 100.0
    total = nn.utils.clip_grad_norm_([p for model, _ in pair for p in model.parameters()], 1e-3)
    assert total > 1000.0
    assert pair[1][0].embed.weight.grad.norm() < 1.1e-3


@pytest.mark.parametrize("edits", [1, 2])
def test_edits_of_fp16_gradients_under_a_scaler(edits):
    model, optimizer = make(Run(stage=2, dtype=torch.float16), LocalComm())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, tokens_for(0, 0, 0))).backward()
    before = model.norm.weight.detach().clone()
    for p in [model.norm.weight, model.norm.bias][:edits]:
        view = p.grad.view(-1)
        view[0] = 0.0
        assert p.grad.norm() > 0
        view[1] = 0.0
        p.grad += 0.0
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 0 and not torch.equal(before, model.norm.weight)
    assert torch.equal(before[:2], model.norm.weight[:2])  # but for a decay of 1e-4, below fp16's steps


def test_arrays_of_gradients_are_copies_and_say_so():
    model, _ = make(Run(), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.raises(ValueError, match="read-only"):
        model.norm.weight.grad.numpy()[0] = 1.0


@stages
def test_copies_for_views_do_not_pile_up(stage):
    model, optimizer = make(Run(stage=stage), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    views = optimizer._parts.grads.views
    for p in model.parameters():
        assert p.grad.view(-1)[0].isfinite()
        assert len(views) <= 1
    kept = [p.grad.view(-1) for p in model.parameters()]
    assert len(views) == len(kept)
    optimizer.step()
    assert len(views) == 0


@stages
def test_a_clip_before_a_further_backward(stage):
    def loop(model, optimizer, ranks):
        for step in range(3):
            mean_loss(model, step, 0, ranks).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            mean_loss(model, step, 1, ranks).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_like_plain(stage, loop)


@stages
def test_a_clip_above_the_norm_changes_no_bit(stage):
    def body(comm, clip):
        model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), comm)
        loss_of(model, tokens_for(0, 0, comm.rank)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    assert equal(on_threads(2, body, True), on_threads(2, body, False))


@stages
def test_closure_and_step_hooks(stage):
    model, optimizer = make(Run(stage=stage), LocalComm())
    events = []
    optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
    optimizer.register_step_post_hook(lambda *_: events.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        events.append("closure")
        optimizer.zero_grad()
        loss = loss_of(model, tokens_for(0, 0, 0))
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() > 0
    assert events == ["pre", "closure", "post"]


@stages
def test_a_step_without_a_backward_does_nothing(stage):
    def body(comm):
        model, optimizer = make(Run(stage=stage), comm)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.step()
        return equal(before, {name: value.clone() for name, value in model.state_dict().items()})

    assert on_threads(3, body) == [True] * 3


@stages
def test_a_gan_loop_with_two_models(stage):
    def body(comm, wrap, ranks):
        one, two = seeded(lambda: nn.Linear(5, 5)), seeded(lambda: nn.Linear(5, 1), 1)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (one, two)]
        if wrap:
            optimizers = [
                zerolite.ZeroOptimizer(o, m, stage=stage, process_group=comm)
                for o, m in zip(optimizers, (one, two), strict=True)
            ]
        for step in range(3):
            batches = [torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + r)) for r in ranks]
            sum(two(one(x).detach()).mean() - two(x).mean() for x in batches).div(len(ranks)).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            optimizers[1].zero_grad()
            sum(F.softplus(-two(one(x))).mean() for x in batches).div(len(ranks)).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
            optimizers[1].zero_grad()
        return [value.clone() for m in (one, two) for value in m.state_dict().values()]

    results = on_threads(2, lambda comm: body(comm, True, [comm.rank]))
    for ours, theirs in zip(results[0], body(None, False, [0, 1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5)


def test_tables_are_on_the_host_whatever_the_default_device_is():
    model = seeded(Net)
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, process_group=LocalComm())
    for bucket in optimizer._built.buckets:
        vars(bucket).pop("spans", None)
        with torch.device("meta"):
            assert bucket.spans.device.type == "cpu" == Parts(bucket.spans).rows.device.type


@pytest.mark.parametrize(
    "stage,offload,moments", [(1, None, "fp32"), (2, "states", "int8"), (3, None, "bf16"), (3, "all", "fp32")]
)
def test_a_default_device_of_the_program_changes_nothing(stage, offload, moments):
    def result(default):
        model, run = seeded(Net), Run(stage=stage, offload=offload, moments=moments, dtype=torch.bfloat16, micro=2, clip=0.5)
        batches = [tokens_for(step, 0, 0) for step in range(2)]
        torch.set_default_device(default)
        try:
            model, optimizer = make(run, LocalComm(), model)
            for tokens in batches:
                loss_of(model, tokens).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.memory()
            return optimizer.full_state()
        finally:
            torch.set_default_device(None)

    assert equal(result("meta"), result(None))


def test_all_ranks_skip_a_step_for_an_assigned_gradient_of_one():
    def body(comm):
        model = seeded(Net)
        optimizer = zerolite.ZeroOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, stage=2, process_group=comm)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        found = []
        for bad in (True, False):
            before = [p.detach().clone() for p in model.parameters()]
            scaler.scale(loss_of(model, tokens_for(0, 0, comm.rank))).backward()
            grad = model.scale.grad.clone()
            model.scale.grad = grad * (math.inf if bad and comm.rank == 1 else 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found.append((scaler.get_scale(), equal(before, [p.detach() for p in model.parameters()])))
        return found

    assert on_threads(2, body, timeout=20.0) == [[(2.0, True), (2.0, False)]] * 2


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_hook_that_raises_after_autograd_has_added_leaves_nothing_behind(clear):
    def body(comm, fails):
        model, armed = seeded(Net), []

        def hook(p):
            if armed:
                armed.clear()
                raise ValueError("out of memory")

        model.head.weight.register_post_accumulate_grad_hook(hook)
        optimizer = zerolite.ZeroOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, stage=2, process_group=comm)
        for step in range(2):
            if fails and step == 0:
                loss_of(model, tokens_for(9, 0, 0)).backward()
                armed.append(True)
                with pytest.raises(ValueError, match="out of memory"):
                    loss_of(model, tokens_for(9, 1, 0)).backward()
                (optimizer if clear == "optimizer" else model).zero_grad()
            loss_of(model, tokens_for(step, 0, 0)).backward()
            loss_of(model, tokens_for(step, 1, 0)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    assert equal(body(LocalComm(), True), body(LocalComm(), False))
