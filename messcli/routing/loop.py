"""The loop: a window of requests is decided, asked, and folded in. Live, recorded and simulated runs share it.

A window's decisions stand before any of it runs, so its lines are finished in input order as answers come. What
the loop yields is all that a journal needs to take the run up again at that place: the same lines, the same
decisions, and only what wasn't answered is asked. Knows the controller and a source of outcomes; knows nothing
of files, states or terminals.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

from messcli.predict.answer import CHECK
from messcli.records import Answer, Check, Decision, Outcome, Rejected, Request
from messcli.routing.controller import DEFAULT_PLAN, Controller, Event
from messcli.routing.source import OutcomeSource

Line = Request | Rejected

# What a crash may cost: answers that no chunk has carried yet. A chunk is a transaction of about a millisecond.
CHUNK_ANSWERS = 64
CHUNK_SECONDS = 1.0

DIGITS = 3  # after the point, of a log-probability that decisions look at


@dataclass(frozen=True, slots=True)
class Settled:
    """A request with all that came of it."""

    request: Request
    decision: Decision
    outcomes: Mapping[int, Outcome]  # by model
    served: int | None  # None: every model that was asked failed
    queue: float  # Q after it
    checks: Mapping[int, Check] = field(default_factory=dict)  # by the model whose answer was read
    billed_joules: float | None = field(init=False)  # every model that ran; None where a meter failed

    def __post_init__(self) -> None:
        known = [outcome.joules for outcome in self.outcomes.values() if outcome.joules is not None]
        readings = [
            *(check.joules for check in self.checks.values()),
            *(one.joules for outcome in self.outcomes.values() for one in outcome.judgements),
        ]
        known_all = [*known, *(joules for joules in readings if joules is not None)]
        complete = len(known_all) == len(self.outcomes) + len(readings)
        billed = math.fsum(known_all) if complete else None
        object.__setattr__(self, "billed_joules", billed)

    @property
    def audit_joules(self) -> float:
        """Joules of an audit alone: of answers that it asked for, and of judging."""
        judged = math.fsum(one.judged_joules for one in self.outcomes.values())
        return judged + math.fsum(
            one.joules or 0.0 for m, one in self.outcomes.items() if self.decision.audits(m)
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that all models it was put to have answered, before its accuracies are known."""

    request: Request
    decision: Decision
    outcomes: dict[int, Outcome]  # by model, in the zoo's order


Look = Callable[[Sequence[Finished]], list[dict[int, Outcome]]]
"""Finds accuracies of finished requests that the source doesn't know: their outcomes with them, in the order given."""


class Reader(Protocol):
    """Has models read answers: a check, a judge."""

    @property
    def decides(self) -> bool:
        """Whether what it says of an answer decides if a larger model is asked."""
        ...

    def questions(
        self, request: Request, decision: Decision, m: int, outcome: Outcome
    ) -> Sequence[tuple[Request, int]]:
        """What is still to be asked about the answer of model m, and of which model of the source. Pure."""
        ...

    def read(self, outcome: Outcome, reader: int, reply: Outcome) -> Outcome:
        """The answer, with what a model has replied to one question about it."""
        ...

    def notes(self) -> Sequence[str]:
        """What the user should know of this run's readings, a line each."""
        ...


@dataclass(frozen=True, slots=True)
class Planned:
    """A line of a window and what was decided for it."""

    line: Line
    decision: Decision | None  # None: the line is no request, or fits no model


