"""A sample of an input, taken in one pass before anything of it is routed.

Knows lines; knows nothing of what is done with them.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from itertools import chain
from typing import TypeVar

from messcli.errors import InputError
from messcli.files.requests import InputFields, open_input, read_requests
from messcli.jsonl import Lines, TornFile
from messcli.records import Request

Item = TypeVar("Item")


def reservoir(items: Iterable[Item], size: int, seed: int) -> list[tuple[int, Item]]:
    """`size` of the items (all, where there are no more) with their places, in order: each subset is as likely.

    One pass, so many in memory: Vitter 1985, algorithm R. A function of (items, size, seed).
    """
    draw = random.Random(seed)  # noqa: S311  # a sample
    kept: list[tuple[int, Item]] = []
    for place, item in enumerate(items):
        if place < size:
            kept.append((place, item))
        elif (spot := int(draw.random() * (place + 1))) < size:
            kept[spot] = (place, item)
    return sorted(kept, key=lambda one: one[0])


def prompts_ahead(
    path: str, fields: InputFields, dialect: str | None, *, size: int, seed: int
) -> list[tuple[int, str]]:
    """Prompts of a sample of a file's lines, with the places of these among its lines.

    Lines are parsed when they were chosen: a pass takes about as long as counting them. None where the file can't
    be read, which is told when routing gets there.
    """
    try:
        with open_input(path) as handle:
            lines = (line for line in Lines(handle) if line.rstrip())
            first = next(lines, b"")
            sample = reservoir(chain([first] * bool(first), lines), size, seed)
        # the first line tells the dialect, whether it was chosen or not
        head = [] if sample and sample[0][0] == 0 else [first]
        text = b"".join(line.rstrip() + b"\n" for line in (*head, *(line for _, line in sample)))
        parsed = list(read_requests(io.BytesIO(text), path, fields, dialect))[len(head) :]
    except (InputError, TornFile):
        return []
    return [
        (place, request.prompt)
        for (place, _), request in zip(sample, parsed, strict=True)
        if isinstance(request, Request)
    ]
