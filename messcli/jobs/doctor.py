"""What works on this machine and what would not: versions, packages, cards, meters, memory, zoo, calibration, state.

Looks only: loads no model, changes no file, and asks nobody on the network but a zoo's own servers for a connection.
"""

from __future__ import annotations

import os
import platform
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]  # carries no types

from messcli import __version__
from messcli.adapter import read_adapter
from messcli.calibration.file import find_calibration, hardware
from messcli.energy import AUTO, MeterOptions, open_meter
from messcli.energy.nvml import free_memory, visible_devices
from messcli.errors import CalibrationError, MessError, MeterError, first_line
from messcli.models.backend import create
from messcli.registry import BACKENDS, DIALECTS, METERS, METRICS, POLICIES, PREDICTORS
from messcli.state.database import APPLICATION_ID, SCHEMA_VERSION
from messcli.zoo import CheckpointOptions, ModelSpec, ServerOptions, Zoo, load_zoo

GOOD, LACKING, BAD = "ok", "--", "!!"  # works; isn't here, and isn't needed by this zoo; would stop a run
CONNECT_SECONDS = 2.0

# package -> what needs it
PACKAGES = {
    "torch": 'models with backend = "transformers" or "vllm"',
    "transformers": 'models with backend = "transformers" or "vllm"',
    "vllm": 'backend = "vllm"',
    "peft": 'an adapter of a model with backend = "transformers"',
    "ray": "--engine ray",
    "nvidia-ml-py": "the meter nvml",
    "fasttext-community": "--predictor fasttext",
    "pyarrow": "input in Parquet",
    "zstandard": "input in .zst",
}


@dataclass(frozen=True, slots=True)
class DoctorConfig:
    """What `messcli doctor` was asked to look at. None: what `route` would take."""

    zoo: str | None = None
    meter: str = AUTO
    calibration: Path | None = None
    state: Path | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    name: str
    status: str  # GOOD, LACKING or BAD
    text: str  # what there is, or what is missing and how to get it


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at everything; raises nothing that concerns one finding only."""
    found = [*_program(), *_packages(), *_machine()]
    try:
        zoo = load_zoo(config.zoo)
    except MessError as error:
        bad = Finding("zoo", config.zoo or "zoo.toml", BAD, str(error))
        return [*found, *_meters(config, MeterOptions()), bad, *_state(config)]
    options = MeterOptions(zoo.energy.get("cpu_watts"), (), zoo.energy.get("command", ()))
    return [
        *found,
        *_meters(config, options),
        *_zoo(config, zoo),
        *_calibration(config, zoo),
        *_state(config),
    ]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """For other programs."""
    return [asdict(finding) for finding in findings]


def lines(findings: list[Finding]) -> Iterator[str]:
    """For people: a block per topic."""
    width = max(len(finding.name) for finding in findings)
    for number, finding in enumerate(findings):
        if number == 0 or findings[number - 1].topic != finding.topic:
            yield finding.topic
        yield f"  {finding.status}  {finding.name:<{width}}  {finding.text}"
    bad = [finding for finding in findings if finding.status == BAD]
    yield ""
    yield (
        "`messcli route` can run here."
        if not bad
        else f"{len(bad)} to mend before `messcli route` can run here; they are marked {BAD}."
    )


# ---- topics ---------------------------------------------------------------------------------------


def _program() -> Iterator[Finding]:
    yield Finding("program", "messcli", GOOD, __version__)
    yield Finding("program", "Python", GOOD, f"{platform.python_version()} ({sys.executable})")
    yield Finding("program", "system", GOOD, platform.platform())


def _packages() -> Iterator[Finding]:
    for name, purpose in PACKAGES.items():
        version = next(iter(metadata.Distribution.discover(name=name)), None)
        if version is None:
            yield Finding("packages", name, LACKING, f"not installed; {purpose} needs it")
        else:
            yield Finding("packages", name, GOOD, version.version)
    for registry in (METRICS, PREDICTORS, POLICIES, METERS, BACKENDS, DIALECTS):
        for name in registry:
            package = registry.package(name)
            if package is not None:
                try:
                    registry.load(name)
                    yield Finding("packages", name, GOOD, f"a {registry.kind} of {package}")
                except MessError as error:
                    yield Finding("packages", name, BAD, str(error))
        for name in registry.shadowed():
            text = f"a package has a {registry.kind} of that name; messcli's own is taken"
            yield Finding("packages", name, LACKING, text)


def _machine() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("machine", "cpu", GOOD, f"{hardware(['cpu'])['cpu']}, {psutil.cpu_count()} threads")
    yield Finding("machine", "memory", GOOD, f"{_size(memory.available)} free of {_size(memory.total)}")
    yield Finding("machine", "disk", GOOD, f"{_size(psutil.disk_usage('.').free)} free in the working folder")
    try:
        cards = hardware(visible_devices())
    except MeterError as error:
        yield Finding("machine", "cards", LACKING, f"no NVIDIA card is seen: {error}")
        return
    try:
        free = {name: f", {_size(now)} free of {_size(all_)}" for name, (now, all_) in free_memory().items()}
    except MeterError as error:
        free = dict.fromkeys(cards, f", free memory unknown: {error}")
    for device, name in cards.items():
        yield Finding("machine", device, GOOD, f"{name}{free.get(device, '')}")
    if not cards:
        yield Finding("machine", "cards", LACKING, "no NVIDIA card is seen by this process")


def _meters(config: DoctorConfig, options: MeterOptions) -> Iterator[Finding]:
    for name in METERS:
        try:
            kind = METERS.load(name)
            device = "cuda:0" if "cuda" in kind.devices else next(iter(kind.devices), "cpu")
            counter = kind.open(device, options)
            text, status = counter.provenance, GOOD
            counter.close()
        except Exception as error:  # a package's meter may raise anything
            text = str(error) if isinstance(error, MessError) else first_line(error)
            status = BAD if name == config.meter else LACKING
        yield Finding("meters", name, status, text)


def _zoo(config: DoctorConfig, zoo: Zoo) -> Iterator[Finding]:
    promised = "no alpha: give --alpha" if zoo.alpha is None else f"alpha {zoo.alpha:g}"
    yield Finding("zoo", "file", GOOD, f"{zoo.path}: {len(zoo.models)} models, {promised}")
    for spec in zoo.models:
        yield _model(spec)
    yield from _shared_weights(zoo)
    try:
        devices = tuple(dict.fromkeys(spec.device for spec in zoo.models))
        meter = open_meter(devices=devices, **zoo.metering(config.meter))
        yield Finding(
            "zoo", f"--meter {config.meter}", GOOD, f"{meter.kind(devices)} on {', '.join(devices)}"
        )
        meter.close()
    except MessError as error:
        yield Finding("zoo", f"--meter {config.meter}", BAD, str(error))


def _model(spec: ModelSpec) -> Finding:
    """Whether a model could be loaded, as far as that shows without loading it."""
    try:
        create(spec, batch_size=None)
    except MessError as error:
        return Finding("zoo", spec.name, BAD, str(error))
    server = spec.own(ServerOptions)
    if spec.backend == "openai" and server.base_url:
        url = urlsplit(server.base_url)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            socket.create_connection((url.hostname or "", port), CONNECT_SECONDS).close()
        except OSError as error:
            text = f"{server.base_url} can't be reached: {error}. Start the server or correct base_url"
            return Finding("zoo", spec.name, BAD, text)
        return Finding("zoo", spec.name, GOOD, f"{server.base_url} takes connections")
    if spec.backend == "vllm" and find_spec("vllm") is None:
        return Finding("zoo", spec.name, BAD, "vllm isn't installed: pip install 'messcli[vllm]'")
    path = Path(spec.path)
    if path.is_absolute() and spec.backend in (
        "transformers",
        "vllm",
    ):  # others make of a path what they like
        if not path.exists():
            return Finding("zoo", spec.name, BAD, f"{path}: no such folder. Correct path in the zoo file")
        return _on_disk(spec, path)
    return Finding(
        "zoo",
        spec.name,
        GOOD,
        f"{spec.backend}, {spec.device}, {spec.path} of the hub",
    )


def _on_disk(spec: ModelSpec, path: Path) -> Finding:
    """A checkpoint's folder, and the adapter on top of it."""
    text = f"{spec.backend}, {spec.device}, {path}"
    folder = spec.own(CheckpointOptions).adapter
    if folder is None:
        return Finding("zoo", spec.name, GOOD, text)
    try:
        adapter = read_adapter(Path(folder), spec.name)
        adapter.check_files(path)
    except MessError as error:
        return Finding("zoo", spec.name, BAD, str(error))
    if spec.backend == "transformers" and find_spec("peft") is None:
        return Finding(
            "zoo",
            spec.name,
            BAD,
            "its adapter needs PEFT, which isn't installed: pip install 'messcli[lora]'",
        )
    return Finding("zoo", spec.name, GOOD, f"{text}, with a LoRA of rank {adapter.rank} from {folder}")


