"""How a job ends: what it came to, and what of that is kept for reports.

Knows the tally and the state; knows nothing of models or of the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from messcli.jobs.brief import Brief
from messcli.jobs.feed import Feed
from messcli.jobs.resume import Terms
from messcli.jobs.summary import Energy, Period, Summary
from messcli.jobs.tally import Tally
from messcli.models.billing import Loads
from messcli.state.state import State
from messcli.tariff import Spent


class Metered(Protocol):
    """Where requests were answered, by what its meter knows beside their joules."""

    @property
    def named_overhead(self) -> Mapping[str, float]:
        """Joules by what they were for."""

    @property
    def loads(self) -> Loads:
        """What was read, by how many requests a model ran at a time."""


def sum_up(
    state: State, brief: Brief, terms: Terms, tally: Tally, feed: Feed, live: Metered, stopped_by: int | None
) -> Summary:
    """The run, summed up, with what the state and the meter know of it; reports find it in the state.

    Args:
        stopped_by: the signal that ended it before its input did.
    """
    _, period_requests = state.journal.period(terms.period) or (None, 0)
    summary = tally.summary(
        already_done=feed.already_done,
        largest_joules=state.journal.mean_joules(brief.zoo.largest.name),
        metric=brief.truth.metric.signature,
        period=Period(terms.period, period_requests, terms.horizon),
        stopped_by=stopped_by,
        standing=state.journal.failures(state.output.name),
        named_overhead=live.named_overhead,
    )
    _keep_for_reports(state, summary.energy, summary.requests.routed, live.loads)
    return summary


def _keep_for_reports(state: State, energy: Energy, routed: int, loads: Loads) -> None:
    """Add to the state what only this run knows: what overhead was for, what it cost, what the largest would have."""
    if named := energy.named_overhead:
        before = state.database.meta("overhead") or {}
        total = {what: before.get(what, 0.0) + named.get(what, 0.0) for what in {**before, **named}}
        state.database.set_meta("overhead", total)
    if loads:
        sums = state.database.meta("loads") or {}
        for model, known in loads.items():
            own = sums.setdefault(model, {})
            for running, numbers in known.items():
                before = own.get(str(running), (0.0, 0, 0))
                own[str(running)] = [a + b for a, b in zip(before, numbers, strict=True)]
        state.database.set_meta("loads", sums)
    if tariff := energy.tariff:
        before = state.database.meta("spent")
        cost = energy.spent if before is None else Spent(**before["sum"]).plus(energy.spent)
        kept = {"sum": cost.as_json(), "currency": tariff.currency, "basis": tariff.basis}
        state.database.set_meta("spent", kept)
    # a run that was killed at its very end left none
    if energy.alone is not None and (routed or state.database.meta("alone") is None):
        state.database.set_meta("alone", energy.alone.as_json())
