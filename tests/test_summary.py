"""What a run counts, and what it says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest

from messcli.energy.load import StepPoint, fitted
from messcli.jobs.config import Writing
from messcli.jobs.row import routed_row
from messcli.jobs.summary import Period, Summary
from messcli.jobs.tally import Tally
from messcli.jobs.watch import Activity
from messcli.records import Decision, Outcome, Rejected, Request
from messcli.routing.learnt import Learnt
from messcli.routing.line import Settled
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN


def settled(number: int, *outcomes: Outcome) -> Settled:
    """A request that was put to the first models, and served by the last of them that answered."""
    answered = [m for m, outcome in enumerate(outcomes) if outcome.error is None]
    decision = Decision(
        number, len(outcomes) - 1, (*range(len(outcomes)),), len(outcomes) > 1, None, None, False
    )
    served = max(answered, default=None)
    return Settled(
        Request(number, "a b", line=number, source="in.jsonl"),
        decision,
        dict(enumerate(outcomes)),
        served,
        0.0,
    )


def tally() -> Tally:
    controller = create_controller(Setup(policy="largest"), 2, {DEFAULT_PLAN: 0.5})
    return Tally(("small", "large"), controller, None)


def summary_of(counted: Tally, named_overhead: Mapping[str, float] | None = None) -> Summary:
    return counted.summary(
        already_done=2,
        largest_joules=8.0,
        metric="exact",
        period=Period("2026-12", 6, 100),
        stopped_by=None,
        named_overhead=named_overhead,
    )


def test_every_line_counts_once_towards_the_progress() -> None:
    counted = tally()
    counted.add(settled(1, Outcome("x", None, 1.0, meter="estimate")))
    counted.add(settled(2, Outcome(None, None, 1.0, meter="estimate", error="model failed")))
    counted.add(Rejected(None, "no request"))
    progress = counted.progress(already_done=4, total=10, activity=Activity())
    assert (progress.finished, progress.joules) == (7, 2.0)


def test_the_summary_says_what_was_counted() -> None:
    counted = tally()
    counted.add(settled(1, Outcome("x", None, 2.0, meter="rapl"), Outcome("x", None, 6.0, meter="rapl")))
    counted.add(settled(2, Outcome(None, None, None, error="model failed")))
    counted.add(Rejected(None, "no request"))
    counted.add_overhead({"rapl": 1.0, "estimate": 0.5})
    summary = summary_of(counted, {"starting": 0.9, "loading models": 0.25, "deciding and learning": 0.01})
    assert (summary.requests.routed, summary.requests.failed, summary.energy.unmetered) == (2, 2, 1)
    assert not summary.promises.missed()  # nothing was observed
    assert summary.text() == [
        "requests     2 routed (2 were done before), 2 failed, 1 explored",
        "first error  in.jsonl:2: 2: model failed",
        "served by    large 1 (50%)",
        "period       2026-12: 6 of 100 requests",
        "energy       9.5 J in all: 8 J billed (rapl), explorations included, and 1.5 J overhead "
        "(1 J rapl, 0.5 J estimate)",
        "overhead     starting 0.9 J, loading models 0.25 J",
        "against      4.75 J per request in all, at least 59% of everything on large (at most 8 J)",
        "basis        the mean of its answers here, in batches as they came; fuller ones take less, as `messcli "
        "calibrate` measures",
        "unmetered    1 requests whose joules aren't known",
    ]


def test_answers_that_were_cut_off_are_counted_by_model() -> None:
    counted = tally()
    for number, ends in enumerate(
        [("length",), ("stop",), ("length", "stop"), ("stop", "length"), (None,)], 1
    ):
        counted.add(settled(number, *(Outcome("x", None, 1.0, finish=end) for end in ends)))
    summary = summary_of(counted)
    assert summary.requests.cut == {"small": 1, "large": 1}  # of what was served alone
    (line,) = [line for line in summary.text() if line.startswith("cut off")]
    assert "2 answers, at the limit of tokens (small 1, large 1)" in line


def test_a_failed_request_says_how_its_last_answer_ended() -> None:
    small, large = (
        Outcome(None, None, 1.0, error="e", fault="request", finish=end) for end in ("length", "filtered")
    )
    row = routed_row(settled(1, small, large), ("small", "large"), writing=Writing())
    assert (row["model"], row["finish"]) == (None, "filtered")


def calibrated(meter: str = "rapl") -> Tally:
    """The largest was calibrated: a step takes 4 J + 1 J per request running, a prompt token 0.5 J."""
    points = [StepPoint(b, 4.0 + b, 0.1) for b in (1.0, 4.0, 16.0)]
    load = fitted(points, joules_per_prompt_token=0.5)
    model = SimpleNamespace(name="large", meter=meter, load=load, joules=lambda characters: 7.0)
    calibration = SimpleNamespace(of=lambda name: model)
    controller = create_controller(Setup(policy="largest"), 2, {DEFAULT_PLAN: 0.5})
    return Tally(("small", "large"), controller, calibration)  # type: ignore[arg-type]


def answer(joules: float, prompt_tokens: int, output_tokens: int) -> Outcome:
    return Outcome("x", None, joules, prompt_tokens, output_tokens, meter="rapl")


def test_the_total_is_compared_with_the_largest_at_full_load() -> None:
    counted = calibrated()
    counted.add(settled(1, answer(2.0, 10, 4), answer(60.0, 10, 4)))
    counted.add(settled(2, answer(2.0, 10, 4), answer(60.0, 30, 8)))
    counted.add(settled(3, answer(2.0, 10, 4)))
    counted.add_overhead({"rapl": 24.0})
    summary = summary_of(counted)
    assert summary.energy.total_joules == 150.0
    assert summary.energy.alone is not None
    expected = 20 * 0.5 + 6 * (4.0 + 16) / 16  # mean lengths, the fullest load that was measured
    assert summary.energy.alone.joules == pytest.approx(expected)
    assert summary.energy.alone.error == pytest.approx(0.0, abs=1e-9)
    against = next(line for line in summary.text() if line.startswith("against"))
    assert f"50 J per request in all, {50 / expected:.0%} of everything on large" in against
    assert summary.energy.alone.basis == "the cost model at full load, lengths of 2 answers seen"
    assert "at least" not in against
    assert [
        line for line in summary.text() if line.startswith("advice       the answers took 126 J, more than")
    ]


@pytest.mark.parametrize("error", [0.1, 5.0])
def test_the_largest_is_known_by_the_runs_own_loads(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    monkeypatch.setattr(Learnt, "joules_of_many", lambda self, m, requests: (2.0, error))
    counted = tally()
    counted.add(settled(1, Outcome("x", None, 2.0, meter="rapl"), Outcome("x", None, 6.0, meter="rapl")))
    summary = summary_of(counted)
    against = next(line for line in summary.text() if line.startswith("against"))
    tells = error < 1.0  # else no more than that its answers here are no cheaper in fuller batches
    assert (f"400% of everything on large (2 J ± {error:.0%})" in against) is tells
    assert ("at least 100% of everything on large (at most 8 J)" in against) is not tells
    assert any(line.startswith("advice") for line in summary.text()) is tells


def test_a_cost_model_of_another_meter_is_not_compared_with() -> None:
    counted = calibrated("nvml")
    counted.add(settled(1, answer(2.0, 10, 4), answer(60.0, 10, 4)))
    alone = summary_of(counted).energy.alone
    assert alone is not None
    assert alone.at_most


def test_a_run_of_the_largest_alone_is_compared_with_nothing() -> None:
    counted = tally()
    line = settled(1, Outcome("x", None, 2.0, meter="rapl"), Outcome("x", None, 6.0, meter="rapl"))
    counted.add(replace(line, outcomes={1: line.outcomes[1]}))
    assert not [line for line in summary_of(counted).text() if line.startswith("against")]
