"""Second-order predictors: ridge regressions on sufficient statistics, one pass, nothing stored per request.

`RidgePredictor` estimates accuracies from a small dense sketch of the prompt, `JoulesPredictor` joules from its
shape. Both are solved anew as evidence grows by a tenth, so that the work per request stays flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.features import DENSE, SHAPE, SKETCH, dense_features, shape_features

Array = NDArray[np.float64]

GROWTH = 1.1  # solve anew when there is so much more evidence

# Penalties (shared part, a model's own part), from the boldest to "the mean alone". No constant fits every task:
# all run side by side and are weighted by how well they predicted so far.
CANDIDATES = (
    (3e3, 1e4),
    (1e4, 3e4),
    (1e4, 1e5),
    (3e4, 3e5),
    (1e4, np.inf),
    (np.inf, np.inf),
)

_BASE_EVIDENCE = 100.0  # samples' worth of belief in the scale of each number before any was seen
_BASE_VARIANCE = np.concatenate((np.full(SHAPE, 0.1), np.full(SKETCH, 2.0 / SKETCH)))
_SHAPE_PENALTY = 0.1  # the shape is penalised so much less than the sketch: eight numbers can't overfit


class RidgePredictor:
    """Accuracy of every model, pooled: mean_m + (w + v_m) . (x - mean of x), with w shared and v_m its own.

    Minimises squared error (equation 4) plus l0 |w|^2 + l1 sum |v_m|^2, exactly, for each penalty pair of
    `CANDIDATES`; their predictions are averaged with weights exp(-loss / 2 sigma^2), the loss being that of
    predictions made before learning. With no signal the weights go to the last candidate: the mean.
    """

    name = "ridge"

    def __init__(self, models: int) -> None:
        self._models = models
        self._n = np.zeros(models)
        self._sum_x = np.zeros((models, DENSE))
        self._gram = np.zeros((models, DENSE, DENSE))
        self._cross = np.zeros((models, DENSE))
        self._sum_y = np.zeros(models)
        self._sum_y2 = np.zeros(1)
        self._losses = np.zeros(len(CANDIDATES))
        self._solve_at = np.array([8.0])
        # the candidates' weights, for their losses, and the averaged ones that predict
        self._all = np.zeros((DENSE + 1, len(CANDIDATES) * models))
        self._averaged = np.zeros((DENSE + 1, models))
        self.version = 0

    def encode(self, text: str) -> Array:
        return dense_features(text)

    def predict_one(self, features: Array) -> Array | None:
        return self.predict_many(features) if self.version else None

    def predict_many(self, features: Array) -> Array:
        """Â for a stack of encoded texts: (requests, models)."""
        estimates: Array = np.clip(features @ self._averaged[:-1] + self._averaged[-1], 0.0, 1.0)
        return estimates

    @property
    def samples(self) -> Array:
        return self._n

    def learn_one(self, features: Array, accuracies: Array) -> None:
        observed = np.flatnonzero(~np.isnan(accuracies))
        if self.version:
            guesses = np.clip(features @ self._all[:-1] + self._all[-1], 0.0, 1.0)
            errors = guesses.reshape(len(CANDIDATES), self._models)[:, observed] - accuracies[observed]
            self._losses += (errors**2).sum(axis=1)
        outer = features[:, None] * features
        for m in observed:
            self._n[m] += 1
            self._sum_x[m] += features
            self._gram[m] += outer
            self._cross[m] += features * accuracies[m]
            self._sum_y[m] += accuracies[m]
            self._sum_y2 += accuracies[m] ** 2
        if self._n.sum() >= self._solve_at[0] and self._n.all():
            self._solve()
            self._solve_at[0] = np.ceil(self._n.sum() * GROWTH)

    def _solve(self) -> None:
        count, total = self._n, self._n.sum()
        mean_x, mean_y = self._sum_x / count[:, None], self._sum_y / count
        spread: Array = np.maximum(
            np.diagonal(self._gram.sum(axis=0)) / total - (self._sum_x.sum(axis=0) / total) ** 2, 0.0
        )
        scale = 1.0 / np.sqrt((total * spread + _BASE_EVIDENCE * _BASE_VARIANCE) / (total + _BASE_EVIDENCE))
        scale[:SHAPE] /= np.sqrt(_SHAPE_PENALTY)
        # centred and scaled, so that one penalty is right for all
        gram = self._gram - count[:, None, None] * mean_x[:, :, None] * mean_x[:, None, :]
        gram *= scale[:, None] * scale
        cross = (self._cross - count[:, None] * mean_x * mean_y[:, None]) * scale
        weights = _pooled_ridge(gram, cross) * scale
        intercepts = mean_y - np.einsum("kmd,md->km", weights, mean_x)
        columns = len(CANDIDATES) * self._models
        self._all = np.vstack([weights.reshape(columns, DENSE).T, intercepts.reshape(1, columns)])
        noise = max(0.9 * float(self._sum_y2[0] / total - (self._sum_y.sum() / total) ** 2), 1e-6)
        votes = np.exp(-np.minimum((self._losses - self._losses.min()) / (2.0 * noise), 50.0))
        votes /= votes.sum()
        self._averaged = np.vstack([np.einsum("k,kmd->dm", votes, weights), votes @ intercepts])
        self.version += 1

    def state(self) -> dict[str, NDArray[Any]]:
        own = {name: value.copy() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {**own, "version": np.array([self.version])}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, value in state.items():
            setattr(self, name, int(value[0]) if name == "version" else value.copy())


def _pooled_ridge(gram: Array, cross: Array) -> Array:
    """Weights (candidates, models, numbers) that minimise squared error plus both penalties.

    Args:
        gram: (models, d, d), centred.
        cross: (models, d), centred.
    """
    models, size = cross.shape
    weights = np.zeros((len(CANDIDATES), models, size))
    eye = np.eye(size)
    inverses: dict[float, Array] = {}
    for k, (shared, own) in enumerate(CANDIDATES):
        if np.isinf(shared):
            continue  # the mean alone
        if np.isinf(own):
            weights[k] = np.linalg.solve(gram.sum(axis=0) + shared * eye, cross.sum(axis=0))
            continue
        if own not in inverses:
            inverses[own] = np.linalg.inv(gram + own * eye)
        # Eliminate v_m = V_m (r_m - G_m w), where V_m = (G_m + own I)^-1; note G_m - G_m V_m G_m = own V_m G_m.
        inverse = inverses[own]
        left = own * np.matmul(inverse, gram).sum(axis=0) + shared * eye
        right = own * np.einsum("mij,mj->i", inverse, cross)
        w = np.linalg.solve(left, right)
        weights[k] = w + np.einsum("mij,mj->mi", inverse, cross - gram @ w)
    return weights


class JoulesPredictor:
    """E_m(t) before the call: what a request will cost with each model, from the shape of its prompt.

    One ridge regression per model on `shape_features`, learnt from what the meter read. A calibration enters
    as readings made beforehand.
    """

    PENALTY = 30.0

    def __init__(self, models: int) -> None:
        self._models = models
        self._n = np.zeros(models)
        self._sum_x = np.zeros((models, SHAPE))
        self._gram = np.zeros((models, SHAPE, SHAPE))
        self._cross = np.zeros((models, SHAPE))
        self._sum_y = np.zeros(models)
        self._weights = np.zeros((SHAPE + 1, models))
        self._solve_at = np.zeros(1)
        self._unit = np.zeros(1)
        self.version = 0

    def encode(self, text: str) -> Array:
        return shape_features(text)

    def predict_one(self, features: Array) -> Array | None:
        """Joules of every model; None until each was read at least once. Pure."""
        return self.predict_many(features) if self.version else None

    def predict_many(self, features: Array) -> Array:
        """Joules for a stack of encoded texts: (requests, models)."""
        floor = 0.1 * self._sum_y / self._n  # a line may cross zero, a model never costs nothing
        predicted: Array = np.maximum(features @ self._weights[:-1] + self._weights[-1], floor)
        return predicted

    def learn_one(self, features: Array, joules: Array) -> None:
        """Take in what was read; NaN where a model didn't run or the reading can't be trusted."""
        outer = features[:, None] * features
        for m in np.flatnonzero(~np.isnan(joules)):
            self._n[m] += 1
            self._sum_x[m] += features
            self._gram[m] += outer
            self._cross[m] += features * joules[m]
            self._sum_y[m] += joules[m]
        if not self._n.all() or self._n.sum() < self._solve_at[0]:
            return
        self._solve()
        self._solve_at[0] = np.ceil(self._n.sum() * GROWTH)
        if self._n.min() <= 10 or not self._unit[0]:
            self._unit[0] = (self._sum_y / self._n).min()

    def _solve(self) -> None:
        count = self._n[:, None]
        mean_x, mean_y = self._sum_x / count, self._sum_y / self._n
        gram = self._gram - count[:, :, None] * mean_x[:, :, None] * mean_x[:, None, :]
        cross = self._cross - count * mean_x * mean_y[:, None]
        spread = np.diagonal(gram, axis1=1, axis2=2).sum(axis=0) / self._n.sum()
        penalty = self.PENALTY * np.diag(np.maximum(spread, 1e-6))
        weights = np.linalg.solve(gram + penalty, cross[:, :, None])[:, :, 0]
        self._weights = np.vstack([weights.T, mean_y - (weights * mean_x).sum(axis=1)])
        self.version += 1

    @property
    def unit(self) -> float:
        """The cheapest model's mean joules: the divisor that makes V a pure number. 1 while unknown.

        It settles once every model was read ten times, and stays: V means the same in the next run.
        """
        return float(self._unit[0]) or 1.0

    def state(self) -> dict[str, NDArray[Any]]:
        own = {name: value.copy() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {**own, "version": np.array([self.version])}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, value in state.items():
            setattr(self, name, int(value[0]) if name == "version" else value.copy())
