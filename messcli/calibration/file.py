"""calibration.json: what a request costs with each model, by its lengths, as `messcli calibrate` measured it.

Knows the file, the energy model and whether both fit a run; measures nothing. `calibrate` writes it,
`route` reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from messcli.amounts import MOST, is_amount
from messcli.energy import Weight
from messcli.energy.load import Checked, CostModel, cost_of
from messcli.energy.nvml import driver_version, visible_cards
from messcli.errors import CalibrationError, EnginesError, MeterError, shown
from messcli.files.sinks import sync_folder
from messcli.jsonl import decoded
from messcli.predict.joules import EnergyPrior
from messcli.zoo import BUNDLED_ZOO, Zoo, signature_of_older

FORMAT = 2  # 2: in load; 1 is read, and knows one load
FORMATS = (1, FORMAT)
FILE_NAME = "calibration.json"
FEWEST_REPETITIONS = 5  # fewer may lie close together by chance
INTERVAL = 0.05  # a cell has converged when its 95 % interval is within this part of its mean

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Joules of one request of p prompt and o output tokens: e0 + a p + b o + d (p o + o^2 / 2), none negative.

    The last term is attention's: output token k looks back at p + k tokens. Holds at the batch size that was
    calibrated, where e0 has the request's share of what a batch costs.
    """

    request_joules: float  # e0
    prompt_token_joules: float  # a
    output_token_joules: float  # b
    attention_joules: float  # d

    def joules(self, prompt_tokens: float, output_tokens: float) -> float:
        """Of one request of these lengths."""
        return float(terms(prompt_tokens, output_tokens) @ np.array(self.values()))

    def values(self) -> tuple[float, ...]:
        """e0, a, b, d."""
        return tuple(getattr(self, field.name) for field in fields(self))


def terms(prompt_tokens: float, output_tokens: float) -> Array:
    """What the coefficients are multiplied with."""
    p, o = prompt_tokens, output_tokens
    return np.array([1.0, p, o, p * o + o * o / 2])


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients with what is known of their error."""

    coefficients: Coefficients
    standard_errors: Coefficients | None  # by bootstrap over the repetitions; None: a cell has only one
    left_out_error: float | None  # mean relative error at a cell that the fit didn't see; None: too few cells


@dataclass(frozen=True, slots=True)
class Cell:
    """One pair of lengths in batches of one size, measured again and again. Joules and seconds are per request."""

    prompt_tokens: int
    output_tokens: int
    joules: tuple[float, ...]  # one per repetition, gross
    seconds: tuple[float, ...]
    batch_size: int

    @property
    def mean_joules(self) -> float:
        """Per request, gross."""
        return math.fsum(self.joules) / len(self.joules)

    @property
    def mean_seconds(self) -> float:
        """Per request: its part of its batch's time."""
        return math.fsum(self.seconds) / len(self.seconds)

    def net_joules(self, idle_watts: float) -> tuple[float, ...]:
        """What came on top of idling, in the request's share of its batch's time."""
        idle = (idle_watts * seconds for seconds in self.seconds)
        return tuple(max(0.0, gross - part) for gross, part in zip(self.joules, idle, strict=True))

    @property
    def half_interval(self) -> float | None:
        """Half of the mean's 95 % interval, in joules (Student's t); None with fewer than 2 repetitions."""
        n = len(self.joules)
        if n < 2:
            return None
        from scipy.special import stdtrit

        return float(stdtrit(n - 1, 0.975)) * float(np.std(self.joules, ddof=1)) / math.sqrt(n)

    @property
    def converged(self) -> bool:
        """Whether it is known well enough: INTERVAL, over at least FEWEST_REPETITIONS."""
        half = self.half_interval
        return (
            len(self.joules) >= FEWEST_REPETITIONS
            and half is not None
            and half <= INTERVAL * self.mean_joules
        )


@dataclass(frozen=True, slots=True)
class OwnPrompts:
    """What the model made of a sample of the user's own prompts."""

    requests: int
    joules: float  # per request
    output_tokens: float  # per request
    factor: float  # joules / what the coefficients say for these lengths


