"""zerolite: ZeRO for any PyTorch program, by one line.

optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=2)
"""

from zerolite.comm.ledger import RankError
from zerolite.meta import meta_init
from zerolite.optimizer import ZeroOptimizer
from zerolite.placement import Plan
from zerolite.planner import plan
from zerolite.pretrained import load_pretrained
from zerolite.saved import save_pretrained
from zerolite.timeline import MemoryTimeline
from zerolite.version import __version__

__all__ = [
    "MemoryTimeline",
    "Plan",
    "RankError",
    "ZeroOptimizer",
    "__version__",
    "load_pretrained",
    "meta_init",
    "plan",
    "save_pretrained",
]
