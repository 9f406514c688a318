"""Trains a small GPT-2 on real text, alone or over ranks, at any ZeRO stage or with plain DDP.

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py --stage 3 --steps 200

The text is the source of the Python standard library, or what --data names. zerolite is one line of `build`; the rest is a
training script as PyTorch has it. Ranks share --out, where the tokens are kept for the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import sys
import sysconfig
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import zerolite

MODELS = {"tiny": (128, 2, 4), "small": (384, 6, 6), "gpt2": (768, 12, 12)}  # width, layers, heads
VOCABULARY = 4096
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}  # not code, or not its own


# ---- options


def parse_args() -> argparse.Namespace:
    """The options; exits with a message where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=["0", "1", "2", "3", "ddp"], default="2", help="ZeRO stage, or ddp for DistributedDataParallel")
    add("--offload", choices=["states", "all"], help="rest states and gradients, or parameters too, in host memory")
    add("--model", choices=list(MODELS), default="small", help="default: small, of 12 million parameters")
    add("--data", type=Path, metavar="PATH", help="a text file or a directory of them; default: the standard library's source")
    add("--steps", type=int, default=200, help="steps of the whole learning rate schedule")
    add("--stop", type=int, help="stop after this step of the schedule; default: after the last")
    add("--batch", type=int, default=4, help="sequences a rank and step")
    add("--context", type=int, default=128, help="tokens of a sequence")
    add("--lr", type=float, default=1e-3, help="highest learning rate")
    add("--seed", type=int, default=0)
    add("--prompt", default="def ", help="start of the generated sample")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where the tokenized text is kept")
    add("--save", type=Path, metavar="PATH", help="write a checkpoint at the end")
    add("--resume", type=Path, metavar="PATH", help="go on from a checkpoint, also one of another stage")
    add("--json", type=Path, metavar="FILE", help="write losses, times and memory")
    args = parser.parse_args()
    args.stop = args.steps if args.stop is None else args.stop
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exits with a message where options are out of range or do not fit together."""
    for name, least in {"steps": 1, "stop": 1, "batch": 1, "context": 8, "seed": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr: expected a number above 0, got {args.lr}")
    if args.stop > args.steps:
        parser.error(f"--stop: expected at most --steps ({args.steps}), got {args.stop}")
    if not args.prompt:
        parser.error("--prompt: expected some text, got none")
    if args.offload and args.stage == "ddp":
        parser.error("--offload: expected a ZeRO stage with it, got --stage ddp")
    if args.offload == "all" and args.stage != "3":
        parser.error(f"--offload all: expected --stage 3 with it, got --stage {args.stage}")
    if args.stage == "ddp" and "WORLD_SIZE" not in os.environ:
        parser.error("--stage ddp: expected ranks. Run it as torchrun --nproc-per-node 2 examples/train.py --stage ddp")
    for name in ("data", "resume"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: {path} does not exist")


# ---- ranks


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a scalar over all ranks (a collective)."""
    value = value.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / rank_and_size()[1]


def peak_of_ranks() -> list[int]:
    """Highest resident bytes of every rank's process so far (a collective)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peaks = [peak] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(peaks, peak)
    return peaks


# ---- text


def text_files(data: Path | None) -> list[Path]:
    """The files to learn from, in a fixed order."""
    if data is not None:
        return [data] if data.is_file() else sorted(p for p in data.rglob("*") if p.is_file())
    root = Path(sysconfig.get_paths()["stdlib"])
    return [p for p in sorted(root.rglob("*.py")) if not SKIPPED & set(p.relative_to(root).parts)]


def tokenize(files: list[Path]) -> tuple[Tokenizer, np.ndarray]:
    """A byte-level BPE tokenizer trained on a sample of the files, and the tokens of all, one after the other."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(map(read, files[:: 1 + len(files) // 200]), trainer)
    ids = [np.empty(0, dtype=np.uint16)]
    for start in range(0, len(files), 32):  # a few at a time: what the tokenizer returns is far larger than the text
        encoded = tokenizer.encode_batch_fast([read(path) for path in files[start : start + 32]])
        ids += [np.array(text.ids, dtype=np.uint16) for text in encoded]
    return tokenizer, np.concatenate(ids)


def read(path: Path) -> str:
    """A file's text."""
    return path.read_text("utf-8", errors="replace")


