"""The input of a job: its lines, how many they are, and prompts from all over it.

Knows files and how requests stand in them; nothing of models or decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

from messcli.files.ahead import prompts_ahead
from messcli.files.requests import count_lines, open_input, read_requests
from messcli.jobs.config import Reading
from messcli.jobs.feed import Feed, patiently
from messcli.records import Rejected, Request
from messcli.routing.line import Line
from messcli.signals import Stop
from messcli.state.state import State


class Input:
    """What stands at `name`, read as `reading` says."""

    def __init__(self, name: str, reading: Reading) -> None:
        self.name = name
        self._reading = reading

    @cached_property  # reading all of a long input takes its time
    def total(self) -> int | None:
        """How many lines are to be routed; None where the input can be read only once."""
        total, limit = count_lines(self.name), self._reading.limit
        return total if total is None or limit is None else min(total, limit)

    @contextmanager
    def lines(self, tell: Callable[[str], None]) -> Iterator[Iterator[Request | Rejected]]:
        """The lines, to be read once."""
        with open_input(self.name) as handle:
            yield read_requests(handle, self.name, self._reading.fields, self._reading.format, tell)

    def sample(self, size: int, seed: int) -> list[tuple[int, str]]:
        """At most `size` prompts, each with its place among the lines."""
        reading = self._reading
        return prompts_ahead(self.name, reading.fields, reading.format, size=size, seed=seed)

    def feed(
        self, lines: Iterator[Line], plan: str | None, alphas: Mapping[str, float], state: State, stop: Stop
    ) -> Feed:
        """Those of the lines that the state hasn't finished.

        Args:
            plan: of requests that name none.
            alphas: plan -> target.
        """
        reading = self._reading
        return Feed(
            lines if reading.linger is None else patiently(lines),
            limit=reading.limit,
            plan=plan,
            alphas=alphas,
            journal=state.journal,
            stop_on_error=reading.on_error == "stop",
            stop=stop,
            output=state.output.name,
            retry=reading.retry,
        )
