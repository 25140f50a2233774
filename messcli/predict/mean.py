"""The mean accuracy of each model: what can be said without looking at the request."""

from __future__ import annotations

import numpy as np

from messcli.predict.base import Accuracies, OneByOne
from messcli.snapshots import Part


class MeanPredictor(OneByOne):
    """The running mean of each model's accuracies: what can be said without looking at the request."""

    name = "mean"

    def __init__(self, models: int) -> None:
        self._sums = np.zeros(models)
        self._counts = np.zeros(models)

    def encode(self, text: str) -> None:
        return None

    def predict_one(self, features: None) -> Accuracies | None:
        if not self._counts.any():
            return None
        overall = self._sums.sum() / self._counts.sum()  # for a model not seen yet
        return np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1), overall)

    def learn_one(self, features: None, accuracies: Accuracies) -> None:
        observed = ~np.isnan(accuracies)
        self._sums[observed] += accuracies[observed]
        self._counts += observed
        self._changed()

    def discount(self, most: float) -> None:
        """Let what is known of each model count as at most `most` answers."""
        part = np.minimum(1.0, most / np.maximum(self._counts, 1.0))
        self._sums, self._counts = self._sums * part, self._counts * part
        self._changed()

    def _changed(self) -> None:
        """Estimates of earlier requests are made anew: that costs nothing here."""
        self.version = int(self._counts.sum())

    @property
    def samples(self) -> Accuracies:
        return self._counts

    def state(self) -> Part:
        return Part(self.name, arrays={"sums": self._sums.copy(), "counts": self._counts.copy()})

    def load(self, part: Part) -> None:
        part.check(self.state())
        self._sums = part.arrays["sums"].copy()
        self._counts = part.arrays["counts"].copy()
        self._changed()
