"""Second-order predictors: ridge regressions on sufficient statistics, one pass, nothing stored per request.

`RidgePredictor` estimates accuracies, `JoulesPredictor` joules, both from a small dense sketch of the prompt. Both
are solved anew as evidence grows by a tenth, so that the work per request stays flat.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.features import CHARACTERS, DENSE, KIND, LENGTH, SHAPE, SKETCH, dense_features

Array = NDArray[np.float64]

GROWTH = 1.1  # solve anew when there is so much more evidence

TEMPER = 3.0  # the candidates err together, so their losses say less than so many independent ones would

# Penalties (shared part, a model's own part), from the boldest to "the mean alone". No constant fits every task:
# all run side by side and are weighted by how well they predicted so far.
CANDIDATES = (
    (30.0, 100.0),
    (300.0, 1e3),
    (3e3, 1e4),
    (1e4, 3e4),
    (1e4, 1e5),
    (3e4, 3e5),
    (1e4, np.inf),
    (np.inf, np.inf),
)
# The boldest begin as if they had erred already: with few samples they would follow every accident.
HANDICAPS = (1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

LEVELS = 0.15  # how far apart models' means are expected to be: while samples are few they are drawn together

_BASE_EVIDENCE = 100.0  # samples' worth of belief in the scale of each number before any was seen
_BASE_VARIANCE = np.concatenate((np.full(SHAPE, 0.1), np.full(SKETCH, 2.0 / SKETCH)))
_SHAPE_PENALTY = 0.1  # the shape is penalised so much less than the sketch: eight numbers can't overfit
# ... but a model's own weights of the numbers that tell a text's kind are penalised like the sketch's: with light ones,
# what the shared part misses looked like a difference between models (docs/evidence/routing.md).
_OWN = np.ones(DENSE)
_OWN[KIND:SHAPE] = 1.0 / _SHAPE_PENALTY


BELIEF = 2.0  # readings that a calibration is worth: single readings scatter, but it was made elsewhere


class _Evidence:
    """Per model, the sufficient statistics of a ridge regression: counts and sums of products.

    Rows wait in `pending` and are added many at a time: a matrix product per hundred rows costs a tenth of a
    hundred outer products.
    """

    PENDING = 256

    def __init__(self, models: int) -> None:
        self.count = np.zeros(models)
        self._sum_x = np.zeros((models, DENSE))
        self._gram = np.zeros((models, DENSE, DENSE))
        self._cross = np.zeros((models, DENSE))
        self._sum_y = np.zeros(models)
        self._sum_y2 = np.zeros(1)
        self._pending_x = np.zeros((self.PENDING, DENSE))
        self._pending_y = np.zeros((self.PENDING, models))
        self._pending = np.zeros(1, np.int64)

    def add(self, x: Array, y: Array) -> None:
        """One request's features and what was observed of each model (NaN: nothing)."""
        place = int(self._pending[0])
        self._pending_x[place], self._pending_y[place] = x, y
        self._pending[0] += 1
        self.count += ~np.isnan(y)
        if place + 1 == self.PENDING:
            self._flush()

    def _flush(self) -> None:
        size = int(self._pending[0])
        for m in range(len(self.count)):
            seen = ~np.isnan(self._pending_y[:size, m])
            x, y = self._pending_x[:size][seen], self._pending_y[:size, m][seen]
            self._sum_x[m] += x.sum(axis=0)
            self._gram[m] += x.T @ x
            self._cross[m] += x.T @ y
            self._sum_y[m] += y.sum()
            self._sum_y2 += y @ y
        self._pending[0] = 0

    def centred(self) -> _Centred:
        """Everything centred at each model's means and scaled, so that one penalty is right for all numbers."""
        self._flush()
        count, total = self.count[:, None], self.count.sum()
        mean_x, mean_y = self._sum_x / count, self._sum_y / self.count
        squares = np.einsum("mii->i", self._gram)
        spread = squares / total - (self._sum_x.sum(axis=0) / total) ** 2
        spread = (total * np.maximum(spread, 0.0) + _BASE_EVIDENCE * _BASE_VARIANCE) / (
            total + _BASE_EVIDENCE
        )
        scale = 1.0 / np.sqrt(spread)
        scale[:SHAPE] /= np.sqrt(_SHAPE_PENALTY)
        gram = self._gram - count[:, :, None] * mean_x[:, :, None] * mean_x[:, None, :]
        gram *= scale[:, None] * scale
        cross = (self._cross - count * mean_x * mean_y[:, None]) * scale
        variance = float(self._sum_y2[0] / total - (self._sum_y.sum() / total) ** 2)
        return _Centred(gram, cross, mean_x, mean_y, scale, variance)

    def state(self) -> dict[str, NDArray[Any]]:
        return {name: value.copy() for name, value in vars(self).items()}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, value in state.items():
            setattr(self, name, value.copy())