def load_text(args: argparse.Namespace) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the tokens; rank 0 makes them once for a set of files (a collective)."""
    files = text_files(args.data)
    key = hashlib.sha256(repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode()).hexdigest()
    vocabulary, tokens = (args.out / f"text-{key[:12]}{suffix}" for suffix in (".json", ".npy"))
    if rank_and_size()[0] == 0 and not tokens.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer, ids = tokenize(files)
        tokenizer.save(str(vocabulary))
        unfinished = tokens.with_suffix(f".{os.getpid()}.npy")
        np.save(unfinished, ids)
        unfinished.rename(tokens)  # last, and in one piece: a file that exists is whole
    if dist.is_initialized():
        dist.barrier()
    ids = np.load(tokens, mmap_mode="r")
    if len(ids) <= args.context:
        raise SystemExit(f"--data: expected more than {args.context} tokens (--context), got {len(ids)}")
    return Tokenizer.from_file(str(vocabulary)), ids


def batch_of(tokens: np.ndarray, args: argparse.Namespace, step: int) -> Tensor:
    """Random windows, (batch, context), that depend on the seed, the step and the rank alone: nothing to save."""
    starts = np.random.default_rng((args.seed, step, rank_and_size()[0])).integers(len(tokens) - args.context, size=args.batch)
    return torch.from_numpy(np.stack([tokens[s : s + args.context] for s in starts]).astype(np.int64))


# ---- model and optimizer


def build(args: argparse.Namespace) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, LambdaLR]:
    """The model, what a forward calls, the optimizer and the schedule: linear warm-up, then a cosine down to a tenth."""
    width, layers, heads = MODELS[args.model]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    plain = {"bos_token_id": None, "eos_token_id": None, "loss_type": "ForCausalLM", "use_cache": False}
    sizes = {"vocab_size": VOCABULARY, "n_positions": args.context, "n_embd": width, "n_layer": layers, "n_head": heads}
    torch.manual_seed(args.seed)
    model = forward = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **plain))
    if args.stage == "ddp":
        model.to(torch.bfloat16)
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    if args.stage != "ddp":
        optimizer = zerolite.ZeroOptimizer(
            optimizer, model, stage=int(args.stage), offload=args.offload, param_dtype=torch.bfloat16
        )
    warm = max(1, args.steps // 10)

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - warm) / max(1, args.steps - warm)))
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * progress))

    return model, forward, optimizer, LambdaLR(optimizer, factor)


def memory_at_rest(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, int]]:
    """Bytes of params, grads and states on this rank by formula and live; call between backward and step."""
    if isinstance(optimizer, zerolite.ZeroOptimizer):
        memory = optimizer.memory()
        return {"planned": memory.planned, "live": memory.live}
    params = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {"params": params, "grads": [p.grad for p in params if p.grad is not None], "states": states}
    live = {term: sum(t.numel() * t.element_size() for t in found) for term, found in tensors.items()}
    count = sum(p.numel() for p in params)
    return {"planned": {"params": 2 * count, "grads": 2 * count, "states": 4 * count}, "live": live}


# ---- checkpoints


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
    """Rank 0 writes the whole state, which any stage and number of ranks can load (a collective)."""
    weights = model.state_dict()  # every rank: at stage 3 the parameters are gathered
    if isinstance(optimizer, zerolite.ZeroOptimizer):
        optimizer.consolidate_state_dict(to=0)
    if rank_and_size()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save({"step": step, "model": weights, **states}, path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> int:
    """Loads a checkpoint on every rank, the model first; returns the steps that it has behind it."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    return saved["step"]


# ---- the run


def generate(args: argparse.Namespace, model: Any, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer) -> str:
    """Text that the model writes after the prompt (a collective)."""
    prompt = torch.tensor([tokenizer.encode(args.prompt).ids[-args.context // 2 :]])
    length = min(120, args.context - prompt.shape[1])
    whole = optimizer.full_params() if isinstance(optimizer, zerolite.ZeroOptimizer) else nullcontext()
    torch.manual_seed(args.seed)
    with whole, torch.no_grad():
        ids = model.generate(prompt, max_new_tokens=length, do_sample=True, temperature=0.7, top_k=40, use_cache=True)
    return tokenizer.decode(ids[0].tolist())


def train(args: argparse.Namespace, tokens: np.ndarray, start: int, parts: Any) -> dict[str, Any]:
    """Steps `start` to `args.stop`; returns the loss (mean over ranks) and seconds of each, and the memory at rest."""
    model, forward, optimizer, scheduler = parts
    report: dict[str, Any] = {"losses": [], "seconds": []}
    hidden = rank_and_size()[0] != 0
    bar = tqdm(range(start, args.stop), disable=hidden, ncols=100, mininterval=0.1 if sys.stderr.isatty() else 10)
    for step in bar:
        began = time.perf_counter()
        windows = batch_of(tokens, args, step)
        loss = forward(input_ids=windows, labels=windows).loss
        loss.backward()
        if step == args.stop - 1:
            report.update(memory_at_rest(model, optimizer))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        report["losses"].append(mean_over_ranks(loss))
        report["seconds"].append(time.perf_counter() - began)
        bar.set_postfix(loss=f"{report['losses'][-1]:.3f}", refresh=False)
    return report


def main() -> None:
    """Trains, saves and reports."""
    args = parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    tokenizer, tokens = load_text(args)
    parts = model, _, optimizer, scheduler = build(args)
    start = resume(args.resume, model, optimizer, scheduler) if args.resume else 0
    if start >= args.stop:
        raise SystemExit(f"--resume: expected a checkpoint of less than {args.stop} steps, got one of {start}. Raise --steps.")
    report = train(args, tokens, start, parts)
    if args.save:
        save(args.save, args.stop, model, optimizer, scheduler)
    report["sample"] = generate(args, model, optimizer, tokenizer)
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["peak"] = peak_of_ranks()
    if rank_and_size()[0] == 0:
        show(report)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()


def show(report: dict[str, Any]) -> None:
    """Prints the memory at rest and the sample."""
    count = report["parameters"]
    print(f"\n{count:,} parameters; bytes a parameter on rank 0 at rest:")
    for term, live in report["live"].items():
        print(f"  {term:8}{report['planned'][term] / count:8.3f} by formula{live / count:8.3f} live")
    print(f"peak memory of each process: {', '.join(f'{peak / 2**20:,.0f} MiB' for peak in report['peak'])}")
    print(f"\n{report['sample']}")


if __name__ == "__main__":
    main()
