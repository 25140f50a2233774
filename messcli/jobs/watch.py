"""What a window's engines are doing, for whoever watches: answers, tokens per second, requests running.

Counts what passes between the loop and its source; changes nothing of it.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from messcli.records import Answer, Asked, Request
from messcli.routing.source import OutcomeSource

SPAN_SECONDS = 10.0  # of tokens per second
EVERY_SECONDS = 0.2  # at most so often is it told


@dataclass(frozen=True, slots=True)
class Activity:
    """As of now."""

    answers: int = 0  # of this run, of all models
    tokens_per_second: float | None = None  # written, over the last seconds; None before the first answer
    running: Mapping[str, int] | None = None  # model -> requests it was asked and hasn't answered
    joules: float = 0.0  # read so far for these requests


class Watched:
    """A source that is looked at. `changed` is called after answers, and about once a second without any."""

    def __init__(
        self, source: OutcomeSource, changed: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.names = source.names
        self._source = source
        self._changed = changed
        self._clock = clock
        self._running: Counter[int] = Counter()
        self._answers = 0
        self._tokens: deque[tuple[float, int]] = deque()
        self._told = -math.inf

    @property
    def activity(self) -> Activity:
        """What is going on."""
        now = self._clock()
        while self._tokens and self._tokens[0][0] < now - SPAN_SECONDS:
            self._tokens.popleft()
        rate = None
        if self._tokens:
            rate = sum(count for _, count in self._tokens) / max(now - self._tokens[0][0], 1.0)
        running = {self.names[m]: count for m, count in sorted(self._running.items()) if count > 0}
        return Activity(self._answers, rate, running, sum(self._source.running_joules().values()))

    @property
    def checkers(self) -> Mapping[int, int]:
        return self._source.checkers

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return self._source.allowed(requests)

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        self._running = Counter(m for _, models in asked for m in models)
        counted = len(asked)
        try:
            for group in self._source.answers(asked):
                for _, m, outcome in group:
                    self._running[m] -= 1
                    self._answers += 1
                    self._tokens.append((self._clock(), outcome.output_tokens or 0))
                yield group
                self._running.update(m for _, models in asked[counted:] for m in models)
                counted = len(asked)  # it grows by second stages
                self._tell()
        finally:
            self._running.clear()

    def _tell(self) -> None:
        now = self._clock()
        if now - self._told >= EVERY_SECONDS:
            self._told = now
            self._changed()

    def take_overhead(self) -> Mapping[str, float]:
        return self._source.take_overhead()

    def running_joules(self) -> Mapping[str, float]:
        return self._source.running_joules()

    def take_warnings(self) -> list[str]:
        return self._source.take_warnings()

    def close(self) -> None:
        self._source.close()
