"""The second look: what an answer tells, what the option to ask a larger model is worth, and the loop with it."""

from __future__ import annotations

import itertools
import json
import math
import zlib

import fake_models
import numpy as np
import pytest

from messcli.errors import ModelError, OutcomesError, StateError
from messcli.jobs.config import RouteConfig
from messcli.jobs.route import route
from messcli.predict.answer import AnswerPredictor, Look
from messcli.records import Check, Generation, Outcome, Request
from messcli.routing.event import Event
from messcli.routing.line import Unfinished
from messcli.routing.look import escalate, options
from messcli.routing.loop import chunks
from messcli.routing.setup import Setup, create_controller
from messcli.routing.source import Recorded
from messcli.simulation.runs import Task, replay
from messcli.simulation.table import OutcomeTable, read_table
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
    small = 1.0 - 2.8 / 3.0 - 0.5  # of `answers`, less its Â
    assert unsure[1] - unsure[0] == pytest.approx(-small, abs=0.15)


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


# ---- the loop ------------------------------------------------------------------------------------


def table(count=400, seed=7, *, confidence=True, checks=False):
    """Prompts tell nothing; the small model knows of half its answers that they are right."""
    draw = np.random.default_rng(seed)
    outcomes, requests = {}, []
    for n in range(count):
        right = float(draw.random() < 0.5)
        told = 0.9 * right + 0.1 * float(draw.random()) if draw.random() < 0.9 else float(draw.random())
        outcomes[n] = {
            "small": Outcome(
                "s",
                right,
                1.0,
                confidence={"mean": told} if confidence else None,
                checks={"large": Check(told, 0.5)} if checks else None,
            ),
            "large": Outcome("l", float(draw.random() < 0.9), 10.0),
        }
        requests.append(Request(n, f"prompt {n % 7}", references=("r",), key=str(n).encode(), digest=b"d"))
    return OutcomeTable(("small", "large"), tuple(requests), outcomes)


def run(rows, *, no_look=False, v=None, window=32):
    setup = Setup(no_look=no_look, v=v, window=window)
    return list(replay(rows, Task(setup, alpha=0.75, shuffled=False)))


def mean_bill(lines):
    return sum(line.billed_joules for line in lines) / len(lines)


def test_looking_keeps_the_accuracy_for_fewer_joules():
    rows = table(1200)
    looked, blind = run(rows), run(rows, no_look=True)
    for lines in (looked, blind):
        accuracy = [line.outcomes[line.served].accuracy for line in lines]
        assert sum(accuracy) / len(accuracy) >= 0.75 - 0.01
    assert mean_bill(looked) < 0.8 * mean_bill(blind)


def test_every_model_that_ran_is_billed_and_the_larger_one_serves():
    second = [line for line in run(table()) if line.decision.given is not None and len(line.outcomes) == 2]
    assert second
    for line in second:
        assert line.decision.asked == (0, 1)
        assert (line.served, line.billed_joules, line.decision.explored) == (1, 11.0, False)


def test_checks_are_bought_where_confidence_is_silent_and_are_billed():
    lines = run(table(1200, confidence=False, checks=True))
    kept = [line for line in lines if line.decision.given is not None and len(line.outcomes) == 1]
    assert kept
    assert {line.billed_joules for line in kept} <= {1.0, 1.5}
    assert any(line.billed_joules == 1.5 for line in kept)


@pytest.mark.parametrize("settings", [{"no_look": True}, {"v": 0.1}])
def test_it_can_be_switched_off_and_the_paper_never_does_it(settings):
    assert all(line.decision.given is None and not line.checks for line in run(table(200), **settings))


def test_without_confidences_nothing_changes():
    rows = table(confidence=False)
    assert run(rows) == run(rows, no_look=True)


class Broken(Recorded):
    """Gives so many answers, one in a group, the second models' included, and ends."""

    def __init__(self, rows, answers):
        super().__init__(rows.names, rows.outcomes, rows.source.checkers)
        self.left = answers

    def answers(self, asked):
        for group in super().answers(asked):
            for answer in group:
                if not self.left:
                    return
                self.left -= 1
                yield [answer]


def work(rows, controller, source, *, unfinished=None, skip=0):
    """Every chunk at once: (settled lines, the events of all windows, decisions and answers of the open window)."""
    lines, events, window, answers = [], [], [], []
    clock = itertools.count()  # a second passes at every look at it: every group is a chunk
    for chunk in chunks(
        rows.requests[skip:], controller, source, unfinished=unfinished, clock=lambda: next(clock)
    ):
        if chunk.opened is not None:
            window, answers = list(chunk.opened), []
        answers += chunk.ahead
        lines += chunk.lines
        events += [Event.loads(event.dumps()) for event in chunk.events]
    return lines, events, window, answers


def test_a_run_that_is_cut_off_between_the_stages_goes_on_as_if_it_wasnt():
    rows = table(160)
    setup = Setup(horizon=160, window=32)

    def controller():
        return create_controller(setup, 2, {"": 0.75})

    whole, *_ = work(rows, controller(), rows.source)
    assert any(len(line.decision.asked) == 2 and line.decision.given is not None for line in whole)
    total = sum(len(line.outcomes) for line in whole)
    for answers in (total - 31, total - 20, total - 7):  # in the last windows
        stopped = controller()
        before, _, window, ahead = work(rows, stopped, Broken(rows, answers))
        kept = Part.loads(stopped.state().dumps())
        begun = controller()
        begun.load(kept)
        open_lines = [item for item in window if item.line.id >= len(before)]
        first = window.index(open_lines[0])
        unfinished = Unfinished(
            {(item.line.key, item.line.digest): item.decision for item in open_lines},
            {
                (window[place].line.key, m): Outcome.loads(o.dumps())
                for place, m, o in ahead
                if place >= first
            },
        )
        after, *_ = work(rows, begun, rows.source, unfinished=unfinished, skip=len(before))
        assert before + after == whole


