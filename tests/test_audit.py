"""Audits in the controller: which requests, what they teach, and what they prove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from marks import slow

from messcli.records import Outcome, Request
from messcli.routing.audit import JUDGE, Audits
from messcli.routing.controller import Controller
from messcli.routing.line import Settled
from messcli.routing.loop import chunks
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.source import Recorded
from messcli.snapshots import Part

NAMES = ("small", "large")
SMALL, LARGE = 0, 1
ALPHA = 0.75


def made(count: int, seed: int = 0, *, tells: bool = False) -> tuple[list[Request], Recorded]:
    """Requests without references: small answers 60 % of them well, large 90 %; large takes ten times the joules.

    Args:
        tells: the small model's tokens are likelier where it is right.
    """
    rng = np.random.default_rng(seed)
    requests, outcomes = [], {}
    for i in range(count):
        hard = rng.random() < 0.4
        right = (float(rng.random() < (0.2 if hard else 0.87)), float(rng.random() < 0.9))
        requests.append(
            Request(i, f"{'why does' if hard else 'what is'} number {rng.integers(50)}", references=())
        )
        outcomes[i] = {
            name: Outcome("", accuracy, joules)
            for name, accuracy, joules in zip(NAMES, right, (10.0, 100.0), strict=True)
        }
        if tells:
            sure = -0.2 if right[SMALL] else -1.5
            likely = {"mean": sure + 0.3 * float(rng.standard_normal())}
            outcomes[i]["small"] = replace(outcomes[i]["small"], confidence=likely)
    return requests, Recorded(NAMES, outcomes)


def answer(source: Recorded, request: Request, model: int) -> Outcome:
    ((_, _, outcome),) = next(source.answers([(request, (model,))]))
    return outcome


def controller(audits: Audits | None, *, horizon: int | None = None, **options: object) -> Controller:
    setup = Setup(audits=audits, horizon=horizon, **options)  # type: ignore[arg-type]  # options of Setup
    return create_controller(setup, len(NAMES), {DEFAULT_PLAN: ALPHA})


def run(
    count: int,
    audits: Audits | None,
    *,
    horizon: int | None = None,
    data: int = 0,
    tells: bool = False,
    **options: object,
) -> tuple[Controller, list[Settled]]:
    requests, source = made(count, data, tells=tells)
    deciding = controller(audits, horizon=count if horizon is None else horizon, **options)
    lines = [line for chunk in chunks(requests, deciding, source) for line in chunk.lines]
    return deciding, [line for line in lines if isinstance(line, Settled)]


def accuracies(lines: Sequence[Settled]) -> list[float]:
    """True accuracies of what was served."""
    return [line.outcomes[line.served].accuracy or 0.0 for line in lines if line.served is not None]


def test_without_audits_no_coin_is_thrown() -> None:
    deciding, lines = run(50, None, window=16)
    assert deciding.accounts[DEFAULT_PLAN].mean is None
    assert not any(line.decision.audited or line.decision.audit_probability for line in lines)


def test_audits_replace_references() -> None:
    deciding, lines = run(2000, Audits(), window=32)
    assert np.mean(accuracies(lines)) >= ALPHA
    joules = math.fsum(line.billed_joules or 0.0 for line in lines)
    assert joules < 0.8 * 100.0 * len(lines)
    account = deciding.accounts[DEFAULT_PLAN]
    audited = [line for line in lines if line.decision.audited]
    assert account.observed == len(audited)
    assert account.estimated == len(lines) - len(audited)


def test_only_audited_answers_are_learnt_from_and_all_of_them() -> None:
    deciding, lines = run(600, Audits(), window=32)
    answers = [sum(m in line.outcomes for line in lines if line.decision.audited) for m in (SMALL, LARGE)]
    assert deciding.learnt.predictor.samples.tolist() == answers


def test_an_audit_by_the_largest_serves_its_answer_and_is_billed() -> None:
    _, lines = run(600, Audits(), window=32)
    audited = [line for line in lines if line.decision.audited and line.decision.chosen == SMALL]
    assert audited
    for line in audited:
        assert line.served == LARGE
        assert set(line.outcomes) == {SMALL, LARGE}
        assert line.billed_joules == 110.0


def test_a_judge_asks_no_other_model() -> None:
    _, lines = run(600, Audits(by=JUDGE), window=32)
    assert any(line.decision.audited for line in lines)
    assert all(set(line.outcomes) == {line.decision.chosen} for line in lines)


def test_at_most_one_in_twenty_after_the_first_thousand() -> None:
    _, lines = run(3000, Audits(), window=64)
    later = [line.decision.audited for line in lines[1000:]]
    assert 0.02 * len(later) < sum(later) <= 0.05 * len(later)


def test_it_goes_on_where_the_horizon_is_not_known() -> None:
    requests, source = made(2500)
    deciding = controller(Audits(), window=64)
    lines = [line for chunk in chunks(requests, deciding, source) for line in chunk.lines]
    later = [line.decision.audited for line in lines[1000:] if isinstance(line, Settled)]
    assert 0 < sum(later) <= 0.05 * len(later)


@pytest.mark.slow
def test_every_request_can_be_audited_and_the_probability_is_that_of_the_coin() -> None:
    expected = found = count = 0.0
    variance = 0.0
    for seed in range(10):
        _, lines = run(800, Audits(), window=32, seed=seed)
        for line in lines:
            p = line.decision.audit_probability
            assert 0.0 < p <= 1.0
            expected, found, count = expected + p, found + line.decision.audited, count + 1
            variance += p * (1 - p)
    assert 0.02 * count < expected < 0.9 * count
    assert abs(found - expected) < 4 * math.sqrt(variance)


def test_more_audits_fall_at_the_start() -> None:
    _, lines = run(3000, Audits(), window=32)
    audited = [line.decision.audited for line in lines]
    assert sum(audited[:300]) > 2 * sum(audited[-300:])


@pytest.mark.slow
def test_where_little_is_at_stake_little_is_audited() -> None:
    """The small model is as good as the large one: to know it better would change nothing."""
    requests, source = made(2000)
    outcomes = {}
    for request in requests:
        large = answer(source, request, LARGE)
        outcomes[request.id] = {"small": replace(large, joules=10.0), "large": large}
    deciding = controller(Audits(), horizon=2000, window=32)
    audited = [
        line.decision.audited
        for chunk in chunks(requests, deciding, Recorded(NAMES, outcomes))
        for line in chunk.lines
        if isinstance(line, Settled)
    ]
    _, usual = run(2000, Audits(), window=32)
    assert 0 < sum(audited) < 0.7 * sum(line.decision.audited for line in usual)


@pytest.mark.parametrize(
    ("predictor", "tells"),
    [
        slow("mean", False),
        slow("mean", True),
        slow("ridge", False),
        slow("linear", True),
    ],
)
def test_the_estimate_is_unbiased_in_the_loop(predictor: str, tells: bool) -> None:
    """Decisions, probabilities and estimates all depend on earlier audits: the coins alone make it unbiased."""
    errors, variances = [], []
    for seed in range(40):
        deciding, lines = run(
            300, Audits(), window=16, seed=seed, data=seed, predictor=predictor, horizon=3000, tells=tells
        )
        mean = deciding.accounts[DEFAULT_PLAN].mean
        assert mean is not None
        assert mean.mean is not None
        errors.append(mean.mean - float(np.mean(accuracies(lines))))
        variances.append((mean.standard_error or 0.0) ** 2)
    assert abs(np.mean(errors)) < 3 * math.sqrt(np.mean(variances) / len(errors))
    # the median: one audit that was all but impossible can make one run's estimated variance a hundredfold
    assert np.std(errors) == pytest.approx(math.sqrt(np.median(variances)), rel=0.5)


@pytest.mark.slow
def test_the_bound_holds_at_every_window_of_every_run() -> None:
    """At 95 %, 20 of 20 runs are to be expected more often than not; 18 are all but certain."""
    wrong = 0
    for seed in range(20):
        requests, source = made(500, seed)
        deciding = controller(Audits(), horizon=3000, window=32, seed=seed)
        served: list[float] = []
        above = False
        for chunk in chunks(requests, deciding, source):
            served += accuracies([line for line in chunk.lines if isinstance(line, Settled)])
            mean = deciding.accounts[DEFAULT_PLAN].mean
            if mean is None:  # the first window is decided, and nothing of it settled yet
                assert not served
                continue
            least = mean.least(0.05)
            assert least is not None
            above = above or least > np.mean(served) + 1e-9
        wrong += above
    assert wrong <= 2


def test_audits_find_out_what_looked_at_answers_are_worth() -> None:
    """An audit serves the largest model's answer, whatever the small one's tells: what counts is what would have been
    served without it."""
    deciding, lines = run(1500, Audits(), window=32, tells=True)
    looked = [line for line in lines if line.decision.given is not None]
    audited = [line for line in looked if line.decision.audited]
    for kind in (audited, [line for line in looked if not line.decision.audited]):
        assert {line.decision.chosen for line in kind} == {SMALL, LARGE}
    assert all(line.served == LARGE and line.decision.first == SMALL for line in audited)
    assert all(
        line.audit_joules == (100.0 if line.decision.chosen == SMALL else 0.0) for line in audited
    )  # an answer that was asked for because of the look is no audit's
    assert all(line.served == line.decision.chosen for line in looked if not line.decision.audited)
    assert np.mean(accuracies(lines)) >= ALPHA
    mean = deciding.accounts[DEFAULT_PLAN].mean
    assert mean is not None
    assert (mean.least(0.05) or 0.0) <= np.mean(accuracies(lines))


@pytest.mark.slow
def test_looking_saves_joules_where_a_judge_audits() -> None:
    bills = []
    for no_look in (False, True):
        _, lines = run(3000, Audits(by=JUDGE), window=32, tells=True, no_look=no_look)
        assert np.mean(accuracies(lines)) >= ALPHA - 0.01
        bills.append(sum(line.billed_joules or 0.0 for line in lines))
    assert bills[0] < 0.85 * bills[1]


@pytest.mark.slow
def test_sure_aims_higher() -> None:
    plain, lines = run(4000, Audits(), window=64)
    sure, surer = run(4000, Audits(sure=True), window=64)
    means = [deciding.accounts[DEFAULT_PLAN].mean for deciding in (plain, sure)]
    assert all(mean is not None for mean in means)
    bounds = [mean.least(0.05) or 0.0 for mean in means if mean is not None]
    assert bounds[1] > bounds[0]
    assert np.mean(accuracies(surer)) > np.mean(accuracies(lines))


def test_agreement_knows_the_largest_models_answers_without_audits() -> None:
    requests, source = made(1500)
    outcomes = {
        request.id: {
            "small": answer(source, request, SMALL),
            "large": replace(answer(source, request, LARGE), accuracy=1.0),
        }
        for request in requests
    }
    deciding = controller(Audits(agreement=True), horizon=1500, window=32)
    lines = [
        line
        for chunk in chunks(requests, deciding, Recorded(NAMES, outcomes))
        for line in chunk.lines
        if isinstance(line, Settled)
    ]
    account = deciding.accounts[DEFAULT_PLAN]
    by_large = [line for line in lines if line.served == LARGE]
    assert account.observed == len(by_large)
    assert account.observed_sum == len(by_large)
    assert 0 < account.estimated < len(lines)
    assert np.mean(accuracies(lines)) >= ALPHA


# ---- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "tells"), [(1, False), (32, False), (32, True)])
@pytest.mark.slow
def test_deciding_is_pure_and_a_run_goes_on_exactly(window: int, tells: bool) -> None:
    requests, source = made(400, tells=tells)
    whole, lines = run(400, Audits(), window=window, horizon=400, tells=tells)
    first = controller(Audits(), horizon=400, window=window)
    iterator = iter(chunks(requests, first, source))
    done: list[Settled] = []
    chunk = next(iterator)
    while len(done) < 192 or not chunk.ends_window:
        chunk = next(iterator)
        done += [line for line in chunk.lines if isinstance(line, Settled)]
    again = controller(Audits(), horizon=400, window=window)
    again.load(Part.loads(first.state().dumps()))
    batch = requests[len(done) : len(done) + again.window()]
    allowed = [(SMALL, LARGE)] * len(batch)
    assert again.decide(batch, allowed) == again.decide(batch, allowed) == first.decide(batch, allowed)
    rest = [line for chunk in chunks(requests[len(done) :], again, source) for line in chunk.lines]
    assert [line.decision for line in (*done, *rest) if isinstance(line, Settled)] == [
        line.decision for line in lines
    ]
    assert asdict(again.accounts[DEFAULT_PLAN]) == asdict(whole.accounts[DEFAULT_PLAN])
    assert again.auditor is not None
    assert whole.auditor is not None
    assert again.auditor.state() == whole.auditor.state()
