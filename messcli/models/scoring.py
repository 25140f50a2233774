"""Outcomes of answers: scored by the metric where there is a reference."""

from __future__ import annotations

from messcli.errors import MetricError
from messcli.metrics import Metric
from messcli.models.backend import Billed
from messcli.records import Outcome, Request


def score(metric: Metric, request: Request, answer: Billed) -> Outcome:
    """What a model did with a request. A metric that fails makes it an error of this request."""
    generation = answer.generation
    accuracy, error = None, generation.error
    if generation.output is not None and error is None and request.references:
        try:
            accuracy = metric(generation.output, request.references)
        except MetricError as failure:
            error = f"request {request.id!r}: {failure}"
    return Outcome(
        output=generation.output,
        accuracy=accuracy,
        joules=answer.joules,
        prompt_tokens=generation.prompt_tokens,
        output_tokens=generation.output_tokens,
        seconds=answer.seconds,
        meter=answer.meter,
        error=error,
    )
