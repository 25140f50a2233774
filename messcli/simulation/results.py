"""What came of simulated runs: one policy at one setting on one request order, and summed up over orders.

Joules are per request throughout. Knows nothing of how a run goes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from messcli.metrics import ROUNDING
from messcli.simulation.engines import InLoad


@dataclass(frozen=True, slots=True)
class Audited:
    """What audits took and told in one run, or on average in several."""

    share: float  # of the requests that were audited
    later: float  # the same among the requests after the first thousand
    joules: (
        float  # per request of the run, of answers that were asked for the audits alone; in `billed_joules`
    )
    estimate: float  # of the mean accuracy of what was served, unbiased
    bound: float  # what that mean is at least
    holds: float  # 1 where the bound was at most the true mean at the end of every window; a share over runs


@dataclass(frozen=True, slots=True)
class Result:
    """What one policy at one setting did on one request order: a line of `--out`. Joules per request."""

    policy: str
    alpha: float
    v: float | None
    c: float | None
    seed: int
    requests: int
    accuracy: float  # mean, of what was served, true
    billed_joules: float  # everything billed
    paper_joules: float  # an exploration billed as its served model only
    explorations: int
    served: dict[str, int]
    meets_alpha: bool
    in_load: InLoad | None = None  # None: no engines were given
    audited: Audited | None = None  # None: all accuracies were known
    looked: int | None = None  # requests whose answer was looked at; None: there were none
    escalated: int | None = None  # of those: a larger model was asked as well

    def row(self) -> dict[str, Any]:
        """As it stands in the file."""
        row = asdict(self)
        return {name: value for name, value in row.items() if name not in _OPTIONAL or value is not None}


_OPTIONAL = ("in_load", "audited", "looked", "escalated")


@dataclass(frozen=True, slots=True)
class Line:
    """One policy at one setting, over all orders."""

    policy: str
    alpha: float
    v: float | None
    c: float | None
    orders: int
    accuracy: float
    accuracy_deviation: float  # between orders; 0 with one
    billed_joules: float
    billed_deviation: float
    paper_joules: float
    explorations: float
    shares: Mapping[str, float]
    meets: int  # orders in which alpha was met
    in_load: InLoad | None = None
    audited: Audited | None = None


def lines(results: Iterable[Result]) -> list[Line]:
    """Sum up over orders; settings in the order of their first result."""
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        groups.setdefault((result.alpha, result.policy, result.v, result.c), []).append(result)
    return [line_of(group) for group in groups.values()]


def line_of(group: Sequence[Result]) -> Line:
    """One setting's results over its orders, summed up."""
    first = group[0]

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    def deviation(values: Iterable[float]) -> float:
        spread = float(np.std(list(values), ddof=1)) if len(group) > 1 else 0.0
        return spread if spread > ROUNDING else 0.0  # equal numbers, added up in another order

    return Line(
        policy=first.policy,
        alpha=first.alpha,
        v=first.v,
        c=first.c,
        orders=len(group),
        accuracy=mean(r.accuracy for r in group),
        accuracy_deviation=deviation(r.accuracy for r in group),
        billed_joules=mean(r.billed_joules for r in group),
        billed_deviation=deviation(r.billed_joules for r in group),
        paper_joules=mean(r.paper_joules for r in group),
        explorations=mean(r.explorations for r in group),
        shares={name: mean(r.served[name] / r.requests for r in group) for name in first.served},
        meets=sum(r.meets_alpha for r in group),
        in_load=_mean_in_load([r.in_load for r in group if r.in_load is not None]),
        audited=_mean_audited([r.audited for r in group if r.audited is not None]),
    )


def _mean_audited(found: Sequence[Audited]) -> Audited | None:
    if not found:
        return None
    return Audited(*np.mean([astuple(one) for one in found], axis=0).tolist())


def _mean_in_load(found: Sequence[InLoad]) -> InLoad | None:
    if not found:
        return None
    means = {
        name: float(np.mean([getattr(one, name) for one in found]))
        for name in ("joules", "seconds", "of_largest", "of_smallest", "of_blind_mix")
    }
    running = {name: float(np.mean([one.running[name] for one in found])) for name in found[0].running}
    return InLoad(running=running, **means)
