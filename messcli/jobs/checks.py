"""Has a larger model read answers, where a decision says so. Knows templates and decisions; nothing of prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from messcli.metrics.reasoning import split_reasoning
from messcli.models.check import TEMPLATE, probability, question
from messcli.models.untrusted import template_of
from messcli.records import Check, Decision, Outcome, Request
from messcli.zoo import Zoo


@dataclass(slots=True)
class _Told:
    """What a reader's checks came to in a run."""

    checks: int = 0
    mute: int = 0  # that told no probability
    why: str = ""  # the first of them


class Checks:
    """Asks for checks. A `messcli.routing.line.Reader`."""

    decides = True

    def __init__(self, zoo: Zoo) -> None:
        self._names = zoo.names
        self._template = template_of(zoo.look.check, TEMPLATE)
        self._told: dict[int, _Told] = {}

    def questions(
        self, request: Request, decision: Decision, m: int, outcome: Outcome
    ) -> Sequence[tuple[Request, int]]:
        reader = decision.checked_by
        if reader is None or not decision.checks(m) or outcome.output is None or outcome.error is not None:
            return ()
        if self._names[reader] in (outcome.checks or {}):  # of an earlier run
            return ()
        answer, _ = split_reasoning(outcome.output)
        return [(question(self._template, request, answer, self._names[m]), reader)]

    def read(self, outcome: Outcome, reader: int, reply: Outcome) -> Outcome:
        found = probability(reply.weights)
        told = self._told.setdefault(reader, _Told())
        told.checks += 1
        if found is None:
            told.mute += 1
            told.why = told.why or reply.error or "its backend tells no probabilities of next tokens"
        check = Check(found, reply.joules, reply.meter, reply.prompt_tokens or 0)
        return replace(outcome, checks={**(outcome.checks or {}), self._names[reader]: check})

    def notes(self) -> list[str]:
        """What went wrong in this run, a line each, for people."""
        return [
            f"warning: {told.mute} of {told.checks} checks by {self._names[reader]} told nothing. The first: {told.why}"
            for reader, told in self._told.items()
            if told.mute
        ]
