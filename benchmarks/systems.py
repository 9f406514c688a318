"""The systems that are measured side by side: each takes a job and returns what runs one step of it.

A system is a function Job -> Trained. `Trained.forward(batch)` returns the loss, `backward(loss)` and `update()` do the
rest; every system has its best known settings for the device, all keys written out. Those of other projects: peers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LR, DECAY, CLIP = 1e-4, 0.1, 1.0
BUCKET = 13_000_000  # elements: 25 MiB of bf16, DDP's and zerolite's default
# From MANY DTensors on, FSDP2's updates are called with FEW at a time: an operation on a list of them looks at all inputs for
# each output (torch 2.13), which takes minutes a step with 10,000 parameters and half a second with lists of 10 to 50.
MANY, FEW = 1000, 20


@dataclass(frozen=True)
class Job:
    """What is to be trained."""

    make: Callable[[], nn.Module]  # builds the model in bf16, the same values on every rank
    device: torch.device
    rows: int = 2  # of one rank's batch
    lean: bool = False  # build it with as little memory as the system can (the largest model)

    def model(self) -> nn.Module:
        return self.make().to(self.device)


@dataclass
class Trained:
    """One model under one system."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Any]
    update: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    sent: Callable[[], int] | None = None  # bytes that this rank sent so far, where the system counts them
    plan: dict[str, int] | None = None  # planned bytes at rest by term: a rank's part of what its host holds


@dataclass(frozen=True)
class System:
    """A system, and what it needs to run."""

    run: Callable[[Job], Trained]
    package: str | None = None
    cuda: bool = False
    alone: bool = False  # one rank only
    core: bool = False  # one of those that the short presets run
    stage: int | None = None

    def missing(self, world: int, cuda: bool) -> str | None:
        """Why it cannot run here; None: it can."""
        if self.cuda and not cuda:
            return "needs a GPU"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed" + (" (make peers)" if self.package == "deepspeed" else "")
        if self.alone and world > 1:
            return "runs on one rank only"
        return None


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(input_ids=batch, labels=batch).loss


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)


def alone(job: Job) -> Trained:
    """Forward and backward only, in as many processes: what every system's overhead is counted from."""
    model = job.model()
    return Trained(loss_of(model), Tensor.backward, model.zero_grad)


def stepped(
    model: nn.Module, wrapped: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], clip: bool = True,
    foreach: bool | None = None,
) -> Trained:  # fmt: skip
    """The usual loop around an optimizer."""

    def update() -> None:
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=foreach)
        optimizer.step()
        optimizer.zero_grad()

    return Trained(loss_of(wrapped), Tensor.backward, update, {**settings, "clip": CLIP if clip else None})


def parallel(job: Job) -> tuple[nn.Module, nn.Module]:
    """The model, and DDP around it where there are several ranks."""
    model = job.model()
    if dist.get_world_size() == 1:
        return model, model
    return model, nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=25)


def ddp(job: Job) -> Trained:
    model, wrapped = parallel(job)
    return stepped(
        model, wrapped, adamw(model.parameters()), {"gradient_as_bucket_view": True, "bucket_cap_mb": 25, "AdamW": "fused"}
    )


def zero_redundancy(job: Job) -> Trained:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, wrapped = parallel(job)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=LR, weight_decay=DECAY, fused=True)
    return stepped(model, wrapped, optimizer, {"gradient_as_bucket_view": True, "bucket_cap_mb": 25, "AdamW": "fused"})


