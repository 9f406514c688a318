"""The systems that are measured side by side: each takes a model and returns what runs one step of it.

A system is a function (model, rank) -> Trained. `Trained.forward(batch)` returns the loss, `backward(loss)` and
`update()` do the rest; every peer has its best known settings for CPU ranks, all keys written out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LR, DECAY, CLIP = 1e-4, 0.1, 1.0
BUCKET = 13_000_000  # elements: 25 MiB of bf16, DDP's and zerolite's default


@dataclass
class Trained:
    """One model under one system."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Any]
    update: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    sent: Callable[[], int] = lambda: -1  # bytes that this rank put on the wire so far; -1: not counted


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(input_ids=batch, labels=batch).loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)


def alone(model: nn.Module, rank: int) -> Trained:
    """Forward and backward only, in as many processes: what every system's overhead is counted from."""

    def update() -> None:
        model.zero_grad()

    return Trained(loss_of(model), Tensor.backward, update)


def _torch(model: nn.Module, wrapped: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Trained:
    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return Trained(loss_of(wrapped), Tensor.backward, update, settings)


def ddp(model: nn.Module, rank: int) -> Trained:
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _torch(model, wrapped, adamw(model), {"gradient_as_bucket_view": True, "AdamW": "fused"})


def zero_redundancy(model: nn.Module, rank: int) -> Trained:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=LR, weight_decay=DECAY, fused=True)
    return _torch(model, wrapped, optimizer, {"AdamW": "fused"})


def fsdp2(model: nn.Module, rank: int) -> Trained:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model.float()
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _torch(model, model, adamw(model), {"param_dtype": "bf16", "reduce_dtype": "fp32", "units": "blocks"})


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def zerolite(stage: int, **options: Any) -> Callable[[nn.Module, int], Trained]:
    def system(model: nn.Module, rank: int) -> Trained:
        from zerolite import ZeroOptimizer

        optimizer = ZeroOptimizer(adamw(model), model, stage=stage, **options)

        def update() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

        ledger = optimizer._parts.comm.ledger
        return Trained(loss_of(model), Tensor.backward, update, {"stage": stage, **options}, lambda: sum(ledger.sent.values()))

    return system


def deepspeed(stage: int, offload: bool = False) -> Callable[[nn.Module, int], Trained]:
    def system(model: nn.Module, rank: int) -> Trained:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed as ds

        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "overlap_comm": False,  # there are no streams on CPU
                "reduce_scatter": True,
                "round_robin_gradients": False,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                **({"offload_optimizer": {"device": "cpu", "pin_memory": False}} if offload else {}),
                **(
                    {
                        "stage3_prefetch_bucket_size": BUCKET,
                        "stage3_param_persistence_threshold": 100_000,
                        "stage3_max_live_parameters": 10**9,
                        "stage3_max_reuse_distance": 10**9,
                        "stage3_gather_16bit_weights_on_model_save": False,
                    }
                    if stage == 3
                    else {}
                ),
            },
        }
        if offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
                model.parameters(), lr=LR, weight_decay=DECAY, adamw_mode=True, fp32_optimizer_states=True
            )
        else:
            optimizer = adamw(model)
        engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        return Trained(loss_of(engine), engine.backward, engine.step, config)

    return system


SYSTEMS: dict[str, Callable[[nn.Module, int], Trained]] = {
    "model alone": alone,
    "DDP + AdamW(fused)": ddp,
    "ZeroRedundancyOptimizer": zero_redundancy,
    "FSDP2": fsdp2,
    "DeepSpeed 1": deepspeed(1),
    "DeepSpeed 2": deepspeed(2),
    "DeepSpeed 3": deepspeed(3),
    "DeepSpeed 2 + offload": deepspeed(2, offload=True),
    "DeepSpeed 3 + offload": deepspeed(3, offload=True),
    "zerolite 0": zerolite(0),
    "zerolite 1": zerolite(1),
    "zerolite 2": zerolite(2),
    "zerolite 3": zerolite(3),
}
NEEDS = {"DeepSpeed": "deepspeed"}  # first word of a system's name -> the package that it needs