@dataclass(frozen=True, slots=True)
class ModelCalibration:
    """Everything measured of one model."""

    name: str
    signature: Mapping[str, Any]  # what defines the member: ModelSpec.signature
    device: str
    dtype: str
    batch_size: int
    meter: str  # nvml | rapl | estimate
    idle_watts: float  # of the devices that the model uses
    cells: tuple[Cell, ...]
    gross: Fit
    net: Fit
    constant_prompt_tokens: float  # a prompt has so many tokens (its template's) ...
    prompt_tokens_per_character: float  # ... and so many per character
    own_prompts: OwnPrompts | None
    load_cells: tuple[Cell, ...] = ()  # two output lengths at other batch sizes
    load: CostModel | None = None  # what they say of a step in load; None: fewer than two loads were measured
    load_factor: float = 1.0  # joules at the load of a run / at `batch_size`; no part of the file

    @property
    def output_tokens(self) -> float:
        """Mean length of an answer: of the user's own prompts, else half of what it may be."""
        own = self.own_prompts
        return self.signature["max_new_tokens"] / 2 if own is None else own.output_tokens

    def joules(self, characters: float) -> float:
        """E_m before anything was read in a run, for a prompt of so many characters: a line."""
        tokens = self.constant_prompt_tokens + self.prompt_tokens_per_character * characters
        factor = self.load_factor * (1.0 if self.own_prompts is None else self.own_prompts.factor)
        return factor * self.gross.coefficients.joules(tokens, self.output_tokens)

    def at_load(self, running: float, characters: float) -> ModelCalibration:
        """As this many requests at a time take: the grid's joules, times what its cost model says of the other load for
        a prompt of `characters`. Unchanged where nothing was measured in load."""
        if self.load is None:
            return self
        prompt = self.constant_prompt_tokens + self.prompt_tokens_per_character * characters
        running = min(max(1.0, running), self.load.most_running)
        there = self.load.joules(prompt, self.output_tokens, running)
        return replace(
            self, load_factor=there / self.load.joules(prompt, self.output_tokens, self.batch_size)
        )

    def weight(self, prompt_tokens: int, output_tokens: int) -> float:
        """A request's share of its batch. One that got no token didn't run, or not to an end."""
        return self.gross.coefficients.joules(prompt_tokens, output_tokens) if output_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration file."""

    models: tuple[ModelCalibration, ...]
    characters: float  # of a typical prompt
    meter: Mapping[str, Any]  # choice, and per source kind, provenance, period and idle watts
    versions: Mapping[str, str]
    hardware: Mapping[str, str]  # device -> its name
    window: int
    seed: int
    made: str  # UTC
    warnings: tuple[str, ...]  # what made readings mean more than the models' energy
    messcli: str
    path: Path | None = None

    def of(self, name: str) -> ModelCalibration:
        """The model `name`, which must be there."""
        return next(model for model in self.models if model.name == name)

    def prior(self, names: Sequence[str]) -> EnergyPrior:
        """E_m(t) of the models `names` before a run reads anything."""
        models = [self.of(name) for name in names]
        at_zero = [model.joules(0.0) for model in models]
        slopes = [model.joules(1.0) - start for model, start in zip(models, at_zero, strict=True)]
        return EnergyPrior(tuple(at_zero), tuple(slopes), self.characters)

    def at_window(self, window: float) -> Calibration:
        """As a run with windows of so many requests meets its engines: every model has an equal share of a window.

        The joules of a request hold its part of the steps at that load; readings correct it.
        """
        share = window / len(self.models)
        return replace(self, models=tuple(model.at_load(share, self.characters) for model in self.models))

    def weights(self) -> dict[str, Weight]:
        """How a batch's joules are split, by model."""
        return {model.name: model.weight for model in self.models}

    @property
    def converged(self) -> bool:
        """Whether every cell of every model has."""
        return all(cell.converged for m in self.models for cell in (*m.cells, *m.load_cells))

    @property
    def identity(self) -> str:
        """Tells two calibrations apart."""
        prior = repr(self.prior([model.name for model in self.models]))
        return f"{self.made} {hashlib.blake2b(prior.encode(), digest_size=6).hexdigest()}"

    def difference(self, zoo: Zoo, meter: str) -> str | None:
        """The first thing in which `zoo` on this machine isn't what was calibrated, in words; None: it fits."""
        known = {model.name: model for model in self.models}
        for spec in zoo.models:
            where = f'model "{spec.name}"'
            if spec.name not in known:
                return f"it has no {where}, only {', '.join(known)}"
            model = known[spec.name]
            now = {**spec.signature(), "device": spec.device}
            for name, was in {**signature_of_older(model.signature), "device": model.device}.items():
                if now.get(name) != was:
                    return f"{where}: {name} was {json.dumps(was)}, and is {json.dumps(now.get(name))}"
        for what, then, here in (
            ("version of ", self.versions, versions(zoo)),
            ("", self.hardware, hardware(spec.device for spec in zoo.models)),
        ):
            for name, text in here.items():
                if then.get(name) != text:
                    return f"{what}{name} was {then.get(name, 'not there')}, and is {text}"
        kinds = {known[name].meter for name in zoo.names}
        if "estimate" in kinds and self.meter.get("cpu_watts") != zoo.energy.get("cpu_watts"):
            was, watts = self.meter.get("cpu_watts"), zoo.energy.get("cpu_watts")
            return f"cpu_watts was {was or 'the default'}, and is {watts or 'the default'}"
        if meter in ("nvml", "rapl", "estimate") and kinds != {meter}:
            return f"it was metered by {'/'.join(sorted(kinds))}, and this run has --meter {meter}"
        return None

    def dumps(self) -> str:
        """The file's text."""
        document: dict[str, Any] = {"format": FORMAT, **asdict(self), "converged": self.converged}
        del document["path"]
        for model, written in zip(self.models, document["models"], strict=True):
            del written["load_factor"]
            entries = (*written["cells"], *written["load_cells"])
            for cell, entry in zip((*model.cells, *model.load_cells), entries, strict=True):
                entry.update(
                    mean_joules=cell.mean_joules,
                    half_interval_joules=cell.half_interval,
                    mean_net_joules=float(np.mean(cell.net_joules(model.idle_watts))),
                    converged=cell.converged,
                )
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load_calibration(path: Path) -> Calibration:
    """Raises CalibrationError naming the file and the cure."""
    cure = "Run `messcli calibrate` again, or route with --no-calibration"
    try:
        document = decoded(path.read_bytes())
    except OSError as error:
        raise CalibrationError(f"{path}: can't be read: {error.strerror}. {cure}") from error
    except ValueError as error:
        raise CalibrationError(f"{path}: is no calibration: {error}. {cure}") from error
    if not isinstance(document, dict) or document.get("format") not in FORMATS:
        found = document.get("format") if isinstance(document, dict) else None
        raise CalibrationError(f"{path}: has format {found}, and this messcli reads 1 to {FORMAT}. {cure}")
    try:
        return _calibration(document, path)
    except (KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CalibrationError(f"{path}: is no calibration: {what}. {cure}") from error


def _calibration(document: Mapping[str, Any], path: Path) -> Calibration:
    models = []
    for entry in document["models"]:
        own = entry["own_prompts"]
        parts = {
            "gross": _fit(entry["gross"]),
            "net": _fit(entry["net"]),
            "cells": _cells(entry["cells"], entry),
            "own_prompts": None if own is None else _made(OwnPrompts, own),
            "load_cells": _cells(entry.get("load_cells", ()), entry),  # format 1 has none
            "load": None if entry.get("load") is None else _load(entry["load"], path, entry["name"]),
        }
        model = _made(ModelCalibration, {**entry, **parts})
        with np.errstate(all="ignore"):  # coefficients that are no numbers give costs that are none
            costs = model.joules(0.0), model.joules(1000.0)
        for number in costs:
            if not 0 < number <= MOST:
                raise ValueError(f'model "{model.name}" costs {number} J')
        models.append(model)
    parts = {"models": tuple(models), "warnings": tuple(document["warnings"]), "path": path}
    return _made(Calibration, {**document, **parts})


def _cells(entries: Iterable[Mapping[str, Any]], model: Mapping[str, Any]) -> tuple[Cell, ...]:
    sizes = {"batch_size": model["batch_size"]}  # format 1 has one per model
    return tuple(
        _made(Cell, {**sizes, **cell, "joules": tuple(cell["joules"]), "seconds": tuple(cell["seconds"])})
        for cell in entries
    )


def _load(entry: object, path: Path, model: str) -> CostModel:
    """What stands there is checked as any engines file; the line is fitted anew."""
    try:
        return cost_of(Checked(path, f'model "{model}": load', entry))
    except EnginesError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from None


def _fit(entry: Mapping[str, Any]) -> Fit:
    coefficients = _made(Coefficients, entry["coefficients"])
    if min(coefficients.values()) < 0:
        raise ValueError("a coefficient is negative")
    errors = entry["standard_errors"]
    parts = {
        "coefficients": coefficients,
        "standard_errors": None if errors is None else _made(Coefficients, errors),
    }
    return _made(Fit, {**entry, **parts})


_Record = TypeVar("_Record")


def _made(kind: type[_Record], values: Mapping[str, Any]) -> _Record:
    """`kind` from its fields in `values`; what else stands there is for people."""
    named = [field.name for field in fields(kind) if field.name != "load_factor"]  # type: ignore[arg-type]  # a dataclass
    hints = get_type_hints(kind)
    for name in named:
        if not _fits(values[name], hints[name]):
            raise ValueError(f'"{name}" is {shown(values[name])}, which it can\'t be')
    return kind(**{name: values[name] for name in named})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from the file is what a field holds, as far as plain values and tuples of them go."""
    if hint is str:
        return isinstance(value, str)
    if hint is float or hint is int:
        return is_amount(
            abs(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        )
    if hint == tuple[float, ...] or hint == tuple[str, ...]:
        return isinstance(value, tuple | list) and all(_fits(one, get_args(hint)[0]) for one in value)
    return True


# ---- where it lies -------------------------------------------------------------------------------


def places(zoo: Zoo) -> list[Path]:
    """Where a zoo's calibration may lie: beside the zoo file, else in the working folder."""
    beside = [] if zoo.path is None else [zoo.path.parent / FILE_NAME]
    return [*beside, Path(FILE_NAME)]


def default_path(zoo: Zoo) -> Path:
    """Where a new calibration goes: beside the zoo file, unless that is ours or can't be written."""
    if zoo.path is None or os.path.realpath(zoo.path) == os.path.realpath(BUNDLED_ZOO):
        return Path(FILE_NAME)
    folder = zoo.path.parent
    return folder / FILE_NAME if os.access(folder, os.W_OK) else Path(FILE_NAME)


def find_calibration(path: Path | None, zoo: Zoo, meter: str) -> Calibration | None:
    """The calibration of `zoo`: `path`, else where it lies by default; None where there is none.

    Raises CalibrationError where it doesn't fit the zoo, the devices or the versions.
    """
    found = path or next((place for place in places(zoo) if place.is_file()), None)
    if found is None:
        return None
    calibration = load_calibration(found)
    if difference := calibration.difference(zoo, meter):
        raise CalibrationError(
            f"{found}: doesn't fit this run: {difference}. Run `messcli calibrate` again, or route with "
            "--no-calibration"
        )
    return calibration


def save(path: Path, text: str) -> None:
    """Write `path` whole or not at all. Raises CalibrationError."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        fresh.replace(path)
        sync_folder(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise CalibrationError(f"{path}: can't be written: {error.strerror}. Name another -o") from error


# ---- what it was measured on ---------------------------------------------------------------------


def versions(zoo: Zoo) -> dict[str, str]:
    """Of the libraries that run the zoo's models, and of the NVIDIA driver where there is one."""
    found = {}
    for name in ("torch", "transformers", *sorted({spec.backend for spec in zoo.models})):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if any(spec.device != "cpu" for spec in zoo.models) and (driver := driver_version()):
        found["NVIDIA driver"] = driver
    return found


def hardware(devices: Iterable[str]) -> dict[str, str]:
    """What stands behind each device's name. Loads neither torch nor CUDA."""
    names = {}
    for device in dict.fromkeys(devices):
        if device == "cpu":
            names[device] = _cpu()
            continue
        try:
            cards = [card.name for card in visible_cards()]
        except MeterError:
            cards = []
        index = device.partition(":")[2]
        if index.isdigit():
            names[device] = cards[int(index)] if int(index) < len(cards) else "unknown"
        else:  # "auto"
            names[device] = ", ".join(cards) or _cpu()
    return names


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
            break
    return f"{name} x {os.cpu_count()}"
