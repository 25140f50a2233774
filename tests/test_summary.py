"""What a run counts, and what it says at its end."""

from __future__ import annotations

from messcli.jobs.summary import Summary, Tally
from messcli.records import Decision, Outcome, Rejected, Request
from messcli.routing.controller import DEFAULT_PLAN
from messcli.routing.loop import Settled
from messcli.routing.setup import Setup, create_controller


def settled(number: int, *outcomes: Outcome) -> Settled:
    """A request that was put to the first models, and served by the last of them that answered."""
    answered = [m for m, outcome in enumerate(outcomes) if outcome.error is None]
    decision = Decision(
        number, len(outcomes) - 1, (*range(len(outcomes)),), len(outcomes) > 1, None, None, False
    )
    served = max(answered, default=None)
    return Settled(Request(number, "a b"), decision, dict(enumerate(outcomes)), served, 0.0)


def tally() -> Tally:
    controller = create_controller(Setup(policy="largest"), 2, {DEFAULT_PLAN: 0.5})
    return Tally(("small", "large"), controller, None)


def summary_of(counted: Tally) -> Summary:
    return counted.summary(
        already_done=2,
        largest_joules=8.0,
        metric="exact",
        period="2026-12",
        horizon=100,
        period_requests=6,
        stopped_by=None,
    )


def test_every_line_counts_once_towards_the_progress() -> None:
    counted = tally()
    counted.add(settled(1, Outcome("x", None, 1.0, meter="estimate")))
    counted.add(settled(2, Outcome(None, None, 1.0, meter="estimate", error="model failed")))
    counted.add(Rejected(None, "no request"))
    progress = counted.progress(already_done=4, total=10)
    assert (progress.finished, progress.joules) == (7, 2.0)


def test_the_summary_says_what_was_counted() -> None:
    counted = tally()
    counted.add(settled(1, Outcome("x", None, 2.0, meter="rapl"), Outcome("x", None, 6.0, meter="rapl")))
    counted.add(settled(2, Outcome(None, None, None, error="model failed")))
    counted.add(Rejected(None, "no request"))
    counted.add_overhead({"rapl": 1.0, "estimate": 0.5})
    summary = summary_of(counted)
    assert (summary.routed, summary.failed, summary.unmetered) == (2, 2, 1)
    assert not summary.sla_missed  # nothing was observed
    assert summary.text() == [
        "requests     2 routed (2 were done before), 2 failed, 1 explored",
        "first error  model failed",
        "served by    large 1 (50%)",
        "period       2026-12: 6 of 100 requests",
        "energy       8 J billed (rapl), 4 J per request, explorations included; 1.5 J overhead "
        "(1 J rapl, 0.5 J estimate)",
        "against      8 J per request, the mean of what large answered: 50% of that "
        "(fuller batches cost less: --policy largest measures it)",
        "unmetered    1 requests whose joules aren't known",
    ]
