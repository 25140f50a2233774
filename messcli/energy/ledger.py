"""The ledger: whose joules are these? Bills plus overhead add up to what the counters read.

Knows calls (a stretch of time on named devices) and counters; not what a call computes. Readings are
only ever differenced, shared out or given up as unknown: none is invented, scaled or patched.

A counter that updates every `period` can't time a call to better than that, so

- calls under `GROUP_PERIODS` periods are read together with the short calls next to them, and the
  group's reading is shared out by call seconds;
- a group under `RESOLVED_PERIODS` periods, which may read 0, joins its nearest neighbour in the window;
  where it is alone, the window's end waits for the counter's tick;
- a gap between calls of one group too short for the counter is billed to the group's calls (bills
  are never understated); a longer one keeps its share by seconds, as overhead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from messcli.energy.counter import CounterReset
from messcli.energy.meter import Meter
from messcli.errors import MeterError
from messcli.records import Generation

# Both ends of a reading are off by up to a period: over 10 periods that is 4 % (standard deviation), and
# what one call loses its neighbour gains.
GROUP_PERIODS = 10
# A span of two periods holds a tick even when ticks come late.
RESOLVED_PERIODS = 2

Weight = Callable[[int, int], float]  # (prompt tokens, output tokens) -> relative joules


def token_weight(prompt_tokens: int, output_tokens: int) -> float:
    """The share of a batch before any calibration: one output token weighs as much as ten prompt tokens.

    A prompt's tokens pass through the model together, an output's one after another.
    """
    return 0.1 * prompt_tokens + output_tokens


def split(amount: float, generations: Sequence[Generation], weight: Weight = token_weight) -> list[float]:
    """A batch's joules (or seconds) by request, in proportion to `weight` of its unpadded tokens.

    The parts sum to `amount`. Without any tokens the parts are equal. Calibration passes a weight that
    predicts joules.
    """
    weights = [weight(generation.prompt_tokens, generation.output_tokens) for generation in generations]
    return _share(amount, weights)


def _share(amount: float, weights: Sequence[float]) -> list[float]:
    whole = sum(weights)
    if whole <= 0:
        return [amount / len(weights)] * len(weights) if weights else []
    return [amount * (weight / whole) for weight in weights]


@dataclass(frozen=True, slots=True)
class Bill:
    """One request's part of a call. None: unknown, because the counter failed; never a guess."""

    joules: float | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class _Reading:
    joules: float
    seconds: float  # the ledger's clock
    resets: int  # of this source so far: readings are only differenced where these agree


@dataclass(frozen=True, slots=True)
class _Span:
    """One call as one source saw it."""

    call: Call
    start: _Reading
    end: _Reading


@dataclass(slots=True)
class _Group:
    spans: list[_Span]
    short: bool  # made of short calls only

    @property
    def seconds(self) -> float:
        return self.spans[-1].end.seconds - self.spans[0].start.seconds


class Call:
    """One backend call. The caller sets `generations`; `joules` and `bills()` need the window closed."""

    def __init__(self, model: str, request_ids: Sequence[str], kind: str) -> None:
        self.model = model
        self.request_ids = tuple(request_ids)
        self.kind = kind  # for the rows' `meter`
        self.generations: Sequence[Generation] = ()
        self.seconds = 0.0
        self.fault: str | None = None  # why joules are None
        self._settled = False
        self._parts: dict[str, float] = {}  # source -> joules
        self._replayed: list[tuple[float | None, float | None]] | None = None

    @property
    def joules(self) -> float | None:
        """Joules of the call over all its devices; None where a counter failed, and `fault` says how."""
        if not self._settled:
            raise RuntimeError("a call's joules are known when its window closes")
        return None if self.fault is not None else sum(self._parts.values())

    def bills(self, weight: Weight = token_weight) -> list[Bill]:
        """One bill per request, in order; their joules and seconds sum to the call's."""
        joules = self.joules
        if self._replayed is not None:
            return [Bill(*numbers) for numbers in self._replayed]
        if len(self.generations) != len(self.request_ids):
            raise RuntimeError(f"{len(self.generations)} generations for {len(self.request_ids)} requests")
        seconds = split(self.seconds, self.generations, weight)
        if joules is None:
            return [Bill(None, part) for part in seconds]
        return [Bill(*parts) for parts in zip(split(joules, self.generations, weight), seconds, strict=True)]


