"""The second look: what an answer tells, what the option to ask a larger model is worth, and the loop with it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from messcli.errors import StateError
from messcli.predict.answer import AnswerPredictor, Look
from messcli.routing.look import escalate, options
from messcli.snapshots import Part

NAN = math.nan


# ---- accuracy given the answer -------------------------------------------------------------------


def answers(count, seed=0, *, both=1.0):
    """Of two models: confident answers of the small one are right, the large one is right at 0.8 whatever the small
    one says. The large one answers a part of them."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        confidence = draw.uniform(-3.0, 0.0)
        small = float(draw.random() < 1.0 + confidence / 3.0)
        large = float(draw.random() < 0.8) if draw.random() < both else NAN
        yield 0, {"mean": confidence}, (0.5, 0.8), (small, large)


def taught(rows, models=2):
    predictor = AnswerPredictor(models)
    for row in rows:
        predictor.learn_one(*row)
        predictor.take_in()
    return predictor


def test_an_answer_says_nothing_at_first():
    predictor = AnswerPredictor(3)
    assert not predictor.given(0, {"mean": -0.1}).any()
    assert not predictor.looks()


def test_confidence_tells_what_the_model_does_and_what_a_larger_one_does():
    predictor = taught(answers(1500))
    unsure, sure = predictor.given(0, {"mean": -2.9}), predictor.given(0, {"mean": -0.1})
    assert unsure[0] == pytest.approx(-0.5, abs=0.12)
    assert sure[0] == pytest.approx(0.5, abs=0.12)
    assert abs(sure[1] - unsure[1]) < 0.2  # the large one is as good on both


def test_only_asking_the_larger_model_after_bad_answers_teaches_it_right():
    """It is known from unsure answers alone: there it is no worse than elsewhere, and no better."""
    rows = [(m, s, e, (a, b if s["mean"] < -2 else NAN)) for m, s, e, (a, b) in answers(2000, seed=1)]
    unsure = taught(rows).given(0, {"mean": -2.8})
    assert unsure[1] - unsure[0] == pytest.approx(0.47, abs=0.15)


def test_a_scale_makes_no_difference():
    rows = list(answers(300))
    stretched = [(m, {"mean": 1000.0 * s["mean"] ** 3}, e, a) for m, s, e, a in rows]
    there, here = taught(stretched), taught(rows)
    assert there.given(0, {"mean": 1000.0 * -2.0}) == pytest.approx(
        here.given(0, {"mean": -(2.0 ** (1 / 3))})
    )


def test_what_is_said_stands_still_until_it_is_taken_in():
    rows = list(answers(400))
    predictor = taught(rows[:200])
    before = predictor.given(0, {"mean": -2.5})
    looks = [look.shifts.copy() for look in predictor.looks()]
    for row in rows[200:]:
        predictor.learn_one(*row)
    assert (predictor.given(0, {"mean": -2.5}) == before).all()
    assert all((a == b.shifts).all() for a, b in zip(looks, predictor.looks(), strict=True))
    predictor.take_in()
    assert (predictor.given(0, {"mean": -2.5}) != before).any()


def test_a_snapshot_goes_on_exactly_in_the_middle_of_a_window():
    rows = list(answers(300))
    one = taught(rows[:150])
    for row in rows[150:200]:
        one.learn_one(*row)
    other = AnswerPredictor(2)
    other.load(Part.loads(one.state().dumps()))
    for predictor in (one, other):
        for row in rows[200:]:
            predictor.learn_one(*row)
        predictor.take_in()
    assert other.state().dumps() == one.state().dumps()
    assert (one.given(0, {"mean": -1.0}) == other.given(0, {"mean": -1.0})).all()
    with pytest.raises(StateError):
        AnswerPredictor(3).load(one.state())


def test_typical_answers_tell_nothing_on_average():
    (look,) = taught(answers(1500)).looks()
    assert (look.model, look.checked, look.joules) == (0, False, 0.0)
    assert look.shifts.mean(axis=0) == pytest.approx([0.0, 0.0], abs=0.03)
    assert np.ptp(look.shifts[:, 0]) > 0.7


def test_a_check_says_more_than_confidence_where_it_does():
    draw = np.random.default_rng(3)
    predictor = AnswerPredictor(2)
    for _ in range(800):
        right = float(draw.random() < 0.5)
        signals = {"mean": draw.uniform(-1, 0), "check": 0.6 * right + 0.4 * draw.random()}
        predictor.learn_one(0, signals, (0.5, 0.8), (right, 0.8), 2.0)
        predictor.take_in()
    own, checked = predictor.looks()
    assert (checked.checked, checked.joules) == (True, pytest.approx(2.0))
    assert np.ptp(checked.shifts[:, 0]) > 3 * np.ptp(own.shifts[:, 0])
    assert predictor.given(0, {"mean": -0.5, "check": 0.1})[0] < -0.3
    assert abs(predictor.given(0, {"mean": -0.5})[0]) < 0.2


# ---- the worth of the option ---------------------------------------------------------------------


def by_hand(estimates, joules, look, price):
    """Over typical answers: what escalating where it pays adds, one at a time."""
    gain = more = 0.0
    for shift in look.shifts:
        given = np.clip(estimates + shift, 0, 1)
        larger = range(look.model + 1, len(estimates))
        best = max(larger, key=lambda m: price * given[m] - joules[m])
        if price * (given[best] - given[look.model]) > joules[best]:
            gain += given[best] - given[look.model]
            more += joules[best]
    return gain / len(look.shifts), more / len(look.shifts) + look.joules


def test_the_worth_is_that_of_deciding_after_each_typical_answer():
    draw = np.random.default_rng(5)
    estimates, joules = draw.uniform(0.2, 0.9, (6, 3)), draw.uniform(1, 9, (6, 3))
    shifts = draw.normal(0, 0.2, (4, 3))
    looks = [Look(0, False, shifts, 0.0), Look(0, True, 2 * shifts, 0.4), Look(1, False, 1.5 * shifts, 0.0)]
    prices = np.array([0.0, 5.0, 20.0, 300.0])
    found = options(estimates, joules, looks, prices)
    for p, price in enumerate(prices):
        for i in range(6):
            for m in range(3):
                tried = [by_hand(estimates[i], joules[i], look, price) for look in looks if look.model == m]
                gain, more = max(tried, key=lambda t: price * t[0] - t[1], default=(0.0, 0.0))
                worth = max(0.0, price * gain - more)
                assert found.worth[p, i, m] == pytest.approx(worth)
                assert found.accuracy[p, i, m] == pytest.approx(gain if worth else 0.0)
                assert found.joules[p, i, m] == pytest.approx(more if worth else 0.0)


def test_escalates_where_the_price_says_so_and_only_to_what_is_allowed():
    given, joules = (0.3, 0.6, 0.9), (1.0, 5.0, 20.0)
    assert escalate(0, given, joules, (1, 2), 10.0) is None
    assert escalate(0, given, joules, (1, 2), 20.0) == 1
    assert escalate(0, given, joules, (1, 2), 100.0) == 2
    assert escalate(0, given, joules, (1,), 100.0) == 1
    assert escalate(0, given, joules, (), 100.0) is None
