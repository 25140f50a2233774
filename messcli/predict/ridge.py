"""The default: the accuracy of every model by ridge regressions, from bold to the mean alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from messcli.predict import tuning
from messcli.predict.latent import SIZE
from messcli.predict.levels import levels
from messcli.predict.regression import Array, Regression, in_rows, inverse, pooled_ridge
from messcli.predict.text import KIND, SHAPE
from messcli.predict.tuning import LATENT, LEVELS, REGRESSION, TEXT, Levels, digest
from messcli.snapshots import Part


class RidgePredictor(Regression):
    """Accuracy of every model, pooled: level_m + (w + v_m) . (x - mean of x), with w shared and v_m its own.

    Minimises squared error (equation 4) plus l0 |w|^2 + l1 sum |v_m|^2, exactly, for each penalty pair of
    `tuning.candidates`; their predictions are averaged with weights exp(-loss / (2 sigma^2 temper)), the loss
    being that of predictions made before learning. With no signal the weights go to the last candidate: the mean.
    """

    name = "ridge"

    def __init__(self, models: int, tuning: tuning.Ridge = tuning.RIDGE) -> None:
        self._tuning = tuning
        self._levels = LEVELS
        super().__init__(models, tuning.first)

    def begin(self, prior: Levels) -> None:
        """Predict from `prior` before anything is learnt, and while some models aren't observed."""
        self._expected = self._levels = prior
        nothing = np.zeros(self._models)
        self._weights[-1] = levels(prior, nothing, nothing, prior.variance)
        self._candidates[-1] = np.tile(self._weights[-1], len(self._losses))
        self._solve_at = 1.0
        self.version = 1

    def _begin(self) -> None:
        super()._begin()
        candidates = self._tuning.candidates
        self._losses = np.array([candidate.handicap for candidate in candidates])
        self._candidates = np.zeros((SIZE + 1, len(candidates) * self._models))

    def state(self) -> Part:
        part = super().state()
        return replace(
            part,
            arrays={**part.arrays, "losses": self._losses.copy(), "candidates": self._candidates.copy()},
            tuning=digest(TEXT, LATENT, REGRESSION, LEVELS, self._tuning),
        )

    def load(self, part: Part) -> None:
        super().load(part)
        self._losses, self._candidates = part.arrays["losses"].copy(), part.arrays["candidates"].copy()

    def _discounted(self, left: float) -> None:
        self._losses = left * (self._losses - self._losses.min())

    def _bounded(self, linear: Array) -> Array:
        return np.clip(linear, 0.0, 1.0)

    def _learn(self, at: Array, observed: Array) -> None:
        if self.version:
            guesses = np.clip(at @ self._candidates[:-1] + self._candidates[-1], 0.0, 1.0)
            errors = (guesses.reshape(len(self._losses), self._models) - observed) ** 2
            errors[:, np.isnan(observed)] = 0.0
            self._losses += errors.sum(axis=1)
        super()._learn(at, observed)

    def solve(self) -> None:
        tuning, centred, prior = self._tuning, self._evidence.centred(), self._levels
        weights = candidate_weights(centred.gram, centred.cross, tuning) * centred.scale
        # Levels are compared at the same place: each model's mean, moved there along the regression.
        moved = centred.mean_y - np.einsum("kmd,md->km", weights, centred.mean_x - centred.middle)
        samples = self.samples
        variance = (prior.belief * prior.variance + centred.within) / (prior.belief + samples.sum())
        intercepts = levels(prior, samples, moved, variance) - weights @ centred.middle
        columns = len(self._losses) * self._models
        self._candidates = in_rows(
            np.vstack([weights.reshape(columns, SIZE).T, intercepts.reshape(1, columns)])
        )
        noise = max(tuning.noise * centred.variance, tuning.least_noise)
        behind = (self._losses - self._losses.min()) / (2.0 * noise * tuning.temper)
        votes = np.exp(-np.minimum(behind, tuning.most_loss))
        votes /= votes.sum()
        self._weights = in_rows(np.vstack([np.einsum("k,kmd->dm", votes, weights), votes @ intercepts]))
        self.version += 1


def candidate_weights(gram: Array, cross: Array, tuning: tuning.Ridge = tuning.RIDGE) -> Array:
    """Weights (candidates, models, numbers) under each of `tuning.candidates`; see `pooled_ridge`."""
    models, size = cross.shape
    weights = np.zeros((len(tuning.candidates), models, size))
    inverses: dict[tuple[float, float], Array] = {}
    for k, (shared, own, lengths, _) in enumerate(tuning.candidates):
        if np.isinf(shared):
            continue  # the mean alone
        if np.isinf(own):
            weights[k] = np.linalg.solve(gram.sum(axis=0) + shared * np.eye(size), cross.sum(axis=0))
            continue
        penalty = np.full(size, own)
        penalty[:KIND] = lengths
        penalty[KIND:SHAPE] *= tuning.own_kind
        if (own, lengths) not in inverses:
            inverses[own, lengths] = inverse(gram, penalty)
        weights[k] = pooled_ridge(gram, cross, np.full(size, shared), penalty, inverses[own, lengths])
    return weights
