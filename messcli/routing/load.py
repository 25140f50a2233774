"""What a window takes beyond its requests' own tokens: models run steps, and a step costs nearly the same for few.

An answer's token takes A / b + K joules among b requests that run at a time: A is what a step takes whatever runs, K is
a token's own part. Both are learnt per token from what was read, with what ran beside it: the last answers of a window
are the long ones, so that joules per answer would rise for two reasons where few run. A reading is taken for what the
same answer takes on a full engine, and a model that would get too few requests of a window to pay for its steps is
left out of it.

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
class Line:
    """Joules of an answer's token: A / b + K."""

    steps: float  # A
    own: float  # K
    error: float = math.nan  # mean relative error at an octave that the line didn't see; NaN: not known

    def of(self, running: float) -> float:
        """Of each token, where so many run at a time."""
        return self.steps / running + self.own

    @property
    def weight(self) -> float:
        """The part of a lone answer's joules that is its steps'."""
        return self.steps / (self.steps + self.own)


@dataclass(frozen=True, slots=True)
class Share:
    """What one model takes for requests that it is given at once: `steps` for each `room` of them, and `own` each.

    Where nothing is concluded of a model, it has no steps, and `own` is 1.
    """

    steps: float  # joules of a mean answer's steps, whatever runs
    own: float  # joules that each request adds
    room: float  # requests at a time
    error: float = math.nan  # as of `Line`

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
        self._tokens = np.zeros((models, OCTAVES))  # written
        self._parts = np.zeros((models, OCTAVES))  # sum of tokens / requests at a time
        self._taken = np.zeros(models)  # sum of what its joules were taken for, on full engines
        self._most = np.zeros(models)  # that ran at a time
        self._given = np.zeros(models)  # the most of one window
        self._in_window = np.zeros(models)
        self._before = np.zeros(models)  # requests of the window before
        self._fitted_at = 0.0  # requests of all models at which the lines were fitted last
        self._lines: list[Line | None] = [None] * models
        # By model, as of the last window's end; None while no model was read at loads that differ
        self.shares: list[Share] | None = None

    def settle(self, joules: Sequence[float], running: Sequence[float], tokens: Sequence[float]) -> Array:
        """Fold in a request.

        Args:
            joules, running, tokens: by model: what was read, how many ran at a time, how many tokens were written; NaN
                where that isn't known.

        Returns:
            How many times the joules that were read its answers are expected to take on full engines, by model; 1
            where nothing is known of that yet.
        """
        full = np.ones(len(joules))
        for m, (read, beside, written) in enumerate(zip(joules, running, tokens, strict=True)):
            if math.isnan(read) or not beside >= 1.0:
                continue
            octave = min(int(math.log2(beside)), OCTAVES - 1)
            count = self._count[m].sum()
            if not written >= 0.0:  # not told: a mean answer
                written = self._tokens[m].sum() / count if count else 1.0
            written = max(written, 1.0)
            self._most[m] = max(self._most[m], beside)
            line = self._line_of(m)
            if line is not None:
                full[m] = line.of(self._room(m)) / line.of(beside)
            self._count[m, octave] += 1.0
            self._joules[m, octave] += read
            self._taken[m] += read * full[m]
            self._tokens[m, octave] += written
            self._parts[m, octave] += written / beside
            self._in_window[m] += 1.0
        if self._count.sum() >= self._tuning.refit * self._fitted_at + 1.0:
            self._fit()
        return full

    def close_window(self) -> None:
        """All requests of a window are folded in."""
        self._given = np.maximum(self._given, self._in_window)
        self._before, self._in_window = self._in_window, np.zeros(len(self._given))
        self._fit()
        self.shares = [self._share(m) for m in range(len(self._count))] if any(self._lines) else None

    @property
    def scale(self) -> Array:
        """What readings are to be taken for by now, in what they were taken for when they came, (models,)."""
        scale = np.ones(len(self._count))
        for m, taken in enumerate(self._taken):
            line, seen = self._line_of(m), self._count[m] > 0.0
            if line is not None and taken > 0.0:
                running = self._tokens[m][seen] / self._parts[m][seen]
                at = np.array([line.of(beside) for beside in running])
                scale[m] = line.of(self._room(m)) * float((self._joules[m][seen] / at).sum()) / taken
        return scale

    @property
    def waking(self) -> float:
        """Joules that a window takes for steps, whatever it holds: of the models that the last one asked."""
        asked = zip(self.shares or (), self._before, strict=False)
        return math.fsum(share.steps for share, requests in asked if requests)

    def _fit(self) -> None:
        self._fitted_at = float(self._count.sum())
        self._lines = [self._line(m) for m in range(len(self._count))]

    def _line_of(self, m: int) -> Line | None:
        """Of model m; where it was read too little, or at one load alone, that of the model whose steps weigh least."""
        known = [line for line in self._lines if line is not None]
        return self._lines[m] or min(known, key=lambda line: line.weight, default=None)

    def _share(self, m: int) -> Share:
        line, count = self._line_of(m), self._count[m].sum()
        if line is None or not count or not self._joules[m].any():
            return Share(steps=0.0, own=1.0, room=self._room(m))
        tokens = self._tokens[m].sum()
        unit = float(tokens / count)
        if self._lines[m] is None:  # as much as was read of it
            read = line.of(float(tokens / self._parts[m].sum()))
            unit *= float(self._joules[m].sum() / tokens) / read
        error = line.error if self._lines[m] is not None else math.nan
        return Share(float(line.steps * unit), float(line.own * unit), self._room(m), error)

    def _line(self, m: int) -> Line | None:
        """Of model m; None where its loads are too much alike, or few requests were read."""
        seen = self._count[m] > 0.0
        counts, tokens = self._count[m][seen], self._tokens[m][seen]
        running = tokens / self._parts[m][seen]
        if counts.sum() < self._tuning.few or not running.max() >= self._tuning.spread * running.min():
            return None
        joules = self._joules[m][seen] / tokens * running  # of a token of all that ran together
        if not joules.all():  # a meter that reads nothing tells no line
            return None
        error = left_out_error(running, joules)
        return Line(*line(running, joules, counts), math.nan if error is None else error)

    def _room(self, m: int) -> float:
        """How many run at a time at the most: as many as did, where more were given, else as many as with any model."""
        limited = self._given[m] > self._tuning.full * self._most[m]
        return float(self._most[m] if limited else self._most.max())

    @property
    def is_empty(self) -> bool:
        return not self._count.any()

    def state(self) -> Part:
        lines = [(line.steps, line.own, line.error) if line else _NO_LINE for line in self._lines]
        shares = [(share.steps, share.own, share.room, share.error) for share in self.shares or ()]
        return Part(
            "loads",
            version=2,
            arrays={
                **{name: getattr(self, f"_{name}").copy() for name in _FIELDS},
                "lines": np.array(lines, float),
                "shares": np.array(shares, float).reshape(-1, 4),
            },
            values={"fitted_at": self._fitted_at},
            tuning=digest(self._tuning),
        )

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        part.check(self.state(), free=["shares"])
        for name in _FIELDS:
            setattr(self, f"_{name}", part.arrays[name].copy())
        self._fitted_at = part.values["fitted_at"]
        lines = part.arrays["lines"].tolist()
        self._lines = [None if math.isnan(row[0]) else Line(*row) for row in lines]
        self.shares = [Share(*row) for row in part.arrays["shares"].tolist()] or None


_NO_LINE = (math.nan, math.nan, math.nan)
_FIELDS = ("count", "joules", "tokens", "parts", "taken", "most", "given", "in_window", "before")