def test_a_table_s_confidences_and_checks_are_read(tmp_path):
    path = tmp_path / "table.jsonl"
    small = {"accuracy": 1, "joules": 1, "prompt_tokens": 10, "output_tokens": 30, "confidence": 0.7}
    large = {"accuracy": 1, "joules": 8, "prompt_tokens": 10, "output_tokens": 20}
    stated = {**small, "checks": {"large": 0.4}, "check_joules": 0.25}
    lines = [
        {"id": 1, "prompt": "p", "models": {"small": {**small, "checks": {"large": 0.9}}, "large": large}},
        {"id": 2, "prompt": "p", "models": {"small": stated, "large": large}},
        {"id": 3, "prompt": "p", "models": {"small": {**small, "confidence_by_large": 0.2}, "large": large}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = read_table(str(path))
    assert read.source.checkers == {0: 1}
    assert read.outcomes[1]["small"].confidence == {"mean": 0.7}
    joules = 8 / (0.002 * 10 + 0.05 * 20) * 0.002 * 40
    assert read.outcomes[1]["small"].checks["large"] == Check(0.9, pytest.approx(joules))
    assert read.outcomes[2]["small"].checks["large"] == Check(0.4, 0.25)
    assert read.outcomes[3]["small"].checks["large"].probability == 0.2


@pytest.mark.parametrize("wrong", [{"confidence": "sure"}, {"checks": 0.5}, {"checks": {"large": 1.5}}])
def test_what_is_no_confidence_is_refused(tmp_path, wrong):
    path = tmp_path / "table.jsonl"
    models = {"small": {"accuracy": 1, "joules": 1, **wrong}, "large": {"accuracy": 1, "joules": 2}}
    path.write_text(json.dumps({"id": 1, "prompt": "p", "models": models}) + "\n")
    with pytest.raises(OutcomesError, match=r'model "small": "(confidence|checks)"'):
        read_table(str(path))


# ---- route ---------------------------------------------------------------------------------------


def _told(self, request):
    """Of two prompts that look alike a model knows one, and its tokens are likely then."""
    known = {"small": 4, "medium": 6, "large": 9}[self.spec.name]
    right = zlib.crc32(request.prompt.encode()) % 10 < known
    confidence = {"mean": -0.1 if right else -2.0, "tokens": 2.0}
    return Generation(request.prompt if right else "?", 2, 2, finish="stop", confidence=confidence)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of 150 requests: (how it is routed to a file, its rows)."""
    monkeypatch.setattr(fake_models.FakeBackend, "_generation", _told)
    zoo = fake_models.write_zoo(tmp_path, monkeypatch, alpha=0.75)
    prompts = [f"word{n} text" for n in range(150)]
    rows = [{"id": f"r{n}", "prompt": prompt, "reference": prompt} for n, prompt in enumerate(prompts)]
    meter = fake_models.write_joules(tmp_path, rows)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def routed(name, **options):
        options = {"zoo": str(zoo), "meter": meter, "window": 16, "predictor": "mean", **options}
        return route(RouteConfig.of(str(tmp_path / "in.jsonl"), str(tmp_path / name), **options))

    return routed, lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def test_rows_and_summary_say_what_a_look_brought(job):
    routed, rows_of = job
    summary = routed("out.jsonl")
    rows = rows_of("out.jsonl")
    looked = [row for row in rows if "asked" in row]
    escalated = [row for row in looked if len(row["asked"]) == 2]
    assert escalated
    assert len(escalated) < len(looked)
    for row in looked:
        assert row["model"] == row["asked"][-1]
        assert row["confidence"] == pytest.approx(math.exp(-0.1 if row["accuracy"] else -2.0))
        cost = {"small": 2, "medium": 6, "large": 18}
        assert row["billed_joules"] == sum(cost[name] for name in row["asked"])
    assert summary.looks.answers == len(looked)
    assert summary.looks.escalated == len(escalated)
    (line,) = [line for line in summary.text() if line.startswith("second look")]
    assert f"{len(looked)} answers looked at, {len(escalated)} put to a larger model" in line
    assert sum(row["billed_joules"] for row in rows) == pytest.approx(summary.energy.billed_joules)


def test_no_look_serves_answers_as_they_are(job):
    routed, rows_of = job
    summary = routed("out.jsonl", no_look=True)
    assert not any("asked" in row or "confidence" in row for row in rows_of("out.jsonl"))
    assert not any(line.startswith("second look") for line in summary.text())


@pytest.mark.slow
def test_a_route_that_is_cut_off_anywhere_goes_on_to_the_same_rows(job, monkeypatch):
    routed, rows_of = job
    routed("whole.jsonl")
    calls = fake_models.FakeBackend.calls
    for broken in range(calls // 2, calls, 5):
        name = f"cut{broken}.jsonl"
        monkeypatch.setattr(fake_models.FakeBackend, "calls", 0)
        monkeypatch.setattr(fake_models.FakeBackend, "fail_after", broken)
        with pytest.raises(ModelError):
            routed(name)
        monkeypatch.setattr(fake_models.FakeBackend, "fail_after", None)
        routed(name)
        assert rows_of(name) == rows_of("whole.jsonl")
