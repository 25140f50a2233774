"""The energy model fitted to measured cells. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from messcli.calibration.file import Cell, Coefficients, Fit, terms
from messcli.energy.load import CostModel, StepPoint, fitted

RESAMPLES = 200  # of the bootstrap
FEWEST_LOADS = 2  # a line in load needs them

Array = NDArray[np.float64]


def fit(cells: Sequence[Cell], seed: int) -> Fit:
    """Coefficients that minimise squared relative errors at the cells' means, with their errors."""
    matrix = np.stack([terms(cell.prompt_tokens, cell.output_tokens) for cell in cells])
    means = np.array([cell.mean_joules for cell in cells])
    best = _relative(matrix, means)
    errors = None
    if all(len(cell.joules) >= 2 for cell in cells):
        rng = np.random.default_rng(seed)
        resampled = []
        for _ in range(RESAMPLES):
            drawn = [rng.choice(cell.joules, len(cell.joules)).mean() for cell in cells]
            resampled.append(_relative(matrix, np.array(drawn)))
        errors = Coefficients(*np.std(resampled, axis=0).tolist())
    return Fit(
        coefficients=Coefficients(*best.tolist()),
        standard_errors=errors,
        left_out_error=_left_out_error(matrix, means),
    )


def fit_load(cells: Sequence[Cell], idle_watts: float, most_running: int) -> CostModel | None:
    """What a step takes by the requests running, from two output lengths at every batch size.

    The longer answers take so many steps more, with the same prompts: the difference is theirs. What is left of the
    shorter ones is the prompts', taken at the largest load, where a call's constant part weighs least.

    Returns None with fewer than two loads whose steps take anything.
    """
    points: list[StepPoint] = []
    prompts: list[tuple[float, float]] = []  # joules and seconds per prompt token
    for size in sorted({cell.batch_size for cell in cells}):
        alike = sorted((c for c in cells if c.batch_size == size), key=lambda c: c.output_tokens)
        short, long = alike[0], alike[-1]
        steps = long.output_tokens - short.output_tokens
        if steps == 0:
            continue  # only one length was measured
        joules = size * (long.mean_joules - short.mean_joules) / steps
        seconds = size * (long.mean_seconds - short.mean_seconds) / steps
        if joules <= 0 or seconds <= 0:
            continue  # lost in the scatter of the readings
        points.append(StepPoint(float(size), joules, seconds))
        tokens = size * short.prompt_tokens
        prompts.append(
            (
                max(0.0, size * short.mean_joules - short.output_tokens * joules) / tokens,
                max(0.0, size * short.mean_seconds - short.output_tokens * seconds) / tokens,
            )
        )
    if len(points) < FEWEST_LOADS:
        return None
    return fitted(
        points,
        joules_per_prompt_token=prompts[-1][0],
        seconds_per_prompt_token=prompts[-1][1],
        idle_watts=max(0.0, idle_watts),
        most_running=most_running,
    )


def _left_out_error(matrix: Array, means: Array) -> float | None:
    """Mean relative error at each cell by the fit to all others; None with too few of them to be fitted."""
    count, unknowns = matrix.shape
    if count <= unknowns or not means.all():
        return None
    errors = []
    for left_out in range(count):
        others = np.arange(count) != left_out
        predicted = matrix[left_out] @ _relative(matrix[others], means[others])
        errors.append(abs(predicted / means[left_out] - 1.0))
    return float(np.mean(errors))


def _relative(matrix: Array, joules: Array) -> Array:
    """Non-negative least squares on relative errors. A cell without joules (net of idle) hasn't infinite weight."""
    most = float(joules.max())
    if most <= 0:
        return np.zeros(matrix.shape[1])
    scale = 1.0 / np.maximum(joules, 1e-3 * most)
    return nonnegative(matrix * scale[:, None], joules * scale)


def nonnegative(matrix: Array, values: Array) -> Array:
    """The weights w >= 0 of the least squares |matrix w - values|; `matrix` has shape (values, weights)."""
    from scipy.optimize import nnls

    largest = matrix.max(axis=0)
    largest[largest == 0] = 1.0
    solution, _ = nnls(matrix / largest, values)  # columns of like size: p o is millions where e0 is 1
    weights: Array = solution / largest
    return weights
