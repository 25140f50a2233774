"""Joules: what was read, and to which request they belong.

`open_meter` finds a counter for every device the zoo uses; an `EnergyLedger` bills each backend call
with what its devices' counters read, so that the bills and the overhead add up to the counters'
totals. Knows nothing of models, metrics or routing: a call is a stretch of time on named devices.
"""

from __future__ import annotations

from messcli.energy.counter import Counter, CounterReset, MeterKind, MeterOptions
from messcli.energy.ledger import GROUP_PERIODS, Bill, Call, EnergyLedger, Weight, split, token_weight
from messcli.energy.meter import AUTO, CPU, Meter, open_meter

__all__ = [
    "AUTO",
    "CPU",
    "GROUP_PERIODS",
    "Bill",
    "Call",
    "Counter",
    "CounterReset",
    "EnergyLedger",
    "Meter",
    "MeterKind",
    "MeterOptions",
    "Weight",
    "open_meter",
    "split",
    "token_weight",
]
