"""The loop: a window of requests is decided, asked, and folded in. Live, recorded and simulated runs share it.

A window's decisions stand before any of it runs, so its lines are finished in input order as answers come. What
the loop yields is all that a journal needs to take the run up again at that place: the same lines, the same
decisions, and only what wasn't answered is asked. Knows the controller and a source of outcomes; knows nothing
of files, states or terminals.

What one model fails to answer goes to the next that can, in a stage of its own. A request that is lost because a model
isn't there waits until the window's other answers have come. It is asked again where that model has come back, and an
error where only others are there. Where none is, it is an outage: nothing is lost, and the loop asks again after a
pause, as often as it is let.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

from messcli.errors import MessError, ModelUnavailable
from messcli.predict.answer import CHECK
from messcli.records import IN_A_ROW, Answer, Check, Decision, Outcome, Rejected, Request
from messcli.routing.controller import DEFAULT_PLAN, Controller, Event
from messcli.routing.failures import Contact, fallback
from messcli.routing.source import OutcomeSource

Line = Request | Rejected

# What a crash may cost: answers that no chunk has carried yet. A chunk is a transaction of about a millisecond.
CHUNK_ANSWERS = 64
CHUNK_SECONDS = 1.0

MOST_AGAIN = 2  # times that a request is asked anew in its window, as a model that was away came back

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
        if self.request.mends is not None:  # earlier tries are the request's, too
            readings.append(self.request.mends.joules)
        known_all = [*known, *(joules for joules in readings if joules is not None)]
        complete = len(known_all) == len(self.outcomes) + len(readings)
        billed = math.fsum(known_all) if complete else None
        object.__setattr__(self, "billed_joules", billed)

    @property
    def errors(self) -> Mapping[int, str]:
        """What went wrong, by model that failed."""
        return {m: one.error for m, one in self.outcomes.items() if one.error is not None}

    @property
    def error(self) -> str:
        """Why no model has answered."""
        return _words(self.outcomes.values())

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


class Pauses(Protocol):
    """What the loop does while no model is there."""

    def __call__(self, before: int, why: str) -> bool:
        """Wait; whether to ask again.

        Args:
            before: pauses since a model was last heard of.
            why: what the models' last failure was.
        """
        ...


def no_pause(before: int, why: str) -> bool:
    """Give up at once."""
    return False


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
    pause: Pauses = no_pause,
    halt: Callable[[], None] | None = None,
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
        pause: waits while no model is there.
        halt: makes the source end early, with what is under way. It is called at the first request that no model
            answers or whose answer isn't scored, which counts as not asked then; None: such a request is finished.

    Raises:
        ModelUnavailable: no model is there, and `pause` gave up. What was finished and answered stands.
        MessError: what `halt` was called for, once the source has ended.
    """
    iterator = iter(lines)
    contact = Contact()

    def window(planned: Sequence[Planned], known: Mapping[int, Mapping[int, Outcome]]) -> _Window:
        return _Window(planned, controller, source, clock, look, readers, contact, pause, halt, known)

    if unfinished is not None:
        planned, others = _taken_up(iterator, unfinished)
        if (
            not planned and not others
        ):  # the input has nothing to do: the window waits for one that has its lines
            return
        iterator = chain(others, iterator)
        known = {
            place: kept
            for place, item in enumerate(planned)
            if (kept := _known(item.line, unfinished, controller.models))
        }
        yield Chunk(
            planned, ahead=[(place, m, one) for place, kept in known.items() for m, one in kept.items()]
        )
        work = window(planned, known)
        yield from work.run()
        if not work.ended:
            return
    while batch := _batch(iterator, controller.window(left()), linger, clock):
        planned = _decide(batch, controller, source)
        yield Chunk(planned)
        work = window(planned, {})
        yield from work.run()
        if not work.ended:
            return


def _known(line: Line, unfinished: Unfinished, models: int) -> dict[int, Outcome]:
    """What is kept of a line of an unfinished window. That a model wasn't there counts where another one answered:
    else it is asked again."""
    kept = {m: one for m in range(models) if (one := unfinished.answers.get((line.key, m))) is not None}
    answered = any(one.error is None for one in kept.values())
    return {m: one for m, one in kept.items() if answered or one.fault != "away"}


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
    plan = request.plan or DEFAULT_PLAN
    return replace(request.reject(why), key=request.key, digest=request.digest, plan=plan)


@dataclass(frozen=True, slots=True)
class _Put:
    """What a question to the source is for."""

    place: int  # of the line
    request: Request
    model: int  # that is asked
    reader: Reader | None = None  # whose question it is; None: the line's request itself
    answer: int = -1  # the model whose answer it is about

    @property
    def decides(self) -> bool:
        """Whether the reply decides if a larger model is asked."""
        return self.reader is not None and self.reader.decides


