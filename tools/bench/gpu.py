"""What messcli does on an NVIDIA card, measured in a few minutes: one JSON report.

    python tools/bench/gpu.py --out DIR [--minutes 5]   # a bare machine: a card, torch, transformers, no network
    python tools/bench/gpu.py --out DIR --tiny          # in miniature, also without a card

Makes Llama checkpoints with random weights (0.1, 1 and 7 billion parameters) and runs `python -m messcli` from this
checkout on them. Stages, in order: machine, models, counter, conservation, curve, resume, memory, windows, turns,
calibrate, beside. A stage that fails stops no other; one for which there is no time is skipped. DIR/report.json is
rewritten after every stage; DIR/engines.json is the curve alone: joules per output token by requests running.

This process samples the card's counter (NVML) all the while and computes nothing on the card. Work runs in child
processes, which say when it began and ended: CLOCK_MONOTONIC is one clock for all of them. Without NVML the
joules are CPU seconds x 10 W, marked `estimate`. No setting of the card is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, Any]

SAMPLE_SECONDS = 0.02  # between two samples of the counter: a fifth of its usual period
LATE_TICK_SECONDS = 0.5  # how long to wait for the counter's tick after a span: five usual periods
CPU_WATTS = 10.0  # per busy core, messcli's own estimate
POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT; the binding's name for it is younger than the field
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "nvidia-ml-py",
)
ALPHA = 0.75  # between what the second and the third model reach by the made-up metric


# --- sizes ---


@dataclass(frozen=True)
class Shape:
    """A Llama. Parameters: 2 V w + layers (2 w^2 (1 + kv / heads) + 3 w f + 2 w) + w."""

    name: str
    letter: str  # of its words, by which the made-up metric knows whose answer it scores
    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int = 32_000
    positions: int = 4_096

    @property
    def parameters(self) -> int:
        attention = 2 * self.width**2 * (self.heads + self.kv_heads) // self.heads
        layer = attention + 3 * self.width * self.feed_forward + 2 * self.width
        return 2 * self.vocabulary * self.width + self.layers * layer + self.width

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token, in bf16."""
        return 2 * self.layers * self.kv_heads * (self.width // self.heads) * 2


SMALL = Shape("llama-0.1b", "s", 768, 12, 12, 12, 2_048)
MEDIUM = Shape("llama-1b", "m", 2_048, 22, 32, 4, 5_632)  # TinyLlama's
LARGE = Shape("llama-7b", "l", 4_096, 32, 32, 32, 11_008)  # Llama 2 7B's
LARGE_IF_SHORT = Shape("llama-3b", "l", 3_200, 26, 32, 32, 8_640)  # OpenLLaMA 3B's
TINY = tuple(
    Shape(f"tiny-{letter}", letter, width, 2, 4, 4, 2 * width, vocabulary=512, positions=512)
    for letter, width in (("s", 32), ("m", 48), ("l", 64))
)


@dataclass(frozen=True)
class Scale:
    """How much is done; the times are in `STAGES`."""

    loads: tuple[int, ...]  # requests running
    requests: int  # of a routing run
    batch: int
    new_tokens: int  # an answer's most
    curve_tokens: tuple[int, int]  # prompt and output of the curve
    prompt_tokens: int  # of the reading that tells what a prompt's token costs
    prompt_batch: int
    load_seconds: float  # of each phase of the counter's test
    memory_prompt_words: int


CARD_SCALE = Scale((1, 8, 32, 128, 256), 512, 256, 32, (32, 64), 1_024, 32, 5.0, 2_000)
TINY_SCALE = Scale((1, 2, 4), 320, 64, 24, (8, 8), 32, 2, 1.0, 100)


# --- joules ---


class NvmlSource:
    """Total energy, instantaneous power and memory used of one card. Raises where NVML isn't there."""

    kind = "nvml"

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self._card = pynvml.nvmlDeviceGetHandleByIndex(int(shown) if shown.isdigit() else 0)
        self.read_joules()

    def read_joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card)) / 1000

    def read_watts(self) -> float | None:
        with contextlib.suppress(self._nvml.NVMLError):
            reading = self._nvml.nvmlDeviceGetFieldValues(self._card, [POWER_INSTANT])[0]
            if reading.nvmlReturn == self._nvml.NVML_SUCCESS:
                return float(reading.value.uiVal) / 1000
        return self.read_averaged_watts()

    def read_averaged_watts(self) -> float | None:
        """On most cards since Ampere the mean of the last second."""
        with contextlib.suppress(self._nvml.NVMLError):
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._card)) / 1000
        return None

    def read_memory_bytes(self) -> int | None:
        with contextlib.suppress(self._nvml.NVMLError):
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._card).used)
        return None

    def describe(self) -> Figures:
        nvml, figures = self._nvml, {}
        for name, ask in {
            "card": lambda: nvml.nvmlDeviceGetName(self._card),
            "cards": nvml.nvmlDeviceGetCount,
            "driver": nvml.nvmlSystemGetDriverVersion,
            "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(self._card) / 1000,
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(self._card).total,
            "sm_clock_megahertz": lambda: nvml.nvmlDeviceGetClockInfo(self._card, nvml.NVML_CLOCK_SM),
            "persistence_mode": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(self._card)),
        }.items():
            try:
                figures[name] = ask()
            except nvml.NVMLError as error:  # noqa: PERF203  # a card may tell some of these only
                figures[name] = f"unknown: {error}"
        return figures


class EstimateSource:
    """Busy CPU seconds of the whole machine x watts: no measurement."""

    kind = "estimate"

    def read_joules(self) -> float:
        times = psutil.cpu_times()
        return (sum(times[:7]) - times.idle - getattr(times, "iowait", 0.0)) * CPU_WATTS

    def read_watts(self) -> float | None:
        return None

    read_averaged_watts = read_watts

    def read_memory_bytes(self) -> int | None:
        return None

    def describe(self) -> Figures:
        return {"card": None, "driver": None}


