"""Small models and loops that the tests share. Models are built under a lock: rank threads share torch's generator."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerolite

_lock = threading.RLock()


def seeded(make: Any, seed: int = 0) -> Any:
    """make() with torch's generator at a fixed state."""
    with _lock:
        torch.manual_seed(seed)
        return make()


class Block(nn.Module):
    """A pre-norm residual block; sizes that no world divides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 3)
        self.down = nn.Linear(2 * width + 3, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, blocks, tied head: the shape of a language model in a few thousand parameters."""

    def __init__(self, width: int = 13, blocks: int = 3, words: int = 31, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Run:
    """One training run."""

    stage: int = 2
    offload: str | None = None
    dtype: torch.dtype | None = None
    bucket_mb: float = 25.0
    steps: int = 4
    micro: int = 1
    clip: float | None = None
    lr: float = 1e-2
    optimizer: type = torch.optim.AdamW
    options: tuple = ()
    no_sync: bool = False
    moments: str = "fp32"
    more: tuple = ()  # further options of ZeroOptimizer


def tokens_for(step: int, micro: int, rank: int, words: int = 31) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randint(0, words, (2, 7), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def make(run: Run, group: Any, model: nn.Module | None = None) -> tuple[nn.Module, zerolite.ZeroOptimizer]:
    """A model and its ZeroOptimizer."""
    model = seeded(Net) if model is None else model
    inner = run.optimizer(model.parameters(), lr=run.lr, **dict(run.options))
    optimizer = zerolite.ZeroOptimizer(
        inner,
        model,
        stage=run.stage,
        offload=run.offload,
        param_dtype=run.dtype,
        bucket_mb=run.bucket_mb,
        moments=run.moments,
        process_group=group,
        **dict(run.more),
    )
    return model, optimizer


def train(group: Any, rank: int, run: Run, model: nn.Module | None = None) -> dict[str, Any]:
    """Trains and returns parameters, states, losses and norms."""
    model, optimizer = make(run, group, model)
    losses, norms = [], []
    for step in range(run.steps):
        for micro in range(run.micro):
            if run.no_sync and micro + 1 < run.micro:
                with optimizer.no_sync():
                    loss = loss_of(model, tokens_for(step, micro, rank))
                    (loss / run.micro).backward()
            else:
                loss = loss_of(model, tokens_for(step, micro, rank))
                (loss / run.micro).backward()
        losses.append(loss.item())
        if run.clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), run.clip).item())
        optimizer.step()
        optimizer.zero_grad()
    params = {name: value.clone() for name, value in model.state_dict().items()}
    return {"params": params, "states": optimizer.full_state(), "losses": losses, "norms": norms}


def train_on(comm: Any, run: Run) -> dict[str, Any]:
    return train(comm, comm.rank, run)


def equal(a: Any, b: Any) -> bool:
    """Whether two results are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
