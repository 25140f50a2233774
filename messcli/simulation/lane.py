"""One engine in load: requests start together, run steps beside each other, and end.

Knows token counts and a cost model; knows nothing of policies, traces or how a run was decided.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from messcli.energy.load import CostModel
from messcli.records import Answer, Asked, Outcome
from messcli.routing.source import Recorded


class Lane:
    """One engine under way: what runs on it and what waits. Time is in seconds, progress in steps."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        # no request: no step
        loads = range(1, cost.most_running + 1)
        self.step_joules = [0.0, *map(cost.step_joules, loads)]
        self.step_seconds = [math.inf, *map(cost.step_seconds, loads)]
        self.waiting: deque[tuple[int, int, int]] = deque()  # place, prompt and output tokens
        self.running: list[tuple[float, int]] = []  # heap: the step at which an answer ends, and its place
        self.steps = 0.0
        self.until = (
            0.0  # seconds up to which everything below is counted; later than now while a prompt is read
        )
        self.joules = self.busy = self.work = 0.0

    def advance(self, now: float) -> None:
        """Run on to `now`; nothing ends before."""
        running = len(self.running)
        if now > self.until:
            if running:
                seconds = now - self.until
                steps = seconds / self.step_seconds[running]
                self.steps += steps
                self.joules += steps * self.step_joules[running]
                self.busy += seconds
                self.work += running * seconds
            self.until = now

    def start(self) -> None:
        """Take in what waits, as far as there is room."""
        while self.waiting and len(self.running) < self.cost.most_running:
            place, prompt_tokens, output_tokens = self.waiting.popleft()
            self.joules += prompt_tokens * self.cost.joules_per_prompt_token
            reading = prompt_tokens * self.cost.seconds_per_prompt_token
            self.until += reading
            self.busy += reading
            self.work += (len(self.running) + 1) * reading
            # an answer without tokens has taken a step too
            heapq.heappush(self.running, (self.steps + max(1, output_tokens), place))

    @property
    def next_end(self) -> float:
        """When the next request ends; inf without any."""
        if not self.running:
            return math.inf
        return self.until + (self.running[0][0] - self.steps) * self.step_seconds[len(self.running)]

    def ended(self) -> Iterator[int]:
        """Places whose answers end now, the next one at least: it is what `advance` was called for."""
        self.steps = max(self.steps, self.running[0][0])
        while self.running and self.running[0][0] <= self.steps + 1e-9 * (1.0 + self.steps):
            yield heapq.heappop(self.running)[1]


@dataclass(frozen=True, slots=True)
class Took:
    """What an answer took among others."""

    joules: float
    running: float  # requests at a time, itself included: the harmonic mean over its tokens


def together(cost: CostModel, tokens: Sequence[tuple[int, int]]) -> list[Took]:
    """What each of some requests takes that an engine is given at once. A step's joules are shared evenly.

    Args:
        tokens: of each its prompt's and its answer's.
    """
    lane = Lane(cost)
    lane.waiting.extend((place, *pair) for place, pair in enumerate(tokens))
    # Sums over the steps so far: of joules / requests running, and of 1 / requests running
    joules = parts = 0.0
    began: dict[int, tuple[float, float]] = {}
    took = [Took(0.0, 1.0)] * len(tokens)
    while lane.waiting or lane.running:
        lane.start()
        began |= {place: (joules, parts) for _, place in lane.running if place not in began}
        running, steps = len(lane.running), lane.running[0][0] - lane.steps
        joules += steps * lane.step_joules[running] / running
        parts += steps / running
        for place in lane.ended():
            (prompt, written), (before, others) = tokens[place], began[place]
            own = prompt * cost.joules_per_prompt_token + joules - before
            took[place] = Took(own, max(1, written) / (parts - others))
    return took


class OnEngines(Recorded):
    """Recorded outcomes on engines in load: what a model is asked at once runs together, and decisions take an answer
    for what it took then. Its `joules` stay those of the table."""

    def __init__(
        self,
        names: Sequence[str],
        outcomes: Mapping[str | int, Mapping[str, Outcome]],
        checkers: Mapping[int, int],
        costs: Sequence[CostModel],
    ) -> None:
        super().__init__(names, outcomes, checkers)
        self._costs = costs

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        for group in super().answers(asked):
            found: dict[int, list[Answer]] = {}
            for answer in group:
                found.setdefault(answer[1], []).append(answer)
            loaded = {m: iter(self._in_load(m, answers)) for m, answers in found.items()}
            yield [(place, m, next(loaded[m])) for place, m, _ in group]

    def _in_load(self, m: int, answers: Sequence[Answer]) -> Iterator[Outcome]:
        outcomes = [outcome for _, _, outcome in answers]
        tokens = [(outcome.prompt_tokens or 0, outcome.output_tokens or 0) for outcome in outcomes]
        for outcome, took in zip(outcomes, together(self._costs[m], tokens), strict=True):
            yield replace(outcome, worth=took.joules, running=took.running)
