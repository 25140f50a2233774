"""What a window takes beyond its requests' own tokens: models run steps, and a step costs nearly the same for few.

A request among b that run at a time takes A / b + K joules: A is what an answer's steps take whatever runs, K is
its own part. Both are learnt from what was read, with what ran beside it. So joules are expected of full engines, and a
model that would get too few requests of a window to pay for its steps is left out of it.

Models are indices into the zoo. Knows numbers; knows nothing of prompts, engines or meters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messcli.energy.load import left_out_error, line
from messcli.predict.tuning import digest
from messcli.routing import tuning
from messcli.snapshots import Part

Array = NDArray[np.float64]

OCTAVES = 16  # of requests that ran at a time: more than 32,768 count as so many


@dataclass(frozen=True, slots=True)
class Share:
    """What one model takes for requests that it is given at once: `steps` for each `room` of them, and `own` each.

    Where nothing is concluded of a model, it has no steps, and `own` and `read` are 1.
    """

    steps: float  # A: joules of an answer's steps, whatever runs
    own: float  # K: joules that each request adds
    room: float  # requests at a time
    read: float  # joules of a request as they were read, by this line
    error: float = math.nan  # mean relative error of the line at an octave that it didn't see; NaN: not known

    @property
    def full(self) -> float:
        """Of a request on a full engine."""
        return self.steps / self.room + self.own

    def of(self, requests: float) -> float:
        """Of each of so many; of none, as of many."""
        return self.steps * math.ceil(requests / self.room) / requests + self.own if requests else self.full

    def idle(self, requests: float) -> float:
        """What so many take more than they would on a full engine."""
        return self.steps * (math.ceil(requests / self.room) - requests / self.room)


class Loads:
    """What was read of every model, by the requests that ran at a time. An octave is a power of two of these."""

    def __init__(self, models: int, tuning: tuning.Loads) -> None:
        self._tuning = tuning
        self._count = np.zeros((models, OCTAVES))  # requests
        self._joules = np.zeros((models, OCTAVES))
        self._parts = np.zeros((models, OCTAVES))  # sum of 1 / requests at a time
        self._most = np.zeros(models)  # that ran at a time
        self._given = np.zeros(models)  # the most of one window
        self._in_window = np.zeros(models)
        self._before = np.zeros(models)  # requests of the window before
        # By model, as of the last window's end; None while no model was read at loads that differ
        self.shares: list[Share] | None = None

    def settle(self, joules: Sequence[float], running: Sequence[float]) -> None:
        """Fold in a request: by model what was read and how many ran at a time, NaN where that isn't known."""
        for m, (read, beside) in enumerate(zip(joules, running, strict=True)):
            if math.isnan(read) or not beside >= 1.0:
                continue
            octave = min(int(math.log2(beside)), OCTAVES - 1)
            self._count[m, octave] += 1.0
            self._joules[m, octave] += read
            self._parts[m, octave] += 1.0 / beside
            self._most[m] = max(self._most[m], beside)
            self._in_window[m] += 1.0

    def close_window(self) -> None:
        """All requests of a window are folded in."""
        self._given = np.maximum(self._given, self._in_window)
        self._before, self._in_window = self._in_window, np.zeros(len(self._given))
        self.shares = self._fitted()

    @property
    def scale(self) -> Array:
        """Joules of a request on full engines, in units of what was read, (models,)."""
        return np.array([share.full / share.read for share in self.shares or ()] or np.ones(len(self._given)))

    @property
    def waking(self) -> float:
        """Joules that a window takes for steps, whatever it holds: of the models that the last one asked."""
        asked = zip(self.shares or (), self._before, strict=False)
        return math.fsum(share.steps for share, requests in asked if requests)

    def _fitted(self) -> list[Share] | None:
        """By model; None while no model was read at loads that differ.

        A model that was read at one load alone is taken for the one of the others whose steps weigh least. Of one that
        was read a few times or never, nothing is concluded.
        """
        lines = [self._line(m) for m in range(len(self._count))]
        weights = [steps / (steps + own) for steps, own, _ in filter(None, lines)]
        if not weights:
            return None
        return [self._share(m, line, min(weights)) for m, line in enumerate(lines)]

    def _share(self, m: int, known: tuple[float, float, float] | None, weight: float) -> Share:
        """Of model m, by its own line or by the weight of steps in that of another one."""
        count = self._count[m].sum()
        if known is None and (count < self._tuning.few or not self._joules[m].any()):
            return Share(steps=0.0, own=1.0, room=self._room(m), read=1.0)
        parts, mean = (float(of[m].sum() / count) for of in (self._parts, self._joules))
        alone = mean / (weight * parts + 1.0 - weight)
        steps, own, error = known or (weight * alone, (1.0 - weight) * alone, math.nan)
        return Share(float(steps), float(own), self._room(m), float(steps * parts + own), error)

    def _line(self, m: int) -> tuple[float, float, float] | None:
        """A, K and the error of model m; None where its loads are too much alike, or few requests were read."""
        seen = self._count[m] > 0.0
        counts, parts = self._count[m][seen], self._parts[m][seen]
        running = counts / parts
        if counts.sum() < self._tuning.few or running.max() < self._tuning.spread * running.min():
            return None
        joules = self._joules[m][seen] / parts  # of all that ran together
        if not joules.all():  # a meter that reads nothing tells no line
            return None
        error = left_out_error(running, joules)
        return (*line(running, joules, counts), math.nan if error is None else error)

    def _room(self, m: int) -> float:
        """How many run at a time at the most: as many as did, where more were given, else as many as with any model."""
        limited = self._given[m] > self._tuning.full * self._most[m]
        return float(self._most[m] if limited else self._most.max())

    @property
    def is_empty(self) -> bool:
        return not self._count.any()

    def state(self) -> Part:
        arrays = {name: getattr(self, f"_{name}").copy() for name in _FIELDS}
        shares = [
            (share.steps, share.own, share.room, share.read, share.error) for share in self.shares or ()
        ]
        return Part(
            "loads",
            arrays={**arrays, "shares": np.array(shares, float).reshape(-1, 5)},
            tuning=digest(self._tuning),
        )

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        part.check(self.state(), free=["shares"])
        for name in _FIELDS:
            setattr(self, f"_{name}", part.arrays[name].copy())
        self.shares = [Share(*row) for row in part.arrays["shares"].tolist()] or None


_FIELDS = ("count", "joules", "parts", "most", "given", "in_window", "before")
