"""Outcomes of answers: scored by the metric where there is a reference."""

from __future__ import annotations

from messcli.errors import MetricError
from messcli.metrics import Metric
from messcli.models.backend import Billed
from messcli.records import Outcome, Request
from messcli.tariff import FREE, Tariff


def score(
    metric: Metric, request: Request, answer: Billed, *, model: str = "", tariff: Tariff = FREE
) -> Outcome:
    """What a model did with a request. Where the metric fails, the answer stands without an accuracy."""
    generation = answer.generation
    accuracy, unscored = None, None
    if generation.output is not None and generation.error is None and request.references:
        try:
            accuracy = metric(generation.output, request.references)
        except MetricError as failure:
            unscored = str(failure)
    return Outcome(
        output=generation.output,
        accuracy=accuracy,
        joules=answer.joules,
        prompt_tokens=generation.prompt_tokens,
        output_tokens=generation.output_tokens,
        seconds=answer.seconds,
        meter=answer.meter or None,
        error=generation.error,
        finish=generation.finish,
        running=answer.running,
        worth=tariff.worth(model, generation.prompt_tokens, generation.output_tokens),
        unscored=unscored,
        confidence=generation.confidence,
        weights=generation.weights,
        reasoning=generation.reasoning,
        fault=None if generation.error is None else generation.fault or "model",
    )
