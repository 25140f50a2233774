"""Accuracy given the answer: what a model's confidence in its answer says of it, and of what larger models would do.

A prompt's estimate Â_l(x) is known before any answer. After model m answered with signals s (token probabilities, a
check's probability), A_l - Â_l(x) is regressed on s, for m itself and for every larger l: ridge regressions on
sufficient statistics of each pair (m, l). A signal enters by its rank among the model's latest ones, so that neither
its scale nor its calibration matters. What a typical answer tells is 0 by construction: ranks are centred, and the
constant of a regression is no part of what it says.

Where l was asked because m's answer looked bad, only bad answers teach what l does. That is no bias here: an answer is
chosen by s, and s is what is regressed on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messcli.predict import tuning
from messcli.snapshots import Part

Array = NDArray[np.float64]

CHECK = "check"
SIGNALS = ("mean", "least", "p10", "p50", "tokens", CHECK)
"""Of an answer: mean, least, 10 % and 50 % quantile of its tokens' log-probabilities, its length in tokens, and the
probability that a larger model gave it. Others are not looked at; any of them may be absent."""


@dataclass(frozen=True, slots=True)
class Look:
    """What looking at an answer of `model` tells, for typical answers."""

    model: int
    checked: bool  # a larger model's check is part of it
    shifts: Array  # (typical, models): Â_l given the answer, minus Â_l of the prompt; 0 for smaller models
    joules: float  # of the check; 0 without


@dataclass(frozen=True, slots=True)
class Checks:
    """Of a model's answers, by a larger one."""

    made: int
    joules: float  # of one, in the mean; 0 before there were any
    mute: bool  # there were several, and none told a probability


