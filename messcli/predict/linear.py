"""The paper's predictors: a linear model per LLM, one step of gradient descent per sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from messcli.predict import tuning
from messcli.predict.base import Accuracies, OneByOne, Sparse
from messcli.predict.text import sparse_features
from messcli.predict.tuning import TEXT, digest
from messcli.snapshots import Part


class LinearPredictor(OneByOne):
    """One linear model per LLM on hashed n-grams, one SGD step on squared error per sample (equation 4).

    All weights start from one common random vector (line 1 of Algorithm 1); the constant's weight starts at
    the first accuracy seen, so that learning begins at the level of the data.

    It takes no seed: a predictor is a function of what it is taught.
    """

    name = "linear"

    def __init__(self, models: int, tuning: tuning.Linear = tuning.LINEAR) -> None:
        self._tuning = tuning
        common = np.random.default_rng(0).normal(0.0, tuning.start, tuning.buckets + 1)
        self._weights = np.repeat(common[:, None], models, axis=1)
        self._samples = np.zeros(models)

    def encode(self, text: str) -> Sparse:
        return sparse_features(self._tuning.buckets)(text)

    def encode_many(self, texts: Sequence[str]) -> Sequence[Sparse]:
        return sparse_features(self._tuning.buckets).many(texts)

    def predict_one(self, features: Sparse) -> Accuracies | None:
        predicted = self.predict_many([features])
        return None if predicted is None else predicted[0]

    def predict_many(self, features: Sequence[Sparse]) -> Accuracies | None:
        if not np.count_nonzero(self._samples) or not features:
            return None
        sums: Accuracies = np.array([values @ self._weights.take(indices, 0) for indices, values in features])
        return np.clip(sums, 0.0, 1.0)

    def learn_one(self, features: Sparse, accuracies: Accuracies) -> None:
        indices, values = features
        step = 2.0 * self._tuning.learning_rate * values
        for m, accuracy in enumerate(accuracies.tolist()):  # most requests teach one model only
            if math.isnan(accuracy):
                continue
            own = self._weights[:, m]
            if not self._samples[m]:
                own[self._tuning.buckets] = accuracy
            weights = own[indices]
            own[indices] = weights + step * (accuracy - values @ weights)
            self._samples[m] += 1

    @property
    def samples(self) -> Accuracies:
        return self._samples

    def state(self) -> Part:
        return Part(
            self.name,
            arrays={"weights": self._weights.copy(), "samples": self._samples.copy()},
            tuning=digest(TEXT, self._tuning),
        )

    def load(self, part: Part) -> None:
        part.check(self.state())
        self._weights = part.arrays["weights"].copy()
        self._samples = part.arrays["samples"].copy()