def fsdp2(offload: bool = False) -> Callable[[Job], Trained]:
    def system(job: Job) -> Trained:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        mesh = init_device_mesh(job.device.type, (dist.get_world_size(),))
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=True) if offload else OffloadPolicy(),
        }
        with torch.device("meta" if job.lean else job.device):
            model = job.make().float()
        for block in blocks_of(model):
            fully_shard(block, **options)
        fully_shard(model, **options)
        if job.lean:
            model.to_empty(device="cpu" if offload else job.device)
            with torch.no_grad():
                for p in model.parameters():
                    p.normal_(0, 0.02)
        settings: dict[str, Any] = {"param_dtype": "bf16", "reduce_dtype": "fp32", "units": "blocks and root", "AdamW": "fused"}
        settings |= {"offload": offload, "reshard_after_forward": True}
        params = list(model.parameters())
        if len(params) < MANY:
            return stepped(model, model, adamw(params), settings)
        groups = [{"params": params[k : k + FEW]} for k in range(0, len(params), FEW)]
        return stepped(model, model, adamw(groups), {**settings, "groups of": FEW, "foreach": False}, foreach=False)

    return system


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def zerolite(stage: int | str, **options: Any) -> Callable[[Job], Trained]:
    def system(job: Job) -> Trained:
        from zerolite import ZeroOptimizer, meta_init

        if job.lean:
            with meta_init():
                model = job.make()
        else:
            model = job.model()
        optimizer = ZeroOptimizer(adamw(model.parameters()), model, stage=stage, **options)
        settings = {"stage": stage, **options, "chosen": optimizer.plan.label}
        clip = not optimizer.plan.step_in_backward  # which leaves no gradient to clip
        trained = stepped(model, model, optimizer, settings, clip)
        ledger = optimizer._parts.comm.ledger
        trained.sent = lambda: sum(ledger.sent.values())
        trained.plan = {t.name: t.host // optimizer.plan.setting.here for t in optimizer.plan.terms if t.when == "always"}
        return trained

    return system


def all_systems() -> dict[str, System]:
    """Every system by name, in the order in which they run."""
    from benchmarks.peers import PEERS

    ours: dict[str, System] = {
        "zerolite 0": System(zerolite(0), stage=0),
        "zerolite 1": System(zerolite(1), stage=1, core=True),
        "zerolite 2": System(zerolite(2), stage=2, core=True),
        "zerolite 3": System(zerolite(3), stage=3, core=True),
        "zerolite 1 + offload": System(zerolite(1, offload="states"), stage=1),
        "zerolite 2 + offload": System(zerolite(2, offload="states"), stage=2),
        "zerolite 3 + offload": System(zerolite(3, offload="states"), stage=3),
        "zerolite 3 + offload all": System(zerolite(3, offload="all"), stage=3),
        "zerolite 2 + bf16 moments": System(zerolite(2, moments="bf16"), stage=2),
        "zerolite 2 + int8 moments": System(zerolite(2, moments="int8"), stage=2, core=True),
        "zerolite 3 + int8 moments": System(zerolite(3, moments="int8"), stage=3),
        "zerolite 3 + step in backward": System(zerolite(3, step_in_backward=True), stage=3),
        "zerolite 3 + int8 moments + step in backward": System(zerolite(3, moments="int8", step_in_backward=True), stage=3),
        "zerolite auto": System(zerolite("auto")),
    }
    return {
        ALONE: System(alone, core=True),
        "DDP + AdamW(fused)": System(ddp, core=True),
        "ZeroRedundancyOptimizer": System(zero_redundancy, stage=1),
        "FSDP2": System(fsdp2(), stage=3, core=True),
        "FSDP2 + offload": System(fsdp2(offload=True), cuda=True, stage=3),
        **PEERS,
        **ours,
    }


ALONE = "model alone"


def choose(wanted: str | None, world: int, cuda: bool, core: bool) -> tuple[list[str], dict[str, str]]:
    """Names of the systems to run, "model alone" first, and of those that cannot, with why.

    wanted  comma-separated names or beginnings of names ("DeepSpeed" is all of its stages); None: all, or the core ones
    """
    known = all_systems()
    names = [name for name, system in known.items() if system.core or not core]
    if wanted is not None:
        parts = [part.strip() for part in wanted.split(",") if part.strip()]
        unknown = [part for part in parts if not any(name.startswith(part) for name in known)]
        if unknown:
            raise ValueError(f"systems: expected some of {list(known)}, got {unknown}")
        names = [name for name in known if name in parts or any(name.startswith(p) and p not in known for p in parts)]
    names = [ALONE, *(name for name in names if name != ALONE)]
    missing = {name: why for name in names if (why := known[name].missing(world, cuda)) is not None}
    return [name for name in names if name not in missing], missing