@dataclass(frozen=True, slots=True)
class Chunk:
    """What has happened since the chunk before."""

    opened: Sequence[Planned] | None = None  # a window was decided, and nothing of it has run yet
    lines: Sequence[Settled | Rejected] = ()  # finished, in input order
    events: Sequence[Event] = ()  # of the requests among them, as they were folded in
    ahead: Sequence[Answer] = ()  # answers to later lines: place in the opened window, model, outcome
    ends_window: bool = False  # and the controller has closed it


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A window that an earlier run was stopped in: what it had decided and what was answered."""

    decisions: Mapping[tuple[bytes, bytes], Decision | None]  # by key and digest of the line, in order
    answers: Mapping[tuple[bytes, int], Outcome]  # by key and model


def chunks(
    lines: Iterable[Line | None],
    controller: Controller,
    source: OutcomeSource,
    *,
    left: Callable[[], int | None] = lambda: None,
    unfinished: Unfinished | None = None,
    linger: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    look: Look | None = None,
    readers: Sequence[Reader] = (),
) -> Iterator[Chunk]:
    """Algorithm 1, a window at a time: decide in order, ask the models, fold in order, close the window.

    The first chunk of a window carries nothing but what was decided, the last one ends it. When the source ends
    early, so does the loop.

    Args:
        lines: None says that no line came for a moment (a pipe).
        left: how many lines are still to come, where that is known.
        unfinished: is taken up first, with those of its lines that the input still has.
        linger: seconds from a window's first line after which it closes with what has come.
        look: finds accuracies that the source doesn't know.
        readers: have answers read.
    """
    iterator = iter(lines)
    if unfinished is not None:
        planned, others = _taken_up(iterator, unfinished)
        if (
            not planned and not others
        ):  # the input has nothing to do: the window waits for one that has its lines
            return
        iterator = chain(others, iterator)
        answers = [
            (place, m, outcome)
            for place, item in enumerate(planned)
            if item.decision is not None
            for m in (*item.decision.asked, *item.decision.larger)
            if (outcome := unfinished.answers.get((item.line.key, m))) is not None
        ]
        yield Chunk(planned, ahead=answers)
        work = _Window(planned, controller, source, clock, look, readers, answers)
        yield from work.run()
        if not work.ended:
            return
    while batch := _batch(iterator, controller.window(left()), linger, clock):
        planned = _decide(batch, controller, source)
        yield Chunk(planned)
        work = _Window(planned, controller, source, clock, look, readers)
        yield from work.run()
        if not work.ended:
            return


def _batch(lines: Iterator[Line | None], size: int, linger: float, clock: Callable[[], float]) -> list[Line]:
    batch: list[Line] = []
    closes = math.inf
    for line in lines:
        if line is not None:
            if not batch and linger < math.inf:
                closes = clock() + linger
            batch.append(line)
        if len(batch) == size or (batch and closes < math.inf and clock() >= closes):
            break
    return batch


def _taken_up(
    lines: Iterator[Line | None], unfinished: Unfinished
) -> tuple[list[Planned], list[Line | None]]:
    """The lines of the window as the input has them now, in the window's order; and others that were read meanwhile.

    An input that is as it was has nothing else before them. Where it was changed, the search ends after as many
    other lines as the window had: those that weren't found by then are decided anew when they come.
    """
    found: dict[tuple[bytes, bytes], Line] = {}
    others: list[Line | None] = []
    wanted = unfinished.decisions
    while len(found) < len(wanted) and len(others) <= len(wanted):
        try:
            line = next(lines)
        except StopIteration:
            break
        if line is None:
            continue
        identity = (line.key, line.digest)
        if identity in wanted:
            found[identity] = line
        else:
            others.append(line)
    planned = []
    for identity, decision in wanted.items():
        if identity in found:
            line = found[identity]
            if decision is None and isinstance(line, Request):
                line = _too_long(line)
            planned.append(Planned(line, decision))
    return planned, others


def _decide(batch: Sequence[Line], controller: Controller, source: OutcomeSource) -> list[Planned]:
    """Decide a window; requests that fit no model's context are rejected."""
    requests = [line for line in batch if isinstance(line, Request)]
    allowed = source.allowed(requests)
    fitting = [request for request, models in zip(requests, allowed, strict=True) if models]
    decisions = iter(controller.decide(fitting, [models for models in allowed if models], source.checkers))
    can = iter(allowed)
    return [
        Planned(line, None)
        if isinstance(line, Rejected)
        else Planned(line, next(decisions))
        if next(can)
        else Planned(_too_long(line), None)
        for line in batch
    ]


def _too_long(request: Request) -> Rejected:
    why = "the prompt is longer than every model's context. Shorten it"
    return replace(request.reject(why), key=request.key, digest=request.digest)


@dataclass(frozen=True, slots=True)
class _Put:
    """What a question to the source is for."""

    place: int  # of the line
    request: Request
    model: int  # that is asked
    reader: Reader | None = None  # whose question it is; None: the line's request itself
    answer: int = -1  # the model whose answer it is about


