"""Where accuracies come from without references: answers that are compared with the largest model's.

Knows metrics, outcomes and what audits are; knows nothing of models, states or how often is audited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from messcli.errors import MetricError, UsageError
from messcli.metrics import Metric
from messcli.records import Outcome, Rejected, Request
from messcli.routing.audit import Audits
from messcli.routing.loop import Finished, Line

REFERENCES, LARGEST = "references", "largest"  # what answers are compared with
AGAINST = (REFERENCES, LARGEST)


def audits(against: str, *, sure: bool) -> Audits | None:
    """How answers are audited that are compared with `against`; None: they aren't."""
    if against == REFERENCES:
        if sure:
            raise UsageError("--sure is of audits. Give --against largest too")
        return None
    return Audits(agreement=True, sure=sure)


def agreement_metric(metric: Metric) -> Metric:
    """The metric under a signature that says what outputs are compared with: a state isn't continued with another."""
    return replace(metric, signature=f"against:{LARGEST}|{metric.signature}", continues=())


class Agreement:
    """Looks at finished requests: where the largest model has answered, the others are scored against it.

    Args:
        models: the size of the zoo.
    """

    def __init__(self, metric: Metric, models: int) -> None:
        self._metric = metric
        self._largest = models - 1

    def __call__(self, finished: Sequence[Finished]) -> list[dict[int, Outcome]]:
        return [self._look(one.outcomes) for one in finished]

    def _look(self, outcomes: dict[int, Outcome]) -> dict[int, Outcome]:
        largest = outcomes.get(self._largest)
        theirs = None if largest is None or largest.error is not None else largest.output
        return {m: self._scored(m, outcome, theirs) for m, outcome in outcomes.items()}

    def _scored(self, m: int, outcome: Outcome, theirs: str | None) -> Outcome:
        accuracy: float | None = None
        unscored: str | None = None
        if theirs is not None and outcome.output is not None and outcome.error is None:
            try:
                accuracy = 1.0 if m == self._largest else self._metric(outcome.output, (theirs,))
            except MetricError as failure:
                unscored = str(failure)
        return replace(outcome, accuracy=accuracy, unscored=unscored)


def without_references(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines as they are where nobody has references."""
    return (line if isinstance(line, Rejected) else _bare(line) for line in lines)


def _bare(request: Request) -> Request:
    return replace(request, references=()) if request.references else request