@dataclass(frozen=True, slots=True)
class _Centred:
    gram: Array  # (models, d, d)
    cross: Array  # (models, d)
    mean_x: Array  # (models, d), not scaled
    mean_y: Array  # (models,)
    scale: Array  # (d,)
    variance: float  # of all models' observations


class _Solved(ABC):
    """What the two predictors share: evidence, weights that are solved for as it grows, and their snapshot."""

    def __init__(self, models: int, solve_at: float) -> None:
        self._models = models
        self._evidence = _Evidence(models)
        self._weights = np.zeros((DENSE + 1, models))
        self._solve_at = np.array([solve_at])
        self.version = 0

    def encode(self, text: str) -> Array:
        return dense_features(text)

    def encode_many(self, texts: Sequence[str]) -> Sequence[Array]:
        return dense_features.many(texts)

    @property
    def samples(self) -> Array:
        return self._evidence.count

    def predict_one(self, features: Array) -> Array | None:
        predicted = self.predict_many([features])
        return None if predicted is None else predicted[0]

    def predict_many(self, features: Sequence[Array]) -> Array | None:
        if not self.version or not len(features):
            return None
        return self._bounded(np.array(features) @ self._weights[:-1] + self._weights[-1])

    @abstractmethod
    def _bounded(self, linear: Array) -> Array:
        """What is predicted, kept to what is possible."""

    def _due(self) -> bool:
        count = self._evidence.count
        if count.sum() < self._solve_at[0] or not count.all():
            return False
        self._solve_at[0] = np.ceil(count.sum() * GROWTH)
        return True

    def state(self) -> dict[str, NDArray[Any]]:
        own = {name: value.copy() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        evidence = {f"evidence.{name}": value for name, value in self._evidence.state().items()}
        return {**own, **evidence, "version": np.array([self.version])}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        prefix = "evidence."
        self._evidence.load({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        for name, value in state.items():
            if name == "version":
                self.version = int(value[0])
            elif not name.startswith(prefix):
                setattr(self, name, value.copy())


def _in_rows(array: Array) -> Array:
    """Laid out as a snapshot gives it back: products over another layout differ in the last bit."""
    return np.ascontiguousarray(array)


class RidgePredictor(_Solved):
    """Accuracy of every model, pooled: level_m + (w + v_m) . (x - mean of x), with w shared and v_m its own.

    Minimises squared error (equation 4) plus l0 |w|^2 + l1 sum |v_m|^2, exactly, for each penalty pair of
    `CANDIDATES`; their predictions are averaged with weights exp(-loss / (2 sigma^2 TEMPER)), the loss
    being that of predictions made before learning. With no signal the weights go to the last candidate: the mean.
    """

    name = "ridge"

    def __init__(self, models: int) -> None:
        super().__init__(models, solve_at=8.0)
        self._losses = np.array(HANDICAPS)
        self._candidates = np.zeros((DENSE + 1, len(CANDIDATES) * models))

    def _bounded(self, linear: Array) -> Array:
        return np.clip(linear, 0.0, 1.0)

    def learn_one(self, features: Array, accuracies: Array) -> None:
        if self.version:
            guesses = np.clip(features @ self._candidates[:-1] + self._candidates[-1], 0.0, 1.0)
            errors = guesses.reshape(len(CANDIDATES), self._models) - accuracies
            self._losses += np.nansum(errors**2, axis=1)
        self._evidence.add(features, accuracies)
        if self._due():
            self._solve()

    def _solve(self) -> None:
        centred = self._evidence.centred()
        weights = _pooled_ridge(centred.gram, centred.cross) * centred.scale
        doubt = centred.variance / LEVELS**2  # samples that the zoo's mean is worth
        levels = (self.samples * centred.mean_y + doubt * centred.mean_y.mean()) / (self.samples + doubt)
        intercepts = levels - np.einsum("kmd,md->km", weights, centred.mean_x)
        columns = len(CANDIDATES) * self._models
        self._candidates = _in_rows(
            np.vstack([weights.reshape(columns, DENSE).T, intercepts.reshape(1, columns)])
        )
        noise = max(0.9 * centred.variance, 1e-6)
        votes = np.exp(-np.minimum((self._losses - self._losses.min()) / (2.0 * noise * TEMPER), 50.0))
        votes /= votes.sum()
        self._weights = _in_rows(np.vstack([np.einsum("k,kmd->dm", votes, weights), votes @ intercepts]))
        self.version += 1


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
        penalty = own * _OWN
        if own not in inverses:
            inverses[own] = np.linalg.inv(gram + np.diag(penalty)).astype(float)
        # Eliminate v_m = V_m (r_m - G_m w), where V_m = (G_m + P)^-1, P the diagonal of penalties; note that
        # G_m - G_m V_m G_m = P - P V_m P, and I - G_m V_m = P V_m.
        inverse = inverses[own]
        left = np.diag(models * penalty + shared) - penalty[:, None] * inverse.sum(axis=0) * penalty
        right = penalty * np.einsum("mij,mj->i", inverse, cross)
        w = np.linalg.solve(left, right)
        weights[k] = w + np.einsum("mij,mj->mi", inverse, cross - gram @ w)
    return weights


@dataclass(frozen=True, slots=True)
class EnergyPrior:
    """What a calibration says of a request's joules, by model: joules + joules_per_character x its length."""

    joules: tuple[float, ...]
    joules_per_character: tuple[float, ...]
    characters: float  # of a typical prompt


class JoulesPredictor(_Solved):
    """E_m(t) before the call: what a request will cost with each model, from the prompt's length and words.

    One ridge regression per model, learnt from what the meter read; lengths count for more than words. With a
    calibration it starts from a line in the prompt's length, and what is read corrects that: the line's level (so
    answers that are longer or shorter than was assumed) and the weights around it.
    """

    PENALTIES = np.diag(np.concatenate((np.full(SHAPE, 100.0), np.full(SKETCH, 3000.0))))

    def __init__(self, models: int) -> None:
        super().__init__(models, solve_at=0.0)
        self._floor = np.zeros(models)
        self._unit = np.zeros(1)
        self._prior = np.zeros((2, models))  # joules at length 0, and per feature LENGTH; 0: no calibration

    def calibrate(self, prior: EnergyPrior | None) -> None:
        """Start from `prior`, or from nothing; what was read stays and is weighed against it anew."""
        self._prior = np.zeros((2, self._models))
        if prior is not None:
            per_feature = np.array(prior.joules_per_character) * CHARACTERS
            self._prior = np.vstack([prior.joules, per_feature])
        if self.samples.all():
            self._solve()
            return
        self._weights = np.zeros((DENSE + 1, self._models))
        self._weights[-1], self._weights[LENGTH] = self._prior
        self.version = 0 if prior is None else self.version + 1
        if prior is not None:
            typical = self._prior[0] + self._prior[1] * prior.characters / CHARACTERS
            self._floor = 0.1 * typical
            self._unit[0] = typical.min()

    def _bounded(self, linear: Array) -> Array:
        return np.maximum(linear, self._floor)

    def learn_one(self, features: Array, joules: Array) -> None:
        """Take in what was read; NaN where a model didn't run or the reading can't be trusted."""
        self._evidence.add(features, joules)
        if self._due():
            self._solve()

    def _solve(self) -> None:
        centred = self._evidence.centred()
        # The line of the calibration, raised or lowered to what is read; the regression learns what departs from it.
        expected = self._prior[0] + self._prior[1] * centred.mean_x[:, LENGTH]
        belief = np.where(expected > 0, BELIEF, 0.0)
        level = (belief * expected + self.samples * centred.mean_y) / (belief + self.samples)
        slope = self._prior[1] * level / np.where(expected > 0, expected, 1.0) / centred.scale[LENGTH]
        cross = centred.cross - centred.gram[:, :, LENGTH] * slope[:, None]
        weights = np.linalg.solve(centred.gram + self.PENALTIES, cross[:, :, None])[:, :, 0]
        weights[:, LENGTH] += slope
        weights *= centred.scale
        self._weights = _in_rows(np.vstack([weights.T, level - (weights * centred.mean_x).sum(axis=1)]))
        self._floor = 0.1 * level  # a line may cross zero, a model never costs nothing
        if self.samples.min() <= 10 or not self._unit[0]:
            self._unit[0] = level.min()
        self.version += 1

    @property
    def unit(self) -> float:
        """The cheapest model's mean joules: the divisor that makes V a pure number. 1 while unknown.

        It settles once every model was read ten times, and stays: V means the same in the next run.
        """
        return float(self._unit[0]) or 1.0
