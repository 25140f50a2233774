"""What one model fails to answer: who answers it, who pays, what is learnt, and which model is left alone.

The source is a double that fails on command; the loop, the controller and the predictors are the real ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from marks import slow

from messcli.errors import MessError, ModelUnavailable
from messcli.predict.base import create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.records import IN_A_ROW, Answer, Asked, Fault, Outcome, Request
from messcli.routing.controller import Controller
from messcli.routing.deciding import Settings
from messcli.routing.event import Event
from messcli.routing.failures import LONGEST_PAUSE, Absences, fallback
from messcli.routing.line import Chunk, Settled, Unfinished
from messcli.routing.loop import chunks
from messcli.routing.policy import MessPlus
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.source import Recorded
from messcli.snapshots import Part

NAMES = ("small", "medium", "large")
COSTS = (1.0, 3.0, 8.0)
WASTED = 0.5  # joules of a failure

Failing = Callable[[Request, int], Fault | None]  # whose trouble it is that a model fails on a request


def requests(count: int, *, references: bool = True) -> list[Request]:
    draw = random.Random(1)
    words = [f"word{n}" for n in range(30)]
    made = []
    for n in range(count):
        kind = "chat" if draw.random() < 0.5 else "plain"
        text = " ".join([kind, *draw.choices(words, k=6)])
        made.append(Request(n, text, references=("yes",) if references else (), key=b"%d" % n))
    return made


class Faulty(Recorded):
    """Models that are right with a chance of their own, and fail where a test says so."""

    def __init__(self, failing: Failing, allowed: Callable[[Request], tuple[int, ...]] | None = None) -> None:
        super().__init__(NAMES, {})
        self.failing = failing
        self.asked: Counter[int] = Counter()
        self._allowed = allowed

    def allowed(self, batch: Sequence[Request]) -> list[tuple[int, ...]]:
        return [self._allowed(one) if self._allowed else (0, 1, 2) for one in batch]

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        done = 0
        while done < len(asked):
            request, models = asked[done]
            yield [(done, m, self.outcome(request, m)) for m in models]
            done += 1

    def outcome(self, request: Request, m: int) -> Outcome:
        self.asked[m] += 1
        fault = self.failing(request, m)
        if fault is not None:
            return Outcome(None, None, WASTED, meter="x", error=f"{NAMES[m]} fails", fault=fault)
        right = random.Random(f"{request.id} {m}").random() < (0.7, 0.8, 0.95)[m]
        return Outcome(
            "yes" if right else "no", float(right) if request.references else None, COSTS[m], meter="x"
        )


def paper(c: float = 1.0, window: int = 1, v: float = 0.1, alpha: float = 0.6) -> Controller:
    settings = Settings(alphas={DEFAULT_PLAN: alpha}, window=window)
    return Controller(3, MessPlus(v, c), create_predictor("linear", 3), JoulesPredictor(3), settings)


def automatic(window: int | None = 64, alpha: float = 0.6) -> Controller:
    return create_controller(Setup(window=window), 3, {DEFAULT_PLAN: alpha})


def settled(lines: Sequence[Request], source: Faulty, control: Controller) -> list[Settled]:
    made = [line for chunk in chunks(lines, control, source) for line in chunk.lines]
    assert all(isinstance(line, Settled) for line in made)
    return [line for line in made if isinstance(line, Settled)]


def chats_refused_by_small(request: Request, m: int) -> Fault | None:
    return "request" if m == 0 and "chat" in request.prompt else None


# ---- who is asked next ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "allowed", "failed", "expected"),
    [
        (0, (0, 1, 2), [0], 1),
        (1, (0, 1, 2), [1], 2),
        (2, (0, 1, 2), [1, 2], 0),
        (2, (0, 1, 2), [2], 1),
        (0, (0, 2), [0], 2),
        (0, (0,), [0], None),
        (2, (0, 1, 2), [0, 1, 2], None),
    ],
)
def test_the_next_larger_model_answers_else_the_next_smaller(model, allowed, failed, expected):
    assert fallback(model, allowed, failed) == expected


@pytest.mark.parametrize("make", [paper, automatic])
@pytest.mark.parametrize("window", [1, slow(64), 4096])
@pytest.mark.parametrize("fault", ["request", "model", "away"])
@pytest.mark.slow
def test_what_one_model_fails_to_answer_goes_to_the_next_and_is_billed(make, window, fault):
    source = Faulty(lambda request, m: fault if m == 0 and "chat" in request.prompt else None)
    lines = settled(requests(300), source, make(window=window))
    assert all(line.served is not None for line in lines)
    passed_on = [line for line in lines if line.errors]
    assert passed_on
    for line in passed_on:
        assert line.served in (1, 2)
        assert line.errors == {0: "small fails"}
        expected = WASTED + sum(COSTS[m] for m in line.outcomes if m != 0)
        assert line.billed_joules == pytest.approx(expected)
        assert set(line.decision.asked) == set(line.outcomes)
        if not line.decision.explored:
            assert line.decision.asked == (0, line.served)


@pytest.mark.parametrize("without", [0, 1, 2])
def test_only_where_none_is_left_is_the_row_an_error(without):
    """`without` can't take a prompt of the chats, and the others fail on them."""

    def allowed(request: Request) -> tuple[int, ...]:
        return tuple(m for m in range(3) if "plain" in request.prompt or m != without)

    source = Faulty(lambda request, m: "request" if "chat" in request.prompt else None, allowed)
    control = automatic()
    lines = settled(requests(100), source, control)
    for line in lines:
        failed = "chat" in line.request.prompt
        assert (line.served is None) == failed
        assert set(line.errors) == ({m for m in range(3) if m != without} if failed else set())
    assert control.accounts[DEFAULT_PLAN].failed == sum("chat" in line.request.prompt for line in lines)


