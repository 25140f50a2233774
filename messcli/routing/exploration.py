"""How often more than the served model answers, so that predictors learn. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b


def coin(seed: int, t: int, purpose: bytes = b"explore") -> float:
    """A number in [0, 1) that depends on nothing but (seed, t, purpose): no generator state to save."""
    digest = blake2b(b"%d/%d/" % (seed, t) + purpose, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def exploration_probability(t: int, c: float) -> float:
    """p_t = min(1, c * t^(-1/3)): line 3 of Algorithm 1. `t` counts from 1."""
    fading: float = t ** (-1.0 / 3.0)
    return min(1.0, c * fading)


def companions(
    seed: int, t: int, served: int, allowed: Sequence[int], joules: Sequence[float], share: float
) -> tuple[int, ...]:
    """The models that are asked beside the served one: cheaper ones, so that they are known where it is needed.

    Each smaller model is asked with a probability at which all of them together are expected to take `share` of the
    served answer's joules. Coins depend on (seed, t, model) alone.
    """
    smaller = [m for m in allowed if m < served]
    return tuple(
        m
        for m in smaller
        if coin(seed, t, b"with %d" % m) * len(smaller) * joules[m] < share * joules[served]
    )
