"""Where outcomes come from: live models (`messcli/models/live.py`) or a recorded table. The loop can't tell them apart.

A source knows how to get (output, accuracy, joules) for a request and a model. It knows nothing of which
model should be asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from messcli.errors import OutcomesError
from messcli.records import Answer, Asked, Outcome, Request


class OutcomeSource(Protocol):
    """Answers requests with the models of a zoo, given as indices into `names`."""

    names: tuple[str, ...]

    @property
    def checkers(self) -> Mapping[int, int]:
        """Model -> the larger one that can check its answers."""
        ...

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """For each request, the models that can take its prompt, ascending; may be empty."""
        ...

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        """What was asked, each pair of request and model once, in any order, in groups as it comes.

        `asked` may grow at its end between two groups: what is new is answered as well.
        An empty group says that time passes: a source that waits gives one at least once a second. It ends early
        where it was told to stop. Closing the iterator ends what is running.
        """
        ...

    def take_overhead(self) -> Mapping[str, float]:
        """Joules since last taken that belong to no request, by meter."""
        ...

    def running_joules(self) -> Mapping[str, float]:
        """Joules read so far for requests that aren't answered yet, by meter."""
        ...

    def take_warnings(self) -> list[str]:
        """What the user should know of since last taken, one line each."""
        ...

    def close(self) -> None:
        """Give the models' memory back."""
        ...


class Recorded:
    """Outcomes that were measured before, by request id: a drop-in replacement for models and meters."""

    def __init__(
        self,
        names: Sequence[str],
        outcomes: Mapping[str | int, Mapping[str, Outcome]],
        checkers: Mapping[int, int] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.checkers = checkers or {}
        self._outcomes = outcomes

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return [tuple(range(len(self.names)))] * len(requests)

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        answered = 0
        while answered < len(asked):
            new = range(answered, len(asked))
            answered = len(asked)
            yield [
                (position, m, self._outcome(asked[position][0], self.names[m]))
                for position in new
                for m in asked[position][1]
            ]

    def _outcome(self, request: Request, name: str) -> Outcome:
        try:
            return self._outcomes[request.id][name]
        except KeyError:
            raise OutcomesError(
                f'no outcome of model "{name}" for request {request.id!r} was recorded. Record the input again'
            ) from None

    def take_overhead(self) -> Mapping[str, float]:
        return {}

    def running_joules(self) -> Mapping[str, float]:
        return {}

    def take_warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        pass
