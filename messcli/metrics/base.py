"""What a metric is: a named function with a signature, and the checks around every score.

The signature names all that the numbers depend on, as sacrebleu's does; scores with different signatures are
not comparable.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from messcli.errors import MetricError, first_line, shown
from messcli.metrics.reasoning import split_reasoning

ROUNDING = 1e-9  # how far a mean may be below alpha by summing floats in another order
_NOISE = 1e-6  # how far out of [0, 1] a user's score may be by rounding


def keeps(mean: float, alpha: float) -> bool:
    """Whether a mean accuracy keeps the promise of alpha."""
    return mean >= alpha - ROUNDING


def with_failures(mean: float | None, count: int, failed: int) -> float:
    """The mean accuracy of `count` requests and of `failed` ones that nobody answered: accuracy 0 for these."""
    return (mean or 0.0) * count / max(count + failed, 1)


def failure_words(mean: float | None, count: int, failed: int, alpha: float) -> str:
    """What failed requests make of a promise, for people; "" where there are none."""
    if not failed:
        return ""
    worst = with_failures(mean, count, failed)
    verdict = "kept" if keeps(worst, alpha) else "MISSED"
    return f"{failed} failed; with accuracy 0 for them {worst:.4f}: SLA {verdict}"


@dataclass(frozen=True, slots=True)
class Metric:
    """A named score. `function(output, references)` is only called with at least one reference."""

    name: str
    signature: str  # "name|key:value|...": equal signatures mean equal scores
    function: Callable[[str, Sequence[str]], float]
    # Signatures of earlier versions whose scores differ only on text that they scored wrongly. A state that was
    # made with one of them goes on.
    continues: tuple[str, ...] = ()

    def __call__(self, output: str, references: Sequence[str]) -> float:
        """Accuracy of `output` in [0, 1]; 1 is best. Its reasoning parts (`<think>...</think>`) are left out.

        Raises:
            ValueError: there is no reference.
            MetricError: the function failed, or returned no number from 0 to 1. The output itself is sound.
        """
        if not references:
            raise ValueError("a metric needs at least one reference")
        answer, _ = split_reasoning(output)
        try:
            value: Any = self.function(answer, references)
        except (Exception, SystemExit) as error:  # a user's function may raise anything, and exit
            raise MetricError(
                f'metric "{self.name}" failed on {shown(answer)}: {first_line(error)}'
            ) from error
        if not isinstance(value, numbers.Real):
            kind = type(value).__name__
            raise MetricError(
                f'metric "{self.name}" returned {kind} {shown(value)} for {shown(answer)}. Return a float'
            )
        try:
            score = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            score = math.inf
        if not math.isfinite(score) or not -_NOISE <= score <= 1 + _NOISE:
            raise MetricError(
                f'metric "{self.name}" returned {score:g} for {shown(answer)}. Return a number from 0 to 1'
            )
        return min(1.0, max(0.0, score))
