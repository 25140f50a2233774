"""What a dialect is, and the guess of a file's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from messcli.registry import DIALECTS

OWN = "jsonl"  # messcli's own format


@dataclass(frozen=True, slots=True)
class Dialect:
    """A format of requests. Pure functions of single objects.

    Args:
        title: what such a line is called in messages, in the plural.
        looks_like: whether a file whose first line is this object is of this kind.
        read: an object of ours for one of theirs: "prompt" or "messages", with "id" and "reference" where theirs
            has them; further fields pass through to the row. Raises ValueError that ends with the cure.
        write: an object of theirs for an output row of ours; None: rows stay ours.
        unwrite: what of the row stands in an object that `write` made; None where the object is another's. None: as
            `write`.
    """

    title: str
    looks_like: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    unwrite: Callable[[Mapping[str, Any]], dict[str, Any] | None] | None = None


def load_dialect(name: str) -> Dialect:
    """The dialect of that name. Raises UsageError where there is none."""
    dialect: Dialect = DIALECTS.load(name)
    return dialect


def guess(first: Mapping[str, Any]) -> str:
    """The name of the first dialect that takes `first` for its own; ours where none does."""
    others = (name for name in DIALECTS if name != OWN)
    return next((name for name in others if load_dialect(name).looks_like(first)), OWN)


def row_in(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of ours that an output line in another program's shape holds; any other line as it is."""
    others = (load_dialect(name).unwrite for name in DIALECTS)
    rows = (unwrite(line) for unwrite in others if unwrite is not None)
    return next((row for row in rows if row is not None), line)


def without(line: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """What of a line passes through: all but `names`."""
    return {name: value for name, value in line.items() if name not in names}


JSONL = Dialect("requests", looks_like=lambda _: True, read=lambda line: line)
