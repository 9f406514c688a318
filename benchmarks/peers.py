"""Other projects' systems, with their best settings: DeepSpeed's stages and offloads; torchao, FlashOptim, bitsandbytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.systems import BUCKET, CLIP, DECAY, LR, Job, System, Trained, adamw, loss_of, stepped

#: Where a stage's parameters may wait in the meantime; elements.
STAGE_3 = {
    "stage3_prefetch_bucket_size": BUCKET,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_gather_16bit_weights_on_model_save": False,
}


def config(stage: int, offload: bool, params: bool, cuda: bool, rows: int) -> dict[str, Any]:
    """Every key of a DeepSpeed run (0.19.8)."""
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": cuda,  # there are no streams on a CPU
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "zero_optimization": {**zero, **(STAGE_3 if stage == 3 else {})},
    }


def deepspeed(stage: int, offload: bool = False, params: bool = False) -> Callable[[Job], Trained]:
    def system(job: Job) -> Trained:
        cuda = job.device.type == "cuda"
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
        import deepspeed as ds

        settings = config(stage, offload, params, cuda, job.rows)
        if not dist.is_initialized() or not ds.comm.is_initialized():
            ds.init_distributed(dist_backend="nccl" if cuda else "gloo")
        if stage == 3 and job.lean:
            with ds.zero.Init(config_dict_or_path=settings):
                model = job.make()
        else:
            model = job.model()
        if offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
                model.parameters(), lr=LR, weight_decay=DECAY, adamw_mode=True, fp32_optimizer_states=True
            )
        else:
            optimizer = adamw(model.parameters())
        engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        shown = {**settings, "optimizer": type(optimizer).__name__}
        return Trained(loss_of(engine), engine.backward, engine.step, shown)

    return system


def torchao(job: Job) -> Trained:
    """States and gradients on the host; no clipping, and the bf16 model has no fp32 master."""
    from torchao.optim import CPUOffloadOptimizer

    model = job.model()
    options = {"offload_gradients": True, "fused": True, "lr": LR, "weight_decay": DECAY}
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, **options)
    return stepped(model, model, optimizer, options, clip=False)


def flashoptim(job: Job) -> Trained:
    from flashoptim import FlashAdamW

    model = job.model()
    optimizer = FlashAdamW(model.parameters(), lr=LR, weight_decay=DECAY, master_weight_bits=24)
    return stepped(model, model, optimizer, {"master_weight_bits": 24})


def bitsandbytes(job: Job) -> Trained:
    from bitsandbytes.optim import PagedAdamW8bit

    model = job.model()
    return stepped(model, model, PagedAdamW8bit(model.parameters(), lr=LR, weight_decay=DECAY), {"paged": True, "bits": 8})


def _deepspeed(stage: int, *, offload: bool = False, params: bool = False, core: bool = False) -> System:
    return System(deepspeed(stage, offload, params), package="deepspeed", core=core, stage=stage)


PEERS: dict[str, System] = {
    "DeepSpeed 0": _deepspeed(0),
    "DeepSpeed 1": _deepspeed(1, core=True),
    "DeepSpeed 2": _deepspeed(2, core=True),
    "DeepSpeed 3": _deepspeed(3),
    "DeepSpeed 1 + offload": _deepspeed(1, offload=True),
    "DeepSpeed 2 + offload": _deepspeed(2, offload=True, core=True),
    "DeepSpeed 3 + offload": _deepspeed(3, offload=True, core=True),
    "DeepSpeed 3 + offload all": _deepspeed(3, offload=True, params=True),
    "torchao CPUOffloadOptimizer": System(torchao, package="torchao", cuda=True, alone=True),
    "FlashOptim": System(flashoptim, package="flashoptim", cuda=True, alone=True),
    "bitsandbytes paged 8-bit": System(bitsandbytes, package="bitsandbytes", cuda=True, alone=True),
}
