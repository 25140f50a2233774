"""The models' mean accuracies before and after a few answers: a prior over the declared order, and what was seen.

A zoo is listed smallest to largest, so means are expected to rise along it. Conjugate normal model: the first mean is
N(first, first_sd^2), each next one differs from the one before it by N(step, step_sd^2), an accuracy scatters about
its model's mean with one variance. Pure functions of numbers; knows no prompts and no models' names.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from messcli.predict.tuning import Levels

Array = NDArray[np.float64]


@lru_cache(maxsize=64)
def _prior(prior: Levels, models: int) -> tuple[Array, Array]:
    """(precision matrix, means) of the models' mean accuracies."""
    differences = np.eye(models) - np.eye(models, k=-1)
    weights = np.full(models, prior.step_sd**-2)
    weights[0] = prior.first_sd**-2
    precision: Array = differences.T @ (weights[:, None] * differences)
    means: Array = prior.first + prior.step * np.arange(models, dtype=float)
    return precision, means


def covariance(prior: Levels, samples: Array, variance: float) -> Array:
    """Of the models' means, (models, models), after so many answers of each with that variance."""
    precision, _ = _prior(prior, len(samples))
    return np.linalg.inv(precision + np.diag(samples / variance)).astype(float)


def deviations(prior: Levels, samples: Array, variance: float) -> Array:
    """Standard deviations of the models' means, (models,)."""
    return np.sqrt(np.diag(covariance(prior, samples, variance)))


def levels(prior: Levels, samples: Array, means: Array, variance: float) -> Array:
    """The models' expected means.

    Args:
        samples: answers of each model, (models,).
        means: their mean accuracies, (..., models); not looked at where there are no answers.
        variance: of one answer.
    """
    precision, expected = _prior(prior, len(samples))
    seen = np.where(samples > 0, means, 0.0) * (samples / variance)
    return (seen + precision @ expected) @ covariance(prior, samples, variance)


def joules_of_all(joules: Array, known: NDArray[np.bool_], ratio: float) -> Array:
    """Mean joules of every model, where only some are known: the others lie on a geometric series through those."""
    places = np.arange(len(joules), dtype=float)
    if not known.any():
        return ratio**places
    read = np.flatnonzero(known)
    logs = np.log(np.maximum(joules[read], 1e-12))
    filled = np.interp(places, read, logs)
    step = np.log(ratio)
    filled = np.where(places < read[0], logs[0] - step * (read[0] - places), filled)
    filled = np.where(places > read[-1], logs[-1] + step * (places - read[-1]), filled)
    return np.where(known, joules, np.exp(filled))
