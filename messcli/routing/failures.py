"""Failures: who answers what a model failed to, which models are left out of windows, and when none is there.

Whose trouble a failure is says `messcli.records.Fault`. Models are indices into the zoo. Knows nothing of servers,
processes or clocks: what is decided here is a function of what was answered, in the order of the input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from messcli.records import IN_A_ROW, Fault, Outcome
from messcli.snapshots import Part

# Requests settled before a model that is gone is tried again: doubled with each try that fails. Raising the first one
# leaves it out longer after a short absence, raising the longest one after a long absence.
FIRST_PAUSE = 64
LONGEST_PAUSE = 1024


def fallback(model: int, allowed: Sequence[int], failed: Collection[int]) -> int | None:
    """Who is asked once `model` has failed: the next larger one, so that accuracy isn't lost; else the next smaller.

    Args:
        allowed: models that can take the request, ascending.
        failed: those that have failed on it.
    """
    larger = [m for m in allowed if m > model]
    smaller = [m for m in reversed(allowed) if m < model]
    return next((m for m in (*larger, *smaller) if m not in failed), None)


def owner(outcomes: Collection[Outcome]) -> Fault:
    """Whose trouble it is that none of `outcomes` is an answer: the request's only where every model refuses it."""
    return "request" if all(one.fault == "request" for one in outcomes) else "model"


@dataclass(slots=True)
class _Record:
    """What a model did lately, in settled requests."""

    in_a_row: int = 0  # failures since its last answer
    until: int = 0  # the request t after which it is tried again
    pause: int = 0  # requests that it was left out for


class Absences:
    """Models that failed many times in a row, and are left out of windows for a while.

    Which they are changes between windows only: a window's decisions don't depend on how far it is settled.
    """

    def __init__(self, models: int) -> None:
        self.out: frozenset[int] = frozenset()
        self._records = [_Record() for _ in range(models)]

    def settle(self, t: int, asked: Sequence[int], faults: Mapping[str, Fault]) -> None:
        """Fold in request t: the models it was put to, and whose trouble each failure was."""
        for m in asked:
            record = self._records[m]
            if faults.get(str(m)) in (None, "request"):  # a refusal is an answer, too: it is there
                if record.in_a_row:
                    self._records[m] = _Record()
                continue
            record.in_a_row += 1
            if record.in_a_row >= IN_A_ROW and t >= record.until:
                record.pause = min(max(2 * record.pause, FIRST_PAUSE), LONGEST_PAUSE)
                record.until = t + record.pause

    def close_window(self, t: int) -> None:
        """The window that ended with request t is settled."""
        self.out = frozenset(
            m for m, record in enumerate(self._records) if record.in_a_row >= IN_A_ROW and record.until > t
        )

    def present(self, allowed: Sequence[int]) -> Sequence[int]:
        """`allowed` without those that are left out; all of them where nothing would be left."""
        if not self.out:
            return allowed
        return [m for m in allowed if m not in self.out] or allowed

    # ---- remembering -------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remember: no model's last answer was a failure."""
        return not self.out and all(record == _Record() for record in self._records)

    def state(self) -> Part:
        """For a snapshot."""
        rows = [[record.in_a_row, record.until, record.pause] for record in self._records]
        return Part("absences", values={"out": sorted(self.out), "records": rows})

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        part.check(self.state())
        self.out = frozenset(part.values["out"])
        self._records = [_Record(*row) for row in part.values["records"]]


@dataclass(slots=True)
class Contact:
    """Whether any model is there, as a run's answers tell in the order in which they come."""

    there: set[int] = field(default_factory=set)  # models whose last answer was one, or a refusal
    lost: int = 0  # requests in a row that no model has answered, for a reason that isn't theirs
    pauses: int = 0  # since the last answer
    failure: str = ""  # the last one, in words

    def heard(self, m: int, outcome: Outcome) -> None:
        """Take in an outcome of model `m`."""
        if outcome.error is None or outcome.fault == "request":
            self.there.add(m)
            self.lost = self.pauses = 0
            return
        if outcome.fault == "away":
            self.there.discard(m)
        self.failure = outcome.error

    @property
    def none_for_long(self) -> bool:
        """Whether request after request was lost, and no model is there."""
        return self.lost >= IN_A_ROW and not self.there
