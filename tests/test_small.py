"""Many small parameters: what is done for all at once gives what is done for each."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from ranks import on_threads
from torch import nn

import zerolite
from zerolite import gradient


class Sum(nn.Module):
    """Some parameters, of which `skip` is left out of the sum."""

    def __init__(self, count: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(7, generator=generator).bfloat16()) for _ in range(count)])

    def forward(self, skip: int, scale: float) -> torch.Tensor:
        used = [w.pow(2).sum() * (scale + k) for k, w in enumerate(self.weights) if k != skip]
        return torch.stack(used).sum()


def train(comm, stage, clip, hooks):
    model = Sum(40)
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), model, stage=stage, process_group=comm)
    if not hooks:  # every gradient goes through the careful path
        for bucket in optimizer._trained:
            bucket.grads.open = lambda task: None
    norms = []
    for step in range(4):
        for micro in range(1 + (step == 2)):
            model(3 if step == 1 else -1, 1.0 + comm.rank + micro).backward()
        if clip == "torch":
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        elif clip == "own":
            norms.append(optimizer.clip_grad_norm_(1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    states = optimizer.full_state()
    return norms, [states[name][key] for name in states for key in ("exp_avg", "exp_avg_sq", "master", "step")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hooks_and_clipping_for_all_at_once_change_no_bit(stage):
    found = {
        key: on_threads(2, lambda comm, key=key: train(comm, stage, *key))
        for key in (("torch", True), ("own", True), ("torch", False))
    }
    for norms, states in [rank for ranks in found.values() for rank in ranks]:
        assert norms == found["torch", True][0][0] and len(norms) == 4
        assert all(torch.equal(a, b) for a, b in zip(states, found["torch", True][0][1], strict=True))


def test_gradients_that_can_rest_packed_are_packed_in_portions(monkeypatch):
    """At most so many wait, where they are small also those that travel at once; bits, rounds under way and what does not lie
    flat are as without."""
    held = []
    pack = gradient.Gradients.pack
    monkeypatch.setattr(gradient.Gradients, "pack", lambda self: (held.append(len(self.arrived)), pack(self))[1])
    whole = on_threads(2, lambda comm: train(comm, 1, "own", True))
    assert max(held) == 40
    monkeypatch.setattr(gradient, "_PORTION", 16)
    for stage in (0, 1, 2, 3):
        held.clear()
        for found, expected in zip(
            on_threads(2, lambda comm, stage=stage: train(comm, stage, "own", True)), whole, strict=True
        ):
            assert found[0] == expected[0] and all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
        assert max(held) == 16
    held.clear()
    monkeypatch.setattr(gradient, "_SMALL", 0)
    for found, expected in zip(on_threads(2, lambda comm: train(comm, 2, "own", True)), whole, strict=True):
        assert found[0] == expected[0] and all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert not held  # of large ones a round that must wait for its turn is packed then, as a whole


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_second_gradient_in_one_backward_after_a_portion_was_packed(stage, monkeypatch):
    def run(portion):
        monkeypatch.setattr(gradient, "_PORTION", portion)
        model = Sum(40)
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer = zerolite.ZeroOptimizer(inner, model, stage=stage, process_group=zerolite.comm.local.LocalComm())
        for _ in range(2):
            x = torch.ones((), requires_grad=True)
            inside = torch.utils.checkpoint.checkpoint(lambda x: model(-1, 2.0) * x, x, use_reentrant=True)
            (inside + model(3, 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.full_params():
            return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(16), run(1000), strict=True))


def test_hooks_of_a_bucket_share_one_function():
    model = Sum(40)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=1, process_group=zerolite.comm.local.LocalComm())
    hooks = [hook for p in model.parameters() for hook in p._post_accumulate_grad_hooks.values()]
    assert len(hooks) == 40 and len({id(hook.func) for hook in hooks}) == len(optimizer._trained) == 1


def test_a_norm_that_a_hook_reads_is_of_what_came_so_far():
    model = Sum(5)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=1, process_group=zerolite.comm.local.LocalComm())
    seen = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.norm().item(), p)))
    model(-1, 1.0).backward()
    assert [value for value, _ in seen] == [p.grad.norm().item() for _, p in seen] and min(value for value, _ in seen) > 0
    optimizer.step()
