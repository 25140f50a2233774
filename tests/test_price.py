"""The price of accuracy, and what is expected of a zoo before it was asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messcli.predict.joules import JoulesPredictor
from messcli.predict.levels import deviations, joules_of_all, levels
from messcli.predict.ridge import RidgePredictor
from messcli.predict.tuning import LEVELS
from messcli.routing.price import Standing, curve, solve
from messcli.routing.tuning import TUNING

ZOO = np.array([0.4, 0.6, 0.8])  # accuracies
JOULES = np.array([1.0, 4.0, 30.0])
START = Standing(
    alpha=0.65, surplus=0.0, surplus_error=0.0, left=2000.0, window=1.0, variance=0.2, drift=0.0, spent=0.0
)


def sample(scatter: float = 0.1, count: int = 400, seed: int = 0):
    """Requests on which models' accuracies differ: estimates and joules."""
    draw = np.random.default_rng(seed)
    gaps = draw.normal(0.0, scatter, (count, 3))
    return np.clip(ZOO + gaps, 0.0, 1.0), JOULES * draw.uniform(0.5, 1.5, (count, 1))


def found(standing: Standing, scatter: float = 0.1, errors=(0.0, 0.0, 0.0)):
    estimates, joules = sample(scatter)
    return solve(estimates, joules, np.zeros(3), np.array(errors), standing, TUNING.price)


def bought(standing: Standing, scatter: float = 0.1) -> float:
    """The mean estimate of what the solution chooses."""
    estimates, joules = sample(scatter)
    solution = found(standing, scatter)
    at = curve(estimates, joules, np.zeros(3), np.zeros(3), np.array([solution.low, solution.price])).accuracy
    return float(at[0] + solution.share * (at[1] - at[0]))


@given(st.floats(-60, 60), st.floats(0.0, 40.0))
def test_a_surplus_lowers_the_price(surplus, more):
    lower, higher = (found(replace(START, surplus=s)).price for s in (surplus + more, surplus))
    assert lower <= higher * (1 + 1e-9)


def test_what_is_bought_is_what_is_missing():
    """With so much to come that chance doesn't count: the smallest price that reaches what is missing."""
    for alpha in (0.45, 0.55, 0.65, 0.75):
        assert bought(replace(START, alpha=alpha, left=1e7)) == pytest.approx(alpha, abs=0.005)
    assert bought(replace(START, left=1e7, surplus=1e6)) == pytest.approx(0.55, abs=0.005)


def test_a_whole_window_is_decided_at_once():
    """Models that differ by nothing but their means: no one price buys a mix, so requests are shared out."""
    standing = replace(START, left=1e6, window=5e5)
    solution = found(standing, scatter=0.0)
    assert solution.low < solution.price
    assert 0.0 < solution.share < 1.0
    assert bought(standing, scatter=0.0) == pytest.approx(0.65, abs=0.02)


def test_nothing_is_bought_that_may_not_be_needed():
    """Just above what the cheap model does, with chance to come: the dear one waits until it is known to be needed."""
    estimates, joules = np.tile(ZOO, (50, 1)), np.tile(JOULES, (50, 1))
    early = replace(START, alpha=0.605, left=2000.0, spent=0.0)
    solution = solve(estimates, joules, np.zeros(3), np.zeros(3), early, TUNING.price)
    dear = (JOULES[2] - JOULES[1]) / (ZOO[2] - ZOO[1])
    assert solution.price < dear, "chance may bring it for nothing"
    late = replace(early, left=100.0, surplus=-18.0)
    assert solve(estimates, joules, np.zeros(3), np.zeros(3), late, TUNING.price).price > dear


def test_the_last_request_is_paid_for_only_where_it_is_needed():
    kept = replace(START, left=1.0, surplus=3.0, spent=1e4)
    assert found(kept).price < 1.0
    missing = found(replace(kept, surplus=-1.0))
    assert missing.price > 100.0
    assert not missing.reachable


