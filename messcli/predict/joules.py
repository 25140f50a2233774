"""E_m(t): what a request will cost with each model, before any has run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from messcli.predict import tuning
from messcli.predict.latent import LATENT, SIZE
from messcli.predict.levels import joules_of_all
from messcli.predict.regression import Array, Regression, in_rows, inverse, pooled_ridge
from messcli.predict.text import CHARACTERS, LENGTH, SHAPE
from messcli.predict.tuning import LATENT as LATENT_TUNING
from messcli.predict.tuning import REGRESSION, TEXT, digest
from messcli.snapshots import Part


@dataclass(frozen=True, slots=True)
class EnergyPrior:
    """What a calibration says of a request's joules, by model: joules + joules_per_character x its length."""

    joules: tuple[float, ...]
    joules_per_character: tuple[float, ...]
    characters: float  # of a typical prompt


class JoulesPredictor(Regression):
    """E_m(t) before the call: what a request will cost with each model, from the prompt's length and words.

    A pooled ridge regression on what the meter read, each model's joules in units of its mean: a request that makes one
    model write much makes the others write much, and most is known of the model that is served most. Lengths count
    for more than words. With a calibration it starts from a line in the prompt's length. What is read corrects the
    line's level, which is off where answers are longer or shorter than was assumed, and the weights around it.
    """

    name = "joules"

    def __init__(self, models: int, tuning: tuning.Joules = tuning.JOULES) -> None:
        self._tuning = tuning
        shape, directions = tuning.shared_shape, tuning.shared_directions
        self._shared = np.concatenate((np.full(SHAPE, shape), np.full(LATENT, directions)))
        self._own = tuning.own * self._shared
        self._floor = np.zeros(models)
        self._unit = 0.0  # joules; 0: not known
        self._ratio = tuning.ratio
        self._line = np.zeros((2, models))  # joules at length 0, and per feature LENGTH; 0: no calibration
        self.scale = np.ones(models)
        super().__init__(models, 0.0)

    def state(self) -> Part:
        part = super().state()
        return replace(
            part,
            arrays={**part.arrays, "floor": self._floor.copy(), "prior": self._line.copy()},
            values={**part.values, "unit": self._unit},
            tuning=digest(TEXT, LATENT_TUNING, REGRESSION, self._tuning),
        )

    def load(self, part: Part) -> None:
        super().load(part)
        self._floor, self._line = part.arrays["floor"].copy(), part.arrays["prior"].copy()
        self._unit = part.values["unit"]

    def _begin(self) -> None:
        super()._begin()
        self._start_from_prior()

    def _start_from_prior(self) -> None:
        self._weights = np.zeros((SIZE + 1, self._models))
        self._weights[-1], self._weights[LENGTH] = self._line
        if self._expected is not None:
            self._weights[-1] = joules_of_all(self._line[0], self._line[0] > 0, self._ratio)

    def calibrate(self, prior: EnergyPrior | None) -> None:
        """Start from `prior`, or from nothing; what was read stays and is weighed against it anew."""
        self._line = np.zeros((2, self._models))
        if prior is not None:
            per_feature = np.array(prior.joules_per_character) * CHARACTERS
            self._line = np.vstack([prior.joules, per_feature])
        if self.samples.all() or (self._expected is not None and self.samples.any()):
            self.solve()
            return
        self._start_from_prior()
        self.version = self.version + 1 if prior is not None or self._expected is not None else 0
        if prior is not None:
            typical = self._line[0] + self._line[1] * prior.characters / CHARACTERS
            self._floor = self._tuning.floor * typical
            self._unit = float(typical.min())

    def begin(self, prior: tuning.Levels) -> None:
        """Say something of every model from the start: of one that is neither calibrated nor read, what its place in
        the zoo makes likely."""
        self._expected = prior
        if not self._evidence.count.any():
            self._start_from_prior()
            self.version += 1

    def expect(self, scale: Array) -> None:
        """Predict so many times what was learnt of each model: it was learnt when less was known of loads. `scale` is
        no part of `state`: who knows loads keeps it."""
        self.scale = scale
        self.version += 1

    @property
    def measured(self) -> bool:
        """Whether anything rests on a calibration or a reading: else only the zoo's order is known, in some unit."""
        return bool(self._line.any() or self.samples.any())

    @property
    def typical(self) -> Array:
        """Joules of every model for a prompt in the middle, (models,); 0 while nothing is known."""
        return self._bounded(self._weights[-1].copy())

    def _discounted(self, left: float) -> None:
        pass  # nothing is

    def _bounded(self, linear: Array) -> Array:
        return np.maximum(linear, self._floor) * self.scale

    def solve(self) -> None:
        centred = self._evidence.centred()
        # The line of the calibration, raised or lowered to what is read; the regression learns what departs from it.
        expected = self._line[0] + self._line[1] * centred.mean_x[:, LENGTH]
        belief = np.where(expected > 0, self._tuning.belief, 0.0)
        weight = belief + self.samples
        level = (belief * expected + self.samples * centred.mean_y) / np.maximum(weight, 1e-9)
        if not weight.all():
            level = joules_of_all(level, weight > 0, self._ratio)
        slope = self._line[1] * level / np.where(expected > 0, expected, 1.0) / centred.scale[LENGTH]
        cross = centred.cross - centred.gram[:, :, LENGTH] * slope[:, None]
        unit = np.where(level > 0, level, 1.0)[:, None]
        inverses = inverse(centred.gram, self._own)
        weights = unit * pooled_ridge(centred.gram, cross / unit, self._shared, self._own, inverses)
        weights[:, LENGTH] += slope
        weights *= centred.scale
        self._weights = in_rows(np.vstack([weights.T, level - (weights * centred.mean_x).sum(axis=1)]))
        self._floor = self._tuning.floor * level  # a line may cross zero, a model never costs nothing
        if self.samples.min() <= self._tuning.unit_settles or not self._unit:
            self._unit = float(level.min())
        self.version += 1

    @property
    def unit(self) -> float:
        """The cheapest model's mean joules: the divisor that makes V a pure number. 1 while unknown.

        It settles once every model was read ten times, and stays: V means the same in the next run.
        """
        return self._unit or 1.0