class _Window:
    """A window at work: its answers so far, and the lines that aren't finished."""

    def __init__(
        self,
        planned: Sequence[Planned],
        controller: Controller,
        source: OutcomeSource,
        clock: Callable[[], float],
        look: Look | None,
        readers: Sequence[Reader] = (),
        answers: Iterable[Answer] = (),
    ) -> None:
        self._lines = list(planned)
        self._controller = controller
        self._source = source
        self._clock = clock
        self._look = look
        self._readers = readers
        self._outcomes: dict[int, dict[int, Outcome]] = {}  # by place, of lines that aren't finished
        self._unread: Counter[int] = Counter()  # questions about answers that aren't replied to, by place
        self._finished = 0  # lines, from the first on
        # of an earlier run's answers: what they were to be asked about; larger models are among the decisions'
        self._begun = [put for answer in answers for put in self._take(*answer) if put.reader is not None]

    def _take(self, place: int, m: int, outcome: Outcome) -> list[_Put]:
        """Take in an answer; what is to be asked because of it."""
        self._outcomes.setdefault(place, {})[m] = outcome
        item = self._lines[place]
        if item.decision is None or not isinstance(item.line, Request):
            return []
        puts = [
            _Put(place, question, model, reader, m)
            for reader in self._readers
            for question, model in reader.questions(item.line, item.decision, m, outcome)
        ]
        self._unread[place] += len(puts)
        if not any(put.reader is not None and put.reader.decides for put in puts):
            puts += self._second(place, m)
        return puts

    def _read(self, put: _Put, reader: Reader, reply: Outcome) -> list[_Put]:
        """Take in what was said of an answer; what is to be asked because of it."""
        answers = self._outcomes[put.place]
        answers[put.answer] = reader.read(answers[put.answer], put.model, reply)
        self._unread[put.place] -= 1
        return self._second(put.place, put.answer) if reader.decides else []

    def _second(self, place: int, m: int) -> list[_Put]:
        """The larger model that is to be asked as well, if its first model's answer makes that worth it."""
        item = self._lines[place]
        if item.decision is None or m != item.decision.looks_at or not isinstance(item.line, Request):
            return []
        outcome = self._outcomes[place][m]
        decision = _looked_at(item.line, item.decision, outcome, self._controller, self._source)
        self._lines[place] = Planned(item.line, decision)
        return [
            _Put(place, item.line, larger) for larger in decision.asked if larger not in item.decision.asked
        ]

    def run(self) -> Iterator[Chunk]:
        """Ask what isn't answered; yield chunks until the window ends, or the source does."""
        puts = [
            _Put(place, item.line, m)
            for place, item in enumerate(self._lines)
            if item.decision is not None and isinstance(item.line, Request)
            for m in item.decision.asked
            if m not in self._outcomes.get(place, {})
        ] + self._begun
        asked: list[tuple[Request, Sequence[int]]] = [(put.request, (put.model,)) for put in puts]
        failure: Exception | None = None
        fresh: list[Answer] = []
        missing_answers = len(puts)
        since = self._clock()
        try:
            for group in self._source.answers(asked) if asked else ():
                for position, m, outcome in group:
                    put = puts[position]
                    if put.reader is None:
                        fresh.append((put.place, m, outcome))
                        more = self._take(put.place, m, outcome)
                    else:
                        more = self._read(put, put.reader, outcome)
                        fresh.append((put.place, put.answer, self._outcomes[put.place][put.answer]))
                    puts += more  # the source sees them before its next group
                    asked += [(one.request, (one.model,)) for one in more]
                    missing_answers += len(more)
                missing_answers -= len(group)
                late = len(fresh) >= CHUNK_ANSWERS or self._clock() - since >= CHUNK_SECONDS
                if fresh and late and missing_answers:  # the last chunk is yielded below
                    yield self._chunk(fresh)
                    fresh, since = [], self._clock()
        except (
            Exception
        ) as error:  # whatever ended the source: what it has answered stands, and is kept first
            failure = error
        yield self._chunk(fresh)
        if failure is not None:
            raise failure

    @property
    def ended(self) -> bool:
        """Whether all of its lines are finished."""
        return self._finished == len(self._lines)

    def _chunk(self, fresh: Sequence[Answer]) -> Chunk:
        """Finish the lines that have nothing unanswered before them; what else is in `fresh` is ahead."""
        finished: list[Rejected | Finished] = []
        for place, item in enumerate(self._lines[self._finished :], start=self._finished):
            outcomes = self._outcomes.get(place, {})
            if item.decision is not None and (
                len(outcomes) < len(item.decision.asked) or self._unread[place]
            ):
                break
            if item.decision is not None and isinstance(item.line, Request):
                in_order = dict(sorted(outcomes.items()))  # the zoo's, not that of coming
                finished.append(Finished(item.line, item.decision, in_order))
            elif isinstance(item.line, Rejected):
                finished.append(item.line)
        answered = [one for one in finished if isinstance(one, Finished)]
        if self._look is not None and answered:
            answered = [
                replace(one, outcomes=outcomes)
                for one, outcomes in zip(answered, self._look(answered), strict=True)
            ]
        for place in range(self._finished, self._finished + len(finished)):
            self._outcomes.pop(place, None)
            self._unread.pop(place, None)
        self._finished += len(finished)
        checks = [_checks(one.decision, one.outcomes, self._source.names) for one in answered]
        events = [
            _event(one.request, one.decision, one.outcomes, made, self._controller)
            for one, made in zip(answered, checks, strict=True)
        ]
        settled = zip(answered, events, self._controller.settle(events), checks, strict=True)
        lines: list[Settled | Rejected] = []
        for line in finished:
            if isinstance(line, Rejected):
                lines.append(line)
            else:
                one, event, queue, made = next(settled)
                lines.append(Settled(one.request, one.decision, one.outcomes, event.served, queue, made))
        if self.ended:
            self._controller.close_window()
        ahead = [answer for answer in fresh if answer[0] >= self._finished]
        return Chunk(None, lines, events, ahead, self.ended)


