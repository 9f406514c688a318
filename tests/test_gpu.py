"""ZeroOptimizer with parameters on a GPU: the same bits resident, offloaded, on the host and streamed. Needs a GPU.

tests/test_cuda.py compares the kernels with the CPU's; tests/test_offload.py runs the same pipeline on a CPU that plays a
device.
"""

from __future__ import annotations

import pytest
import torch
from models import equal
from torch import nn

import zerolite
from zerolite import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WAYS = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    *[
        {"stage": stage, "offload": "states", "update": way, "gradients": gradients}
        for stage in (0, 2, 3)
        for way in ("host", "stream", "auto")
        for gradients in ("host", "device")
    ],
    {"stage": 3, "offload": "all", "update": "host"},
    {"stage": 3, "offload": "all", "update": "auto"},
    {"stage": 2, "offload": "states", "overlap": False},
    {"stage": 2, "offload": "states", "resident": 0.5},
    {"stage": 2, "offload": "states", "resident": 0.5, "gradients": "device", "overlap": False},
]


def net(seed: int = 0) -> nn.Module:
    """Linear layers alone: torch's own backward of them is the same in every run."""
    torch.manual_seed(seed)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(67, 129), nn.GELU(), nn.Linear(129, 67)) for _ in range(4))
    model = nn.Module()
    model.blocks, model.head = blocks, nn.Linear(67, 5)

    def forward(x):
        for block in model.blocks:
            x = x + block(x)
        return model.head(x)

    model.forward = forward
    return model.cuda()


def run(dtype=torch.bfloat16, micro=1, moments="fp32", steps=5, **options):
    model = net()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = zerolite.ZeroOptimizer(inner, model, param_dtype=dtype, moments=moments, bucket_mb=0.02, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    norms = []
    for _ in range(steps):
        for _ in range(micro):
            x = torch.randn(16, 67, generator=generator, device="cuda").to(dtype or torch.float32)
            model(x).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    params = {name: value.cpu() for name, value in model.state_dict().items()}
    return {"params": params, "states": optimizer.full_state(), "norms": norms}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_same_bits_wherever_states_rest(dtype, micro, moments, monkeypatch):
    monkeypatch.setenv("ZEROLITE_DEBUG", "poison")
    expected = run(dtype, micro, moments, **WAYS[0])
    assert max(expected["norms"]) > 0.1
    for way in WAYS[1:]:
        assert equal(run(dtype, micro, moments, **way), expected), way


def test_the_device_agrees_with_the_host_in_every_bit():
    """One update of the same gradients on either: the kernels' arithmetic is the same."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Linear(300, 70).to(device)
        optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), param_dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device, p.dtype)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append(([p.detach().cpu() for p in model.parameters()], list(optimizer.full_state().values())))
    assert equal(*results)


@pytest.mark.parametrize("gradients", ["host", "device"])
def test_host_memory_is_pinned_and_device_memory_is_the_plan(gradients):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)]).cuda()
    inner = torch.optim.AdamW(model.parameters())
    optimizer = zerolite.ZeroOptimizer(
        inner, model, offload="states", gradients=gradients, param_dtype=torch.bfloat16, bucket_mb=4
    )
    assert all(bucket.mine.is_pinned() and bucket.rest.is_pinned() for bucket in optimizer._trained)
    elements = 8 << 20
    assert torch.cuda.memory_allocated() - before == pytest.approx(2 * elements, rel=0.02)
    model(torch.ones(4, 1024, device="cuda", dtype=torch.bfloat16)).sum().backward()
    assert optimizer.memory().live == optimizer.plan.bytes_at_rest
    optimizer.step()
    optimizer.state_dict()
    grads = optimizer.plan.bytes_at_rest["grads"] if gradients == "host" else 0  # on the device free once they are updated
    assert optimizer.memory().live == {**optimizer.plan.bytes_at_rest, "grads": grads}


def test_kernels_of_the_device_are_in_use():
    assert kernels.native.CUDA_LIBRARY.exists()
    assert "zerolite::reduce_adam_" in str(torch._C._dispatch_dump("zerolite::reduce_adam_"))
    assert "CUDA" in torch._C._dispatch_dump("zerolite::reduce_adam_")
