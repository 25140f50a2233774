"""A row of `route`: what a finished line looks like in the output, under the names of `docs/formats.md`.

Knows what a settled line holds; knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from messcli.jobs.config import Writing
from messcli.jobs.session import of_model
from messcli.metrics.reasoning import split_reasoning
from messcli.records import Rejected, rejected_row, row_of
from messcli.routing.line import Settled


def routed_row(line: Settled | Rejected, names: Sequence[str], *, writing: Writing) -> dict[str, Any]:
    if isinstance(line, Rejected):
        return rejected_row(line, writing.rename)
    include_prompt = writing.include_prompt or not line.request.given.keys().isdisjoint(writing.columns)
    decision, served = line.decision, line.served
    values: dict[str, Any] = {
        "explored": decision.explored,
        "billed_joules": line.billed_joules,
        "queue": line.queue,
    }
    if served is None:
        last = line.outcomes.get(decision.model)
        values["finish"] = None if last is None else last.finish
        return row_of(
            line.request, None, values, error=line.error, include_prompt=include_prompt, names=writing.rename
        )
    outcome = line.outcomes[served]
    answer, reasoning = split_reasoning(outcome.output or "")
    reasoning = "\n".join(part for part in (outcome.reasoning, reasoning) if part)
    values.update(
        output=answer if outcome.output is not None else None,
        accuracy=outcome.accuracy,
        joules=outcome.joules,
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        seconds=outcome.seconds,
        meter=outcome.meter,
        finish=outcome.finish,
        estimated_accuracy=of_model(decision.given or decision.estimates, served),
        joules_predicted=of_model(decision.joules_predicted, served),
    )
    if decision.chosen is not None:
        values["audited"] = decision.audited
    if decision.given is not None:
        values["confidence"] = _confidence(line, served)
    if decision.given is not None or line.errors:
        values["asked"] = [names[m] for m in decision.asked]
    if line.checks:
        values["checks"] = {names[m]: check.probability for m, check in line.checks.items()}
    if line.errors:
        values["failed"] = {names[m]: why for m, why in line.errors.items()}
    if reasoning:
        values["reasoning"] = reasoning
    return row_of(
        line.request,
        names[served],
        values,
        error=outcome.unscored,
        include_prompt=include_prompt,
        names=writing.rename,
    )


def _confidence(line: Settled, served: int) -> float | None:
    """In the served answer, from 0 to 1: what a check says, else the mean probability of its tokens (geometric)."""
    check, told = line.checks.get(served), line.outcomes[served].confidence
    if check is not None and check.probability is not None:
        return check.probability
    return None if told is None or "mean" not in told else math.exp(min(told["mean"], 0.0))
