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

Calls that run beside each other on one counter (`call(..., beside=True)`) are read whenever one of them starts or ends.
What was read between two such moments is shared out by the joules that each call is expected to take (`Call.expected`,
by the model's calibration), spread evenly over its seconds. Stretches under `RESOLVED_PERIODS` periods join the next.

A call's joules are known as soon as no later call can join its group: with the next group, and at the latest when its
window closes. In an eager window a call that is long enough to be read by itself is settled when it ends; a call too
short to be read that comes after it then waits for the counter instead of joining it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from messcli.energy.counter import CounterReset
from messcli.energy.meter import Meter
from messcli.errors import MeterError
from messcli.records import Generation

# Both ends of a reading are off by up to a period: over 10 periods that is 4 % (standard deviation), and
# what one call loses its neighbour gains.
GROUP_PERIODS = 10
# A span of two periods holds a tick even when ticks come late.
RESOLVED_PERIODS = 2

# What overhead is for.
STARTING = "starting"  # from opening the meter to the first window: libraries, configurations, tokenizers
LOADING = "loading models"
THINKING = "deciding and learning"  # between windows: predictions, the price, commits

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


class _Together:
    """Calls of one source that run beside each other: those that run, and those that ended and aren't billed whole.

    Their time is cut where one starts or ends. What ended waits for those that began before its end, whose `expected`
    isn't known yet.
    """

    def __init__(self) -> None:
        self.spans: list[_Span] = []
        self.running: dict[Call, _Reading] = {}  # since when
        self._cut: _Reading | None = None  # up to here everything is billed

    @property
    def begins(self) -> _Reading:
        """Where the first stretch that isn't billed begins; there are spans."""
        first = min((span.start for span in self.spans), key=lambda reading: reading.seconds)
        return first if self._cut is None or self._cut.seconds < first.seconds else self._cut

    def stretches(self, resolved: float, *, everything: bool) -> Iterator[_Stretch]:
        """The next ones that can be billed, of at least `resolved` seconds: what is shorter joins its neighbour."""
        if not self.spans:
            return
        begins = self.begins
        since = min((start.seconds for start in self.running.values()), default=math.inf)
        moments = {reading.seconds: reading for span in self.spans for reading in (span.start, span.end)}
        times = [
            begins.seconds,
            *(s for s in sorted(moments) if begins.seconds < s and (everything or s <= since)),
        ]
        ends = [0]
        for place in range(1, len(times)):
            if times[place] - times[ends[-1]] >= resolved:
                ends.append(place)
        if everything and ends[-1] < len(times) - 1:
            ends[max(1, len(ends) - 1) :] = [len(times) - 1]
        moments[begins.seconds] = begins
        for one, other in pairwise(ends):
            inside = list(pairwise(times[one : other + 1]))
            idle = math.fsum(b - a for a, b in inside if b - a >= resolved and not self._ran(a, b))
            first, last = moments[times[one]], moments[times[other]]
            self._cut = last
            yield _Stretch(first, last, self._ran(first.seconds, last.seconds), idle)

    def _ran(self, first: float, last: float) -> dict[Call, float]:
        shares: dict[Call, float] = {}
        for span in self.spans:
            both = min(span.end.seconds, last) - max(span.start.seconds, first)
            if both > 0:
                shares[span.call] = span.call.expected * both / (span.end.seconds - span.start.seconds)
        return shares

    def take_finished(self) -> list[_Span]:
        """The calls whose last stretch is billed."""
        until = -math.inf if self._cut is None else self._cut.seconds
        finished = [span for span in self.spans if span.end.seconds <= until]
        self.spans = [span for span in self.spans if span.end.seconds > until]
        return finished


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A time in which calls ran beside each other."""

    first: _Reading
    last: _Reading
    shares: Mapping[Call, float]  # relative joules of each call that ran
    idle_seconds: float  # in which none ran, as far as the counter can tell

    @property
    def seconds(self) -> float:
        return self.last.seconds - self.first.seconds


class Call:
    """A stretch of one model's work. The caller sets `generations`, or `work`; its joules are known when it is settled.

    Attributes:
        work: per request that ran, the prompt tokens read and the output tokens written meanwhile.
        expected: joules by the model's calibration, for a call beside others: what they read together is split by it.
    """

    def __init__(self, model: str, request_ids: Sequence[str], kind: str, sources: Sequence[str]) -> None:
        self.model = model
        self.request_ids = tuple(request_ids)
        self.kind = kind  # for the rows' `meter`
        self.generations: Sequence[Generation] = ()
        self.work: Sequence[tuple[int, int]] | None = None
        self.expected = 0.0
        self.seconds = 0.0
        self.fault: str | None = None  # why joules are None
        self._dropped = False
        self._beside = False
        self._unsettled = set(sources)
        self._ended = False
        self._parts: dict[str, float] = {}  # source -> joules
        self._replayed: list[tuple[float | None, float | None]] | None = None

    def drop(self) -> None:
        """It was no work: its joules are overhead."""
        self._dropped = True

    @property
    def settled(self) -> bool:
        """Whether its joules are known, or known to be unknown."""
        return self._ended and not self._unsettled

    @property
    def joules(self) -> float | None:
        """Joules of the call over all its devices; None where a counter failed, and `fault` says how."""
        if not self.settled:
            raise RuntimeError(
                "a call's joules are known when it is settled, at the latest when its window closes"
            )
        return None if self.fault is not None else sum(self._parts.values())

    @property
    def tokens(self) -> Sequence[tuple[int, int]]:
        """Per request: prompt and output tokens."""
        if self.work is not None:
            return self.work
        return [(made.prompt_tokens, made.output_tokens) for made in self.generations]

    def bills(self, weight: Weight = token_weight) -> list[Bill]:
        """One bill per request, in order; their joules and seconds sum to the call's."""
        joules = self.joules
        if self._replayed is not None:
            return [Bill(*numbers) for numbers in self._replayed]
        if self.work is None and len(self.generations) != len(self.request_ids):
            raise RuntimeError(f"{len(self.generations)} generations for {len(self.request_ids)} requests")
        weights = [weight(*tokens) for tokens in self.tokens]
        seconds = _share(self.seconds, weights)
        if joules is None:
            return [Bill(None, part) for part in seconds]
        return [Bill(*parts) for parts in zip(_share(joules, weights), seconds, strict=True)]


class EnergyLedger:
    """Attributes a meter's joules to calls, and everything else to overhead.

        with ledger.window():
            with ledger.call(model, ids, backend.devices) as call:
                call.generations = backend.generate(batch)
        call.bills()

    A meter that fails never costs the window's work: calls whose joules can't be known have `joules`
    None, `fault` is set, and the next `window()` raises it. A counter that merely fell (CounterReset)
    leaves only the calls around the fall unknown; `take_warnings` tells.

    Calls on one device follow each other, unless all of them are `beside`; on devices with different counters they may
    overlap, in threads.
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
        self._lock = threading.RLock()  # calls end in threads
        self._spans: dict[str, list[_Span]] | None = None  # by source, not settled; None between windows
        self._eager = False
        self._together: dict[str, _Together] = {}  # by source, calls that run beside each other
        self._busy: dict[str, dict[Call, float]] = {}  # by source, calls that run: joules at their start
        self._dead: dict[str, MeterError] = {}
        self._last = dict.fromkeys(meter.counters, 0.0)
        self._resets = dict.fromkeys(meter.counters, 0)
        self._attributed = dict.fromkeys(meter.counters, 0.0)
        self._taken = dict.fromkeys(meter.counters, 0.0)
        self._replayed = 0.0
        self._warnings: list[str] = []
        self._named: dict[str, float] = {}
        self._stretch = STARTING, 0.0  # what is done now, outside of windows, and the total when it began

    @property
    def total(self) -> float:
        """Joules of all devices since the meter was opened, as of the last reading.

        What a counter lost from sight (a fall, a failure) is in no total: it is unknown.
        """
        return sum(self._last.values()) + self._replayed

    @property
    def attributed(self) -> float:
        """Joules of all calls that are settled and whose joules are known."""
        return sum(self._attributed.values()) + self._replayed

    @property
    def overhead(self) -> float:
        """total - attributed: loading, learning, idle between windows and of devices that no call used."""
        return self.total - self.attributed

    @property
    def named(self) -> Mapping[str, float]:
        """Joules of overhead by what they were for: STARTING, LOADING, THINKING. The rest is waiting and idling."""
        return dict(self._named)

    @contextmanager
    def overhead_of(self, what: str) -> Iterator[None]:
        """Name what every counter reads meanwhile, which is overhead: no call runs."""
        before = self._read_all()
        try:
            yield
        finally:
            joules = self._read_all() - before
            self._name(what, joules)
            stretch, began = self._stretch
            self._stretch = stretch, began + joules  # it is no part of what it happened in

    def _name(self, what: str, joules: float) -> None:
        self._named[what] = self._named.get(what, 0.0) + joules

    def _read_all(self) -> float:
        with self._lock:
            for source in self._meter.counters:
                self._read(source)
        return sum(self._last.values())

    def _name_stretch(self) -> None:
        """Name what was read outside of windows since last named."""
        what, before = self._stretch
        now = self._read_all()
        self._name(what, now - before)
        self._stretch = what, now

    @property
    def replays(self) -> bool:
        """Whether joules come from a recorded table, whatever runs where."""
        return self._meter.replays

    def sources(self, devices: Sequence[str]) -> tuple[str, ...]:
        """The counters that calls on `devices` draw on: calls that share one must not overlap."""
        return self._meter.sources(devices)

    def take_overhead(self) -> dict[str, float]:
        """Joules of overhead since last taken, by kind of meter.

        Between windows every counter is read first; within one it is the overhead before the first call that isn't
        settled. Commit them with the rows: what is taken over a run sums to `overhead`.
        """
        taken: dict[str, float] = {}
        if self._spans is None:
            self._name_stretch()
        with self._lock:
            for source, counter in self._meter.counters.items():
                if self._spans is None:
                    self._read(source)
                # rounding may leave -1e-13 J
                fresh = max(0.0, self._decided(source) - self._attributed[source] - self._taken[source])
                self._taken[source] += fresh
                taken[counter.kind] = taken.get(counter.kind, 0.0) + fresh
        return taken

    def _decided(self, source: str) -> float:
        """The counter's value up to which every joule is known to be somebody's or overhead."""
        known = list(self._busy.get(source, {}).values())
        if self._spans and (pending := self._spans.get(source)):
            known.append(pending[0].start.joules)
        if (together := self._together.get(source)) and together.spans:
            known.append(together.begins.joules)
        return min(known, default=self._last[source])

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
    def window(self, *, eager: bool = False, goes_on: bool = False) -> Iterator[None]:
        """One window of the loop; its calls' joules are known when it closes, also by an exception.

        Args:
            eager: settle calls that are long enough as soon as they end.
            goes_on: it is more of the work before it, which a failed counter doesn't end: its joules are unknown.

        Closing may wait for a counter's tick, two periods at most.

        Raises:
            MeterError: that an earlier window met, before anything runs.
        """
        if self.fault is not None and not goes_on:
            raise self.fault
        if self._spans is not None:
            raise RuntimeError("a window is open already")
        self._name_stretch()
        self._spans, self._eager = {}, eager
        try:
            yield
        finally:
            with self._lock:
                spans, self._spans = self._spans, None
                for source in spans:
                    self._settle(source, spans[source], everything=True)
                for source, together in self._together.items():
                    self._settle_together(source, together, everything=True)
                self._together = {}
            self._stretch = THINKING, self._read_all()

    @contextmanager
    def call(
        self, model: str, request_ids: Sequence[str], devices: Sequence[str], *, beside: bool = False
    ) -> Iterator[Call]:
        """One backend call on `devices`, whose work is done when the block ends (synchronise first).

        `beside`: others that are `beside` too may run on the same devices; the caller sets `expected`.
        A call that raises is billed to nobody: its joules are overhead. Raises MeterError, before
        anything runs, for a device without a meter or a request without a recorded outcome.
        """
        spans = self._spans
        if spans is None:
            raise RuntimeError("a call needs an open window")
        sources = self._meter.sources(devices)
        together = self._together
        call = Call(model, request_ids, self._meter.kind(devices), sources)
        call._replayed = self._meter.replayed(model, request_ids)
        with self._lock:
            call._beside = beside
            others = {source: self._busy.get(source, {}) for source in sources}
            if overlapping := [
                source
                for source, running in others.items()
                if not all(one._beside for one in (*running, call)) and running
            ]:
                raise RuntimeError(f"two calls at once on {', '.join(sorted(overlapping))}")
            for source in sources:
                self._busy.setdefault(source, {})[call] = self._last[source]
                if beside:
                    together.setdefault(source, _Together())
        try:
            starts = {}
            for source in sources:
                with self._lock:
                    starts[source] = start = self._read(source)
                    self._busy[source][call] = self._last[source]
                    if beside and start is not None:
                        together[source].running[call] = start
            started = self._clock()
            yield call
            call.seconds = self._clock() - started
            if not call._dropped:
                with self._lock:
                    self._end(call, starts, spans, together if beside else {})
        finally:
            with self._lock:
                for source in sources:
                    self._idle(source, call, together)

    def _idle(self, source: str, call: Call, together: Mapping[str, _Together]) -> None:
        self._busy[source].pop(call, None)
        if source in together:
            together[source].running.pop(call, None)

    def _end(
        self,
        call: Call,
        starts: Mapping[str, _Reading | None],
        spans: dict[str, list[_Span]],
        together: Mapping[str, _Together],
    ) -> None:
        for source, start in starts.items():
            end = self._read(source)
            self._idle(source, call, together)
            if start is None or end is None:
                self._give_up(call, source, str(self._dead[source]))
            elif together:
                together[source].spans.append(_Span(call, start, end))
            else:
                spans.setdefault(source, []).append(_Span(call, start, end))
        call._ended = True
        if call._replayed is not None:
            call._parts["replay"] = sum(joules or 0.0 for joules, _ in call._replayed)
            call.seconds = sum(seconds or 0.0 for _, seconds in call._replayed)
            self._replayed += call._parts["replay"]
        for source in starts:
            if source in spans:
                self._settle(source, spans[source], everything=False)
            if source in together:
                self._settle_together(source, together[source], everything=False)

    def replay(self, model: str, request_ids: Sequence[str]) -> list[Bill] | None:
        """The recorded bills of requests that `model` has answered; None where counters are read.

        Raises MeterError for a request without a recorded outcome.
        """
        numbers = self._meter.replayed(model, request_ids)
        if numbers is None:
            return None
        with self._lock:
            self._replayed += sum(joules or 0.0 for joules, _ in numbers)
        return [Bill(*pair) for pair in numbers]

    def check(self, model: str, request_ids: Sequence[str], devices: Sequence[str]) -> str:
        """The kind of meter that bills calls of `model` on `devices`.

        Raises MeterError for a device without a meter, or a request without a recorded outcome.
        """
        self._meter.sources(devices)
        self._meter.replayed(model, request_ids)
        return self._meter.kind(devices)

    def forgo(self, call: Call, part: float) -> float:
        """Make `part` (0 to 1) of a settled call's joules overhead: they went into an answer that never came.

        Returns:
            joules.
        """
        forgone = 0.0
        with self._lock:
            for source, joules in call._parts.items():
                if call.fault is None and source in self._attributed:
                    self._attributed[source] -= part * joules
                    forgone += part * joules
        return forgone

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

    def _settle(self, source: str, spans: list[_Span], *, everything: bool) -> None:
        """Bill what no later call can change, or everything; it is taken out of `spans`."""
        period = self._meter.counters[source].period
        groups = _groups(spans, period)
        final = len(groups) if everything else _final(groups, period, eager=self._eager)
        for number, group in enumerate(groups[:final], start=1):
            self._bill(source, group, period, is_last=everything and number == final)
            for span in group.spans:
                span.call._unsettled.discard(source)
        del spans[: sum(len(group.spans) for group in groups[:final])]

    def _settle_together(self, source: str, together: _Together, *, everything: bool) -> None:
        """Bill the stretches that no call will be known to have run in later on, or everything."""
        period = self._meter.counters[source].period
        for stretch in together.stretches(RESOLVED_PERIODS * period, everything=everything):
            end: _Reading | None = stretch.last
            if everything and stretch.shares and stretch.last.joules <= stretch.first.joules:
                end = self._await_tick(source, stretch.last, period)
            why, joules = None, 0.0
            if end is None or end.resets != stretch.first.resets:
                why = str(
                    self._dead.get(source) or f"the counter of {source} fell or leapt while the call ran"
                )
            else:
                joules = end.joules - stretch.first.joules
                tokens = sum(written for call in stretch.shares for _, written in call.tokens)
                if joules <= 0 and tokens:
                    why = str(self._stood_still(source, stretch.seconds, tokens))
            joules, _ = _share(joules, [stretch.seconds - stretch.idle_seconds, stretch.idle_seconds])
            for call, part in zip(stretch.shares, _share(joules, list(stretch.shares.values())), strict=True):
                if why is not None:
                    self._give_up(call, source, why)
                elif call.fault is None:
                    call._parts[source] = call._parts.get(source, 0.0) + part
                    self._attributed[source] += part
        for span in together.take_finished():
            span.call._unsettled.discard(source)

    def _stood_still(self, source: str, seconds: float, tokens: int) -> MeterError:
        counter = self._meter.counters[source]
        error = MeterError(
            f"the {counter.kind} counter of {source} stood still over {seconds:.2g} s in which "
            f"{tokens} tokens were generated ({counter.provenance}): their joules are left null. What is "
            "finished stays; take --meter estimate to go on without this counter"
        )
        self._fail(source, error)
        return error

    def _give_up(self, call: Call, source: str, why: str) -> None:
        """One unknown part makes the whole unknown; the rest is overhead."""
        if call.fault is None:
            for other, joules in call._parts.items():
                self._attributed[other] -= joules
        call.fault = why
        call._unsettled.discard(source)

    def _bill(self, source: str, group: _Group, period: float, *, is_last: bool) -> None:
        first, last = group.spans[0].start, group.spans[-1].end
        end: _Reading | None = last
        if is_last and (group.seconds < period or last.joules <= first.joules):
            end = self._await_tick(source, last, period)
        calls = [span.call for span in group.spans]
        if end is None or end.resets != first.resets:
            why = str(self._dead.get(source) or f"the counter of {source} fell or leapt while the call ran")
            for call in calls:
                self._give_up(call, source, why)
            return
        joules = end.joules - first.joules
        tokens = sum(written for call in calls for _, written in call.tokens)
        if joules <= 0 and tokens > 0:
            error = self._stood_still(source, group.seconds, tokens)
            for call in calls:
                self._give_up(call, source, str(error))
            return
        seconds = [span.end.seconds - span.start.seconds for span in group.spans]
        gaps = [
            gap
            for before, after in zip(group.spans, group.spans[1:], strict=False)
            if (gap := after.start.seconds - before.end.seconds) >= RESOLVED_PERIODS * period
        ]
        shares = _share(joules, seconds + gaps) if sum(seconds) > 0 else _share(joules, [1.0] * len(calls))
        for call, share in zip(calls, shares, strict=False):  # the gaps' shares are left over, as overhead
            if call.fault is None:
                call._parts[source] = share
                self._attributed[source] += share

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


def _final(groups: Sequence[_Group], period: float, *, eager: bool) -> int:
    """How many groups, from the first on, no later call can join."""
    if not groups:
        return 0
    enough, resolved = GROUP_PERIODS * period, RESOLVED_PERIODS * period
    last = groups[-1]
    if not last.short and eager:
        return len(groups)
    if len(groups) == 1:
        return 0
    before = groups[-2]
    is_tail = before.short and last.seconds < enough and _gap(before.spans, last.spans) < resolved
    return len(groups) - (2 if is_tail or last.seconds < resolved else 1)


def _gap(before: Sequence[_Span], after: Sequence[_Span]) -> float:
    return after[0].start.seconds - before[-1].end.seconds
