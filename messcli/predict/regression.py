"""Ridge regressions over the latent space, pooled over the models of a zoo: what `ridge` and `joules` share.

Sufficient statistics only: one pass, nothing is stored per request once the space is settled. Solved anew as evidence
grows by a tenth, so that the work per request stays flat. Knows numbers and texts; nothing of accuracies or joules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messcli.predict import tuning
from messcli.predict.latent import SIZE, LatentSpace, Move, Placed
from messcli.predict.text import SHAPE
from messcli.snapshots import Part

Array = NDArray[np.float64]


class Evidence:
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
        self._sum_y2 = 0.0
        self._pending_x = np.zeros((self.PENDING, SIZE))
        self._pending_y = np.zeros((self.PENDING, models))
        self._pending = 0

    def add(self, x: Array, y: Array) -> None:
        """One request's features and what was observed of each model (NaN: nothing)."""
        place = self._pending
        self._pending_x[place], self._pending_y[place] = x, y
        self._pending += 1
        self.count += ~np.isnan(y)
        if place + 1 == self.PENDING:
            self._flush()

    def _flush(self) -> None:
        size = self._pending
        for m in range(len(self.count)):
            seen = ~np.isnan(self._pending_y[:size, m])
            x, y = self._pending_x[:size][seen], self._pending_y[:size, m][seen]
            self._sum_x[m] += x.sum(axis=0)
            self._gram[m] += x.T @ x
            self._cross[m] += x.T @ y
            self._sum_y[m] += y.sum()
            self._sum_y2 += float(y @ y)
        self._pending = 0

    def discount(self, most: float) -> float:
        """Let what was observed of each model count as at most `most` answers. Means stay.

        Returns:
            The part of all answers that is left.
        """
        self._flush()
        total = float(self.count.sum())
        if not total:
            return 1.0
        within = max(self._sum_y2 - float(self._sum_y**2 @ (1.0 / np.maximum(self.count, 1.0))), 0.0)
        part = np.minimum(1.0, most / np.maximum(self.count, 1.0))
        self.count = self.count * part
        self._sum_x *= part[:, None]
        self._gram *= part[:, None, None]
        self._cross *= part[:, None]
        self._sum_y *= part
        left = float(self.count.sum()) / total
        self._sum_y2 = float(self._sum_y**2 @ (1.0 / np.maximum(self.count, 1e-9))) + within * left
        return left

    def move(self, move: Move) -> None:
        """Carry over what was observed to where the texts lie now."""
        self._flush()
        turn, shift = np.eye(SIZE), np.zeros(SIZE)
        turn[SHAPE:, SHAPE:], shift[SHAPE:] = move.turn, move.shift
        turned = self._sum_x @ turn
        self._gram = turn.T @ self._gram @ turn
        self._gram += turned[:, :, None] * shift + shift[:, None] * turned[:, None, :]
        self._gram += self.count[:, None, None] * shift[:, None] * shift
        self._sum_x = turned + self.count[:, None] * shift
        self._cross = self._cross @ turn + self._sum_y[:, None] * shift

    def centred(self) -> Centred:
        """Everything centred at each model's means and scaled, so that one penalty is right for all numbers."""
        self._flush()
        count, total, base = self.count[:, None], self.count.sum(), tuning.REGRESSION
        middle = self._sum_x.sum(axis=0) / total
        mean_x = np.where(count > 0, self._sum_x / np.maximum(count, 1.0), middle)
        mean_y = self._sum_y / np.maximum(self.count, 1.0)
        squares = np.einsum("mii->i", self._gram[:, :SHAPE, :SHAPE])
        spread = squares / total - (self._sum_x[:, :SHAPE].sum(axis=0) / total) ** 2
        spread = (total * np.maximum(spread, 0.0) + base.shape_evidence * base.shape_variance) / (
            total + base.shape_evidence
        )
        scale = np.ones(SIZE)
        scale[:SHAPE] = np.sqrt(base.shape_scaled / spread)
        gram = self._gram - count[:, :, None] * mean_x[:, :, None] * mean_x[:, None, :]
        gram *= scale[:, None] * scale
        cross = (self._cross - count * mean_x * mean_y[:, None]) * scale
        variance = float(self._sum_y2 / total - (self._sum_y.sum() / total) ** 2)
        within = max(float(self._sum_y2 - self.count @ mean_y**2), 0.0)
        return Centred(gram, cross, mean_x, mean_y, middle, scale, variance, within)

    def state(self) -> Part:
        return Part(
            "evidence",
            arrays={
                "count": self.count.copy(),
                "sum_x": self._sum_x.copy(),
                "gram": self._gram.copy(),
                "cross": self._cross.copy(),
                "sum_y": self._sum_y.copy(),
                "pending_x": self._pending_x[: self._pending].copy(),
                "pending_y": self._pending_y[: self._pending].copy(),
            },
            values={"sum_y2": self._sum_y2},
        )

    def load(self, part: Part) -> None:
        part.check(self.state(), free=["pending_x", "pending_y"])
        arrays = part.arrays
        self.count, self._sum_x, self._gram = (arrays[n].copy() for n in ("count", "sum_x", "gram"))
        self._cross, self._sum_y = arrays["cross"].copy(), arrays["sum_y"].copy()
        self._sum_y2 = part.values["sum_y2"]
        self._pending = len(arrays["pending_x"])
        self._pending_x[: self._pending] = arrays["pending_x"]
        self._pending_y[: self._pending] = arrays["pending_y"]