def _looked_at(
    request: Request, decision: Decision, outcome: Outcome, controller: Controller, source: OutcomeSource
) -> Decision:
    """The decision once its model has answered."""
    if not decision.larger or outcome.error is not None:
        return decision
    first = decision.looks_at
    check = _checks(decision, {first: outcome}, source.names).get(first)
    return controller.second(request.plan or DEFAULT_PLAN, decision, _signals(outcome, check))


def _checks(
    decision: Decision | None, outcomes: Mapping[int, Outcome], names: Sequence[str]
) -> dict[int, Check]:
    """The checks that were decided on, by the model whose answer was read."""
    if decision is None or decision.checked_by is None:
        return {}
    reader = names[decision.checked_by]
    return {
        m: check
        for m, outcome in outcomes.items()
        if decision.checks(m) and (check := (outcome.checks or {}).get(reader)) is not None
    }


def _signals(outcome: Outcome, check: Check | None) -> dict[str, float]:
    """What an answer tells of itself, and what a check says of it. Batches of other sizes sum in another order: what
    they change lies beyond the digits that count."""
    signals = {name: round(value, DIGITS) for name, value in (outcome.confidence or {}).items()}
    if check is not None and check.probability is not None:
        signals[CHECK] = check.probability
    return signals


def _event(
    request: Request,
    decision: Decision,
    outcomes: Mapping[int, Outcome],
    checks: Mapping[int, Check],
    controller: Controller,
) -> Event:
    answered = [m for m, outcome in outcomes.items() if outcome.error is None]
    accuracies = [math.nan] * controller.models
    joules = [math.nan] * controller.models
    sees = controller.sees(decision)
    for m, outcome in outcomes.items():
        if sees and outcome.accuracy is not None and outcome.error is None:
            accuracies[m] = outcome.accuracy
        cost = outcome.joules if outcome.worth is None else outcome.worth
        if cost is not None:
            joules[m] = cost
    judged = math.fsum(outcome.judged_joules for outcome in outcomes.values())
    served: int | None = decision.model
    if served not in answered:  # on an exploration another model has answered, and was paid for
        served = max(answered, default=None)
    elif decision.explored and controller.settings.serve == "best":
        served = max(answered, key=lambda m: (accuracies[m], -joules[m]))
    return Event(
        text=request.prompt,
        plan=request.plan or DEFAULT_PLAN,
        decision=decision,
        accuracies=tuple(accuracies),
        joules=tuple(joules),
        served=served,
        signals=_signals_of_all(outcomes, checks, controller),
        check_joules={str(m): check.joules for m, check in checks.items() if check.joules is not None}
        or None,
        judged=judged,
    )


def _signals_of_all(
    outcomes: Mapping[int, Outcome], checks: Mapping[int, Check], controller: Controller
) -> Mapping[str, Mapping[str, float]] | None:
    """By model; None where nobody wants to know, or nothing is said."""
    if not controller.looks:
        return None
    told = {
        str(m): signals
        for m, outcome in outcomes.items()
        if outcome.error is None and (signals := _signals(outcome, checks.get(m)))
    }
    return told or None