# ---- what is learnt -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [slow(1), 64])
def test_a_model_that_refuses_a_kind_of_prompt_is_asked_for_other_kinds(window, monkeypatch):
    """Where a failure takes as much as an answer, it is soon avoided, though no accuracy depends on it."""
    monkeypatch.setitem(globals(), "WASTED", COSTS[0])
    lines = settled(requests(1500), Faulty(chats_refused_by_small), automatic(window))
    late = [line for line in lines[-500:] if not line.decision.explored]
    asked = Counter("chat" in line.request.prompt for line in late if 0 in line.outcomes)
    assert asked[True] <= 0.2 * len(late)
    assert asked[False] >= 0.3 * len(late)
    assert asked[True] <= 0.5 * asked[False]


def test_a_model_that_fails_everything_is_expected_to_be_worth_nothing():
    control = paper(c=30.0)
    settled(requests(300), Faulty(lambda request, m: "request" if m == 1 else None), control)
    predicted = control.learnt.predictor.predict_many(
        control.learnt.predictor.encode_many(["chat word1 word2"])
    )
    assert predicted is not None
    assert predicted[0][1] < 0.3 < predicted[0][2]


def test_what_failures_take_says_nothing_of_what_answers_take():
    control = paper(c=30.0)
    settled(requests(200), Faulty(lambda request, m: "model" if m == 2 and request.id % 2 else None), control)
    predicted = control.learnt.joules.predict_many(control.learnt.joules.encode_many(["chat word1 word2"]))
    assert predicted is not None
    assert predicted[0][2] == pytest.approx(COSTS[2], rel=0.01)  # and not (8 + WASTED) / 2


# ---- a model that is gone -------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, slow(1), 2])
@pytest.mark.parametrize("fault", ["model", "away"])
@pytest.mark.parametrize("window", [slow(1), 64])
def test_a_model_that_is_gone_is_asked_a_few_times_and_everything_is_answered(dead, fault, window):
    source = Faulty(lambda request, m: fault if m == dead else None)
    lines = settled(requests(2000), source, paper(c=3.0, window=window))
    assert all(line.served not in (None, dead) for line in lines)
    # a window is decided at once: it may hold as many as it is long
    tries = 2000 / LONGEST_PAUSE + 6
    assert source.asked[dead] <= max(IN_A_ROW, window) + tries * window


@pytest.mark.parametrize("window", [slow(1), 64])
def test_a_model_that_comes_back_is_used_again(window):
    source = Faulty(lambda request, m: "away" if m == 0 and 200 <= request.id < 500 else None)
    lines = settled(requests(2500), source, automatic(window=window))
    served = [line.served for line in lines]
    assert 0 not in served[200:500]
    before, after = served[100:200].count(0) / 100, served[1500:].count(0) / 1000
    assert after >= 0.5 * before > 0


def test_absences_are_a_function_of_what_was_settled():
    draw = random.Random(3)
    history = [(t, (0, 1), {str(m): draw.choice(["model", "away", "request"]) for m in range(2) if draw.random() < 0.8})
               for t in range(1, 800)]  # fmt: skip
    whole = Absences(2)
    left_out = []
    for t, asked, faults in history:
        whole.settle(t, asked, faults)
        if t % 16 == 0:
            whole.close_window(t)
            left_out.append(whole.out)
    assert len(set(left_out)) > 1
    anew = Absences(2)
    found = []
    for t, asked, faults in history:
        kept = Absences(2)
        kept.load(Part.loads(anew.state().dumps()))
        anew = kept
        anew.settle(t, asked, faults)
        if t % 16 == 0:
            anew.close_window(t)
            found.append(anew.out)
    assert found == left_out


