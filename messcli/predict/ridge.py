"""Second-order predictors: ridge regressions on sufficient statistics, one pass, nothing stored per request.

`RidgePredictor` estimates accuracies, `JoulesPredictor` joules, both from where the prompt lies in a `LatentSpace`.
Both are solved anew as evidence grows by a tenth, so that the work per request stays flat.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from messcli.predict.latent import LATENT, SIZE, LatentSpace, Lessons, Placed
from messcli.predict.text import CHARACTERS, KIND, LENGTH, SHAPE

Array = NDArray[np.float64]

GROWTH = 1.1  # solve anew when there is so much more evidence

TEMPER = 1.5  # the candidates err together, so their losses say less than so many independent ones would


class Candidate(NamedTuple):
    """Penalties of one regression; the larger, the less it follows the samples."""

    shared: float  # of the weights that all models share
    own: float  # of a model's own weights
    lengths: float  # of its own weights of the prompt's lengths
    handicap: float = 0.0  # squared errors to begin with: few samples would lead the boldest astray


# From the boldest to "the mean alone". No constant fits every task: all run side by side and are weighted by how well
# they predicted so far. The first ones are for tasks where a prompt's length tells which model is needed.
CANDIDATES = (
    Candidate(0.3, 3.0, 0.03, handicap=1.0),
    Candidate(3.0, 30.0, 0.3, handicap=0.5),
    Candidate(10.0, 300.0, 1.0, handicap=0.5),
    Candidate(1.0, 10.0, 10.0, handicap=1.0),
    Candidate(3.0, 30.0, 100.0, handicap=0.5),
    Candidate(10.0, 100.0, 300.0),
    Candidate(10.0, 300.0, 1e3),
    Candidate(30.0, 1e3, 3e3),
    Candidate(100.0, 3e3, 1e4),
    Candidate(30.0, np.inf, np.inf),
    Candidate(np.inf, np.inf, np.inf),
)

LEVELS = 0.15  # how far apart models' means are expected to be: while samples are few they are drawn together

_BASE_EVIDENCE = 100.0  # samples' worth of belief in the variance of the shape's numbers before any was seen
_BASE_VARIANCE = 0.1
_SHAPE_VARIANCE = 0.08  # what each of them is scaled to; all directions of the space together have 1
# A model's own weights of the numbers that tell a text's kind are penalised more: with light ones, what the shared
# part misses looked like a difference between models (docs/evidence/routing.md).
_OWN_KIND = 10.0

BELIEF = 2.0  # readings that a calibration is worth: single readings scatter, but it was made elsewhere


class _Evidence:
    """Per model, the sufficient statistics of a ridge regression: counts and sums of products.

    Rows wait in `pending` and are added many at a time: a matrix product per hundred rows costs a tenth of a
    hundred outer products.
    """

    PENDING = 256

    def __init__(self, models: int) -> None:
        self.count = np.zeros(models)
        self._sum_x = np.zeros((models, SIZE))
        self._gram = np.zeros((models, SIZE, SIZE))
        self._cross = np.zeros((models, SIZE))
        self._sum_y = np.zeros(models)
        self._sum_y2 = np.zeros(1)
        self._pending_x = np.zeros((self.PENDING, SIZE))
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
        squares = np.einsum("mii->i", self._gram[:, :SHAPE, :SHAPE])
        spread = squares / total - (self._sum_x[:, :SHAPE].sum(axis=0) / total) ** 2
        spread = (total * np.maximum(spread, 0.0) + _BASE_EVIDENCE * _BASE_VARIANCE) / (
            total + _BASE_EVIDENCE
        )
        scale = np.ones(SIZE)
        scale[:SHAPE] = np.sqrt(_SHAPE_VARIANCE / spread)
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
    """What the two predictors share: a space, evidence, weights that are solved for as it grows, and their snapshot."""

    FIRST: ClassVar[float]  # samples to solve on at first

    def __init__(self, models: int) -> None:
        self._models = models
        self._space = LatentSpace()
        self._lessons = Lessons(models)
        self.version = 0
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet."""
        self._evidence = _Evidence(self._models)
        self._weights = np.zeros((SIZE + 1, self._models))
        self._solve_at = np.array([self.FIRST])

    def encode(self, text: str) -> Placed:
        return self._space.encode(text)

    def encode_many(self, texts: Sequence[str]) -> Sequence[Placed]:
        return self._space.encode.many(texts)

    def learn_one(self, features: Placed, observed: Array) -> None:
        """Take in what was observed of each model; NaN where nothing was."""
        if not (self._lessons.open and self._lessons.add(features.text, observed.copy())):
            self._learn(features.at, observed)
            return
        # As if the space had been known from the start.
        lessons = self._lessons.fit(self._space)
        self._begin()
        for placed, (_, values) in zip(self.encode_many([t for t, _ in lessons]), lessons, strict=True):
            self._learn(placed.at, values)
        if self._evidence.count.all():
            self._solve()

    def _learn(self, at: Array, observed: Array) -> None:
        self._evidence.add(at, observed)
        if self._due():
            self._solve()

    @abstractmethod
    def _solve(self) -> None:
        """Weights from the evidence."""

    @property
    def samples(self) -> Array:
        return self._evidence.count

    def predict_one(self, features: Placed) -> Array | None:
        predicted = self.predict_many([features])
        return None if predicted is None else predicted[0]

    def predict_many(self, features: Sequence[Placed]) -> Array | None:
        if not self.version or not len(features):
            return None
        return self._bounded(np.array([one.at for one in features]) @ self._weights[:-1] + self._weights[-1])

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
        arrays = {name: value.copy() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for part, owner in self._parts():
            arrays.update({f"{part}.{name}": value for name, value in owner.state().items()})
        return {**arrays, "version": np.array([self.version])}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        for part, owner in self._parts():
            prefix = f"{part}."
            owner.load({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        self.version = int(state["version"][0])
        for name, value in state.items():
            if name in vars(self) and name != "version":
                setattr(self, name, value.copy())

    def _parts(self) -> tuple[tuple[str, _Evidence | LatentSpace | Lessons], ...]:
        return ("evidence", self._evidence), ("space", self._space), ("lessons", self._lessons)


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
    FIRST = 8.0

    def _begin(self) -> None:
        super()._begin()
        self._losses = np.array([candidate.handicap for candidate in CANDIDATES])
        self._candidates = np.zeros((SIZE + 1, len(CANDIDATES) * self._models))

    def _bounded(self, linear: Array) -> Array:
        return np.clip(linear, 0.0, 1.0)

    def _learn(self, at: Array, observed: Array) -> None:
        if self.version:
            guesses = np.clip(at @ self._candidates[:-1] + self._candidates[-1], 0.0, 1.0)
            errors = guesses.reshape(len(CANDIDATES), self._models) - observed
            self._losses += np.nansum(errors**2, axis=1)
        super()._learn(at, observed)

    def _solve(self) -> None:
        centred = self._evidence.centred()
        weights = _candidates(centred.gram, centred.cross) * centred.scale
        doubt = centred.variance / LEVELS**2  # samples that the zoo's mean is worth
        levels = (self.samples * centred.mean_y + doubt * centred.mean_y.mean()) / (self.samples + doubt)
        intercepts = levels - np.einsum("kmd,md->km", weights, centred.mean_x)
        columns = len(CANDIDATES) * self._models
        self._candidates = _in_rows(
            np.vstack([weights.reshape(columns, SIZE).T, intercepts.reshape(1, columns)])
        )
        noise = max(0.9 * centred.variance, 1e-6)
        votes = np.exp(-np.minimum((self._losses - self._losses.min()) / (2.0 * noise * TEMPER), 50.0))
        votes /= votes.sum()
        self._weights = _in_rows(np.vstack([np.einsum("k,kmd->dm", votes, weights), votes @ intercepts]))
        self.version += 1


def _candidates(gram: Array, cross: Array) -> Array:
    """Weights (candidates, models, numbers) under each of `CANDIDATES`; see `_pooled_ridge`."""
    models, size = cross.shape
    weights = np.zeros((len(CANDIDATES), models, size))
    inverses: dict[tuple[float, float], Array] = {}
    for k, (shared, own, lengths, _) in enumerate(CANDIDATES):
        if np.isinf(shared):
            continue  # the mean alone
        if np.isinf(own):
            weights[k] = np.linalg.solve(gram.sum(axis=0) + shared * np.eye(size), cross.sum(axis=0))
            continue
        penalty = np.full(size, own)
        penalty[:KIND] = lengths
        penalty[KIND:SHAPE] *= _OWN_KIND
        if (own, lengths) not in inverses:
            inverses[own, lengths] = _inverse(gram, penalty)
        weights[k] = _pooled_ridge(gram, cross, np.full(size, shared), penalty, inverses[own, lengths])
    return weights


def _inverse(gram: Array, own: Array) -> Array:
    return np.linalg.inv(gram + np.diag(own)).astype(float)


def _pooled_ridge(gram: Array, cross: Array, shared: Array, own: Array, inverse: Array) -> Array:
    """Weights w + v_m (models, numbers) that minimise squared error plus w S w + sum of v_m P v_m, over all w and v.

    Args:
        gram: G_m of each model, (models, d, d), centred.
        cross: r_m of each model, (models, d), centred.
        shared: the diagonal of S.
        own: the diagonal of P.
        inverse: V_m = (G_m + P)^-1, (models, d, d).
    """
    # Eliminate v_m = V_m (r_m - G_m w). Note that G_m - G_m V_m G_m = P - P V_m P, and I - G_m V_m = P V_m.
    left = np.diag(len(cross) * own + shared) - own[:, None] * inverse.sum(axis=0) * own
    w = np.linalg.solve(left, own * np.einsum("mij,mj->i", inverse, cross))
    weights: Array = w + np.einsum("mij,mj->mi", inverse, cross - gram @ w)
    return weights


@dataclass(frozen=True, slots=True)
class EnergyPrior:
    """What a calibration says of a request's joules, by model: joules + joules_per_character x its length."""

    joules: tuple[float, ...]
    joules_per_character: tuple[float, ...]
    characters: float  # of a typical prompt


class JoulesPredictor(_Solved):
    """E_m(t) before the call: what a request will cost with each model, from the prompt's length and words.

    A pooled ridge regression on what the meter read, each model's joules in units of its mean: a request that makes one
    model write much makes the others write much, and most is known of the model that is served most. Lengths count
    for more than words. With a calibration it starts from a line in the prompt's length, and what is read corrects
    that: the line's level (so answers that are longer or shorter than was assumed) and the weights around it.
    """

    SHARED = np.concatenate((np.full(SHAPE, 1.0), np.full(LATENT, 20.0)))
    OWN = 30.0 * SHARED
    FIRST = 0.0

    def __init__(self, models: int) -> None:
        self._floor = np.zeros(models)
        self._unit = np.zeros(1)
        self._prior = np.zeros((2, models))  # joules at length 0, and per feature LENGTH; 0: no calibration
        super().__init__(models)

    def _begin(self) -> None:
        super()._begin()
        self._start_from_prior()

    def _start_from_prior(self) -> None:
        self._weights = np.zeros((SIZE + 1, self._models))
        self._weights[-1], self._weights[LENGTH] = self._prior

    def calibrate(self, prior: EnergyPrior | None) -> None:
        """Start from `prior`, or from nothing; what was read stays and is weighed against it anew."""
        self._prior = np.zeros((2, self._models))
        if prior is not None:
            per_feature = np.array(prior.joules_per_character) * CHARACTERS
            self._prior = np.vstack([prior.joules, per_feature])
        if self.samples.all():
            self._solve()
            return
        self._start_from_prior()
        self.version = 0 if prior is None else self.version + 1
        if prior is not None:
            typical = self._prior[0] + self._prior[1] * prior.characters / CHARACTERS
            self._floor = 0.1 * typical
            self._unit[0] = typical.min()

    def _bounded(self, linear: Array) -> Array:
        return np.maximum(linear, self._floor)

    def _solve(self) -> None:
        centred = self._evidence.centred()
        # The line of the calibration, raised or lowered to what is read; the regression learns what departs from it.
        expected = self._prior[0] + self._prior[1] * centred.mean_x[:, LENGTH]
        belief = np.where(expected > 0, BELIEF, 0.0)
        level = (belief * expected + self.samples * centred.mean_y) / (belief + self.samples)
        slope = self._prior[1] * level / np.where(expected > 0, expected, 1.0) / centred.scale[LENGTH]
        cross = centred.cross - centred.gram[:, :, LENGTH] * slope[:, None]
        unit = np.where(level > 0, level, 1.0)[:, None]
        inverse = _inverse(centred.gram, self.OWN)
        weights = unit * _pooled_ridge(centred.gram, cross / unit, self.SHARED, self.OWN, inverse)
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
