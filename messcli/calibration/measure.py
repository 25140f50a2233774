"""Measuring what each model of a zoo costs by prompt and output length.

Every cell (a model, a prompt length, an output length) is measured again and again, in rounds of shuffled
order so that drift falls on all alike, until the 95 % interval of its mean is narrow enough or the time is up.
Knows backends and meters; the file's format is `messcli/calibration/file.py`'s.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from messcli import __version__
from messcli.calibration.file import (
    FEWEST_REPETITIONS,
    INTERVAL,
    Calibration,
    Cell,
    Coefficients,
    ModelCalibration,
    OwnPrompts,
    default_path,
    hardware,
    versions,
)
from messcli.calibration.fit import fit, fit_load, nonnegative
from messcli.calibration.readings import Kept, Key, Readings, cell_of, cells_of, setup_of
from messcli.energy import GROUP_PERIODS, Call, EnergyLedger, Meter, open_meter
from messcli.errors import CalibrationError, ModelError, UsageError
from messcli.files.requests import InputFields, open_input, read_requests
from messcli.models.backend import Backend, Exact, create, share_weights
from messcli.records import Generation, Rejected, Request
from messcli.signals import Stop, stop_signals
from messcli.zoo import CheckpointOptions, ModelSpec, Zoo, load_zoo

BUDGET_SECONDS = 600.0
QUICK_SECONDS = 40.0
LEAST_SECONDS = 0.02  # a reading lasts at least so long, and ten periods of its counter
WARM_SECONDS = 5.0  # a cell's first call counts only if it is longer: what is allocated once is lost in it
LONGEST_PROMPT = 1024  # tokens, in the default grid
PROMPT_SHARES, OUTPUT_SHARES = (1 / 16, 1 / 4, 1 / 2, 1), (1 / 8, 1 / 2, 1)  # of the longest
QUICK_PROMPT_SHARES, QUICK_OUTPUT_SHARES = (1 / 8, 1 / 2, 1), (1 / 4, 1)
QUANTILES, QUICK_QUANTILES = (0.05, 0.35, 0.65, 0.95), (0.1, 0.5, 0.9)
PROMPTS_READ = 2000
PROMPTS_TOKENIZED = 500
OWN_BATCHES = 4  # of the user's prompts that are answered
LOADS = (
    1,
    8,
    32,
    128,
    512,
)  # requests at a time, as far as memory allows; more say more of full engines, and take longer

# Tokens per character where there are no prompts of the user's.
SAMPLE_TEXT = (
    "The old harbour lies below the town, where three rivers meet the sea. Every morning the boats go out "
    "before sunrise, and by noon their catch is sold on the market: herring, cod and, in a good year, crabs. "
    "What nobody buys goes to the gulls. How many people live there? About 2,400, says the mayor, and in "
    "summer twice as many. Please summarise the paragraph above in one short sentence, in your own words. "
)

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CalibrateConfig:
    """What `messcli calibrate` was asked to do. None means: as the zoo file says, or the default."""

    prompts: str | None = None  # the user's own, in the input format of `route`
    output: str | None = None
    zoo: str | None = None
    meter: str = "auto"
    batch_size: int | None = None
    window: int = 64  # of `route`
    prompt_tokens: tuple[int, ...] = ()
    output_tokens: tuple[int, ...] = ()
    quick: bool = False
    budget_seconds: float | None = None
    fresh: bool = False
    seed: int = 0
    format: str | None = None  # of the prompts; None: guessed from the first line
    input_fields: InputFields = field(default_factory=InputFields)


@dataclass(frozen=True, slots=True)
class CalibrateProgress:
    """How far the measuring is."""

    seconds: float  # so far
    seconds_left: float  # expected; never more than the budget
    converged: int  # cells
    cells: int
    readings: int


@dataclass(frozen=True, slots=True)
class CalibrateSummary:
    """What came of it."""

    calibration: Calibration | None  # None: stopped before every cell was measured
    output: str
    readings: int  # of this run
    seconds: float
    stopped_by: int | None  # signal number

    def text(self, *, net: bool = False) -> list[str]:
        """The table, for people."""
        calibration = self.calibration
        if calibration is None:
            return []
        lines = []
        for model in calibration.models:
            lines += ["", *_model_lines(model, net=net)]
        state = "converged" if calibration.converged else "NOT converged: run again to go on measuring"
        lines += ["", *(f"warning: {warning}" for warning in calibration.warnings)]
        lines.append(f"{self.readings} readings in {self.seconds:.0f} s; {state}")
        return lines[1:]


def _model_lines(model: ModelCalibration, *, net: bool) -> list[str]:
    kind = "net of idle" if net else "gross"
    lines = [
        f"{model.name}: joules per request ({kind}, {model.meter}) in batches of {model.batch_size}; "
        f"idle {model.idle_watts:.3g} W",
        f"{'prompt':>8} {'output':>8} {'joules':>11} {'± 95 %':>9} {'n':>4}",
    ]
    for cell in model.cells:
        shown = cell
        if net:
            shown = replace(cell, joules=cell.net_joules(model.idle_watts))
        half = shown.half_interval
        width = "?" if half is None or not shown.mean_joules else f"{half / shown.mean_joules:.1%}"
        note = "" if cell.converged else "  not converged"
        lines.append(
            f"{cell.prompt_tokens:>8} {cell.output_tokens:>8} {shown.mean_joules:>11.4g} {width:>9} "
            f"{len(cell.joules):>4}{note}"
        )
    fit = model.net if net else model.gross
    names = ("", " p", " o", " (p o + o²/2)")
    errors = ["?"] * 4 if fit.standard_errors is None else [f"{e:.1g}" for e in fit.standard_errors.values()]
    parts = zip(fit.coefficients.values(), errors, names, strict=True)
    lines.append("    E = " + " + ".join(f"({value:.3g} ± {error}){name}" for value, error, name in parts))
    if fit.left_out_error is not None:
        lines.append(f"    error at a cell that the fit didn't see: {fit.left_out_error:.1%} on average")
    lines += _load_lines(model)
    own = model.own_prompts
    if own is not None:
        lines.append(
            f"    own prompts: {own.joules:.4g} J and {own.output_tokens:.1f} output tokens per request, "
            f"{own.factor:.2f} times what batches of equal lengths take"
        )
    return lines


def _load_lines(model: ModelCalibration) -> list[str]:
    load = model.load
    if load is None:
        return []
    points = ", ".join(f"{p.joules / p.running:.3g} J with {p.running:.0f}" for p in load.points)
    error = "" if load.error is None else f"; off by {load.error:.0%} at a load that it didn't see"
    return [
        f"    in load, per output token by requests running: {points}",
        f"    a step: {load.joules_per_step:.3g} J + {load.joules_per_running_step:.3g} J per request{error}; "
        f"a prompt token {load.joules_per_prompt_token:.3g} J",
    ]


def calibrate(
    config: CalibrateConfig,
    *,
    on_progress: Callable[[CalibrateProgress], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> CalibrateSummary:
    """Measure the zoo's models and write the calibration, going on where an earlier run stopped.

    Raises:
        MessError: with what the user can do; finished readings are kept.
    """
    started = time.monotonic()
    zoo = load_zoo(config.zoo)
    if config.meter.startswith("replay:"):
        raise UsageError("--meter replay reads no energy. Calibrate with auto, or a meter that reads")
    output = config.output or str(default_path(zoo))
    budget = config.budget_seconds or (QUICK_SECONDS if config.quick else BUDGET_SECONDS)
    backends = [_exact_backend(spec, config.batch_size) for spec in zoo.models]
    share_weights(backends)
    prompts = _read_prompts(config, tell)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(tell, "cell"))
        kept = stack.enter_context(Kept.open(output))
        devices = dict.fromkeys(device for backend in backends for device in backend.devices)
        meter = open_meter(devices=tuple(devices), **zoo.metering(config.meter))
        stack.callback(meter.close)
        for line in meter.describe():
            tell(line)
        meter.require_whole_devices()
        job = _Job(config, zoo, backends, meter, prompts, stop, tell, started + budget)
        for backend in backends:
            stack.callback(backend.unload)
            backend.load()
        job.plan()
        kept.start(job.setup(), fresh=config.fresh, tell=tell)
        job.measure(kept, on_progress or (lambda _: None), started)
        seconds = time.monotonic() - started
        if missing := sum(key not in kept.readings for key in job.cells):
            if stop.signal is None:
                raise CalibrationError(
                    f"the counter failed in {missing} of {len(job.cells)} cells. Run the same command again to "
                    "go on, or take another --meter"
                )
            return CalibrateSummary(None, output, job.readings, seconds, stop.signal)
        calibration = job.result(kept.readings, kept.own_prompts)
        if stop.signal is None:
            kept.finish(calibration.dumps())
        return CalibrateSummary(calibration, output, job.readings, seconds, stop.signal)


class _ExactBackend(Backend, Exact, Protocol):
    """What can be measured."""


def _exact_backend(spec: ModelSpec, batch_size: int | None) -> _ExactBackend:
    backend = create(spec, batch_size=batch_size)
    if isinstance(backend, Exact):
        return backend
    raise CalibrationError(
        f'model "{spec.name}": the {spec.backend} backend can\'t be made to answer with exact lengths. Route '
        "without a calibration: E_m is learnt from its own readings"
    )


def _read_prompts(config: CalibrateConfig, tell: Callable[[str], None]) -> list[Request]:
    if config.prompts is None:
        return []
    requests, rejected = [], 0
    with open_input(config.prompts) as handle:
        for line in read_requests(handle, config.prompts, config.input_fields, config.format):
            if isinstance(line, Rejected):
                rejected += 1
                continue
            requests.append(line)
            if len(requests) == PROMPTS_READ:
                break
    if not requests:
        raise CalibrationError(f"{config.prompts}: holds no request. Name prompts, or leave them out")
    if rejected:
        tell(f"warning: {config.prompts}: {rejected} lines are no requests, and are left out")
    return requests


@dataclass(frozen=True, slots=True)
class _Model:
    """What is decided for a model before it is measured."""

    backend: _ExactBackend
    batch_size: int
    most_running: int  # requests at a time, at most LOADS[-1]
    meter: str
    least_seconds: float  # of a reading
    constant_prompt_tokens: float
    prompt_tokens_per_character: float

    @property
    def name(self) -> str:
        return self.backend.spec.name

    @property
    def signature(self) -> Mapping[str, Any]:
        return self.backend.spec.signature()

    @property
    def device(self) -> str:
        return self.backend.spec.device


@dataclass(slots=True)
class _OwnSample:
    """Answers to some of the user's prompts, in batches as `route` makes them."""

    joules: float = 0.0
    answers: list[Generation] = field(default_factory=list)

    def summed_up(self, coefficients: Coefficients) -> OwnPrompts | None:
        if not self.answers or self.joules <= 0:
            return None
        count = len(self.answers)
        length = math.fsum(answer.output_tokens for answer in self.answers) / count
        equal = math.fsum(coefficients.joules(answer.prompt_tokens, length) for answer in self.answers)
        return OwnPrompts(count, self.joules / count, length, self.joules / equal)


