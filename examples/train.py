"""Trains a small GPT-2 on real text, alone or over ranks, at any ZeRO stage or with plain DDP.

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py --stage 3

The text is the source of the Python standard library, or what --data names. zerolite is one line of `build`; the rest is
a training script as PyTorch has it. A checkpoint of one stage resumes at another, to the same bits.
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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from zerolite import MemoryTimeline, ZeroOptimizer

MODELS = {"tiny": (128, 2, 4), "small": (512, 3, 8), "gpt2": (768, 12, 12)}  # width, layers, heads
VOCABULARY = 2048
TESTS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
TABLES = {"encodings", "pydoc_data", "entities.py", "stringprep.py"}  # not code: they read like noise


class Parts(NamedTuple):
    """What a run trains with."""

    model: GPT2LMHeadModel
    forward: nn.Module  # the model, or DDP around it
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR


# ---- options


def parse_args() -> argparse.Namespace:
    """The options; exits with a message where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=["0", "1", "2", "3", "ddp"], default="2", help="ZeRO stage (2), or ddp for DistributedDataParallel")
    add(
        "--offload",
        choices=["states", "all"],
        help="rest states and gradients, or parameters too, in host memory (a CPU run moves nothing)",
    )
    add("--moments", choices=["fp32", "bf16", "int8"], default="fp32", help="storage of Adam's two moments (fp32)")
    add("--model", choices=list(MODELS), default="small", help="default: small, of 11 million parameters")
    add("--data", type=Path, metavar="PATH", help="a text file or a directory of them; default: the standard library's source")
    add("--steps", type=int, default=200, help="steps of the whole learning rate schedule (%(default)s)")
    add("--stop", type=int, help="stop after this step of the schedule; default: after the last")
    add("--batch", type=int, default=4, help="sequences a rank and step (%(default)s)")
    add("--context", type=int, default=128, help="tokens of a sequence (%(default)s)")
    add("--lr", type=float, default=6e-4, help="highest learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="of values, batches and the sample (%(default)s)")
    add("--prompt", default="    def __init__(self", help="start of the generated sample (%(default)r)")
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="where ranks share the tokenized text; kept for the next run (%(default)s)",
    )
    add("--save", type=Path, metavar="PATH", help="write a checkpoint at the end")
    add("--resume", type=Path, metavar="PATH", help="go on from a checkpoint, also one of another stage")
    add("--json", type=Path, metavar="FILE", help="write losses, times and memory")
    add("--timeline", type=Path, metavar="PATH", help="record memory over the steps: PATH.png, PATH.html and PATH.json")
    args = parser.parse_args()
    args.stop = args.steps if args.stop is None else args.stop
    for message, wrong in mistakes(args).items():
        if wrong:
            parser.error(message)
    return args


def mistakes(args: argparse.Namespace) -> dict[str, bool]:
    """Messages for what can be wrong with the options, and whether it is."""
    return {
        f"--steps: expected at least 1, got {args.steps}": args.steps < 1,
        f"--stop: expected 1 to --steps ({args.steps}), got {args.stop}": not 1 <= args.stop <= args.steps,
        f"--batch: expected at least 1, got {args.batch}": args.batch < 1,
        f"--context: expected at least 8, got {args.context}": args.context < 8,
        f"--lr: expected a number above 0, got {args.lr}": not 0 < args.lr < math.inf,
        f"--seed: expected at least 0, got {args.seed}": args.seed < 0,
        "--prompt: expected some text, got none": not args.prompt,
        f"--data: {args.data} does not exist": args.data is not None and not args.data.exists(),
        f"--resume: {args.resume} is not a file": args.resume is not None and not args.resume.is_file(),
        f"--save: expected the name of a file, {args.save} is a folder": args.save is not None and args.save.is_dir(),
        "--offload: expected a ZeRO stage with it, got --stage ddp": args.offload is not None and args.stage == "ddp",
        f"--offload all: expected --stage 3 with it, got {args.stage}": args.offload == "all" and args.stage != "3",
        "--moments: expected a ZeRO stage with it, got --stage ddp": args.moments != "fp32" and args.stage == "ddp",
        "--timeline: expected a ZeRO stage with it, got --stage ddp": args.timeline is not None and args.stage == "ddp",
        "--stage ddp: expected ranks; run torchrun --nproc-per-node 2 examples/train.py --stage ddp": args.stage == "ddp"
        and "WORLD_SIZE" not in os.environ,
    }


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
        return [data] if data.is_file() else sorted(path for path in data.rglob("*") if path.is_file())
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if not (TESTS | TABLES) & set(path.relative_to(root).parts)]


