"""Prompts that a price is solved on: the latest ones, and those to come as far as they were read ahead.

Knows prompts and what predictors say of them; knows nothing of prices.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from messcli.predict.base import Predictor
from messcli.predict.joules import JoulesPredictor
from messcli.records import Decision
from messcli.routing.policy import Recent
from messcli.snapshots import Part


class _Prompts:
    """Some prompts, with what the predictors say of them: made anew when these have changed.

    Attributes:
        texts: of the prompts.
        estimates, joules: (at least as many, models).
    """

    def __init__(self, models: int, capacity: int) -> None:
        self.texts: list[str] = []
        self.estimates = np.full((capacity, models), np.nan)
        self.joules = np.full((capacity, models), np.nan)
        self.versions = np.zeros(2, np.int64)  # of the predictors that filled the arrays

    def seen_by(self, predictor: Predictor, joules: JoulesPredictor) -> Recent | None:
        """What the predictors say of the prompts now; None while one of them can't."""
        estimates, expected = self.estimates[: len(self.texts)], self.joules[: len(self.texts)]
        known = (
            bool(self.texts) and self._refresh(0, predictor, estimates) and self._refresh(1, joules, expected)
        )
        return Recent(estimates, expected, predictor.samples) if known else None

    def _refresh(self, place: int, predictor: Predictor | JoulesPredictor, said: NDArray[np.float64]) -> bool:
        """Predict anew where the predictor has changed or something isn't predicted. Returns whether it can."""
        if predictor.version == self.versions[place] and not np.isnan(said).any():
            return True
        predicted = predictor.predict_many(predictor.encode_many(self.texts))
        if predicted is None:
            return False
        said[:] = predicted
        self.versions[place] = predictor.version
        return True


class Latest:
    """A ring of the latest requests."""

    def __init__(self, models: int, capacity: int, *, begun: bool) -> None:
        self._capacity = capacity
        self._begun = begun  # predictors say something of every model from the start
        self._count = 0  # ever added
        self._prompts = _Prompts(models, capacity)

    def add(self, text: str, decision: Decision) -> None:
        place, prompts = self._count % self._capacity, self._prompts
        self._count += 1
        if place == len(prompts.texts):
            prompts.texts.append(text)
        else:
            prompts.texts[place] = text
        prompts.estimates[place] = np.nan if decision.estimates is None else decision.estimates
        prompts.joules[place] = np.nan if decision.joules_predicted is None else decision.joules_predicted

    def texts(self, count: int) -> list[str]:
        """Of the latest ones, at most so many, in order."""
        texts = self._prompts.texts
        place = self._count % self._capacity if len(texts) == self._capacity else 0
        return (texts[place:] + texts[:place])[-count:]

    def seen_by(self, predictor: Predictor, joules: JoulesPredictor) -> Recent | None:
        """What the predictors say of the requests now; None while one of them can't."""
        known = self._begun or predictor.samples.all()
        return self._prompts.seen_by(predictor, joules) if known else None

    def state(self) -> Part:
        prompts = self._prompts
        return Part(
            "recent",
            arrays={"estimates": prompts.estimates.copy(), "joules": prompts.joules.copy()},
            values={
                "texts": list(prompts.texts),
                "count": self._count,
                "versions": prompts.versions.tolist(),
            },
            tuning=f"the latest {self._capacity}",
        )

    def load(self, part: Part) -> None:
        part.check(self.state())
        prompts = self._prompts
        prompts.texts, self._count = list(part.values["texts"]), part.values["count"]
        prompts.estimates, prompts.joules = part.arrays["estimates"].copy(), part.arrays["joules"].copy()
        prompts.versions = np.array(part.values["versions"], np.int64)


class Ahead:
    """Prompts that are to come, as far as they were read ahead.

    Args:
        begun: requests that were settled when they were.
        sample: prompts with their places after these, ascending.
    """

    def __init__(self, models: int, begun: int, sample: Sequence[tuple[int, str]]) -> None:
        self._models = models
        self._begun = begun
        self._places = [place for place, _ in sample]
        self._prompts = _Prompts(models, len(sample))
        self._prompts.texts = [text for _, text in sample]

    def before(
        self, latest: Recent | None, t: int, predictor: Predictor, joules: JoulesPredictor, least: int
    ) -> Recent | None:
        """Those that are to come after t settled requests, and as many of the latest as make `least` with them."""
        first = bisect_left(self._places, t - self._begun)
        if first == len(self._places):
            return latest
        # All are predicted together, then some are left out: products over other shapes differ in the last bit.
        ahead = self._prompts.seen_by(predictor, joules)
        if ahead is None:
            return latest
        estimates, expected = ahead.estimates[first:], ahead.joules[first:]
        lacking = least - len(estimates)
        if latest is not None and lacking > 0:
            estimates = np.concatenate([estimates, latest.estimates[:lacking]])
            expected = np.concatenate([expected, latest.joules[:lacking]])
        return Recent(estimates, expected, predictor.samples)

    def state(self) -> Part:
        return Part(
            "ahead",
            values={"begun": self._begun, "places": list(self._places), "texts": list(self._prompts.texts)},
        )

    @classmethod
    def of(cls, models: int, part: Part) -> Ahead:
        """What `state` gave. Raises StateError: it isn't that."""
        part.check(cls(models, 0, ()).state())
        values = part.values
        return cls(models, values["begun"], list(zip(values["places"], values["texts"], strict=True)))