class EnergyLedger:
    """Attributes a meter's joules to calls, and everything else to overhead.

        with ledger.window():
            with ledger.call(model, ids, backend.devices) as call:
                call.generations = backend.generate(batch)
        call.bills()

    A meter that fails never costs the window's work: calls whose joules can't be known have `joules`
    None, `fault` is set, and the next `window()` raises it. A counter that merely fell (CounterReset)
    leaves only the calls around the fall unknown; `take_warnings` tells.

    Calls on one device follow each other; on devices with different counters they may overlap, in threads.
    `clock` and `sleep` are in seconds.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.fault: MeterError | None = None  # the first fault that ended a counter
        self._meter = meter
        self._clock = clock
        self._sleep = sleep
        self._spans: dict[str, list[_Span]] | None = None  # by source; None between windows
        self._calls: list[Call] = []
        self._busy: set[str] = set()
        self._dead: dict[str, MeterError] = {}
        self._last = dict.fromkeys(meter.counters, 0.0)
        self._resets = dict.fromkeys(meter.counters, 0)
        self._attributed = dict.fromkeys(meter.counters, 0.0)
        self._taken = dict.fromkeys(meter.counters, 0.0)
        self._replayed = 0.0
        self._warnings: list[str] = []

    @property
    def total(self) -> float:
        """Joules of all devices since the meter was opened, as of the last reading.

        What a counter lost from sight (a fall, a failure) is in no total: it is unknown.
        """
        return sum(self._last.values()) + self._replayed

    @property
    def attributed(self) -> float:
        """Joules of all calls whose window has closed and whose joules are known."""
        return sum(self._attributed.values()) + self._replayed

    @property
    def overhead(self) -> float:
        """total - attributed: loading, learning, idle between windows and of devices that no call used."""
        return self.total - self.attributed

    @property
    def replays(self) -> bool:
        """Whether joules come from a recorded table, whatever runs where."""
        return self._meter.replays

    def sources(self, devices: Sequence[str]) -> tuple[str, ...]:
        """The counters that calls on `devices` draw on: calls that share one must not overlap."""
        return self._meter.sources(devices)

    def take_overhead(self) -> dict[str, float]:
        """Joules of overhead since last taken, by kind of meter, after reading every counter.

        Commit them with the window's rows: what is taken over a run sums to `overhead`.
        """
        if self._spans is not None:
            raise RuntimeError("overhead is known between windows")
        taken: dict[str, float] = {}
        for source, counter in self._meter.counters.items():
            self._read(source)
            # rounding may leave -1e-13 J
            fresh = max(0.0, self._last[source] - self._attributed[source] - self._taken[source])
            self._taken[source] += fresh
            taken[counter.kind] = taken.get(counter.kind, 0.0) + fresh
        return taken

    def accounts(self) -> dict[str, tuple[float, float]]:
        """By source, after reading it: joules since the meter was opened, and those of them that calls took."""
        for source in self._meter.counters:
            self._read(source)
        return {source: (self._last[source], self._attributed[source]) for source in self._meter.counters}

    def take_warnings(self) -> list[str]:
        """What happened to counters since last taken, one line each."""
        taken, self._warnings = self._warnings, []
        return taken

    @contextmanager
    def window(self) -> Iterator[None]:
        """One window of the loop; its calls' joules are known when it closes, also by an exception.

        Closing may wait for a counter's tick, two periods at most. Raises the MeterError that an earlier
        window met, before anything runs.
        """
        if self.fault is not None:
            raise self.fault
        if self._spans is not None:
            raise RuntimeError("a window is open already")
        self._spans, self._calls = {}, []
        try:
            yield
        finally:
            spans, self._spans = self._spans, None
            self._settle(spans)

    @contextmanager
    def call(self, model: str, request_ids: Sequence[str], devices: Sequence[str]) -> Iterator[Call]:
        """One backend call on `devices`, whose work is done when the block ends (synchronise first).

        A call that raises is billed to nobody: its joules are overhead. Raises MeterError, before
        anything runs, for a device without a meter or a request without a recorded outcome.
        """
        spans = self._spans
        if spans is None:
            raise RuntimeError("a call needs an open window")
        call = Call(model, request_ids, self._meter.kind(devices))
        sources = self._meter.sources(devices)
        call._replayed = self._meter.replayed(model, request_ids)
        if overlapping := self._busy.intersection(sources):
            raise RuntimeError(f"two calls at once on {', '.join(sorted(overlapping))}")
        self._busy.update(sources)
        try:
            starts = {source: self._read(source) for source in sources}
            started = self._clock()
            yield call
            call.seconds = self._clock() - started
            self._calls.append(call)
            for source, start in starts.items():
                end = self._read(source)
                if start is None or end is None:
                    call.fault = str(self._dead[source])
                else:
                    spans.setdefault(source, []).append(_Span(call, start, end))
        finally:
            self._busy.difference_update(sources)

    def _read(self, source: str) -> _Reading | None:
        """None where the counter has failed for good. A reading's time is taken before it, so that a wait
        for the counter shows as part of the span."""
        if source in self._dead:
            return None
        now = self._clock()
        try:
            self._last[source] = self._meter.counters[source].read()
        except CounterReset as reset:
            self._resets[source] += 1
            self._warnings.append(f"{source}: {reset}")
        except MeterError as error:
            self._fail(source, error)
            return None
        return _Reading(self._last[source], now, self._resets[source])

    def _fail(self, source: str, error: MeterError) -> None:
        self._dead[source] = error
        self.fault = self.fault or error

    def _settle(self, spans_by_source: dict[str, list[_Span]]) -> None:
        for source, spans in spans_by_source.items():
            period = self._meter.counters[source].period
            for group in _groups(spans, period):
                self._bill(source, group, period)
        for call in self._calls:
            call._settled = True
            if call._replayed is not None:
                call._parts["replay"] = sum(joules or 0.0 for joules, _ in call._replayed)
                call.seconds = sum(seconds or 0.0 for _, seconds in call._replayed)
                self._replayed += call._parts["replay"]
            elif call.fault is None:  # one unknown part makes the whole unknown; the rest stays in overhead
                for source, joules in call._parts.items():
                    self._attributed[source] += joules

    def _bill(self, source: str, group: _Group, period: float) -> None:
        first, last = group.spans[0].start, group.spans[-1].end
        end: _Reading | None = last
        if group.seconds < period or last.joules <= first.joules:
            end = self._await_tick(source, last, period)
        calls = [span.call for span in group.spans]
        if end is None or end.resets != first.resets:
            for call in calls:
                call.fault = str(
                    self._dead.get(source) or f"the counter of {source} fell or leapt while the call ran"
                )
            return
        joules = end.joules - first.joules
        tokens = sum(generation.output_tokens for call in calls for generation in call.generations)
        if joules <= 0 and tokens > 0:
            counter = self._meter.counters[source]
            error = MeterError(
                f"the {counter.kind} counter of {source} stood still over {group.seconds:.2g} s in which "
                f"{tokens} tokens were generated ({counter.provenance}): their joules are left null. What is "
                "finished stays; take --meter estimate to go on without this counter"
            )
            self._fail(source, error)
            for call in calls:
                call.fault = str(error)
            return
        seconds = [span.end.seconds - span.start.seconds for span in group.spans]
        gaps = [
            gap
            for before, after in zip(group.spans, group.spans[1:], strict=False)
            if (gap := after.start.seconds - before.end.seconds) >= RESOLVED_PERIODS * period
        ]
        shares = _share(joules, seconds + gaps) if sum(seconds) > 0 else _share(joules, [1.0] * len(calls))
        for call, share in zip(calls, shares, strict=False):  # the gaps' shares are left over, as overhead
            call._parts[source] = share

    def _await_tick(self, source: str, end: _Reading, period: float) -> _Reading | None:
        """The counter's next change after `end`. It is due within a period; a late one gets a second."""
        deadline = self._clock() + RESOLVED_PERIODS * period
        reading = self._read(source)
        while reading is not None and reading.joules <= end.joules and reading.resets == end.resets:
            if self._clock() >= deadline:
                break
            self._sleep(period / 20)
            reading = self._read(source)
        return reading


