"""What a job took in all, beside everything on the largest model.

The headline compares the total: what requests were billed and the overhead. Knows numbers and words; knows nothing of
where they were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from messcli.energy.load import CostModel


@dataclass(frozen=True, slots=True)
class Alone:
    """What everything on the largest model takes, per request: its answers only, no overhead."""

    model: str
    joules: float
    error: float | None  # relative; None: nothing is known of it
    at_most: bool  # no more than this: batches of the run were smaller than full ones
    basis: str

    def as_json(self) -> dict[str, Any]:
        """As a state keeps it; `Alone(**found)` reads it back."""
        return asdict(self)

    def words(self) -> str:
        """The number, for people."""
        error = "" if self.error is None else f" ± {self.error:.0%}"
        return f"{'at most ' if self.at_most else ''}{self.joules:.4g} J{error}"


@dataclass(slots=True)
class Lengths:
    """How long the answers of the largest model were, summed up."""

    answers: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        """Count one answer."""
        self.answers += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens


def by_cost_model(model: str, cost: CostModel, lengths: Lengths) -> Alone:
    """By the cost model at full load, for answers as long as those that were seen; one at least."""
    joules = cost.joules_at_full_load(
        lengths.prompt_tokens / lengths.answers, lengths.output_tokens / lengths.answers
    )
    seen = f"{lengths.answers} answers" if lengths.answers > 1 else "1 answer"
    return Alone(model, joules, cost.error, False, f"the cost model at full load, lengths of {seen} seen")


def by_answers(model: str, joules: float, error: float | None, basis: str, *, recorded: bool) -> Alone:
    """By the mean of what it took here. `recorded`: joules of a table, which no load of this run has changed."""
    return Alone(model, joules, error, not recorded, basis)


def of_largest(total_joules: float, alone: Alone) -> float:
    """Joules per request, overhead included, as a part of what everything on the largest takes."""
    return total_joules / alone.joules


def headline(total_joules: float, alone: Alone, *, overhead_known: bool = True) -> str:
    """The one comparison, for people; `alone.basis` belongs beside it. `total_joules` are per request."""
    share = of_largest(total_joules, alone)
    at_least = "at least " if alone.at_most else ""
    whole = "in all" if overhead_known else "billed"
    return (
        f"{total_joules:.4g} J per request {whole}, {at_least}{share:.0%} of everything on {alone.model} "
        f"({alone.words()})"
    )


def overhead_words(joules: float, named: Mapping[str, float]) -> str:
    """Parts of the overhead, for people: "starting 12.1 J, loading models 8.2 J"; "" where nothing is known of them.

    Parts under 1 % of it are left out.
    """
    return ", ".join(f"{what} {part:.4g} J" for what, part in named.items() if part >= 0.01 * joules > 0)
