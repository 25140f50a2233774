"""How often more than the served model answers, so that predictors learn. Pure functions of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

from messcli.routing import tuning


def coin(seed: int, t: int, purpose: bytes = b"explore") -> float:
    """A number in [0, 1) that depends on nothing but (seed, t, purpose): no generator state to save."""
    digest = blake2b(b"%d/%d/" % (seed, t) + purpose, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def exploration_probability(t: int, c: float) -> float:
    """p_t = min(1, c * t^(-1/3)): line 3 of Algorithm 1. `t` counts from 1."""
    fading: float = t ** (-1.0 / 3.0)
    return min(1.0, c * fading)


@dataclass(frozen=True, slots=True)
class Exploration:
    """The schedule where no constant is given: some first requests are all explored, later ones by p_t.

    Each of the two phases may take `tuning.share` of the bill; `tuning.least` explorations there are in any case.

    Args:
        horizon: requests in all; None where that isn't known.
        c: the constant of p_t for the later ones, whatever they cost; None: `tuning.c`, as far as it is affordable.
    """

    horizon: int | None
    c: float | None
    tuning: tuning.Exploration

    @property
    def first(self) -> int:
        """How many of the first requests are explored, where that is affordable."""
        if not self.horizon:
            return self.tuning.first
        return max(self.tuning.least, int(self.tuning.first_by_root * math.sqrt(self.horizon)))

    def probability(self, t: int, explored: int, requests: float, whole_zoo: float) -> float:
        """p_t.

        Args:
            t: the request, counted from 1.
            explored: explorations so far.
            requests: expected in all.
            whole_zoo: what all models' answers to a request cost, in units of the chosen model's; 0: not known.
        """
        affordable = self.tuning.share / whole_zoo if whole_zoo else 1.0  # the part of the requests
        if explored < min(float(self.first), max(float(self.tuning.least), affordable * requests)):
            return 1.0
        if self.c is not None:
            return exploration_probability(t, self.c)
        return min(exploration_probability(t, self.tuning.c), affordable)