def tokenize(files: list[Path]) -> tuple[Tokenizer, np.ndarray]:
    """A byte-level BPE tokenizer trained on a sample of the files, and the tokens of all, one after the other."""

    def read(some: list[Path]) -> list[str]:
        return [path.read_text("utf-8", errors="replace") for path in some]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(read(files[:: 1 + len(files) // 200]), trainer)
    ids = [np.empty(0, dtype=np.uint16)]
    for start in range(0, len(files), 32):  # a few at a time: an encoding takes far more memory than its ids
        ids += [np.array(text.ids, dtype=np.uint16) for text in tokenizer.encode_batch_fast(read(files[start : start + 32]))]
    return tokenizer, np.concatenate(ids)


def load_text(args: argparse.Namespace) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the tokens; rank 0 makes them once for a set of files (a collective)."""
    files = text_files(args.data)
    about = [VOCABULARY, *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)]
    stem = args.out / f"text-{hashlib.sha256(repr(about).encode()).hexdigest()[:12]}"
    vocabulary, tokens, unfinished = (stem.with_suffix(end) for end in (".json", ".npy", f".{os.getpid()}.npy"))
    if rank_and_size()[0] == 0 and not tokens.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer, ids = tokenize(files)
        tokenizer.save(str(vocabulary))
        np.save(unfinished, ids)
        unfinished.rename(tokens)  # last, and in one piece: tokens that are there are whole
    if dist.is_initialized():
        dist.barrier()
    ids = np.load(tokens, mmap_mode="r")
    if len(ids) <= args.context:
        raise SystemExit(f"--data: expected more than {args.context} tokens (--context), got {len(ids)}")
    return Tokenizer.from_file(str(vocabulary)), ids


def batch_of(tokens: np.ndarray, args: argparse.Namespace, step: int) -> Tensor:
    """Random windows, (batch, context + 1), that follow from seed, step and rank alone: a checkpoint needs no sampler."""
    random = np.random.default_rng((args.seed, step, rank_and_size()[0]))
    starts = random.integers(len(tokens) - args.context, size=args.batch)
    return torch.from_numpy(np.stack([tokens[start : start + args.context + 1] for start in starts]).astype(np.int64))


# ---- model and optimizer


def build(args: argparse.Namespace) -> Parts:
    """A fresh model in bf16, its optimizer, and a schedule: linear warm-up, then a cosine down to a tenth."""
    width, layers, heads = MODELS[args.model]
    sizes = {"vocab_size": VOCABULARY, "n_positions": args.context, "n_embd": width, "n_layer": layers, "n_head": heads}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    plain = {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
    torch.manual_seed(args.seed)
    model = forward = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **plain))
    if args.stage == "ddp":
        model.to(torch.bfloat16)
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    if args.stage != "ddp":
        options = {"stage": int(args.stage), "offload": args.offload, "moments": args.moments}
        optimizer = ZeroOptimizer(optimizer, model, param_dtype=torch.bfloat16, **options)
    warm = max(1, args.steps // 10)

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - warm) / max(1, args.steps - warm)))
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * progress))

    return Parts(model, forward, optimizer, LambdaLR(optimizer, factor))


def memory_at_rest(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Bytes of params, grads and states on this rank by formula and live; call between backward and step."""
    if isinstance(optimizer, ZeroOptimizer):
        memory, plan = optimizer.memory(), optimizer.plan
        homes = {term: getattr(plan, term).home for term in memory.live}
        return {"planned": memory.planned, "live": memory.live, "homes": homes}
    params = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {"params": params, "grads": [p.grad for p in params if p.grad is not None], "states": states}
    live = {term: sum(t.numel() * t.element_size() for t in found) for term, found in tensors.items()}
    widths = {"params": 2, "grads": 2, "states": 4}  # all of it in bf16, two moments
    planned = {term: width * sum(p.numel() for p in params) for term, width in widths.items()}
    return {"planned": planned, "live": live, "homes": dict.fromkeys(widths, "device")}


# ---- checkpoints


def save(path: Path, step: int, parts: Parts) -> None:
    """Rank 0 writes the whole state, which any stage and number of ranks can load (a collective)."""
    weights = parts.model.state_dict()  # on every rank: at stage 3 the parameters are gathered for it
    if isinstance(parts.optimizer, ZeroOptimizer):
        parts.optimizer.consolidate_state_dict(to=0)
    if rank_and_size()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        states = {"optimizer": parts.optimizer.state_dict(), "scheduler": parts.scheduler.state_dict()}
        beside = path.with_name(path.name + ".new")  # a kill or a full disk leaves the checkpoint before
        torch.save({"step": step, "model": weights, **states}, beside)
        beside.replace(path)


def resume(path: Path, parts: Parts) -> int:
    """Loads a checkpoint on every rank, the model first; returns the steps that it has behind it."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    parts.model.load_state_dict(saved["model"])
    parts.optimizer.load_state_dict(saved["optimizer"])
    parts.scheduler.load_state_dict(saved["scheduler"])
    return saved["step"]


# ---- the run


def train(args: argparse.Namespace, parts: Parts, tokens: np.ndarray, start: int) -> dict[str, Any]:
    """Steps `start` to `args.stop`; returns the loss (mean over ranks) and seconds of each, and the memory."""
    model, forward, optimizer, scheduler = parts
    losses, seconds, memory = [], [], {}
    often = 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(range(start, args.stop), disable=rank_and_size()[0] != 0, ncols=100, mininterval=often)
    for step in bar:
        began = time.perf_counter()
        windows = batch_of(tokens, args, step)
        logits = forward(input_ids=windows[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        if step == args.stop - 1:
            memory = memory_at_rest(model, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(mean_over_ranks(loss))
        seconds.append(time.perf_counter() - began)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return {"losses": losses, "seconds": seconds, **memory, "peak": peak_of_ranks()}


def generate(args: argparse.Namespace, parts: Parts, tokenizer: Tokenizer) -> str:
    """Text that the model writes after the prompt (a collective)."""
    prompt = torch.tensor([tokenizer.encode(args.prompt).ids[-args.context // 2 :]])
    zero = isinstance(parts.optimizer, ZeroOptimizer)
    torch.manual_seed(args.seed)
    with parts.optimizer.full_params() if zero else nullcontext(), torch.no_grad():
        ids = parts.model.generate(prompt, max_length=args.context, do_sample=True, temperature=0.7, top_k=40, use_cache=True)
    return tokenizer.decode(ids[0].tolist())


def main() -> None:
    """Trains, saves and reports."""
    args = parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    tokenizer, tokens = load_text(args)
    parts = build(args)
    start = resume(args.resume, parts) if args.resume else 0
    if start >= args.stop:
        raise SystemExit(
            f"--resume: expected a checkpoint of less than {args.stop} steps, got one of {start}. Raise "
            "--steps, and --stop where it is given."
        )
    with MemoryTimeline(parts.optimizer, args.timeline) if args.timeline else nullcontext():
        report = train(args, parts, tokens, start)
    if args.save:
        save(args.save, args.stop, parts)
    report["parameters"] = sum(p.numel() for p in parts.model.parameters())
    report["sample"] = generate(args, parts, tokenizer)
    if rank_and_size()[0] == 0:
        show(report)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()


def show(report: dict[str, Any]) -> None:
    """Prints memory and the sample."""
    count = report["parameters"]
    print(f"\n{count:,} parameters; bytes a parameter at rest on rank 0:")
    for term, live in report["live"].items():
        print(f"  {term:8}{report['planned'][term] / count:8.3f} by formula{live / count:8.3f} live")
    print(f"peak of each process: {', '.join(f'{peak / 2**20:,.0f} MiB' for peak in report['peak'])}")
    print(f"\n{report['sample']}")


if __name__ == "__main__":
    main()
