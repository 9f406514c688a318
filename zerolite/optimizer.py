"""ZeroOptimizer: the one line that a training script adds."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress, repeat
from operator import add, and_, is_not
from typing import Any

import torch
from torch import Tensor, nn

from zerolite import checkpoint, loading
from zerolite.auto import settle
from zerolite.bucket import Bucket, Entry
from zerolite.build import Built, build, late_buckets
from zerolite.comm.group import make_comm
from zerolite.early import early_of
from zerolite.memory import Memory, measure
from zerolite.placement import Plan
from zerolite.planner import DEFAULT_BUCKET_MB
from zerolite.shown import Shown
from zerolite.update import comparable
from zerolite.whole import full_params, kept_writes
from zerolite.writes import targets


class ZeroOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer: its states, and the gradients and parameters too, are cut over the ranks of a process group.

    Args:
        optimizer: a torch.optim.Optimizer whose update is elementwise. Adam and AdamW run on the fused
            kernels; others run their own `step` on this rank's shard, in fp32. Its param_groups stay in use.
        model: the module that owns the parameters; needed for stage 3, names errors and checkpoints elsewhere.
        stage: 0 nothing is sharded, 1 optimizer states, 2 gradients too, 3 parameters too;
            "auto": the fastest that fits in the memory that is free, and `plan` says why.
        offload: None, "states" (on the host; gradients at rest where `gradients` says) or "all" (parameters too; stage 3).
        param_dtype: compute dtype, e.g. torch.bfloat16. An fp32 parameter keeps its low bits in the optimizer.
        moments: storage of Adam's moments, "fp32"; "bf16" and "int8" round them to 2 and 1 bytes each (Adam, AdamW).
        units: module classes that are gathered as one at stage 3; None: children of the outermost ModuleLists and
            Sequentials.
        bucket_mb: size of a bucket in MiB of compute dtype; a parameter is never split between buckets.
        overlap: with offload on a GPU, step() returns while the host updates, and each parameter waits for its new value
            when it is used; False: step() waits. The same bits. On a CPU there is nothing to overlap.
        update: where offloaded states are updated, "host", "stream" (on the GPU, in chunks), or "auto": both, by their speed.
        resident: part of the states, 0.0 to 1.0, that stays on the GPU with offload="states"; "auto": what its memory takes.
        gradients: where they rest with offload="states" until the update: "host", "device" (2 bytes a parameter on the GPU
            instead of the host), or "auto": on the GPU where the plan finds room for them, else on the host.
        step_in_backward: True: each parameter is updated as soon as its averaged gradient is there, inside of backward(), so
            gradients do not rest (stage 3; 2 bytes a parameter less). The same bits; nothing can be clipped or skipped, and
            micro-batches are summed under no_sync().
        process_group: a torch.distributed group; None: the default group, or a world of one.

    Rank 0's parameters and buffers are copied to all ranks. Raises TypeError, ValueError or NotImplementedError,
    on every rank and before anything is changed, for what is not supported or differs between ranks.
    """

    skipped_steps: int  # steps left out because a gradient was not finite

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        stage: int | str = 2,
        offload: str | None = None,
        param_dtype: torch.dtype | None = None,
        moments: str = "fp32",
        units: Iterable[type[nn.Module]] | None = None,
        bucket_mb: float = DEFAULT_BUCKET_MB,
        overlap: bool = True,
        update: str = "auto",
        resident: float | str = 0.0,
        gradients: str = "auto",
        step_in_backward: bool = False,
        process_group: Any = None,
    ) -> None:
        self._built: Built | None = None
        comm = make_comm(process_group)
        options = {
            "stage": stage,
            "offload": offload,
            "param_dtype": param_dtype,
            "moments": moments,
            "units": tuple(units) if isinstance(units, Iterable) else units,
            "bucket_mb": bucket_mb,
            "overlap": overlap,
            "update": update,
            "resident": resident,
            "gradients": gradients,
            "step_in_backward": step_in_backward,
        }
        options, reasons = settle(optimizer, model, options, comm)
        built = build(optimizer, model, options, comm)
        built.checked.plan = replace(built.checked.plan, reasons=reasons)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._inner = optimizer
        self.param_groups = optimizer.param_groups
        for name, value in vars(optimizer).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(self, name, value)  # hooks registered on the user's optimizer go on
        self._built = built
        self.skipped_steps = 0
        self._whole: dict[str, Any] | None = None  # of consolidate_state_dict, until the next step
        self._grouped: list[list[int]] = []  # id of each param group and its parameters at the last step
        me = weakref.ref(self)
        built.reducer.names = names = tuple(sorted(optimizer.defaults))
        built.reducer.options = lambda: comparable(getattr(me(), "param_groups", ()), names)
        self._early = early_of(built, lambda: me()._check(), lambda: getattr(me(), "param_groups", None))  # type: ignore[union-attr]
        if optimizer.state:
            try:
                self._load(optimizer.state_dict)
            except Exception:
                built.close()
                raise
            optimizer.state.clear()

    # ---- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update on all ranks (a collective). Returns the closure's loss.

        A step whose gradients are not finite on any rank changes nothing on all ranks and counts in
        `skipped_steps`. Raises RankError where ranks took different paths, RuntimeError where gradients were used
        up or a parameter was replaced, or inside full_params().
        """
        if self._parts.inside:
            raise RuntimeError(
                "step(): expected outside of `with optimizer.full_params()`, got inside, where what parameters hold counts as "
                "written by the script. Leave the block first."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ledger = self._parts.comm.ledger
        ledger.note("step", "begin")
        with torch.no_grad():
            self._step()
        ledger.note("step", "end")
        self._inner._opt_called = True  # type: ignore[attr-defined]  # for schedulers built on the user's optimizer
        return loss

    def _step(self) -> None:
        built = self._settled
        self._check()
        if built.schedule is not None:
            if torch._C._current_graph_task_id() >= 0:
                raise RuntimeError(
                    "step(): expected to be called after backward(), got called inside of it, which at stage 3 still needs "
                    "parameters. Step after the backward, or use stage 2."
                )
            built.schedule.unpin()
        present = built.grads.settle_step()
        present = present if self._early is None else self._early.left(present)
        used, table = any(present), built.grads.table
        finite = built.reducer.finite() if used else True  # a collective where anything large was seen
        if used and not (finite and all(map(math.isfinite, compress(table.factors, present)))):
            self._skip()
        elif used:
            self._update(present)
            grouped = present if None not in table.groups else map(and_, present, map(is_not, table.groups, repeat(None)))
            table.steps[:] = map(add, table.steps, grouped)
        built.grads.use_up()
        built.updates.finish()
        self._whole = None

    def _update(self, present: list[bool]) -> None:
        built = self._parts
        buckets = [bucket for bucket in self._trained if any(map(present.__getitem__, bucket.rows))]
        for bucket in buckets:
            bucket.keep_writes()
        built.reducer.begin(buckets[:1])
        for position, bucket in enumerate(buckets):
            built.reducer.begin(buckets[position + 1 : position + 2])
            here = list(compress(bucket.entries, map(present.__getitem__, bucket.rows)))
            built.updates.update(bucket, targets(bucket, here), here)

    def _check(self) -> None:
        """Raises where a parameter was replaced. Param groups may be edited, but not behind the optimizer's back or into
        something it does not do."""
        with torch._C.DisableTorchFunctionSubclass():  # leaves that watch themselves are not used by this
            self._parts.check_replaced()
        self._whole = None
        known, table = self._parts.params, self._parts.grads.table
        for group in self.param_groups:
            self._parts.rule.check(group)
        grouped = [[id(group), *map(id, group["params"])] for group in self.param_groups]
        if grouped == self._grouped:
            return
        for group in self.param_groups:
            if known.issuperset(map(id, group["params"])):
                continue
            p = next(p for p in group["params"] if id(p) not in known)
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} was added to the wrapped optimizer. Call add_param_group of the "
                "ZeroOptimizer instead."
            )
        table.groups[:] = [None] * len(table.groups)  # what is in no group any more is not updated, as in torch
        for group in self.param_groups:
            for p in group["params"]:
                table.groups[table.numbers[id(p)]] = group
        self._grouped = grouped

    def _skip(self) -> None:
        if self._early is not None:
            self._early.skip()
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            text = "zerolite: a gradient is not finite; this step changed nothing on any rank (see optimizer.skipped_steps)."
            warnings.warn(text + self._parts.why_not_finite(), stacklevel=4)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients, as torch.optim.Optimizer.zero_grad."""
        self._parts.updates.check()
        if self._early is not None:
            self._early.clear()
        with torch._C.DisableTorchFunctionSubclass():  # p.grad of a parameter that waits for its value
            self._parts.grads.clear(set_to_none)
        self._parts.comm.ledger.note("zero_grad", "")

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales gradients so that their total norm is at most `max_norm`; returns the norm (fp32, a collective)."""
        self._parts.check_open()
        params = [p for group in self.param_groups for p in group["params"]]
        total = self._parts.grads.clip(params, max_norm, float(norm_type))
        return nn.utils.clip_grad_norm_(params, max_norm, norm_type) if total is None else total

    @contextmanager
    def no_sync(self) -> Any:
        """Backward passes inside stay on their rank, summed in fp32; the next one outside includes them."""
        reducer = self._parts.reducer
        before, reducer.sync = reducer.sync, False
        try:
            yield
        finally:
            reducer.sync = before

    # ---- reading

    @contextmanager
    def full_params(self) -> Any:
        """Parameters whole on every rank inside (a collective); what every rank writes to them is kept. No step() inside."""
        built = self._settled
        if built.inside:  # the outer one does it
            with torch.no_grad():
                yield
            return
        built.inside, schedule = True, built.schedule
        try:
            with torch.no_grad(), full_params(schedule) if schedule is not None else kept_writes(self._trained):
                yield
        finally:
            built.inside = False

    def full_grads(self) -> dict[str, Tensor]:
        """Averaged gradients by parameter name, whole on every rank (a collective); between backward and step."""
        built = self._settled
        present = built.grads.settle_step()
        return {entry.name: built.grads.read(entry) for entry in built.entries if present[entry.index]}

    def full_state(self) -> dict[str, dict[str, Any]]:
        """Optimizer state by parameter name, whole, on the CPU of every rank (a collective)."""
        return checkpoint.whole_states(self._trained, self._settled.comm)

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """This rank's part of the state by parameter, 1D: views of the elements it owns, of rounded moments copies in fp32.
        What is put into the dicts themselves would change nothing, and raises RuntimeError."""
        found: dict[Tensor, dict[str, Any]] = {}
        if self._built is not None:
            self._built.updates.settle()
            for bucket in self._trained:
                for number, piece in enumerate(bucket.pieces):
                    entry = bucket.entries[piece.slot]
                    if entry.steps > 0:
                        found[entry.param] = Shown(checkpoint.read_piece(bucket, number, piece, entry))
        return Shown(found)

    @state.setter
    def state(self, value: Any) -> None:
        """torch.optim.Optimizer assigns an empty dict when it is built; states live in buckets."""
        if self._built is not None:
            Shown.refuse()

    def memory(self) -> Memory:
        """Bytes at rest by term, as planned and as live now."""
        return measure(self.plan, self._parts.buckets)

    @property
    def plan(self) -> Plan:
        """What rests sharded, where, and how many bytes it takes."""
        return self._parts.plan

    # ---- state dicts

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """This rank's part, without communication; after consolidate_state_dict(), on that rank, the whole."""
        self._parts.updates.settle()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        whole = self._whole
        if whole is not None:
            state = {**whole, "param_groups": checkpoint.packed_groups(self.param_groups)}
        else:
            state = checkpoint.part_state_dict(self.param_groups, self._trained, self._parts.comm)
        for post in self._optimizer_state_dict_post_hooks.values():
            result = post(self, state)
            state = state if result is None else result
        return state

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gathers the whole state on rank `to` (a collective); state_dict() there returns it until the next step."""
        comm = self._settled.comm
        if not hasattr(to, "__index__") or not 0 <= to < comm.size:
            raise ValueError(f"consolidate_state_dict: expected a rank from 0 to {comm.size - 1}, got {to!r}")
        self._whole = checkpoint.whole_state_dict(self.param_groups, self._trained, comm, comm.rank == to)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Loads this rank's part at the same layout, or a whole state dict, also one of torch.optim, at any.

        A collective. Load the model first. Raises on every rank, before anything is written, where groups, shapes, pieces or
        ranks differ; RuntimeError inside full_params().
        """
        groups = self._load(lambda: loading.hooked(self, state_dict))
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({name: copy.deepcopy(value) for name, value in saved.items() if name != "params"})
        # what a class fixes (AdamW's decoupled decay), and defaults of options that are newer than the checkpoint
        self._inner.__setstate__({"state": defaultdict(dict), "param_groups": self.param_groups})
        self._whole = None
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _load(self, given: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        built = self._settled
        if self._early is not None:
            self._early.refuse("load_state_dict()")
        if built.inside:
            raise RuntimeError("load_state_dict: expected to be called outside of full_params(), got called inside.")
        return loading.load(given, self.param_groups, built.entries, lambda: self._trained, built.rule, built.comm, self._adopt)

    # ---- parameters that come later

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim.Optimizer.add_param_group (a collective: every rank adds it)."""
        if self._built is None:
            super().add_param_group(param_group)
            return
        if self._early is not None:
            self._early.refuse("add_param_group()")
        super().add_param_group(param_group)
        try:
            self._parts.rule.check(self.param_groups[-1])
            added = self._built.add_group(self.param_groups[-1], len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._adopt([entry for entry in added if entry.param.requires_grad])

    def _adopt(self, entries: list[Entry]) -> None:
        """Gives states to parameters that were frozen, or not there, when the optimizer was built."""
        late_buckets(self._settled, entries)

    # ---- the rest

    @property
    def _parts(self) -> Built:
        assert self._built is not None
        return self._built

    @property
    def _settled(self) -> Built:
        """The parts, when every update under way is done."""
        return self._parts.settled()

    @property
    def _trained(self) -> list[Bucket]:
        return [bucket for bucket in self._parts.buckets if bucket.trained]

    def remove_hooks(self) -> None:
        """Detaches from autograd and the model, on every rank; the optimizer cannot be used afterwards."""
        self._parts.close()

    def __repr__(self) -> str:
        return f"ZeroOptimizer of {self._inner!r}\n{self.plan}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("ZeroOptimizer cannot be pickled or copied: it belongs to a process group. Save state_dict().")