class _Job:
    """One calibration: models loaded, cells planned, readings made."""

    def __init__(
        self,
        config: CalibrateConfig,
        zoo: Zoo,
        backends: Sequence[_ExactBackend],
        meter: Meter,
        prompts: Sequence[Request],
        stop: Stop,
        tell: Callable[[str], None],
        deadline: float,
    ) -> None:
        self.readings = 0  # of this run
        self.cells: list[Key] = []  # the grid: each is measured once at least, whatever the time
        self.load_cells: list[Key] = []  # as far as the time goes
        self._config = config
        self._zoo = zoo
        self._backends = backends
        self._meter = meter
        self._ledger = EnergyLedger(meter)
        self._prompts = prompts
        self._stop = stop
        self._tell = tell
        self._deadline = deadline
        self._models: dict[str, _Model] = {}
        self._idle_watts: dict[str, float] = {}
        self._own: dict[str, _OwnSample] = {}
        self._warnings: dict[str, None] = {}
        self._seconds: dict[Key, float] = {}  # that a reading takes
        self._rng = random.Random(config.seed)  # noqa: S311  # drawn to be repeatable, not secret

    # ---- what is to be measured ------------------------------------------------------------------

    def plan(self) -> None:
        for backend in self._backends:
            samples = self._samples(backend)
            lengths = np.array([len(request.prompt) for request in samples], float)
            tokens = np.array([backend.prompt_tokens(request) for request in samples], float)
            constant, per_character = nonnegative(np.stack([np.ones_like(lengths), lengths], axis=1), tokens)
            prompt_lengths = self._prompt_lengths(backend, tokens)
            probe = samples[int(np.argmax(tokens))]
            sources = self._meter.sources(backend.devices)
            period = max(self._meter.counters[source].period for source in sources)
            model = _Model(
                backend,
                self._batch_size(backend, probe),
                max(map(len, backend.plan([probe] * LOADS[-1]))),
                self._meter.kind(backend.devices),
                max(LEAST_SECONDS, GROUP_PERIODS * period),
                constant,
                per_character,
            )
            self._models[model.name] = model
            outputs = self._output_lengths(backend.spec.max_new_tokens)
            self.cells += [Key(model.name, p, o, model.batch_size) for p in prompt_lengths for o in outputs]
            self.load_cells += self._loads(model, prompt_lengths, outputs)

    def _samples(self, backend: Backend) -> list[Request]:
        if self._prompts:
            limit = backend.context_length
            few = self._prompts[:: max(1, len(self._prompts) // PROMPTS_TOKENIZED)]
            fitting = [r for r in few if limit is None or backend.prompt_tokens(r) <= limit]
            if not fitting:
                raise CalibrationError(
                    f'model "{backend.spec.name}": every prompt is longer than its context. Calibrate without them'
                )
            return fitting
        return [Request(f"sample {n}", SAMPLE_TEXT[:n]) for n in range(20, len(SAMPLE_TEXT), 40)]

    def _prompt_lengths(self, backend: Backend, tokens: Array) -> list[int]:
        limit, quick = backend.context_length, self._config.quick
        if self._config.prompt_tokens:
            lengths = [n for n in self._config.prompt_tokens if limit is None or n <= limit]
            if not lengths:
                raise UsageError(
                    f'--prompt-tokens: model "{backend.spec.name}" takes at most {limit}. Give shorter ones'
                )
        elif self._prompts:
            wanted = QUICK_QUANTILES if quick else QUANTILES
            lengths = [round(float(n)) for n in np.quantile(tokens, wanted)]
        else:
            most = LONGEST_PROMPT // 4 if quick else LONGEST_PROMPT
            most = most if limit is None else min(most, limit)
            shares = QUICK_PROMPT_SHARES if quick else PROMPT_SHARES
            lengths = [round(most * share) for share in shares]
        return sorted({max(1, n) for n in lengths})

    def _output_lengths(self, most: int) -> list[int]:
        if self._config.output_tokens:
            lengths = [n for n in self._config.output_tokens if n <= most]
            if not lengths:
                raise UsageError(f"--output-tokens: max_new_tokens of the zoo file is {most}. Give less")
            return sorted(set(lengths))
        shares = QUICK_OUTPUT_SHARES if self._config.quick else OUTPUT_SHARES
        return sorted({max(1, round(most * share)) for share in shares})

    @staticmethod
    def _loads(model: _Model, prompt_lengths: Sequence[int], outputs: Sequence[int]) -> list[Key]:
        """Two output lengths at every load: what the longer one takes more is steps."""
        longest = outputs[-1]
        shortest = outputs[0] if len(outputs) > 1 else max(1, longest // 4)
        if shortest == longest:
            return []
        typical = prompt_lengths[len(prompt_lengths) // 2]
        loads = [*(load for load in LOADS if load < model.most_running), model.most_running]
        return [Key(model.name, typical, o, load) for load in loads for o in (shortest, longest)]

    def _batch_size(self, backend: Backend, probe: Request) -> int:
        """What `route` will use: what a window leaves a model on average, if the backend takes so many at once."""
        if self._config.batch_size is not None:
            return self._config.batch_size
        share = math.ceil(self._config.window / len(self._backends))
        return min(share, max(map(len, backend.plan([probe] * share))))

    def setup(self) -> dict[str, Any]:
        return setup_of(
            list(self._models.values()), self._versions(), self._hardware(), self._zoo.energy.get("cpu_watts")
        )

    def _versions(self) -> dict[str, str]:
        return versions(self._zoo)

    def _hardware(self) -> dict[str, str]:
        return hardware(spec.device for spec in self._zoo.models)

    def _meter_description(self) -> dict[str, Any]:
        sources = {
            name: {
                "kind": counter.kind,
                "provenance": counter.provenance,
                "period_seconds": counter.period,
                "idle_watts": self._idle_watts.get(name),
            }
            for name, counter in self._meter.counters.items()
        }
        return {
            "choice": self._config.meter,
            "cpu_watts": self._zoo.energy.get("cpu_watts"),
            "sources": sources,
        }

    # ---- measuring -------------------------------------------------------------------------------

    def measure(self, kept: Kept, on_progress: Callable[[CalibrateProgress], None], started: float) -> None:
        """Rounds over the cells that haven't converged, in shuffled order, until all have or the time is up; the grid's
        first round is always finished. Loads come after it, from the smallest on."""
        known = {*self.cells, *self.load_cells}
        self.cells += [key for key in kept.readings if key not in known and self._of_grid(key)]
        self._stop.in_hand = True
        self._measure_idle()
        for model in self._models.values():
            if self._prompts and not self._over():
                self._own[model.name] = self._measure_own_prompts(model)
        self._rounds(kept, on_progress, started)
        for model in self._models.values():
            unread = [k for k in self.load_cells if k.model == model.name and k not in kept.readings]
            if unread and self._stop.signal is None:
                self._give_up(min(unread, key=lambda key: key.batch_size), kept, "the budget has ended")

    def _rounds(self, kept: Kept, on_progress: Callable[[CalibrateProgress], None], started: float) -> None:
        while todo := [key for key in self._all_cells() if not cell_of(key, kept.readings).converged]:
            self._rng.shuffle(todo)
            # cells without any reading first, and whatever the time: nothing comes of the rest without them
            todo.sort(key=lambda key: self._turn(key, kept))
            for key in todo:
                needed = key in self.cells and key not in kept.readings
                if self._stop.signal is not None or (self._over() and not needed):
                    return
                if key in self.cells or self._may_measure(key, kept):
                    self._measure_cell(key, kept)
                    on_progress(self._progress(kept, started))
            self._flag()

    def _all_cells(self) -> list[Key]:
        return list(dict.fromkeys((*self.cells, *self.load_cells)))

    def _of_grid(self, key: Key) -> bool:
        return key.model in self._models and key.batch_size == self._models[key.model].batch_size

    def _turn(self, key: Key, kept: Kept) -> int:
        """0: the grid's unread cells; then unread loads, the smallest first; last what was read."""
        if key in kept.readings:
            return 1 + LOADS[-1]
        return 0 if key in self.cells else key.batch_size

    def _may_measure(self, key: Key, kept: Kept) -> bool:
        """Whether a load may be tried: not where a smaller one says that it may take longer than is left."""
        if key not in self.load_cells:  # it was given up in this round
            return False
        if key in kept.readings:
            return True
        smaller = [
            other
            for other in self._seconds
            if other[:3] == key[:3] and other.batch_size < key.batch_size  # same lengths
        ]
        if smaller:
            before = max(smaller, key=lambda other: other.batch_size)
            most = self._seconds[before] * key.batch_size / before.batch_size
            if time.monotonic() + most > self._deadline:
                self._give_up(key, kept, "the budget may not last")
                return False
        return True

    def _give_up(self, key: Key, kept: Kept, why: str) -> None:
        """Leave out a load and all larger ones of the model that weren't read."""
        self._tell(f"{key.model}: not measured with {key.batch_size} or more requests at a time: {why}")
        self.load_cells = [
            other
            for other in self.load_cells
            if other in kept.readings or other.model != key.model or other.batch_size < key.batch_size
        ]

    def _over(self) -> bool:
        return self._stop.signal is not None or time.monotonic() >= self._deadline

    def _flag(self) -> None:
        for line in (*self._meter.warnings(), *self._ledger.take_warnings()):
            if line not in self._warnings:
                self._warnings[line] = None
                self._tell(f"warning: {line}")

    def _measure_idle(self) -> None:
        """Watts of every source with the models loaded and nothing to do."""
        self._flag()
        longest = max((counter.period for counter in self._meter.counters.values()), default=0.0)
        seconds = max(1.0 if self._config.quick else 5.0, GROUP_PERIODS * longest)
        before, began = self._meter.read(), time.monotonic()
        until = began + seconds
        while time.monotonic() < until and self._stop.signal is None:
            time.sleep(0.1)
        after, seconds = self._meter.read(), time.monotonic() - began
        self._idle_watts = {source: (after[source] - before[source]) / seconds for source in after}

    def _measure_cell(self, key: Key, kept: Kept) -> None:
        model = self._models[key.model]

        def call() -> Any:
            return model.backend.generate_exactly(key.prompt_tokens, key.output_tokens, key.batch_size)

        began = time.monotonic()
        try:
            if key not in self._seconds:
                reading = self._read(model, key.batch_size, call, 0.0)
                if time.monotonic() - began < WARM_SECONDS:
                    self._seconds[key] = max(time.monotonic() - began, model.least_seconds)
                    reading = self._read(model, key.batch_size, call, model.least_seconds)
            else:
                reading = self._read(model, key.batch_size, call, model.least_seconds)
        except ModelError as error:
            if key in self.cells or key.batch_size <= model.batch_size:
                raise
            self._give_up(key, kept, str(error))
            return
        self._seconds[key] = min(self._seconds.get(key, math.inf), time.monotonic() - began)
        if reading is not None:
            self.readings += 1
            kept.add(key, *reading)

    def _read(
        self, model: _Model, batch_size: int, call: Callable[[], Any], least_seconds: float
    ) -> tuple[float, float] | None:
        """Joules and seconds per request of one call, or of as many as fill `least_seconds`.

        None where the counter fell meanwhile. Raises MeterError where it has failed.
        """
        calls: list[Call] = []
        began = time.monotonic()
        with self._ledger.window():
            while not calls or time.monotonic() - began < least_seconds:
                ids = ["calibration"] * batch_size
                with self._ledger.call(model.name, ids, model.backend.devices) as made:
                    made.generations = call()
                calls.append(made)
        if self._ledger.fault is not None:
            raise self._ledger.fault
        joules = [made.joules for made in calls]
        known = [value for value in joules if value is not None]
        if len(known) < len(calls):
            return None
        requests = sum(len(made.generations) for made in calls)
        return math.fsum(known) / requests, math.fsum(made.seconds for made in calls) / requests

    def _measure_own_prompts(self, model: _Model) -> _OwnSample:
        """A sample of the user's prompts as `route` would run them: how long answers are, and what they take."""
        fitting, size = self._samples(model.backend), model.batch_size
        few = self._rng.sample(fitting, min(len(fitting), OWN_BATCHES * size))
        batches = [few[start : start + size] for start in range(0, len(few), size)]
        sample = _OwnSample()
        model.backend.generate(batches[0])  # warms up
        for batch in batches:
            with self._ledger.window():
                ids = [str(request.id) for request in batch]
                with self._ledger.call(model.name, ids, model.backend.devices) as made:
                    made.generations = model.backend.generate(batch)
            if made.joules is not None:
                sample.joules += made.joules
                sample.answers += [g for g in made.generations if g.output_tokens]
        return sample

    def _progress(self, kept: Kept, started: float) -> CalibrateProgress:
        now = time.monotonic()
        left, converged = 0.0, 0
        cells = self._all_cells()
        for key in cells:
            cell = cell_of(key, kept.readings)
            converged += cell.converged
            if not cell.converged:
                left += self._readings_left(cell) * self._seconds.get(key, 0.0)
        left = max(0.0, min(left, self._deadline - now))
        return CalibrateProgress(now - started, left, converged, len(cells), self.readings)

    @staticmethod
    def _readings_left(cell: Cell) -> float:
        """How many more an unconverged cell needs, by the scatter of those that it has."""
        n, half = len(cell.joules), cell.half_interval
        if n < FEWEST_REPETITIONS or half is None:
            return FEWEST_REPETITIONS - n
        return max(1.0, n * (half / (INTERVAL * cell.mean_joules)) ** 2 - n)

    # ---- the result ------------------------------------------------------------------------------

    def result(self, readings: Readings, own_prompts: Mapping[str, OwnPrompts | None]) -> Calibration:
        models = tuple(self._model(model, readings, own_prompts) for model in self._models.values())
        return Calibration(
            models=models,
            characters=self._typical_characters(models),
            meter=self._meter_description(),
            versions=self._versions(),
            hardware=self._hardware(),
            window=self._config.window,
            seed=self._config.seed,
            made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            warnings=tuple(self._warnings),
            messcli=__version__,
        )

    def _model(
        self, model: _Model, readings: Readings, own_prompts: Mapping[str, OwnPrompts | None]
    ) -> ModelCalibration:
        read = sorted(cells_of(model.name, readings), key=lambda c: (c.prompt_tokens, c.output_tokens))
        cells = tuple(cell for cell in read if cell.batch_size == model.batch_size)
        loads = {key[1:] for key in self.load_cells if key.model == model.name}
        in_load = [c for c in read if (c.prompt_tokens, c.output_tokens, c.batch_size) in loads]
        sources = self._meter.sources(model.backend.devices)
        idle_watts = math.fsum(self._idle_watts[source] for source in sources)
        net = [replace(cell, joules=cell.net_joules(idle_watts)) for cell in cells]
        gross = fit(cells, self._config.seed)
        sample = self._own.get(model.name)
        own = own_prompts.get(model.name) if sample is None else sample.summed_up(gross.coefficients)
        return ModelCalibration(
            name=model.name,
            signature=model.signature,
            device=model.device,
            dtype=model.backend.spec.own(CheckpointOptions).dtype,
            batch_size=model.batch_size,
            meter=model.meter,
            idle_watts=idle_watts,
            cells=cells,
            gross=gross,
            net=fit(net, self._config.seed),
            constant_prompt_tokens=model.constant_prompt_tokens,
            prompt_tokens_per_character=model.prompt_tokens_per_character,
            own_prompts=own,
            load_cells=tuple(cell for cell in in_load if cell.batch_size != model.batch_size),
            load=fit_load(in_load, idle_watts, model.most_running),
        )

    def _typical_characters(self, models: Sequence[ModelCalibration]) -> float:
        if self._prompts:
            return float(np.median([len(request.prompt) for request in self._prompts]))
        largest = models[-1]
        tokens = float(np.median([cell.prompt_tokens for cell in largest.cells]))
        beyond = max(0.0, tokens - largest.constant_prompt_tokens)
        return beyond / (largest.prompt_tokens_per_character or 1.0)
