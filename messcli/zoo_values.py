"""Checks of single values of zoo.toml: each returns the value as it is meant, or raises BadValue.

Knows values; the tables and fields that hold them are `zoo.py`'s.
"""

from __future__ import annotations

import datetime
import math
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from messcli.amounts import MOST, is_amount
from messcli.errors import shown

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
_DTYPE_NICKNAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class BadValue(Exception):
    """What is wrong with a value, for the end of a message that names its place."""


def string(value: object) -> str:
    if not isinstance(value, str):
        raise BadValue(f"must be a string in quotes, not {shown(value)}")
    if not value.strip():
        raise BadValue("must not be empty")
    return value


def is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable() and value == value.strip()


def name(value: object) -> str:
    text = string(value)
    if not is_name(text):
        raise BadValue(f"must be printable, without spaces around it, not {shown(text)}")
    return text


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise BadValue(f"must be true or false, not {shown(value)}")
    return value


def count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadValue(f"must be a whole number of at least 1, not {shown(value)}")
    return value


def alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadValue(f"must be a number from 0 to 1, not {shown(value)}")
    if not 0 <= value <= 1:  # false for NaN too
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise BadValue(f"must be from 0 to 1, not {shown(value)}{hint}")
    return float(value)


def scale(value: object) -> tuple[int, int]:
    """The worst and the best score of a judge."""
    whole = isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)
    if not whole or not 0 <= value[0] < value[1] <= 9:  # type: ignore[index]  # it is a list
        raise BadValue(
            f"must be two whole numbers from 0 to 9, the worst and the best score, such as [1, 5]; not {shown(value)}"
        )
    return value[0], value[1]  # type: ignore[index]


def against(value: object) -> str:
    if value not in ("references", "largest"):
        raise BadValue(f'must be "references" or "largest", not {shown(value)}')
    return str(value)


def positive(what: str, most: float = MOST) -> Callable[[object], float]:
    """A number above 0 and up to `most`, which is `what`."""

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            raise BadValue(f"must be {what}, not {shown(value)}")
        return float(value)

    return check


def url(value: object) -> str:
    text = string(value)
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text) is None:
        raise BadValue(
            f"must be a URL such as http://localhost:8000/v1, without key or password, not {shown(text)}"
        )
    return text


def variable(value: object) -> str:
    text = string(value)
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is None:
        raise BadValue("must be the name of an environment variable. The key itself has no place in a file")
    return text


def numbers(*known: str) -> Callable[[object], dict[str, float]]:
    """A table of numbers of at least 0, not all of them 0; of any names where none are given."""

    def check(value: object) -> dict[str, float]:
        held = table(value)
        for key, number in held.items():
            if known and key not in known:
                raise BadValue(f"holds {key}: known are {', '.join(known)}")
            if not is_amount(number):
                raise BadValue(f"holds {key} = {shown(number)}: must be a number of at least 0")
        if known and not any(held.values()):
            raise BadValue("must have a number above 0")
        return {key: float(number) for key, number in held.items()}

    return check


def command(value: object) -> tuple[str, ...]:
    try:
        words = shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:  # a quote that isn't closed
        raise BadValue(f"is no command: {error}, in {shown(value)}") from None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise BadValue(f'must be a command, such as "read-joules --plug 3", not {shown(value)}')
    return tuple(words)


def hourly(hours: int) -> Callable[[object], tuple[float, ...]]:
    """A number of at least 0, or one for each of `hours`."""

    def check(value: object) -> tuple[float, ...]:
        stated: list[Any] = value if isinstance(value, list) else [value]
        for one in stated:
            if not is_amount(one):
                raise BadValue(
                    f"holds {shown(one)}: must be a number of at least 0, or {hours} of them, one an hour"
                )
        if len(stated) not in (1, hours):
            raise BadValue(f"has {len(stated)} numbers: give one, or {hours}, for the hours of the day")
        return tuple(float(one) for one in stated)

    return check


def one_of(*words: str) -> Callable[[object], str]:
    """One of these words."""

    def check(value: object) -> str:
        if value not in words:
            raise BadValue(f"must be one of {', '.join(words)}, not {shown(value)}")
        return str(value)

    return check


def date(value: object) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    return string(value)


def device(value: object) -> str:
    text = string(value)
    if _DEVICE.fullmatch(text) is None:
        raise BadValue(f'must be "cpu", "cuda:N" or "auto", not {shown(text)}')
    return "cuda:0" if text == "cuda" else text


def dtype(value: object) -> str:
    text = string(value).removeprefix("torch.")
    if text not in DTYPES:
        cure = _DTYPE_NICKNAMES.get(text)
        hint = f'; write "{cure}"' if cure else ""
        raise BadValue(f'must be one of {", ".join(DTYPES)}, not "{text}"{hint}')
    return text


def template(value: object) -> str:
    text = string(value)
    if "{prompt}" not in text:
        raise BadValue("must contain {prompt}, where the request's prompt goes")
    return text


def table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadValue(f"must be a table, not {shown(value)}")
    _check_plain(value)
    return value


def _check_plain(value: object) -> None:
    """Dates and NaN are TOML but not JSON, and no option takes them."""
    if isinstance(value, dict):
        for item in value.values():
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadValue(
            f"holds {shown(value)}: options are text, finite numbers, true, false, lists and tables"
        )


def request(value: object) -> dict[str, Any]:
    held = table(value)
    for key in ("model", "messages", "prompt", "stream", "n", "echo"):
        if key in held:
            raise BadValue(f"must not hold {key}: messcli sets it itself")
    for key in held:
        if key.lower() in ("api_key", "api-key", "authorization", "password"):
            raise BadValue(f"must not hold {key}: files are copied. Name the key's variable in api_key_env")
    omitted = held.get("omit", [])
    if not isinstance(omitted, list) or not all(isinstance(name, str) for name in omitted):
        raise BadValue('holds omit: must be a list of the options that aren\'t sent, such as ["temperature"]')
    if needed := {"messages", "prompt"} & set(omitted):
        raise BadValue(f"holds omit: nothing can be asked without {min(needed)}")
    return held


def without(own_fields: Mapping[str, str]) -> Callable[[object], dict[str, Any]]:
    def check(value: object) -> dict[str, Any]:
        held = table(value)
        for key in held:
            if key in own_fields:
                raise BadValue(f"must not hold {key}: set `{own_fields[key]}` on the model itself")
        return held

    return check
