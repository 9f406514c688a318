"""Many steps keep nothing: Python objects, storages, threads, file descriptors."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch
from models import Run, loss_of, make, tokens_for

from zerolite.comm.local import LocalComm


def census():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return len(gc.get_objects()), len(tensors), threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_leave_no_object_behind(stage):
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), LocalComm())

    def steps(count):
        for step in range(count):
            for micro in range(2):
                loss_of(model, tokens_for(step, micro, 0)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    steps(5)
    before = census()
    steps(20)
    after = census()
    assert after[1:] == before[1:]
    assert after[0] - before[0] < 20  # less than one object a step: caches of torch may grow a little
