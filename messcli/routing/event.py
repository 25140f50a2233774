"""What came of a request, as the controller learns it and the state keeps it.

Knows decisions; knows nothing of models, prompts' features or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from messcli.records import Decision, Fault, dumps, loads


@dataclass(frozen=True, slots=True)
class Event:
    """What `settle` needs to know of one request: what was decided, and what came of it. Plain data.

    Arrays run over the zoo; NaN where a model didn't run or nothing was read.
    """

    text: str
    plan: str
    decision: Decision
    accuracies: tuple[float, ...]
    joules: tuple[float, ...]
    served: int | None  # the model whose output was served; None when every one asked failed
    # What answers told of themselves, by model (as JSON has keys); None where nobody wants to know
    signals: Mapping[str, Mapping[str, float]] | None = None
    check_joules: Mapping[str, float] | None = None  # of larger models that read answers: the same
    judged: float = 0.0  # joules of judging its answers
    faults: Mapping[str, Fault] | None = None  # of models that failed, by model; None where none did
    # Requests that ran at a time, by model, and tokens that it wrote then; None where nothing is known
    running: Mapping[str, float] | None = None
    tokens: Mapping[str, int] | None = None

    def dumps(self) -> bytes:
        """As JSON; NaN becomes null. Floats come back exactly."""
        return dumps(self)

    @classmethod
    def loads(cls, data: bytes) -> Event:
        plain = loads(data)
        decision = plain.pop("decision")
        plain.pop("has_reference", None)  # of states that earlier versions wrote
        for name in ("accuracies", "joules"):
            plain[name] = tuple(math.nan if value is None else value for value in plain[name])
        return cls(decision=Decision.of(decision), **plain)