@pytest.mark.parametrize("scatter", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("alpha", [0.65, 0.7, 0.75])
def test_the_last_window_buys_what_is_missing_and_about_a_deviation_of_chance(scatter, alpha):
    """No price reacts any more: it is found exactly, however many requests change their model between two prices."""
    last = replace(START, alpha=alpha, left=4000.0, window=4000.0, spent=1e4, blind=True)
    deviation = (last.variance / last.left) ** 0.5
    assert 0.0 < bought(last, scatter) - alpha < 2.0 * deviation


def test_what_is_dearer_later_is_bought_now():
    window = replace(START, left=2000.0, window=1500.0)
    as_dear, dearer = bought(window), bought(replace(window, dearer=3.0))
    assert as_dear < dearer


def test_out_of_reach_is_said_and_doubted_levels_make_it_dearer():
    assert not found(replace(START, surplus=-1e4)).reachable
    assert found(START).reachable
    sure, doubted = found(START), found(START, errors=(0.0, 0.0, 0.15))
    assert doubted.price > sure.price


# ---- what is expected of a zoo ---------------------------------------------------------------------


def test_levels_start_from_the_order_and_end_at_what_was_seen():
    nothing = np.zeros(4)
    before = levels(LEVELS, nothing, nothing, 0.2)
    assert np.diff(before) == pytest.approx([LEVELS.step] * 3)
    assert before[0] == pytest.approx(LEVELS.first)
    means = np.array([0.9, 0.3, 0.7, 0.2])
    assert levels(LEVELS, np.full(4, 1e6), means, 0.2) == pytest.approx(means, abs=1e-4)
    some = levels(LEVELS, np.array([1e6, 0.0, 0.0, 1e6]), means, 0.2)
    assert 0.2 < some[2] < some[1] < 0.9, "between its neighbours"


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=5), st.integers(0, 4))
def test_an_answer_makes_every_level_surer(samples, model):
    before = np.array(samples)
    after = before.copy()
    after[model % len(samples)] += 1
    assert (deviations(LEVELS, after, 0.2) <= deviations(LEVELS, before, 0.2) + 1e-12).all()


def test_joules_of_models_that_were_not_read_lie_on_a_series():
    read = np.array([True, False, True, False])
    assert joules_of_all(np.array([2.0, 0.0, 18.0, 0.0]), read, 4.0) == pytest.approx([2.0, 6.0, 18.0, 72.0])
    assert joules_of_all(np.zeros(3), np.zeros(3, bool), 4.0) == pytest.approx([1.0, 4.0, 16.0])


def test_predictors_say_something_of_every_model_from_the_first_answer():
    accuracy, joules = RidgePredictor(3), JoulesPredictor(3)
    accuracy.begin(LEVELS)
    joules.begin(LEVELS)
    first = accuracy.predict_one(accuracy.encode("a prompt"))
    assert np.diff(first) == pytest.approx([LEVELS.step] * 2)
    for n in range(20):
        text = f"prompt {n} of some"
        accuracy.learn_one(accuracy.encode(text), np.array([0.1, np.nan, np.nan]))
        joules.learn_one(joules.encode(text), np.array([7.0, np.nan, np.nan]))
    learnt = accuracy.predict_one(accuracy.encode("a prompt"))
    assert learnt[0] == pytest.approx(0.1, abs=0.1)
    assert learnt[0] < learnt[1] < learnt[2] < first[2]
    expected = joules.predict_one(joules.encode("a prompt"))
    assert expected[1] / expected[0] == pytest.approx(4.0, rel=0.1)
    for predictor in (accuracy, joules):
        again = type(predictor)(3)
        again.begin(LEVELS)
        again.load(predictor.state())
        features = predictor.encode("another one")
        assert np.array_equal(predictor.predict_one(features), again.predict_one(again.encode("another one")))
