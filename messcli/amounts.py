"""Numbers from outside: joules, seconds, tokens, prices. What is none is refused where it is read."""

from __future__ import annotations

import math

MOST = 1e15  # 1 PJ, 30 million years, a quadrillion tokens: what is larger is damage, and sums of it would overflow


def is_amount(value: object, most: float = MOST) -> bool:
    """Whether a value is a number from 0 to `most`. NaN, infinities and booleans aren't."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def finite(value: object) -> float | None:
    """The number that a JSON or TOML value is; None where it is none, or none that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None
