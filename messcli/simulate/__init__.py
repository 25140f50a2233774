"""`simulate`: what policies would have done on a recorded table, over settings and request orders.

runs        the loop over a table, on all cores
hindsight   bounds to compare with
results     what came of it, summed up over orders
judge       the command: reads, runs, writes and says it
advice      --best
evidence    --paper
figures     the charts of all of them
"""

from messcli.simulate.results import Result
from messcli.simulate.runs import SimulateConfig, simulate

__all__ = ["Result", "SimulateConfig", "simulate"]