class Trace:
    """Samples of a source over time, by a thread. Times are those of time.monotonic()."""

    def __init__(self, source: NvmlSource | EstimateSource) -> None:
        self.source = source
        self.samples: list[tuple[float, float | None, int | None]] = []  # seconds, watts, bytes
        self._tick_seconds = [time.monotonic()]
        self._tick_joules = [source.read_joules()]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            now, joules = time.monotonic(), self.source.read_joules()
            if joules != self._tick_joules[-1]:
                self._tick_joules.append(joules)
                self._tick_seconds.append(now)
            self.samples.append((now, self.source.read_watts(), self.source.read_memory_bytes()))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def joules(self, start: float, end: float) -> float:
        """Joules from `start` to `end`, linear between the counter's ticks.

        A tick is seen up to a sample late, at both ends alike. Waits for the tick after `end`.
        """
        deadline = end + LATE_TICK_SECONDS
        while self._tick_seconds[-1] <= end and time.monotonic() < deadline:
            time.sleep(SAMPLE_SECONDS)
        count = len(self._tick_joules)  # the thread may append to one list before the other
        at = np.interp([start, end], self._tick_seconds[:count], self._tick_joules[:count])
        return float(at[1] - at[0])

    def integrated_joules(self, start: float, end: float) -> float | None:
        """Watts sampled from `start` to `end`, by the trapezoid rule over that span's length."""
        watts = [
            (at, power) for at, power, _ in list(self.samples) if power is not None and start <= at <= end
        ]
        if len(watts) < 2:
            return None
        seconds, power = np.array(watts).T
        mean = np.sum((power[1:] + power[:-1]) / 2 * np.diff(seconds)) / (seconds[-1] - seconds[0])
        return float(mean * (end - start))

    def memory_rises(self, start: float, end: float, least_bytes: float) -> int | None:
        """How often the card's used memory rose by `least_bytes` from its last low: loads of a model."""
        used = [memory for at, _, memory in list(self.samples) if memory is not None and start <= at <= end]
        if not used:
            return None
        rises, low, high, risen = 0, used[0], used[0], False
        for memory in used:
            low, high = min(low, memory), max(high, memory)
            if not risen and memory - low >= least_bytes:
                rises, risen, high = rises + 1, True, memory
            elif risen and high - memory >= least_bytes:
                risen, low = False, memory
        return rises


# --- processes ---


