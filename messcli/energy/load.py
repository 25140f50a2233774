"""What an engine takes in load: joules and seconds of a step, by the requests that run at that time.

A step gives every running request one token. It costs nearly a + k b joules with b requests running: a is drawn
whatever runs (weights are read once per step), k for each of them. So the average joules of a token fall with load,
by a factor of 3 to 20, and what one more request adds does not. Which models of a window pay for their steps is
`messcli.routing.load`'s.

Knows numbers and the two files that hold them; knows nothing of backends, meters or routing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.amounts import is_amount
from messcli.errors import EnginesError

MOST_RUNNING = 512  # requests at a time, where a file says nothing; points above it aren't used
# Where a file says nothing of prompts: 2 FLOP per parameter and token, at 400 TFLOP/s and 600 W of an H100.
JOULES_PER_FLOP = 600 / 4e14
IDLE_WATTS_PER_DEVICE = 75.0  # of an H100 with weights loaded and nothing to do, where a file says nothing
FEWEST_POINTS_LEFT_OUT = 3  # a line through fewer has no error to tell

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One measured load. Joules of all devices of the engine, and seconds, per step."""

    running: float  # requests, mean
    joules: float
    seconds: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Joules and seconds of one engine by the requests running: measured points, and the line a + k b through them.

    Between points both are interpolated log-log. Below the first a step costs what it costs there; above the last a
    token does.
    """

    points: tuple[StepPoint, ...]  # ascending in `running`, at least one
    joules_per_step: float  # a of the line
    joules_per_running_step: float  # k of the line
    seconds_per_step: float
    seconds_per_running_step: float
    joules_per_prompt_token: float
    seconds_per_prompt_token: float  # 0: hidden in the steps, as where prefill is mixed with decoding
    idle_watts: float  # of all devices of the engine
    most_running: int  # requests at a time
    error: (
        float | None
    )  # mean relative error of the line's joules at a point that it didn't see; None: too few

    def step_joules(self, running: float) -> float:
        """Of one step with so many requests running."""
        return _at([(point.running, point.joules) for point in self.points], running)

    def step_seconds(self, running: float) -> float:
        """Of one step with so many requests running."""
        return _at([(point.running, point.seconds) for point in self.points], running)

    @property
    def full_joules(self) -> float:
        """Of one output token at the load at which it costs least, among the measured ones."""
        return min(point.joules / point.running for point in self.points)

    def joules_at_full_load(self, prompt_tokens: float, output_tokens: float) -> float:
        """Of one request among as many as serve the engine best."""
        return prompt_tokens * self.joules_per_prompt_token + output_tokens * self.full_joules

    def joules(self, prompt_tokens: float, output_tokens: float, running: float) -> float:
        """Of one request among `running`: its prompt, and an equal part of every step."""
        part = self.step_joules(running) / running
        return prompt_tokens * self.joules_per_prompt_token + output_tokens * part


def _at(points: Sequence[tuple[float, float]], running: float) -> float:
    first, last = points[0], points[-1]
    if running <= first[0]:
        return first[1]
    if running >= last[0]:
        return last[1] * running / last[0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if running <= x1:
            return float(y0 * (y1 / y0) ** (math.log(running / x0) / math.log(x1 / x0)))
    raise AssertionError("unreachable: the points span `running`")


# ---- fitting -------------------------------------------------------------------------------------


def fitted(
    points: Sequence[StepPoint],
    *,
    joules_per_prompt_token: float,
    seconds_per_prompt_token: float = 0.0,
    idle_watts: float = 0.0,
    most_running: int = MOST_RUNNING,
) -> CostModel:
    """The cost model through measured points: least squares on relative errors, a and k not negative."""
    points = tuple(sorted(points, key=lambda point: point.running))
    running = np.array([point.running for point in points])
    joules = np.array([point.joules for point in points])
    per_step, per_running = line(running, joules)
    seconds_per_step, seconds_per_running = line(running, np.array([point.seconds for point in points]))
    return CostModel(
        points=points,
        joules_per_step=per_step,
        joules_per_running_step=per_running,
        seconds_per_step=seconds_per_step,
        seconds_per_running_step=seconds_per_running,
        joules_per_prompt_token=joules_per_prompt_token,
        seconds_per_prompt_token=seconds_per_prompt_token,
        idle_watts=idle_watts,
        most_running=most_running,
        error=left_out_error(running, joules),
    )


def line(running: Floats, values: Floats, weights: Floats | None = None) -> tuple[float, float]:
    """a, k >= 0 of the a + k b that is nearest to `values`, by squared relative errors, weighted where asked.

    Two unknowns: where the free solution has a negative one, the best lies on one of the two axes.
    """
    one = np.ones_like(values) if weights is None else np.sqrt(weights)
    constant, slope = one / values, one * running / values  # a x constant + k x slope is to be 1
    candidates = [
        (float(constant @ one / (constant @ constant)), 0.0),
        (0.0, float(slope @ one / (slope @ slope))),
    ]
    if len(running) > 1:
        free = np.linalg.lstsq(np.stack([constant, slope], axis=1), one, rcond=None)[0]
        if free.min() >= 0:
            return float(free[0]), float(free[1])
    return min(candidates, key=lambda ak: float(((ak[0] * constant + ak[1] * slope - one) ** 2).sum()))


def left_out_error(running: Floats, values: Floats) -> float | None:
    """Mean relative error at each point by the line through the others."""
    if len(running) < FEWEST_POINTS_LEFT_OUT:
        return None
    errors = []
    for left_out in range(len(running)):
        others = np.arange(len(running)) != left_out
        a, k = line(running[others], values[others])
        errors.append(abs((a + k * running[left_out]) / values[left_out] - 1.0))
    return float(np.mean(errors))


# ---- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Engine:
    """One entry of an engines file: a model on devices, measured with a task."""

    model: str
    gpu: str
    task: str
    size: float | None  # active parameters, billions
    cost: CostModel

    @property
    def label(self) -> str:
        """As `--engine` takes it."""
        return ",".join(part for part in (self.model, self.gpu, self.task) if part)


def read_engines(path: Path) -> list[Engine]:
    """The entries of an engines file, in its order: `{"engines": [{"model", "points": [...], ...}]}`.

    An entry has `model` and `points`, each with `mean_running`, `joules_per_output_token` and
    `output_tokens_per_second` (of all devices of the engine together). It may have `gpu` and `task`, which tell it
    from others of the model; `gpus` (1), `max_running` of a point, `most_running` (512); `joules_per_prompt_token`,
    else `active_parameters_billions`, from which it is reckoned; `seconds_per_prompt_token` (0); `idle_watts`, else 75
    per device.

    Raises EnginesError naming file, entry and field.
    """
    document = load_json(path)
    entries = document.get("engines") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise EnginesError(
            f'{path}: holds no "engines": a list of {{"model", "points"}}. Give a file of `messcli calibrate`, or '
            "see docs/formats.md"
        )
    engines = [_engine(entry, Checked(path, f"entry {n}", entry)) for n, entry in enumerate(entries, 1)]
    labels = [engine.label for engine in engines]
    for label in labels:
        if labels.count(label) > 1:
            raise EnginesError(f'{path}: "{label}" stands there twice. Tell entries apart by "gpu" or "task"')
    return engines


def load_json(path: Path) -> Any:
    """Raises EnginesError."""
    try:
        return json.loads(path.read_bytes())  # numbers are checked where the field is known
    except OSError as error:
        raise EnginesError(f"--engines {path}: can't be read: {error.strerror}. Name another file") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise EnginesError(f"--engines {path}: not valid JSON: {why}. Is this an engines file?") from None


class Checked:
    """Fields of one object that came from outside. Every fault names file, entry and field."""

    def __init__(self, path: Path, where: str, fields: object) -> None:
        self._path = path
        self.where = where
        if not isinstance(fields, dict):
            raise self.fault(f"expected an object, found {fields!r}")
        self._fields: Mapping[str, Any] = fields

    def fault(self, what: str) -> EnginesError:
        return EnginesError(f"{self._path}: {self.where}: {what}")

    def text(self, field: str, default: str | None = None) -> str:
        found = self._fields.get(field, default)
        if not isinstance(found, str) or (default is None and not found):
            raise self.fault(f'field "{field}": expected text, found {found!r}. Give the name')
        return found

    def number(self, field: str, default: float | None = None, *, zero: bool = False) -> float:
        """Finite and above 0; `zero`: or 0."""
        found = self._fields.get(field, default)
        if not is_amount(found) or (found == 0 and not zero):
            least = "0 or more" if zero else "above 0"
            raise self.fault(f'field "{field}": expected a finite number {least}, found {found!r}')
        return float(found)

    def optional(self, field: str) -> float | None:
        return None if self._fields.get(field) is None else self.number(field)

    def objects(self, field: str) -> Iterator[Checked]:
        found = self._fields.get(field)
        if not isinstance(found, list) or not found:
            raise self.fault(f'field "{field}": expected a list of objects, found {found!r}')
        for n, entry in enumerate(found, 1):
            yield Checked(self._path, f"{self.where}: {field} {n}", entry)


def cost_of(fields: Checked) -> CostModel:
    """A cost model as a calibration holds it. Its line is fitted anew to the points.

    Raises EnginesError naming file, entry and field.
    """
    points = [
        StepPoint(point.number("running"), point.number("joules"), point.number("seconds"))
        for point in fields.objects("points")
    ]
    _rising(points, fields, "running")
    return fitted(
        points,
        joules_per_prompt_token=fields.number("joules_per_prompt_token", zero=True),
        seconds_per_prompt_token=fields.number("seconds_per_prompt_token", zero=True),
        idle_watts=fields.number("idle_watts", zero=True),
        most_running=int(fields.number("most_running")),
    )


def _rising(points: Sequence[StepPoint], fields: Checked, name: str) -> None:
    for before, after in pairwise(points):
        if after.running <= before.running:
            raise fields.fault(
                f'field "points": "{name}" must rise from point to point, found {before.running:g} and then '
                f"{after.running:g}. Order the points by it"
            )


def _engine(entry: Any, fields: Checked) -> Engine:
    model = fields.text("model")
    fields.where += f' "{model}"'
    most = int(fields.number("most_running", MOST_RUNNING))
    measured = []
    for point in fields.objects("points"):
        running = point.number("mean_running")
        if point.number("max_running", running) > most:
            continue
        measured.append(
            StepPoint(
                running,
                point.number("joules_per_output_token") * running,
                running / point.number("output_tokens_per_second"),
            )
        )
    if not measured:
        raise fields.fault(f'field "points": none has at most {most} requests running. Measure smaller loads')
    _rising(measured, fields, "mean_running")
    size = fields.optional("active_parameters_billions")
    per_prompt_token = fields.optional("joules_per_prompt_token")
    if per_prompt_token is None:
        if size is None:
            raise fields.fault(
                'what a prompt costs isn\'t known. Give "joules_per_prompt_token", or '
                '"active_parameters_billions" to have it reckoned'
            )
        per_prompt_token = 2e9 * size * JOULES_PER_FLOP
    idle = fields.number("gpus", 1) * IDLE_WATTS_PER_DEVICE
    cost = fitted(
        measured,
        joules_per_prompt_token=per_prompt_token,
        seconds_per_prompt_token=fields.number("seconds_per_prompt_token", 0.0, zero=True),
        idle_watts=fields.number("idle_watts", idle, zero=True),
        most_running=most,
    )
    return Engine(model, fields.text("gpu", ""), fields.text("task", ""), size, cost)