@dataclass(frozen=True, slots=True)
class Centred:
    gram: Array  # (models, d, d)
    cross: Array  # (models, d)
    mean_x: Array  # (models, d), not scaled; of a model that wasn't observed, `middle`
    mean_y: Array  # (models,); of a model that wasn't observed, 0
    middle: Array  # (d,), of all models' observations, not scaled
    scale: Array  # (d,)
    variance: float  # of all models' observations
    within: float  # sum of squares of all observations about their models' means


class Lessons:
    """What was learnt before the space is settled, to be learnt again in a better one."""

    def __init__(self, models: int) -> None:
        self._models = models
        self._places: list[int] = []  # of their texts, among those that the space has seen
        self._observed: list[Array] = []

    def add(self, place: int, observed: Array) -> None:
        self._places.append(place)
        self._observed.append(observed)

    def of(self, texts: Sequence[str]) -> list[tuple[str, Array]]:
        """All of them, with their texts."""
        return [
            (texts[place], observed) for place, observed in zip(self._places, self._observed, strict=True)
        ]

    def state(self) -> Part:
        return Part(
            "lessons",
            version=2,
            arrays={
                "observed": np.array(self._observed, float).reshape(-1, self._models),
                "places": np.array(self._places, np.int64),
            },
        )

    def load(self, part: Part) -> None:
        part.check(self.state(), free=["observed", "places"])
        self._places = part.arrays["places"].tolist()
        self._observed = list(part.arrays["observed"].copy())


class Regression(ABC):
    """What the two predictors share: evidence, weights that are solved for as it grows, and their snapshot.

    It has a space of its own until it joins another one's: then whoever owns that has it see the texts, and says when
    what was learnt is to be learnt anew.
    """

    name: str

    def __init__(self, models: int, first: float) -> None:
        self._models = models
        self._first = first  # samples to solve on at first
        self.space = LatentSpace()
        self._owns_space = True
        self._lessons = Lessons(models)
        self._expected: tuning.Levels | None = None  # what is said of models that aren't observed
        self.version = 0
        self._begin()

    def join(self, space: LatentSpace) -> None:
        """Place texts in `space` from now on. Nothing was learnt yet."""
        self.space = space
        self._owns_space = False

    def _begin(self) -> None:
        """Know nothing yet."""
        self._evidence = Evidence(self._models)
        self._weights = np.zeros((SIZE + 1, self._models))
        self._solve_at = self._first  # samples of all models at which the weights are solved for

    def encode(self, text: str) -> Placed:
        return self.space.encode(text)

    def encode_many(self, texts: Sequence[str]) -> Sequence[Placed]:
        return self.space.encode.many(texts)

    def learn_one(self, features: Placed, observed: Array) -> None:
        """Take in what was observed of each model; NaN where nothing was. The text is the latest that the space saw."""
        texts = self.space.see(features.text) if self._owns_space else None
        if texts is not None:
            self._lessons.add(len(texts) - 1, observed.copy())
            self.learn_again(texts)
            return
        if not self.space.settled:
            self._lessons.add(self.space.seen - 1, observed.copy())
        self._learn(features.at, observed)

    def learn_again(self, texts: Sequence[str]) -> None:
        """Learn every lesson again: the space was fitted. The result is that of having known it from the start.

        Args:
            texts: that the space has seen.
        """
        lessons = self._lessons.of(texts)
        self._begin()
        for placed, (_, observed) in zip(self.encode_many([t for t, _ in lessons]), lessons, strict=True):
            self._learn(placed.at, observed)
        if self.space.settled:
            self._lessons = Lessons(self._models)
        if lessons and self._known:
            self.solve()

    def move(self, move: Move) -> None:
        """The settled space was fitted anew: carry over what was learnt."""
        self._evidence.move(move)
        if self._evidence.count.any() and self._known:
            self.solve()

    def discount(self, most: float) -> None:
        """Let what is known of each model count as at most `most` answers."""
        self._discounted(self._evidence.discount(most))
        self._solve_at = min(self._solve_at, float(np.ceil(self.samples.sum() * tuning.REGRESSION.growth)))
        if self._evidence.count.any() and self._known:
            self.solve()

    @abstractmethod
    def _discounted(self, left: float) -> None:
        """All that is counted beside the evidence counts by so much less."""

    @property
    def _known(self) -> bool:
        """Whether something can be said of every model."""
        return bool(self._evidence.count.all()) or self._expected is not None

    def _learn(self, at: Array, observed: Array) -> None:
        self._evidence.add(at, observed)
        if self._due():
            self.solve()

    @abstractmethod
    def solve(self) -> None:
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
        if count.sum() < self._solve_at or not self._known:
            return False
        self._solve_at = float(np.ceil(count.sum() * tuning.REGRESSION.growth))
        return True

    def state(self) -> Part:
        return Part(
            self.name,
            version=2,
            arrays={"weights": self._weights.copy()},
            values={"version": self.version, "solve_at": self._solve_at},
            parts={
                "evidence": self._evidence.state(),
                "lessons": self._lessons.state(),
                **({"space": self.space.state()} if self._owns_space else {}),
            },
        )

    def load(self, part: Part) -> None:
        part.check(self.state())
        self._weights = part.arrays["weights"].copy()
        self.version, self._solve_at = part.values["version"], part.values["solve_at"]
        self._evidence.load(part.parts["evidence"])
        self._lessons.load(part.parts["lessons"])
        if self._owns_space:
            self.space.load(part.parts["space"])


def in_rows(array: Array) -> Array:
    """Laid out as a snapshot gives it back: products over another layout differ in the last bit."""
    return np.ascontiguousarray(array)


def inverse(gram: Array, own: Array) -> Array:
    return np.linalg.inv(gram + np.diag(own)).astype(float)


def pooled_ridge(gram: Array, cross: Array, shared: Array, own: Array, inverse: Array) -> Array:
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