class AnswerPredictor:
    """Â_l(x, s) - Â_l(x) of all models, after one of them answered.

    `learn_one` takes note of an answer; what is said changes in `take_in` alone, between windows. So within a window
    it is a function of the answer, whatever has been settled meanwhile. Deterministic.

    Args:
        models: size of the zoo. Pairs are (m, l) with l >= m.
    """

    def __init__(self, models: int, numbers: tuning.Answer = tuning.ANSWER) -> None:
        self._numbers = numbers
        self._models = models
        size = 1 + 2 * len(SIGNALS)
        pairs = (2, models, models)  # without and with a check
        self._gram = np.zeros((*pairs, size, size))
        self._cross = np.zeros((*pairs, size))
        self._squares = np.zeros(pairs)  # of A - Â(x)
        self._count = np.zeros(pairs)
        self._latest = np.full((models, numbers.remembered, len(SIGNALS)), np.nan)
        self._seen = np.zeros(models, np.int64)
        self._checks = np.zeros((models, 2))  # joules of checks of a model's answers, and how many
        # Answers since `take_in` acted: model, joules of the check, signals, A - Â(x) of every model
        self._pending: list[Array] = []
        self._weights: Array | None = None  # solved on demand; None: not since the evidence changed
        self._sorted: list[list[Array]] | None = None  # by model and signal, the latest ones: the same
        self._looks: list[Look] | None = None

    # ---- learning --------------------------------------------------------------------------------

    def learn_one(
        self,
        model: int,
        signals: Mapping[str, float],
        estimates: Sequence[float],
        accuracies: Sequence[float],
        check_joules: float = math.nan,
    ) -> None:
        """Take note of one answer of `model`.

        Args:
            signals: of the answer, by name.
            estimates: Â(x) of every model, made before any answer.
            accuracies: what was observed of every model for this request; NaN where nothing was.
            check_joules: of the check that is among the signals.
        """
        vector = _vector(signals)
        if not (np.isnan(vector).all() and math.isnan(check_joules)):
            residuals = np.array(accuracies, float) - np.array(estimates, float)
            self._pending.append(np.concatenate([[model, check_joules], vector, residuals]))

    def take_in(self) -> None:
        """Let what was noted change what is said, once it is enough. Called between windows."""
        total = float(self._seen.sum())
        if self._pending and len(self._pending) >= self._numbers.growth * total:
            self._take_in_all()

    def _take_in_all(self) -> None:
        noted = np.stack(self._pending)
        self._pending = []
        for m in range(self._models):
            self._take_in_of(m, noted[noted[:, 0] == m, 1:])
        self._weights = self._sorted = self._looks = None

    def _take_in_of(self, m: int, noted: Array) -> None:
        if not len(noted):
            return
        joules, signals, residuals = np.split(noted, [1, 1 + len(SIGNALS)], axis=1)
        places = (self._seen[m] + np.arange(len(noted))) % self._numbers.remembered
        self._latest[m][places[-self._numbers.remembered :]] = signals[-self._numbers.remembered :]
        self._seen[m] += len(noted)
        self._checks[m] += np.nansum(joules), np.count_nonzero(~np.isnan(joules))
        own = self._in_order(m)
        # A checked answer teaches what the answer says by itself, too.
        for checked, rows in enumerate((np.full(len(noted), True), ~np.isnan(signals[:, -1]))):
            x = _features(signals[rows], own, checked=bool(checked))
            for larger in range(m, self._models):
                y = residuals[rows, larger]
                known = ~np.isnan(y)
                x_known, y_known = x[known], y[known]
                self._gram[checked, m, larger] += x_known.T @ x_known
                self._cross[checked, m, larger] += y_known @ x_known
                self._squares[checked, m, larger] += float(y_known @ y_known)
                self._count[checked, m, larger] += len(y_known)

    def discount(self, most: float) -> None:
        """Let what is known of each pair of models count as at most `most` answers."""
        if self._pending:
            self._take_in_all()
        part = np.minimum(1.0, most / np.maximum(self._count, 1.0))
        self._gram *= part[..., None, None]
        self._cross *= part[..., None]
        self._squares *= part
        self._count *= part
        self._checks *= np.minimum(1.0, most / np.maximum(self._checks[:, 1:], 1.0))
        remembered = self._numbers.remembered
        for m, seen in enumerate(self._seen.tolist()):
            if seen > remembered:  # the oldest first, so that it is the first to make room
                self._latest[m] = np.roll(self._latest[m], -(seen % remembered), axis=0)
        self._seen = np.minimum(self._seen, remembered)
        self._weights = self._sorted = self._looks = None

    @property
    def knows_something(self) -> bool:
        """Whether any answer was noted."""
        return bool(self._pending or self._seen.any())

    def checks_of(self, model: int) -> Checks:
        """What is known of checks of the model's answers."""
        joules, made = self._checks[model]
        mute = made >= self._numbers.least and not self._count[1, model, model]
        return Checks(int(made), float(joules / made) if made else 0.0, bool(mute))

    # ---- estimates -------------------------------------------------------------------------------

    def given(self, model: int, signals: Mapping[str, float]) -> Array:
        """What the answer adds to Â(x) of every model, (models,); 0 where it says nothing. Pure."""
        vector = _vector(signals)
        checked = not math.isnan(vector[-1]) and self._knows(model, checked=True)
        if np.isnan(vector).all() or not (checked or self._knows(model, checked=False)):
            return np.zeros(self._models)
        x = _features(vector[None], self._ranked()[model], checked=checked)
        found: Array = (x @ self._solved()[int(checked), model].T)[0]
        return found

    def looks(self) -> Sequence[Look]:
        """Every look that there can be, as far as known. Pure."""
        if self._looks is None:
            self._looks = [
                self._look(m, checked=checked)
                for m in range(self._models - 1)
                for checked in (False, True)
                if self._knows(m, checked=checked)
            ]
        return self._looks

    def _knows(self, model: int, *, checked: bool) -> bool:
        return bool(self._count[int(checked), model, model] >= self._numbers.least)

    def _look(self, m: int, *, checked: bool) -> Look:
        latest = self._latest[m][: min(int(self._seen[m]), self._numbers.remembered)]
        if checked:
            latest = latest[~np.isnan(latest[:, -1])]
        x = _features(latest, self._ranked()[m], checked=checked)
        shifts = x @ self._solved()[int(checked), m].T
        # From those that speak most for a larger model to those that speak least, evenly through.
        order = np.argsort((shifts[:, m : m + 1] - shifts[:, m + 1 :]).min(axis=1), kind="stable")
        count = min(self._numbers.typical, len(order))
        places = ((np.arange(count) + 0.5) / count * len(order)).astype(int) if count else order
        joules, checks = self._checks[m]
        return Look(m, checked, shifts[order[places]], float(joules / checks) if checked and checks else 0.0)

    # ---- numbers ---------------------------------------------------------------------------------

    def _in_order(self, m: int) -> list[Array]:
        latest = self._latest[m][: min(int(self._seen[m]), self._numbers.remembered)]
        return [np.sort(column[~np.isnan(column)]) for column in latest.T]

    def _ranked(self) -> list[list[Array]]:
        if self._sorted is None:
            self._sorted = [self._in_order(m) for m in range(self._models)]
        return self._sorted

    def _solved(self) -> Array:
        """Weights, (without or with check, models, models, features); 0 for the constant and for smaller models."""
        if self._weights is None:
            numbers = self._numbers
            belief = numbers.variance_weight
            noise = (self._squares + numbers.variance * belief) / (self._count + belief)
            own = np.arange(self._models)
            weights = np.zeros_like(self._cross)
            own_penalty: Array = noise[:, own, own, None] / self._expected(numbers.slope) ** 2
            weights[:, own, own] = _ridge(self._gram[:, own, own], self._cross[:, own, own], own_penalty)
            # Whatever makes m's answer a bad one is likely to make l's one, as far as l's can be bad at all: a shift
            # of log odds moves an accuracy by its variance.
            part = numbers.carried * noise / noise[:, own, own][:, :, None]
            likely = np.minimum(part, 1.0)[..., None] * weights[:, own, own][:, :, None, :]
            spread: Array = noise[..., None] / self._expected(numbers.slope_larger) ** 2
            others = _ridge(self._gram, self._cross + spread * likely, spread)
            larger = np.triu(np.ones((self._models, self._models), bool), 1)[None, :, :, None]
            weights = np.where(larger, others, weights)
            weights[..., 0] = 0.0
            self._weights = weights
        return self._weights

    def _expected(self, slope: float) -> Array:
        """Expected size of each feature's weight."""
        expected = np.full(self._gram.shape[-1], slope)
        expected[0] = self._numbers.offset
        return expected

    # ---- remembering -----------------------------------------------------------------------------

    def state(self) -> Part:
        """Everything learnt and noted, as named fields: `load` of it continues exactly."""
        width = 2 + len(SIGNALS) + self._models
        return Part(
            "answers",
            arrays={
                "gram": self._gram.copy(),
                "cross": self._cross.copy(),
                "squares": self._squares.copy(),
                "count": self._count.copy(),
                "latest": self._latest.copy(),
                "seen": self._seen.copy(),
                "checks": self._checks.copy(),
                "pending": np.stack(self._pending) if self._pending else np.zeros((0, width)),
            },
            tuning=tuning.digest(self._numbers),
        )

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        part.check(self.state(), free=("pending",))
        arrays = part.arrays
        self._gram, self._cross = arrays["gram"].copy(), arrays["cross"].copy()
        self._squares, self._count = arrays["squares"].copy(), arrays["count"].copy()
        self._latest, self._seen = arrays["latest"].copy(), arrays["seen"].copy()
        self._checks = arrays["checks"].copy()
        self._pending = list(arrays["pending"].copy())
        self._weights = self._sorted = self._looks = None


