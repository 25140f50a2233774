"""The loop: a window of requests is decided, asked, and folded in. Live, recorded and simulated runs share it.

Knows the controller and a source of outcomes; knows nothing of files, states or terminals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from messcli.records import Decision, Outcome, Rejected, Request
from messcli.routing.controller import DEFAULT_PLAN, Controller, Event
from messcli.routing.source import OutcomeSource

Line = Request | Rejected


@dataclass(frozen=True, slots=True)
class Settled:
    """A request with all that came of it."""

    request: Request
    decision: Decision
    outcomes: Mapping[int, Outcome]  # by model
    served: int | None  # None: every model that was asked failed
    queue: float  # Q after it
    billed_joules: float | None = field(init=False)  # every model that ran; None where a meter failed

    def __post_init__(self) -> None:
        known = [outcome.joules for outcome in self.outcomes.values() if outcome.joules is not None]
        billed = math.fsum(known) if len(known) == len(self.outcomes) else None
        object.__setattr__(self, "billed_joules", billed)


@dataclass(frozen=True, slots=True)
class Step:
    """One window: its lines in input order, settled or rejected, and the events that were folded in."""

    lines: Sequence[Settled | Rejected]
    events: Sequence[Event]


def steps(lines: Iterable[Line], controller: Controller, source: OutcomeSource) -> Iterator[Step]:
    """Algorithm 1, a window at a time: decide in order, ask the models, fold in order, close the window."""
    iterator = iter(lines)
    while batch := list(islice(iterator, controller.window())):
        batch, allowed = _fitting(batch, source)
        requests = [line for line in batch if isinstance(line, Request)]
        decisions = controller.decide(requests, allowed)
        outcomes = source.query([(r, d.asked) for r, d in zip(requests, decisions, strict=True)])
        events = [
            _event(request, decision, answers, controller)
            for request, decision, answers in zip(requests, decisions, outcomes, strict=True)
        ]
        queues = controller.settle(events)
        controller.close_window()
        served = [event.served for event in events]
        settled = iter(list(map(Settled, requests, decisions, outcomes, served, queues)))
        yield Step([next(settled) if isinstance(line, Request) else line for line in batch], events)


def _fitting(batch: Sequence[Line], source: OutcomeSource) -> tuple[list[Line], list[tuple[int, ...]]]:
    """Reject the requests that fit no model's context; say which models the others may go to."""
    allowed = iter(source.allowed([line for line in batch if isinstance(line, Request)]))
    lines: list[Line] = []
    fitting = []
    for line in batch:
        if isinstance(line, Request):
            models = next(allowed)
            if models:
                fitting.append(models)
            else:
                why = "the prompt is longer than every model's context. Shorten it"
                line = replace(line.reject(why), key=line.key, digest=line.digest)
        lines.append(line)
    return lines, fitting


def _event(
    request: Request, decision: Decision, outcomes: Mapping[int, Outcome], controller: Controller
) -> Event:
    answered = [m for m, outcome in outcomes.items() if outcome.error is None]
    accuracies = [math.nan] * controller.models
    joules = [math.nan] * controller.models
    for m, outcome in outcomes.items():
        if outcome.accuracy is not None and outcome.error is None:
            accuracies[m] = outcome.accuracy
        if outcome.joules is not None:
            joules[m] = outcome.joules
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
    )
