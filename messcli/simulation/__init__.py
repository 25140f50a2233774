"""`simulate`: what policies would have done on a recorded table, over settings and request orders.

runs        the loop over a table, on all cores
hindsight   bounds to compare with
results     what came of it, summed up over orders
table       the outcomes table that is replayed
advice      --best
figures     the charts

The command is `messcli/jobs/simulate.py`; `--paper` is `tools/research/evidence.py`.
"""

from messcli.simulation.results import Result
from messcli.simulation.runs import SimulateConfig, simulate

__all__ = ["Result", "SimulateConfig", "simulate"]