# ---- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [slow(1), 32, slow(4096)])
def test_a_run_that_was_stopped_anywhere_decides_the_same(window):
    """What the state keeps, as JSON, is all that is needed to come to the same."""
    odd: list[Fault | None] = ["request", "model", None]
    gone: list[Fault | None] = ["request", "away", None]

    def failing(request: Request, m: int) -> Fault | None:
        draw = random.Random(f"{request.id} {m}")
        return draw.choice(odd) if request.id % 2 else draw.choice(gone) if m < 2 else None

    lines = requests(160)

    def told(line: Settled) -> tuple[object, ...]:
        return (line.request.id, line.decision, line.outcomes, line.served, line.queue)

    whole = [told(line) for line in settled(lines, Faulty(failing), paper(window=window))]
    draw = random.Random(4)
    for _ in range(4):
        control, done, unfinished = paper(window=window), [], None
        for _ in range(200):
            left = lines[len(done) :]
            decisions: dict[tuple[bytes, bytes], object] = {}
            answers: dict[tuple[bytes, int], Outcome] = {}
            stop_after = draw.randint(1, 12)
            opened: list[bytes] = []
            for chunk in chunks(left, control, Interrupted(failing, draw), unfinished=unfinished):
                if chunk.opened is not None:
                    decisions = {(one.line.key, one.line.digest): one.decision for one in chunk.opened}
                    opened = [one.line.key for one in chunk.opened]
                    answers = {}
                for place, m, outcome in chunk.ahead:
                    answers[opened[place], m] = Outcome.loads(outcome.dumps())
                done += [told(line) for line in chunk.lines if isinstance(line, Settled)]
                for line in chunk.lines:
                    decisions.pop((line.request.key, line.request.digest))
                stop_after -= 1
                if stop_after == 0:
                    break
            unfinished = Unfinished(decisions, answers) if decisions else None
            kept = paper(window=window)
            kept.load(Part.loads(control.state().dumps()))
            control = kept
            if len(done) == len(lines):
                break
        assert done == whole


class Interrupted(Faulty):
    """Ends early now and then, as a source does that is told to stop."""

    def __init__(self, failing: Failing, draw: random.Random) -> None:
        super().__init__(failing)
        self._draw = draw

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        for group in super().answers(asked):
            yield group
            if self._draw.random() < 0.1:
                return


# ---- when none is there ---------------------------------------------------------------------------


def test_an_outage_pauses_and_burns_nothing():
    gone = {"now": False}
    pauses: list[int] = []

    def failing(request: Request, m: int) -> Fault | None:
        gone["now"] = gone["now"] or request.id == 50
        return "away" if gone["now"] else None

    def pause(before: int, why: str) -> bool:
        pauses.append(before)
        assert why.endswith("fails")
        return len(pauses) < 4

    done: list[object] = []
    run = chunks(requests(200), paper(window=32), Faulty(failing), pause=pause)
    with pytest.raises(ModelUnavailable, match=r"no model answers: [a-z]+ fails"):
        done.extend(line for chunk in run for line in chunk.lines)
    assert [line.request.id for line in done if isinstance(line, Settled)] == list(range(50))
    assert pauses == [0, 1, 2, 3]


def test_a_run_goes_on_after_a_pause_as_if_nothing_had_been():
    whole = settled(requests(200), Faulty(lambda request, m: None), paper(window=32))
    left = {"failures": 40}

    def failing(request: Request, m: int) -> Fault | None:
        if request.id < 100 or not left["failures"]:
            return None
        left["failures"] -= 1
        return "away"

    lines = [
        line
        for chunk in chunks(requests(200), paper(window=32), Faulty(failing), pause=lambda before, why: True)
        for line in chunk.lines
    ]
    # a request that only some models failed on may have gone on to others
    assert [line.served for line in lines if isinstance(line, Settled)].count(None) == 0
    assert len(lines) == len(whole)


def test_what_one_model_that_is_away_could_answer_is_an_error_while_others_are_there():
    """Small refuses chats, large is away: others go on, and the run doesn't stop for these."""
    source = Faulty(lambda request, m: chats_refused_by_small(request, m) or ("away" if m else None))
    lines = settled(requests(200), source, paper(window=8))
    for line in lines:
        assert (line.served is None) == ("chat" in line.request.prompt)


def test_halting_keeps_what_comes_until_the_source_ends():
    halted = []
    done, ahead = [], []
    source = Faulty(lambda request, m: "model" if request.id == 20 else None)
    run = chunks(requests(64), paper(window=64), source, halt=lambda: halted.append(True))
    with pytest.raises(MessError, match=r"^20: (small|medium|large) fails"):
        collect(run, done, ahead)
    assert halted == [True]
    assert [line.request.id for line in done if isinstance(line, Settled)] == list(range(20))
    assert {place for place, _, _ in ahead} >= set(range(21, 64))
    assert len([m for place, m, _ in ahead if place == 20]) < 3  # the last failure counts as not given


def collect(run: Iterator[Chunk], done: list[object], ahead: list[Answer]) -> None:
    for chunk in run:
        done += chunk.lines
        ahead += chunk.ahead


# ---- what is kept ---------------------------------------------------------------------------------


def test_a_state_without_failures_says_nothing_of_them():
    control = paper(window=8)
    settled(requests(50), Faulty(lambda request, m: None), control)
    assert "absences" not in control.state().parts
    event = Event("x", DEFAULT_PLAN, control.decide(requests(1), [(0, 1, 2)])[0], (1.0,) * 3, (1.0,) * 3, 0)
    faults = {"1": "away"}
    assert Event.loads(replace(event, faults=faults).dumps()).faults == faults