def _ridge(gram: Array, cross: Array, penalty: Array) -> Array:
    """Weights (..., features) of ridge regressions by their sums, with a penalty for each feature."""
    size = gram.shape[-1]
    found = np.linalg.solve(gram + penalty[..., None] * np.eye(size), cross[..., None])
    return np.asarray(found[..., 0], np.float64)


def _vector(signals: Mapping[str, float]) -> Array:
    return np.array([signals.get(name, math.nan) for name in SIGNALS], float)


def _features(vectors: Array, own: Sequence[Array], *, checked: bool) -> Array:
    """1, each signal's rank from -1/2 to 1/2, and a parabola of it: confidence often tells most at one end.

    0 where a signal is absent: it tells nothing then.

    Args:
        vectors: (answers, signals).
        own: of each signal the latest ones, ascending.
        checked: False: as if there were no check.
    """
    ranks = np.full_like(vectors, np.nan)
    for j, latest in enumerate(own):
        there = ~np.isnan(vectors[:, j])
        if len(latest) and there.any() and (checked or SIGNALS[j] != CHECK):
            values = vectors[there, j]
            middle = np.searchsorted(latest, values, "left") + np.searchsorted(latest, values, "right")
            ranks[there, j] = middle / (2.0 * len(latest)) - 0.5
    parabolas = 2.0 * ranks**2 - 1.0 / 6.0
    features: Array = np.nan_to_num(np.concatenate([np.ones((len(vectors), 1)), ranks, parabolas], axis=1))
    return features
