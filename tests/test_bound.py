"""The bound on the mean of what was served: exact identities, and its coverage by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from messcli.routing.bound import RATES, ServedMean
from messcli.snapshots import Part

ERROR = 0.05


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("estimate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("accuracy", [0.0, 0.4, 1.0])
def test_every_factor_has_mean_one(probability: float, estimate: float, accuracy: float) -> None:
    audited, passed = ServedMean(), ServedMean()
    audited.audit(estimate, probability, accuracy)
    passed.pass_by(estimate, probability)
    for k, rate in enumerate(RATES):
        heads = math.exp(audited.gains[k])
        tails = math.exp(rate * (passed.controls[k] - accuracy))
        assert probability * heads + (1 - probability) * tails == pytest.approx(1.0, abs=1e-9)
        assert heads >= 0.24


def test_the_estimate_is_unbiased_whatever_the_predictor_says() -> None:
    rng = np.random.default_rng(3)
    accuracies, estimates = rng.random(8), rng.random(8)
    probabilities = rng.uniform(0.05, 1.0, 8)
    expected = 0.0
    for coins in product((False, True), repeat=8):
        mean, chance = ServedMean(), 1.0
        for a, e, p, coin in zip(accuracies, estimates, probabilities, coins, strict=True):
            chance *= p if coin else 1 - p
            if coin:
                mean.audit(e, p, a)
            else:
                mean.pass_by(e, p)
        expected += chance * (mean.mean or 0.0)
    assert expected == pytest.approx(accuracies.mean(), abs=1e-12)


def test_the_estimate_stays_unbiased_where_an_audit_brings_a_better_answer() -> None:
    """The mean to be estimated depends on the coins then: without an audit `accuracy`, with one `better`."""
    accuracy, better, estimate, p = 0.2, 0.9, 0.7, 0.3
    audited, passed = ServedMean(), ServedMean()
    audited.audit(estimate, p, accuracy, served=better)
    passed.pass_by(estimate, p)
    assert audited.mean is not None
    assert passed.mean is not None
    assert p * audited.mean + (1 - p) * passed.mean == pytest.approx(p * better + (1 - p) * accuracy)


def test_its_standard_error_is_that_of_the_coins() -> None:
    """The expectation of `variance` is the variance of the estimate: sum of (1 - p) / p d^2."""
    estimate, p, accuracy = 0.8, 0.2, 0.1
    audited = ServedMean()
    audited.audit(estimate, p, accuracy)
    assert p * audited.variance == pytest.approx((1 - p) / p * (accuracy - estimate) ** 2)


def test_what_is_all_known_is_bound_by_itself() -> None:
    mean = ServedMean()
    for accuracy in (0.2, 1.0, 0.6):
        mean.observe(accuracy)
        mean.audit(0.5, 1.0, accuracy)
    assert mean.least(ERROR) == pytest.approx(0.6)
    assert mean.mean == pytest.approx(0.6)
    assert mean.standard_error == 0.0
    assert ServedMean().least(ERROR) is ServedMean().mean is None


def test_what_could_never_be_audited_counts_as_wrong() -> None:
    mean = ServedMean()
    for _ in range(10):
        mean.observe(0.8)
        mean.pass_by(0.9, 0.0)
    assert mean.least(ERROR) == pytest.approx(0.4)


def test_a_failed_audit_never_raises_the_bound() -> None:
    found, failed = _plain(np.random.default_rng(0), 2000, 0.1, 0.75)[0], None
    assert found is not None
    before = found.least(ERROR)
    found.audit_failed(0.75, 0.1)
    failed = found.least(ERROR)
    assert before is not None
    assert failed is not None
    assert 0.5 < failed < before


def test_the_bound_is_no_wider_than_it_must_be() -> None:
    """5,000 requests, one in ten audited: within 4 standard errors of the estimate (1.65 would do once, at the end)."""
    mean, _ = _plain(np.random.default_rng(1), 5000, 0.1, 0.75)
    least = mean.least(ERROR)
    assert least is not None
    assert mean.mean is not None
    assert mean.standard_error is not None
    assert mean.mean - 4.0 * mean.standard_error < least < mean.mean - mean.standard_error


def test_it_goes_on_from_a_snapshot() -> None:
    mean, _ = _plain(np.random.default_rng(2), 300, 0.2, 0.6)
    again = ServedMean.of(Part.loads(mean.state().dumps()))
    assert again == mean
    assert again.least(ERROR) == mean.least(ERROR)


def _plain(rng: np.random.Generator, requests: int, p: float, level: float) -> tuple[ServedMean, float]:
    mean, total = ServedMean(), 0.0
    for _ in range(requests):
        accuracy = float(rng.random() < level)
        total += accuracy
        if rng.random() < p:
            mean.audit(level, p, accuracy)
        else:
            mean.pass_by(level, p)
    return mean, total


# ---- coverage ------------------------------------------------------------------------------------

# (t, what is known so far, how accurate the answer is likely to be, a random number) -> Â or p
Says = Callable[[int, ServedMean, float, float], float]


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _accuracy(t: int) -> float:
    return 0.5 + 0.4 * math.sin(t / 60)  # traffic that changes


PREDICTORS: dict[str, Says] = {
    "right": lambda t, known, likely, noise: likely,
    "says 1": lambda t, known, likely, noise: 1.0,
    "says 0": lambda t, known, likely, noise: 0.0,
    "the opposite": lambda t, known, likely, noise: 1.0 - likely,
    "follows the audits": lambda t, known, likely, noise: _clip((known.mean or 0.5) + noise - 0.5),
}
PROBABILITIES: dict[str, Says] = {
    "one in ten": lambda t, known, likely, noise: 0.1,
    "falling": lambda t, known, likely, noise: max(0.03, t**-0.5),
    # audits where it is least likely that an error is found, and fewer when the bound stands well
    "against us": lambda t, known, likely, noise: 0.02 + 0.3 * likely * (_clip(known.mean or 0.5) < 0.6),
}


def _is_wrong_once(requests: int, predictor: Says, probability: Says, seed: int) -> bool:
    """Whether the bound is above the true mean at any moment of a run."""
    rng = np.random.default_rng(seed)
    known, unknown = ServedMean(), 0.0  # the sum of the accuracies that nobody has seen
    for t, (coin, answer, noise) in enumerate(rng.random((requests, 3)).tolist(), start=1):
        likely = _accuracy(t)
        estimate = predictor(t, known, likely, noise)
        p = probability(t, known, likely, noise)
        accuracy = float(answer < likely)
        if coin < p:
            known.audit(estimate, p, accuracy)
        else:
            known.pass_by(estimate, p)
            unknown += accuracy
        if known.rules_out(unknown, ERROR):
            return True
    return False


def _coverage(runs: int, requests: int, predictor: str, probability: str) -> float:
    wrong = sum(
        _is_wrong_once(requests, PREDICTORS[predictor], PROBABILITIES[probability], seed)
        for seed in range(runs)
    )
    return 1.0 - wrong / runs


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("predictor", ["says 1", "follows the audits"])
def test_it_is_right_at_every_moment_in_95_of_100_short_runs(predictor: str, probability: str) -> None:
    assert _coverage(100, 150, predictor, probability) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_it_is_right_at_every_moment_in_95_of_100_runs(predictor: str, probability: str) -> None:
    assert _coverage(1000, 1000, predictor, probability) >= 0.95


def test_a_bound_that_takes_estimates_at_their_word_would_be_found_out() -> None:
    """The simulation can fail: with the probabilities overstated, as if audits spoke for fewer requests."""
    known, unknown = ServedMean(), 0.0
    rng = np.random.default_rng(0)
    wrong = False
    for coin, answer in rng.random((1000, 2)).tolist():
        accuracy = float(answer < 0.3)
        if coin < 0.05:
            known.audit(1.0, 0.5, accuracy)
        else:
            known.pass_by(1.0, 0.5)
            unknown += accuracy
        wrong = wrong or known.rules_out(unknown, ERROR)
    assert wrong