class StageError(Exception):
    """What a stage found wrong, with the end of the process's stderr."""

    def __init__(self, what: str, stderr: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.stderr = list(stderr)[-15:]


class Skipped(Exception):
    """Why a stage has nothing to do."""


@dataclass
class Ended:
    """A process that has ended. `stderr` has the time of each line."""

    code: int
    started: float
    ended: float
    killed: bool
    timed_out: bool
    stdout: list[str] = field(default_factory=list)
    stderr: list[tuple[float, str]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def stderr_lines(self) -> list[str]:
        return [line for _, line in self.stderr]


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    limit_seconds: float,
    kill_when: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run a command to its end, to `limit_seconds`, or until `kill_when()`; the last two by SIGKILL."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    stdout: list[str] = []
    stderr: list[tuple[float, str]] = []
    readers = [
        threading.Thread(target=lambda: stdout.extend(line.rstrip("\n") for line in process.stdout or ())),
        threading.Thread(
            target=lambda: stderr.extend(
                (time.monotonic(), line.rstrip("\n")) for line in process.stderr or ()
            )
        ),
    ]
    for reader in readers:
        reader.start()
    killed = timed_out = False
    while process.poll() is None:
        timed_out = time.monotonic() - started > limit_seconds
        killed = not timed_out and kill_when()
        if killed or timed_out:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.01)
    ended = time.monotonic()
    for reader in readers:
        reader.join(timeout=5)
    killed = killed and process.returncode == -signal.SIGKILL
    return Ended(process.returncode, started, ended, killed, timed_out, stdout, stderr)


@dataclass
class Model:
    """A checkpoint that was made."""

    shape: Shape
    folder: Path


@dataclass
class Bench:
    """What the stages share."""

    work: Path
    out: Path
    tiny: bool
    device: str
    trace: Trace
    scale: Scale
    minutes: float
    models: list[Model] = field(default_factory=list)
    card_bytes: int = 0  # 0: no card
    share_scale: float = 1.0  # of the stages' shares of the time, where only some are run
    stage_ends: float = 0.0
    large_window: str = ""  # of --window

    @property
    def left(self) -> float:
        """Seconds that the stage may still take."""
        return self.stage_ends - time.monotonic()

    @property
    def environment(self) -> dict[str, str]:
        path = [str(ROOT), str(self.work), *filter(None, [os.environ.get("PYTHONPATH")])]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        # tiny models on many threads only wait for each other
        threads = {"OMP_NUM_THREADS": "1"} if self.tiny else {}
        return {**os.environ, **quiet, **threads, "PYTHONPATH": os.pathsep.join(path)}

    def messcli(self, *arguments: object, kill_when: Callable[[], bool] = lambda: False) -> Ended:
        """`python -m messcli ...` in the work folder. Raises StageError unless it ends well or is killed."""
        command = [sys.executable, "-m", "messcli", *map(str, arguments)]
        ended = run(command, self.environment, self.work, self.left, kill_when)
        if ended.timed_out:
            raise StageError(f"no time left for {' '.join(command[2:])}", ended.stderr_lines)
        if ended.code != 0 and not ended.killed:
            raise StageError(f"exit {ended.code} of {' '.join(command[2:])}", ended.stderr_lines)
        return ended

    def worker(self, name: str, **options: object) -> Iterator[Figures]:
        """What the worker `name` of this file tells; in time or not. Raises StageError after the last."""
        task = json.dumps({"device": self.device, **options})
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--task", task]
        ended = run(command, self.environment, self.work, self.left)
        for line in ended.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if ended.timed_out:
            raise StageError(f"no time left for {name}: what it had told by then counts", ended.stderr_lines)
        if ended.code != 0:
            raise StageError(f"exit {ended.code} of {name}", ended.stderr_lines)

    def file(self, name: str, text: str) -> Path:
        path = self.work / name
        path.write_text(text, encoding="utf-8")
        return path

    def zoo(self, models: Sequence[Model], new_tokens: int, *, beside: bool = False) -> Path:
        """A zoo file over `models`."""
        more = "beside = true\n" if beside else ""
        tables = [
            f'[[models]]\nname = "{model.shape.name}"\npath = "{model.folder}"\ndevice = "{self.device}"\n'
            f'dtype = "bfloat16"\nmax_new_tokens = {new_tokens}\n{more}'
            for model in models
        ]
        name = "-".join(model.shape.letter for model in models)
        return self.file(f"zoo-{name}-{new_tokens}{'-beside' * beside}.toml", "\n".join(tables))

    def pair(self) -> list[Model]:
        """The two smallest models, for what needs two and little time."""
        if len(self.models) < 2:
            raise Skipped("fewer than two models were made")
        return self.models[:2]

    def all_models(self) -> list[Model]:
        if not self.models:
            raise Skipped("no models were made")
        return self.models


# --- requests with made-up answers' worth ---

# Random weights answer nothing right. So each model has words of its own (s12, m12, l12), a request's reference is a
# difficulty from 0 to 1 that its words give away, and a model is right up to its own difficulty.
METRIC = '''
SKILL = {"s": 0.5, "m": 0.7, "l": 0.9}


def skill(output, references):
    """1.0 where the model whose words these are is up to the request's difficulty, else 0.0."""
    return float(float(references[0]) < SKILL.get(output[:1], 0.0))
'''
METRIC_NAME = "gpu_bench_metric:skill"


def write_requests(bench: Bench, count: int, *, words: tuple[int, int] = (8, 48), seed: int = 0) -> Path:
    rng = random.Random(seed)
    most = min(model.shape.vocabulary for model in bench.models) - len(SPECIALS)
    lines = []
    for index in range(count):
        difficulty = rng.random()
        near = [min(0.999, max(0.0, rng.gauss(difficulty, 0.05))) for _ in range(rng.randint(*words))]
        prompt = " ".join(f"w{int(place * min(most, 1000))}" for place in near)
        lines.append(json.dumps({"id": f"r{index}", "prompt": prompt, "reference": f"{difficulty:.4f}"}))
    return bench.file(f"requests-{count}-{words[1]}-{seed}.jsonl", "\n".join(lines) + "\n")


def read_rows(path: Path) -> list[Figures]:
    """The whole lines of an output, also of one that is being written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def energy_table(state: Path) -> dict[str, dict[str, float]]:
    """meter -> kind (served, exploration, overhead, ...) -> joules, as a run's state has them."""
    with contextlib.closing(sqlite3.connect(state)) as database:
        found = database.execute(
            "SELECT meter, kind, sum(joules) FROM energy GROUP BY meter, kind"
        ).fetchall()
    table: dict[str, dict[str, float]] = {}
    for meter, kind, joules in found:
        table.setdefault(meter, {})[kind] = joules
    return table


def _breakdown(bench: Bench, state: Path, rows: Sequence[Figures]) -> Figures:
    """What took a run's joules and seconds: models, their loads, overhead."""
    # of the answers that were served: their part of the batches that they were in
    seconds: dict[str, float] = {}
    for row in rows:
        if row.get("seconds") is not None:
            seconds[row["model"]] = seconds.get(row["model"], 0.0) + row["seconds"]
    told = json.loads("\n".join(bench.messcli("report", state, "--json").stdout))
    return {
        "seconds_of_served_by_model": seconds,
        "joules_by_model_and_kind": told["energy"],
        "joules_by_load": told["loads"],  # tokens written and joules, by requests running
        "overhead_by_what_it_was_for": told["overhead_parts"],
    }


def metered_route(bench: Bench, name: str, requests: Path, zoo: Path, *options: object) -> Figures:
    """`messcli route` with its own meter, and the same joules as this process's counter saw them.

    From the line that says that the meter is open to the first of the summary: both within milliseconds of the
    run's first and last reading, so the two differ by up to a counter period at either end.
    """
    output = bench.work / f"{name}.jsonl"
    ended = bench.messcli(
        *("route", requests, "-o", output, "--zoo", zoo, "--alpha", ALPHA, "--metric", METRIC_NAME),
        *("--batch-size", bench.scale.batch, *options),
    )
    opened = next((at for at, line in ended.stderr if line.startswith("energy: ")), ended.started)
    told = [at for at, line in ended.stderr if not line.startswith(("energy: ", "warning: "))]
    closed = next((at for at in told if at > opened), ended.ended)
    rows = read_rows(output)
    table = energy_table(Path(f"{output}.state"))
    billed = sum(row["billed_joules"] or 0.0 for row in rows)
    in_table = sum(joules for kinds in table.values() for kind, joules in kinds.items() if kind != "overhead")
    answered = [row for row in rows if row.get("error") is None]
    tokens = sum(row["output_tokens"] for row in answered)
    figures: Figures = {
        "command_options": [str(option) for option in options],
        "requests": len(rows),
        "failed_requests": len(rows) - len(answered),
        "explored_requests": sum(row["explored"] for row in rows),
        "served": dict(sorted(Counter(row["model"] for row in answered).items())),
        "mean_accuracy": _mean(row["accuracy"] for row in answered),
        "served_output_tokens": tokens,
        "process_seconds": ended.seconds,
        "metered_seconds": closed - opened,
        "joules_by_meter_and_kind": table,
        "billed_joules": billed,
        "rows_against_state_relative": abs(billed - in_table) / in_table if in_table else None,
        "warnings": [line for line in ended.stderr_lines if line.startswith("warning: ")],
        **_breakdown(bench, Path(f"{output}.state"), rows),
    }
    if "nvml" in table and bench.trace.source.kind == "nvml":
        own, seen = sum(table["nvml"].values()), bench.trace.joules(opened, closed)
        figures |= {
            "nvml_joules_of_messcli": own,
            "nvml_joules_of_this_process": seen,
            "messcli_over_this_process": own / seen if seen else None,
            "nvml_joules_per_request": own / len(rows) if rows else None,
            "nvml_joules_of_whole_process": bench.trace.joules(ended.started, ended.ended),
        }
    if figures["rows_against_state_relative"] is not None and figures["rows_against_state_relative"] > 1e-9:
        raise StageError(f"the rows bill {billed} J, the state's table {in_table} J")
    if len({row["id"] for row in rows}) != len(rows) or len(rows) != len(read_rows(requests)):
        raise StageError(f"{len(rows)} rows for {len(read_rows(requests))} requests")
    if len(answered) != len(rows):
        errors = [row["error"] for row in rows if row.get("error")]
        raise StageError(f"{len(errors)} requests failed, the first with: {errors[0]}")
    return figures


def _mean(values: Iterator[float | None] | Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- stages: each fills `figures` as it goes, and returns a line for the table ---


def machine(bench: Bench, figures: Figures) -> str:
    """Versions, the card, and its idle watts before any CUDA context is there."""
    figures |= {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    figures["memory_bytes"] = psutil.virtual_memory().total
    for package in PACKAGES:
        figures[package] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            figures[package] = metadata.version(package)
    figures["card"] = bench.trace.source.describe()
    figures["energy"] = bench.trace.source.kind
    seconds = 1.0 if bench.tiny else 4.0
    start = time.monotonic()
    time.sleep(seconds)
    figures["idle_watts_without_context"] = bench.trace.joules(start, start + seconds) / seconds
    figures["messcli"] = " ".join(bench.messcli("--version").stdout).rpartition(" ")[2]
    text = bench.messcli("route", "--help").stdout
    option = re.search(r"^ +--window.*?(?=^ +-)", "\n".join(text), re.MULTILINE | re.DOTALL)
    bench.large_window = "auto" if option and "auto" in option[0] else str(bench.scale.requests)
    figures["large_window"] = bench.large_window
    name = figures["card"].get("card") or "no card"
    return f"{name}, messcli {figures['messcli']}, idle {figures['idle_watts_without_context']:.1f} W"


def models(bench: Bench, figures: Figures) -> str:
    """Random-weight checkpoints, made on the card in bf16 and saved as safetensors with a tokenizer."""
    shapes = list(TINY if bench.tiny else (SMALL, MEDIUM, LARGE))
    free = shutil.disk_usage(bench.work).free
    for shape in [LARGE] if not bench.tiny else []:
        needs = 2 * (shape.parameters + SMALL.parameters + MEDIUM.parameters)
        # a card must hold all three, and a cache beside them
        if needs > 0.8 * free or needs > 0.6 * bench.card_bytes:
            shapes[-1] = LARGE_IF_SHORT
            figures["made_smaller"] = f"{free} bytes of disk, {bench.card_bytes} of the card"
    figures["folder"] = str(bench.work)
    figures["disk_free_bytes"] = free
    figures["made"] = made = []
    tasks = [shape.__dict__ | {"folder": str(bench.work / shape.name)} for shape in shapes]
    for event in bench.worker("make", shapes=tasks):
        made.append(event)
        shape = next(shape for shape in shapes if shape.name == event["name"])
        bench.models.append(Model(shape, bench.work / shape.name))
        if event["parameters"] != shape.parameters or not event["logits_finite"]:
            raise StageError(f"{event}: {shape.parameters} parameters and finite logits were expected")
    return ", ".join(f"{one['name']} {one['parameters'] / 1e9:.3g}B" for one in made)


def counter(bench: Bench, figures: Figures) -> str:
    """The energy counter against integrated power over a fixed load, and how often both are updated."""
    source = bench.trace.source
    figures["source"] = source.kind
    seconds = bench.scale.load_seconds
    ticks: dict[str, list[float]] = {}
    poller = threading.Thread(target=_poll, args=(source, seconds + (3 if bench.tiny else 12), ticks))
    poller.start()
    try:
        for event in bench.worker("load", seconds=seconds):
            start, end = event["span"]
            joules = bench.trace.joules(start, end)
            integrated = bench.trace.integrated_joules(start, end)
            figures[event["phase"]] = {
                "seconds": end - start,
                "counter_joules": joules,
                "integrated_power_joules": integrated,
                "counter_over_integrated": joules / integrated if integrated else None,
                "watts": joules / (end - start),
                "products": event["products"],
            }
    finally:
        poller.join()
        for name, times in ticks.items():
            gaps = np.diff(times)
            if len(gaps):
                figures[f"{name}_update_seconds"] = {
                    "median": float(np.median(gaps)),
                    "shortest": float(gaps.min()),
                    "longest": float(gaps.max()),
                    "updates": len(gaps),
                }
    ratio = figures["steady"]["counter_over_integrated"]
    period = figures.get("counter_update_seconds", {}).get("median")
    said = f"{ratio:.4f} of integrated power" if ratio else "no power readings"
    return f"{source.kind}: {said}" + (f", update every {1000 * period:.0f} ms" if period else "")


def _poll(source: NvmlSource | EstimateSource, seconds: float, ticks: dict[str, list[float]]) -> None:
    """Times at which each reading changed, to a few ms."""
    reads = {
        "counter": source.read_joules,
        "instant_power": source.read_watts,
        "averaged_power": source.read_averaged_watts,
    }
    last = {name: read() for name, read in reads.items()}
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        for name, read in reads.items():
            value = read()
            if value is not None and value != last[name]:
                ticks.setdefault(name, []).append(now)
                last[name] = value
        time.sleep(0.001)


def conservation(bench: Bench, figures: Figures) -> str:
    """A real run: bills plus overhead against the counter, in the state and as another process read it."""
    zoo = bench.zoo(bench.all_models(), bench.scale.new_tokens)
    requests = write_requests(bench, bench.scale.requests)
    figures |= metered_route(bench, "window-64", requests, zoo, "--window", 64)
    ratio = figures.get("messcli_over_this_process")
    outside = f"{ratio:.4f} of the counter from outside" if ratio else "no NVML meter in this run"
    return f"rows = state to {figures['rows_against_state_relative']:.0e}; {outside}"


def windows(bench: Bench, figures: Figures) -> str:
    """The same requests in large windows, and all on the largest model."""
    zoo = bench.zoo(bench.all_models(), bench.scale.new_tokens)
    requests = write_requests(bench, bench.scale.requests)
    figures["large"] = metered_route(bench, "window-large", requests, zoo, "--window", bench.large_window)
    small = bench.work / "window-64.jsonl"
    before = {row["id"]: row for row in read_rows(small)}
    same = [row for row in read_rows(bench.work / "window-large.jsonl") if row["id"] in before]
    same = [row for row in same if row["model"] == before[row["id"]]["model"]]
    if same:  # bf16: another batch may turn a near tie
        figures["same_model"] = len(same)
        figures["same_output"] = sum(row["output"] == before[row["id"]]["output"] for row in same)
    options = ("--window", bench.scale.requests, "--policy", "largest")
    figures["largest"] = metered_route(bench, "largest", requests, zoo, *options)
    joules = {name: figures[name].get("nvml_joules_of_messcli") for name in ("large", "largest")}
    told = [f"{name} {value:.0f} J" for name, value in joules.items() if value]
    return f"--window {bench.large_window}: " + (", ".join(told) or "no NVML meter in these runs")


def curve(bench: Bench, figures: Figures) -> str:
    """Joules per output token by requests running, for each model, in the form of engines.json."""
    prompt, output = bench.scale.curve_tokens
    points = len(bench.all_models()) * (len(bench.scale.loads) + 1)
    # a third of the time is for starting, loading, warming up and for calls that take longer
    seconds = 0.2 if bench.tiny else max(1.0, min(6.0, 0.6 * bench.left / points))
    figures["seconds_per_point"] = seconds
    engines: dict[str, Figures] = {}
    figures["engines"] = []
    card = bench.trace.source.describe().get("card") or "none"
    try:
        for event in bench.worker(
            "curve",
            models=[{"name": model.shape.name, "folder": str(model.folder)} for model in bench.models],
            loads=bench.scale.loads,
            tokens=(prompt, output),
            reading=(bench.scale.prompt_tokens, bench.scale.prompt_batch),
            seconds=seconds,
        ):
            name = event["model"]
            if name not in engines:
                shape = next(model.shape for model in bench.models if model.shape.name == name)
                engines[name] = {
                    "model": name,
                    "task": f"random-{prompt}-{output}",
                    "gpu": card,
                    "gpus": 1,
                    "active_parameters_billions": shape.parameters / 1e9,
                    "mean_prompt_tokens": prompt,
                    "mean_output_tokens": output,
                    "points": [],
                }
                figures["engines"].append(engines[name])
            _curve_event(bench.trace, event, engines[name])
    finally:
        document = {
            "source": f"messcli tools/bench/gpu.py: transformers generate in bf16, {bench.trace.source.kind}",
            "unit": "joules of the card; the prompts' prefill is spread over the output tokens",
            "engines": figures["engines"],
        }
        (bench.out / "engines.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return "; ".join(
        f"{engine['model']} "
        + " ".join(f"{one['max_running']}:{one['joules_per_output_token']:.3g}" for one in engine["points"])
        for engine in engines.values()
    )


def _curve_event(trace: Trace, event: Figures, engine: Figures) -> None:
    """Turn what the worker did, and when, into joules."""
    if "error" in event:
        engine.setdefault("errors", []).append(event["error"])
        return
    start, end = event["span"]
    joules, seconds = trace.joules(start, end), end - start
    if event["what"] == "load":
        engine |= {"load_seconds": seconds, "load_joules": joules}
        engine |= {"bytes_per_parameter": event["bytes"] / (engine["active_parameters_billions"] * 1e9)}
    elif event["what"] == "idle":
        engine["idle_watts_loaded"] = joules / seconds
    elif event["what"] == "read":
        tokens = event["calls"] * event["running"] * event["prompt_tokens"]
        engine |= {
            "joules_per_prompt_token": joules / tokens,
            "prompt_tokens_per_second": tokens / seconds,
            "prompt_point": {"tokens": event["prompt_tokens"], "running": event["running"]},
        }
    else:
        tokens = event["calls"] * event["running"] * event["output_tokens"]
        point = {"max_running": event["running"], "mean_running": float(event["running"])}
        point |= {"joules_per_output_token": joules / tokens, "output_tokens_per_second": tokens / seconds}
        steps = event["calls"] * event["output_tokens"]
        point |= {"watts": joules / seconds, "joules_per_step": joules / steps, "seconds": seconds}
        engine["points"].append(point)


DECISIONS = ("id", "model", "explored", "accuracy", "queue", "joules", "billed_joules", "joules_predicted")


def resume(bench: Bench, figures: Figures) -> str:
    """Runs killed by SIGKILL and resumed: every id once, and the decisions of a run that nobody killed.

    Joules are replayed from a recorded table, so that they are the same in every run.
    """
    zoo = bench.zoo(bench.pair(), bench.scale.new_tokens)
    requests = write_requests(bench, bench.scale.requests)
    table = bench.work / "recorded.jsonl"
    options = ("--metric", METRIC_NAME, "--batch-size", bench.scale.batch, "--zoo", zoo)
    recorded = bench.messcli("record", requests, "-o", table, *options)
    figures["record_seconds"] = recorded.seconds
    options = (*options, "--alpha", ALPHA, "--meter", f"replay:{table}")
    runs = {"64": "window_64", bench.large_window: "window_large"}
    with ThreadPoolExecutor(2 * len(runs)) as pool:  # the joules are replayed: nothing is timed here
        whole = {
            window: pool.submit(
                bench.messcli,
                *(
                    "route",
                    requests,
                    "-o",
                    bench.work / f"whole-{window}.jsonl",
                    "--window",
                    window,
                    *options,
                ),
            )
            for window in runs
        }
        broken = {
            window: pool.submit(_killed_and_resumed, bench, requests, window, options) for window in runs
        }
        for window, name in runs.items():
            figures[name] = {"window": window, **broken[window].result()}
            whole[window].result()
            expected = read_rows(bench.work / f"whole-{window}.jsonl")
            found = read_rows(bench.work / f"killed-{window}.jsonl")
            ids = Counter(row["id"] for row in found)
            pairs = list(zip(expected, found, strict=False))
            figures[name] |= {
                "rows": len(found),
                "ids_once": len(found) == len(ids) == bench.scale.requests,
                "decisions_that_differ": sum(
                    any(one.get(key) != other.get(key) for key in DECISIONS) for one, other in pairs
                ),
                "outputs_that_differ": sum(one["output"] != other["output"] for one, other in pairs),
            }
    for name in runs.values():
        found = figures[name]
        if not found["ids_once"] or found["decisions_that_differ"]:
            raise StageError(f"{name}: not every id once, or decisions differ: {found}")
    return "; ".join(
        f"--window {window}: killed at {figures[name]['rows_when_killed']} of {bench.scale.requests}, same decisions"
        if figures[name]["killed"]
        else f"--window {window}: ended before it was killed"
        for window, name in runs.items()
    )


def _killed_and_resumed(bench: Bench, requests: Path, window: str, options: Sequence[object]) -> Figures:
    """Kill a run at a quarter of its rows, or where a large window is under way; then let it go on."""
    output = bench.work / f"killed-{window}.jsonl"
    grown = [0, time.monotonic()]  # lines, and since when so many
    still_seconds = 0.05 if bench.tiny else 0.5

    def in_the_middle() -> bool:
        lines = output.read_bytes().count(b"\n") if output.exists() else 0
        if lines != grown[0]:
            grown[:] = [lines, time.monotonic()]
        stands_still = window != "64" and lines >= 32 and time.monotonic() - grown[1] > still_seconds
        return bench.scale.requests > lines and (lines >= bench.scale.requests // 4 or stands_still)

    command = ("route", requests, "-o", output, "--window", window, *options)
    first = bench.messcli(*command, kill_when=in_the_middle)
    rows = len(read_rows(output))
    second = bench.messcli(*command)
    return {
        "killed": first.killed,
        "rows_when_killed": rows,
        "seconds_until_killed": first.seconds,
        "seconds_resumed": second.seconds,
    }


def memory(bench: Bench, figures: Figures) -> str:
    """A batch that is far too large for the card: halved until it fits, and every request answered."""
    model = bench.all_models()[-1]
    words = bench.scale.memory_prompt_words
    per_request = model.shape.cache_bytes_per_token * words
    free = bench.card_bytes - 2 * model.shape.parameters
    count = int(1.4 * free / per_request) + 1 if bench.card_bytes else 8
    figures |= {
        "model": model.shape.name,
        "batch_size": count,
        "prompt_tokens": words,
        "cache_bytes_wanted": count * per_request,
        "card_free_bytes": max(0, free),
        "out_of_memory_forced": bool(bench.card_bytes),
    }
    requests = write_requests(bench, count, words=(words, words), seed=1)
    options = ("--policy", "largest", "--window", count, "--batch-size", count)
    figures["run"] = metered_route(bench, "memory", requests, bench.zoo([model], 8), *options)
    if not bench.card_bytes:
        return f"{count} requests answered; without a card nothing ran out"
    wanted, there = figures["cache_bytes_wanted"] / 1e9, free / 1e9
    return f"{count} requests in one batch want {wanted:.0f} GB of {there:.0f} GB: all answered"


def turns(bench: Bench, figures: Figures) -> str:
    """Two models that share the card: one in memory at a time, beside both."""
    pair = bench.pair()
    zoo = bench.zoo(pair, bench.scale.new_tokens)
    requests = write_requests(bench, bench.scale.requests // 2)
    least = 2 * pair[0].shape.parameters
    for name, options in {"in_turns": ("--max-loaded", 1), "together": ()}.items():
        start = time.monotonic()
        figures[name] = metered_route(bench, name, requests, zoo, "--window", bench.large_window, *options)
        figures[name]["loads_seen_in_memory"] = bench.trace.memory_rises(start, time.monotonic(), 0.7 * least)
    told = []
    for name in ("in_turns", "together"):
        joules = figures[name].get("nvml_joules_of_messcli")
        told.append(
            f"{name} {figures[name]['metered_seconds']:.1f} s" + (f" {joules:.0f} J" if joules else "")
        )
    return ", ".join(told)


def calibrate(bench: Bench, figures: Figures) -> str:
    """`messcli calibrate --quick` over the two smaller models."""
    zoo = bench.zoo(bench.pair(), bench.scale.new_tokens)
    output = bench.work / "calibrated.json"
    budget = max(1.0, min(20.0, 0.4 * bench.left)) if not bench.tiny else 1.0
    options = ("--quick", "--budget", f"{budget:.0f}", "--batch-size", bench.scale.batch)
    ended = bench.messcli("calibrate", "-o", output, "--zoo", zoo, *options)
    figures |= {"seconds": ended.seconds, "told": ended.stderr_lines[-30:]}
    figures["calibration"] = json.loads(output.read_text(encoding="utf-8"))
    return f"{len(figures['calibration'].get('models', []))} models in {ended.seconds:.0f} s"


def beside(bench: Bench, figures: Figures) -> str:
    """Both models asked everything: in turns, and beside each other by the calibration of the stage before."""
    calibration = bench.work / "calibrated.json"
    if not calibration.exists():
        raise Skipped("nothing was calibrated, and beside each other are only calibrated models")
    requests = write_requests(bench, max(32, bench.scale.requests // 4))
    told = []
    for name in ("in_turns", "beside"):
        zoo = bench.zoo(bench.pair(), bench.scale.new_tokens, beside=name == "beside")
        options = ("--window", 256, "--c", 1000, "--calibration", calibration)
        figures[name] = run = metered_route(bench, f"beside-{name}", requests, zoo, *options)
        if run["explored_requests"] != run["requests"]:
            raise StageError(
                f"{run['explored_requests']} of {run['requests']} requests were put to both models"
            )
        joules = run.get("nvml_joules_of_messcli")
        told.append(f"{name} {run['metered_seconds']:.1f} s" + (f" {joules:.0f} J" if joules else ""))
    return ", ".join(told)


@dataclass(frozen=True)
class Stage:
    """Seconds on an H100; with --tiny, none is left out for want of time."""

    run: Callable[[Bench, Figures], str]
    least_seconds: float  # without these it isn't begun
    share: float  # of the whole time, at most, where all are run


STAGES = (
    Stage(machine, 10, 0.15),
    Stage(models, 30, 0.35),
    Stage(counter, 20, 0.12),
    Stage(conservation, 35, 0.25),
    Stage(curve, 45, 0.30),
    Stage(resume, 45, 0.30),
    Stage(memory, 30, 0.20),
    Stage(windows, 40, 0.25),
    Stage(turns, 30, 0.20),
    Stage(calibrate, 30, 0.15),
    Stage(beside, 30, 0.15),
)


# --- workers: child processes that use the card; each prints JSON lines ---

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


def _tell(**event: object) -> None:
    print(json.dumps(event), flush=True)


def make(task: Figures) -> None:
    """Make and save checkpoints."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for shape in task["shapes"]:
        started = time.monotonic()
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            intermediate_size=shape["feed_forward"],
            max_position_embeddings=shape["positions"],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(task["device"]):
            model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(before)
        # a random model never ends an answer by </s>: one word in 32 ends it, so that lengths vary
        model.generation_config.eos_token_id = [2, *range(len(SPECIALS), shape["vocabulary"], 32)]
        with torch.inference_mode():
            logits = model(torch.arange(4, 12, device=task["device"])[None]).logits
        made = time.monotonic()
        folder = Path(shape["folder"])
        model.save_pretrained(folder, max_shard_size="4GB")
        _tokenizer(shape["letter"], shape["vocabulary"], shape["positions"]).save_pretrained(folder)
        _tell(
            name=shape["name"],
            parameters=sum(weights.numel() for weights in model.parameters()),
            dtype=str(model.dtype),
            logits_finite=bool(torch.isfinite(logits).all()),
            make_seconds=made - started,
            save_seconds=time.monotonic() - made,
            files=len(list(folder.glob("*.safetensors"))),
            bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        )
        del model, logits
        if task["device"] != "cpu":
            torch.cuda.empty_cache()


def _tokenizer(letter: str, vocabulary: int, positions: int) -> Any:
    """Words w0, w1, ... in, the model's own words out: s0, s1, ... for the letter s."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *(f"{letter}{number}" for number in range(vocabulary - len(SPECIALS)))]
    core = Tokenizer(kinds.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    core.normalizer = normalizers.Replace("w", letter)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def load(task: Figures) -> None:
    """A fixed load: products of square matrices, without a pause, then half a second on and half a second off."""
    import torch

    device = task["device"]
    size = 8_192 if device != "cpu" else 256
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device != "cpu" else torch.float32)

    def work(seconds: float) -> int:
        products, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(4):
                torch.matmul(one, one)
            products += 4
            _synchronize(device)
        return products

    work(1.0)  # warm
    start = time.monotonic()
    products = work(task["seconds"])
    _tell(phase="steady", span=[start, time.monotonic()], products=products)
    start, products = time.monotonic(), 0
    while time.monotonic() - start < task["seconds"]:
        products += work(0.5)
        time.sleep(0.5)
    _tell(phase="pulsed", span=[start, time.monotonic()], products=products)


def _synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def messcli_backend(name: str, folder: str, device: str, new_tokens: int) -> Any:
    """A model behind messcli's transformers backend. All that this file imports of messcli."""
    from messcli.models.backend import create
    from messcli.zoo import model_spec

    spec = model_spec(
        name=name,
        path=folder,
        device=device,
        dtype="bfloat16",
        max_new_tokens=new_tokens,
        generation={"eos_token_id": 2},  # not one word in 32: a list of ends costs a little in every step
    )
    return create(spec, batch_size=None)


def curve_worker(task: Figures) -> None:
    """Answers of exact lengths at every load, by the call that `messcli calibrate` measures."""
    import torch

    device, (prompt, output) = task["device"], task["tokens"]
    for model in task["models"]:
        name = model["name"]
        backend = messcli_backend(name, model["folder"], device, output)
        start = time.monotonic()
        backend.load()
        _synchronize(device)
        held = torch.cuda.memory_allocated() if device != "cpu" else 0
        _tell(model=name, what="load", span=[start, time.monotonic()], bytes=held)
        start = time.monotonic()
        time.sleep(min(2.0, task["seconds"]))
        _tell(model=name, what="idle", span=[start, time.monotonic()])
        jobs = [("write", prompt, output, running) for running in task["loads"]]
        tokens, running = task["reading"]
        jobs.append(("read", tokens, 1, running))
        for what, prompt_tokens, output_tokens, running in jobs:
            try:
                backend.generate_exactly(
                    prompt_tokens, min(4, output_tokens), running
                )  # kernels, allocations
                calls, start = 0, time.monotonic()
                while calls == 0 or time.monotonic() - start < task["seconds"]:
                    backend.generate_exactly(prompt_tokens, output_tokens, running)
                    calls += 1
                _tell(
                    model=name,
                    what=what,
                    span=[start, time.monotonic()],
                    running=running,
                    calls=calls,
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                )
            except Exception as error:  # noqa: PERF203  # the next load or model may still work
                _tell(model=name, what=what, error=f"{what} at {running}: {type(error).__name__}: {error}")
        backend.unload()


WORKERS: Mapping[str, Callable[[Figures], None]] = {"make": make, "load": load, "curve": curve_worker}


# --- the run ---


def run_stage(bench: Bench, stage: Stage, ends: float) -> Figures:
    """One entry of the report."""
    started = time.monotonic()
    total = 60 * bench.minutes
    left = ends - started
    figures: Figures = {}
    entry: Figures = {"stage": stage.run.__name__, "status": "ok", "says": ""}
    if left < stage.least_seconds and not bench.tiny:
        return entry | {
            "status": "skipped",
            "says": f"{left:.0f} s left of {total:.0f}, and it takes {stage.least_seconds:.0f}",
            "seconds": 0.0,
            "figures": {},
        }
    bench.stage_ends = started + (left if bench.tiny else min(left, stage.share * bench.share_scale * total))
    try:
        entry["says"] = stage.run(bench, figures)
    except Skipped as why:
        entry |= {"status": "skipped", "says": str(why)}
    except Exception as error:  # a stage that fails stops no other
        entry |= {"status": "failed", "says": f"{type(error).__name__}: {error}"}
        entry["stderr"] = (
            error.stderr if isinstance(error, StageError) else traceback.format_exc().splitlines()[-15:]
        )
    return entry | {"seconds": time.monotonic() - started, "figures": figures}


def open_source() -> tuple[NvmlSource | EstimateSource, str | None]:
    """NVML, or the estimate and why."""
    try:
        return NvmlSource(), None
    except Exception as error:  # no binding, no library, no card: each has its own class
        return EstimateSource(), f"{type(error).__name__}: {error}"


def find_card(tiny: bool) -> tuple[str, int]:
    """torch's name of the card and its bytes, asked in another process: this one starts no CUDA."""
    if tiny:
        return "cpu", 0
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        sys.exit(f"torch sees no card: {last}. Run with --tiny to try the script without one")
    return "cuda:0", int(done.stdout)


def work_folder(tiny: bool) -> str | None:
    """Where the checkpoints go: memory where there is plenty (a disk may take minutes), else the temp folder."""
    shared = Path("/dev/shm")  # noqa: S108  # only as a place for a folder of our own
    needs = 2 * (SMALL.parameters + MEDIUM.parameters + LARGE.parameters)
    if tiny or not shared.is_dir() or not os.access(shared, os.W_OK):
        return None
    # the pages of a loaded checkpoint are needed once more, by the process that loads it
    plenty = shutil.disk_usage(shared).free > 1.3 * needs and psutil.virtual_memory().available > 3 * needs
    return str(shared) if plenty else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for report.json and engines.json")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="the whole run takes no longer (default: 5)"
    )
    parser.add_argument(
        "--only", help="these stages, by name, separated by commas; models are made if need be"
    )
    parser.add_argument("--requests", type=int, help="of each routing run (default: 512)")
    parser.add_argument("--tiny", action="store_true", help="three tiny models on the CPU: does it all work?")
    parser.add_argument("--work", help="where the checkpoints are made, and removed in the end")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        WORKERS[options.worker](json.loads(options.task))
        return 0
    if options.out is None:
        parser.error("--out DIR: name the folder for the report")
    names = [stage.run.__name__ for stage in STAGES]
    only = {*options.only.split(","), "machine", "models"} if options.only else set(names)
    if unknown := only - set(names):
        parser.error(f"--only: no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    started = time.monotonic()
    ends = started + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    device, card_bytes = find_card(options.tiny)
    source, why = open_source()
    report: Figures = {
        "report": "messcli tools/bench/gpu.py",
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "minutes_allowed": options.minutes,
        "no_nvml_because": why,
        "stages": [],
    }
    with tempfile.TemporaryDirectory(
        prefix="messcli-gpu-", dir=options.work or work_folder(options.tiny)
    ) as work:
        trace = Trace(source)
        scale = TINY_SCALE if options.tiny else CARD_SCALE
        scale = replace(scale, requests=options.requests or scale.requests)
        bench = Bench(
            Path(work),
            options.out.resolve(),
            options.tiny,
            device,
            trace,
            scale,
            options.minutes,
            card_bytes=card_bytes,
            share_scale=sum(stage.share for stage in STAGES)
            / sum(stage.share for stage in STAGES if stage.run.__name__ in only),
        )
        bench.file(f"{METRIC_NAME.partition(':')[0]}.py", METRIC)
        for stage in STAGES:
            if stage.run.__name__ not in only:
                continue
            entry = run_stage(bench, stage, ends)
            report["stages"].append(entry)
            report["seconds"] = time.monotonic() - started
            text = json.dumps(report, indent=1) + "\n"
            (options.out / "report.json").write_text(text, encoding="utf-8")
            print(
                f"{entry['stage']}: {entry['status']} after {entry['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        trace.stop()

    for entry in report["stages"]:
        print(f"{entry['stage']:<13}{entry['status']:<8}{entry['seconds']:>6.1f} s  {entry['says']}")
    print(f"{report['seconds']:.0f} s in all; {options.out / 'report.json'}")
    return int(any(entry["status"] == "failed" for entry in report["stages"]))


if __name__ == "__main__":
    sys.exit(main())
