"""zerolite: ZeRO for any PyTorch program, by one line.

optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=2)
"""

from zerolite.comm.ledger import RankError
from zerolite.optimizer import ZeroOptimizer
from zerolite.placement import Plan
from zerolite.planner import plan
from zerolite.timeline import MemoryTimeline
from zerolite.version import __version__

__all__ = ["MemoryTimeline", "Plan", "RankError", "ZeroOptimizer", "__version__", "plan"]