class _Window:
    """A window at work: its answers so far, and the lines that aren't finished."""

    def __init__(
        self,
        planned: Sequence[Planned],
        controller: Controller,
        source: OutcomeSource,
        clock: Callable[[], float],
        look: Look | None,
        readers: Sequence[Reader],
        contact: Contact,
        pause: Pauses,
        halt: Callable[[], None] | None,
        known: Mapping[int, Mapping[int, Outcome]],
    ) -> None:
        self._planned = planned
        self._lines = list(planned)
        self._controller = controller
        self._source = source
        self._clock = clock
        self._look = look
        self._readers = readers
        self._contact = contact
        self._pause = pause
        self._halt = halt
        self._outcomes: dict[int, dict[int, Outcome]] = {}  # by place, of lines that aren't finished
        self._unread: Counter[int] = Counter()  # questions about answers that aren't replied to, by place
        self._finished = 0  # lines, from the first on
        self._waiting: set[int] = set()  # lost because a model isn't there: it may come back
        self._again: Counter[int] = Counter()  # times that a line was asked anew, by place
        self._halted: dict[int, MessError] = {}  # lines that the run ends at
        for place, outcomes in known.items():
            self._start(place, outcomes)

    def _start(self, place: int, outcomes: Mapping[int, Outcome]) -> None:
        """Take a line up as it was planned, with what is known of it."""
        self._lines[place] = self._planned[place]
        self._outcomes[place] = dict(outcomes)
        if not any(put.decides for put in self._questions(place)):
            self._go_on(place)

    def _questions(self, place: int, m: int | None = None) -> list[_Put]:
        """What is still to be asked about a line's answers, or about that of one model."""
        item, outcomes = self._lines[place], self._outcomes.get(place, {})
        if item.decision is None or not isinstance(item.line, Request):
            return []
        return [
            _Put(place, question, model, reader, answer)
            for answer, outcome in outcomes.items()
            if m in (None, answer)
            for reader in self._readers
            for question, model in reader.questions(item.line, item.decision, answer, outcome)
        ]

    def _take(self, place: int, m: int, outcome: Outcome) -> list[_Put]:
        """Take in an outcome; what is to be asked because of it."""
        outcomes = self._outcomes.setdefault(place, {})
        outcomes[m] = outcome
        self._contact.heard(m, outcome)
        if outcome.unscored is not None:
            self._end_at(place, outcome.unscored)
        puts = self._questions(place, m)
        self._unread[place] += len(puts)
        if not any(put.decides for put in puts):
            puts += self._go_on(place)
        decision = self._lines[place].decision
        if decision is not None and _failed(decision, outcomes):
            faults = {one.fault for one in outcomes.values()}
            self._contact.lost += faults != {"request"}
            if "away" in faults:
                self._waiting.add(place)
            else:
                self._lose(place)
        return puts

    def _read(self, put: _Put, reader: Reader, reply: Outcome) -> list[_Put]:
        """Take in what was said of an answer; what is to be asked because of it."""
        if reply.fault == "away" and not reader.decides:
            raise ModelUnavailable(str(reply.error))  # no finding isn't what the answer was worth
        answers = self._outcomes[put.place]
        answers[put.answer] = reader.read(answers[put.answer], put.model, reply)
        self._unread[put.place] -= 1
        return self._go_on(put.place) if reader.decides else []

    def _go_on(self, place: int) -> list[_Put]:
        """Bring a line's decision to what its outcomes make of it: an answer is looked at, a failure goes to the next
        model. What is to be asked because of it."""
        item, outcomes = self._lines[place], self._outcomes[place]
        decision, before, request = item.decision, item.decision, item.line
        if decision is None or before is None or not isinstance(request, Request):
            return []
        first = outcomes.get(decision.looks_at)
        if first is not None and first.error is None and decision.larger:
            decision = _looked_at(request, decision, first, self._controller, self._source)
        while _failed(decision, outcomes):
            m = fallback(decision.model, self._can(request), decision.asked)
            if m is None:
                break
            decision = replace(
                decision, model=m, asked=(*decision.asked, m), larger=(), checked_by=None, counted_on=None
            )
        self._lines[place] = Planned(request, decision)
        return [_Put(place, request, m) for m in decision.asked if m not in (*before.asked, *outcomes)]

    def _can(self, request: Request) -> Sequence[int]:
        """Models that can take a request and aren't left out of this window."""
        return self._controller.present(self._source.allowed([request])[0])

    def _give_up(self) -> None:
        """What waits for a model that isn't there is lost where others are, and asked again where it is back."""
        for place in sorted(self._waiting):
            away = {m for m, one in self._outcomes[place].items() if one.fault == "away"}
            if not away & self._contact.there or self._again[place] == MOST_AGAIN:
                self._waiting.discard(place)
                self._lose(place)
            self._again[place] += 1

    def _lose(self, place: int) -> None:
        """No model answers the request at `place`."""
        self._end_at(place, _words(self._outcomes[place].values()))

    def _end_at(self, place: int, why: str) -> None:
        """The run is to end at `place`, which counts as not asked: asked again, it may be answered."""
        request = self._lines[place].line
        if self._halt is not None and place not in self._halted and isinstance(request, Request):
            self._halted[place] = MessError(f"{request.place}: {why}")
            self._halt()

    def run(self) -> Iterator[Chunk]:
        """Ask what isn't answered; yield chunks until the window ends, or the source does."""
        outage = self._contact.none_for_long
        while True:
            if outage:
                if not self._pause(self._contact.pauses, self._contact.failure):
                    raise ModelUnavailable(
                        f"no model answers: {self._contact.failure.rstrip('. ')}. Nothing that was answered is lost: "
                        "the same command goes on"
                    )
                self._contact.pauses += 1
            puts = self._unanswered()
            asked: list[tuple[Request, Sequence[int]]] = [(put.request, (put.model,)) for put in puts]
            failure: Exception | None = None
            fresh: list[Answer] = []
            left = len(puts)  # answers
            since = self._clock()
            try:
                with closing(_closable(self._source.answers(asked) if asked else ())) as groups:
                    for group in groups:
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
                            left += len(more)
                        left -= len(group)
                        if self._is_outage(left):
                            break
                        late = len(fresh) >= CHUNK_ANSWERS or self._clock() - since >= CHUNK_SECONDS
                        if fresh and late and left:  # the last chunk is yielded below
                            yield self._chunk(fresh)
                            fresh, since = [], self._clock()
            except (
                Exception
            ) as error:  # whatever ended the source: what it has answered stands, and is kept first
                failure = error
            outage = failure is None and self._is_outage(left)
            if failure is None and not left and not outage:
                self._give_up()
            again = bool(self._waiting) and not left
            yield self._chunk(fresh)
            if failure is not None:
                raise failure
            if self._halted:
                raise self._halted[min(self._halted)]
            if not outage and not again:
                return
            self._start_over()

    def _unanswered(self) -> list[_Put]:
        """What is to be asked, as far as it is known."""
        puts: list[_Put] = []
        for place, item in enumerate(self._lines[self._finished :], start=self._finished):
            if item.decision is not None and isinstance(item.line, Request):
                known = self._outcomes.get(place, {})
                puts += [_Put(place, item.line, m) for m in item.decision.asked if m not in known]
                questions = self._questions(place) if known else []
                self._unread[place] = len(questions)
                puts += questions
        return puts

    def _is_outage(self, left: int) -> bool:
        """Whether requests are lost and no model is there: many of them, or all that were asked."""
        lost = len(self._waiting)
        return lost > 0 and not self._contact.there and (lost >= IN_A_ROW or not left)

    def _start_over(self) -> None:
        """Ask again for what waits, as it was decided at first: models that weren't there have run nothing of it."""
        waiting, self._waiting = sorted(self._waiting), set()
        for place in waiting:
            self._start(place, {m: one for m, one in self._outcomes[place].items() if one.fault != "away"})

    @property
    def ended(self) -> bool:
        """Whether all of its lines are finished."""
        return self._finished == len(self._lines)

    def _chunk(self, fresh: Sequence[Answer]) -> Chunk:
        """Finish the lines that have nothing unanswered before them; what else is in `fresh` is ahead."""
        finished: list[Rejected | Finished] = []
        for place, item in enumerate(self._lines[self._finished :], start=self._finished):
            outcomes = self._outcomes.get(place, {})
            if place in self._waiting or place in self._halted or self._unread[place]:
                break
            if item.decision is not None and any(m not in outcomes for m in item.decision.asked):
                break
            if item.decision is not None and isinstance(item.line, Request):
                in_order = dict(sorted(outcomes.items()))  # the zoo's, not that of coming
                decision = self._chosen(item.line, item.decision, outcomes)
                finished.append(Finished(item.line, decision, in_order))
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
                if line.plan is not None:
                    self._controller.accounts[line.plan].failed += 1
            else:
                one, event, queue, made = next(settled)
                lines.append(Settled(one.request, one.decision, one.outcomes, event.served, queue, made))
        if self.ended:
            self._controller.close_window()
        ahead = [answer for answer in fresh if answer[0] >= self._finished and answer[0] not in self._halted]
        return Chunk(None, lines, events, ahead, self.ended)

    def _chosen(self, request: Request, decision: Decision, outcomes: Mapping[int, Outcome]) -> Decision:
        """The decision with the model that would have served without an audit, where the chosen one failed."""
        failed = [m for m, one in outcomes.items() if one.error is not None]
        if decision.chosen is None or decision.chosen not in failed:
            return decision
        chosen = fallback(decision.chosen, self._can(request), failed)
        return decision if chosen is None else replace(decision, chosen=chosen)


def _failed(decision: Decision, outcomes: Mapping[int, Outcome]) -> bool:
    """Whether every model that was asked has failed."""
    return all(m in outcomes and outcomes[m].error is not None for m in decision.asked)


def _words(outcomes: Iterable[Outcome]) -> str:
    """What went wrong, each thing once."""
    return "; ".join(dict.fromkeys(one.error for one in outcomes if one.error is not None))


def _closable(groups: Iterable[Sequence[Answer]]) -> Generator[Sequence[Answer], None, None]:
    """Closing it ends what is running."""
    yield from groups


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
        faults={str(m): one.fault or "model" for m, one in outcomes.items() if one.error is not None} or None,
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