def _shared_weights(zoo: Zoo) -> Iterator[Finding]:
    """Models that run on the same weights."""
    groups: dict[Any, list[str]] = {}
    for spec in zoo.models:
        if spec.backend in ("transformers", "vllm"):
            groups.setdefault(spec.weights, []).append(spec.name)
    for names in groups.values():
        if len(names) > 1:
            yield Finding(
                "zoo", "weights", GOOD, f"{', '.join(names)} run on one checkpoint, loaded once, in turns"
            )


def _calibration(config: DoctorConfig, zoo: Zoo) -> Iterator[Finding]:
    try:
        found = find_calibration(config.calibration, zoo, config.meter)
    except CalibrationError as error:
        yield Finding("calibration", "file", BAD, str(error))
        return
    beside = [spec.name for spec in zoo.models if spec.beside]
    if found is None and len(beside) > 1:
        text = f"none: {', '.join(beside)} take turns. `messcli calibrate` lets them run beside each other"
        yield Finding("calibration", "beside", LACKING, text)
    if found is None:
        text = "none: what models cost is learnt from the run. `messcli calibrate` gives it a start"
        yield Finding("calibration", "file", LACKING, text)
    else:
        rest = "" if found.converged else "; not all of its cells converged: run `messcli calibrate` again"
        yield Finding("calibration", "file", GOOD, f"{found.path}, made {found.made}{rest}")


def _state(config: DoctorConfig) -> Iterator[Finding]:
    if config.state is None:
        return
    path = config.state
    try:
        if not path.is_file():
            raise MessError(f"{path}: no such file. A first run makes it")
        with closing(sqlite3.connect(f"{Path(os.path.realpath(path)).as_uri()}?mode=ro", uri=True)) as db:
            if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise MessError(f"{path}: is no state of messcli. Name another")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise MessError(f"{path}: was written by a newer messcli (schema {version}). Upgrade messcli")
            check = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if check != "ok":
                raise MessError(f"{path}: is damaged ({check}). Restore it from a copy")
            (count,) = db.execute("SELECT count(*) FROM requests").fetchone()
        yield Finding("state", str(path), GOOD, f"{count} lines finished, schema {version}, no damage found")
    except (MessError, sqlite3.DatabaseError) as error:
        yield Finding("state", str(path), BAD, str(error))


def _size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
