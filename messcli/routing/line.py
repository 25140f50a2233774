"""What becomes of a line in the loop: planned, asked, looked at, settled; and what the controller learns of it.

Knows records and the controller's questions; asks nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from messcli.predict.answer import CHECK
from messcli.records import Answer, Check, Decision, Outcome, Rejected, Request
from messcli.routing.controller import Controller
from messcli.routing.event import Event
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.source import OutcomeSource

Line = Request | Rejected

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
        return words(self.outcomes.values())

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


def failed(decision: Decision, outcomes: Mapping[int, Outcome]) -> bool:
    """Whether every model that was asked has failed."""
    return all(m in outcomes and outcomes[m].error is not None for m in decision.asked)


def words(outcomes: Iterable[Outcome]) -> str:
    """What went wrong, each thing once."""
    return "; ".join(dict.fromkeys(one.error for one in outcomes if one.error is not None))


def looked_at(
    request: Request, decision: Decision, outcome: Outcome, controller: Controller, source: OutcomeSource
) -> Decision:
    """The decision once its model has answered."""
    if not decision.larger or outcome.error is not None:
        return decision
    first = decision.looks_at
    check = checks_of(decision, {first: outcome}, source.names).get(first)
    return controller.second(request.plan or DEFAULT_PLAN, decision, signals_of(outcome, check))


def checks_of(
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


def signals_of(outcome: Outcome, check: Check | None) -> dict[str, float]:
    """What an answer tells of itself, and what a check says of it. Batches of other sizes sum in another order: what
    they change lies beyond the digits that count."""
    signals = {name: round(value, DIGITS) for name, value in (outcome.confidence or {}).items()}
    if check is not None and check.probability is not None:
        signals[CHECK] = check.probability
    return signals


def event_of(
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
        running={str(m): one.running for m, one in outcomes.items() if one.running is not None} or None,
        tokens={
            str(m): one.output_tokens
            for m, one in outcomes.items()
            if one.running is not None and one.output_tokens is not None
        }
        or None,
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
        if outcome.error is None and (signals := signals_of(outcome, checks.get(m)))
    }
    return told or None