def _groups(spans: Sequence[_Span], period: float) -> list[_Group]:
    """`spans` of one source, in order of time, in groups that the counter can tell apart."""
    enough, resolved = GROUP_PERIODS * period, RESOLVED_PERIODS * period
    groups: list[_Group] = []
    for span in spans:
        short = span.end.seconds - span.start.seconds < enough
        last = groups[-1] if groups else None
        # a group that is long enough is closed; what follows it and stays short is folded back below
        if short and last and last.short and last.seconds < enough and _gap(last.spans, [span]) < resolved:
            last.spans.append(span)
        else:
            groups.append(_Group([span], short))
    position = 0
    while position < len(groups):
        group = groups[position]
        before = groups[position - 1] if position > 0 else None
        after = groups[position + 1] if position + 1 < len(groups) else None
        tail = (
            before is not None
            and before.short
            and group.short
            and group.seconds < enough
            and _gap(before.spans, group.spans) < resolved
        )
        if not tail and (group.seconds >= resolved or (before is None and after is None)):
            position += 1
            continue
        left = before is not None and (
            tail or after is None or _gap(before.spans, group.spans) <= _gap(group.spans, after.spans)
        )
        # fold the pair into one and look at it again: it may still be too short
        first = position - 1 if left else position
        pair = groups[first : first + 2]
        groups[first : first + 2] = [_Group(pair[0].spans + pair[1].spans, pair[0].short and pair[1].short)]
        position = first
    return groups


def _gap(before: Sequence[_Span], after: Sequence[_Span]) -> float:
    return after[0].start.seconds - before[-1].end.seconds
