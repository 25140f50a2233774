"""A window at work: models are asked, answers come, lines are finished in input order.

What one model fails to answer goes to the next that can, in a stage of its own. A request that is lost because a model
isn't there waits until the window's other answers have come. It is asked again where that model has come back, and an
error where only others are there. Where none is, it is an outage: nothing is lost, and the window asks again after a
pause, as often as it is let.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from messcli.errors import MessError, ModelUnavailable
from messcli.records import IN_A_ROW, Answer, Decision, Outcome, Rejected, Request
from messcli.routing.controller import Controller
from messcli.routing.failures import Contact, fallback
from messcli.routing.line import (
    Chunk,
    Finished,
    Look,
    Planned,
    Reader,
    Settled,
    checks_of,
    event_of,
    failed,
    looked_at,
    words,
)
from messcli.routing.source import OutcomeSource

# What a crash may cost: answers that no chunk has carried yet. A chunk is a transaction of about a millisecond.
CHUNK_ANSWERS = 64
CHUNK_SECONDS = 1.0

MOST_AGAIN = 2  # times that a request is asked anew in its window, as a model that was away came back


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


class Asking:
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
        if decision is not None and failed(decision, outcomes):
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
            decision = looked_at(request, decision, first, self._controller, self._source)
        while failed(decision, outcomes):
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
        self._end_at(place, words(self._outcomes[place].values()))

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
        checks = [checks_of(one.decision, one.outcomes, self._source.names) for one in answered]
        events = [
            event_of(one.request, one.decision, one.outcomes, made, self._controller)
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


def _closable(groups: Iterable[Sequence[Answer]]) -> Generator[Sequence[Answer], None, None]:
    """Closing it ends what is running."""
    yield from groups
