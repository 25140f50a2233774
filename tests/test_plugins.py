"""A package of somebody else's adds one of each kind by entry points; every command takes its names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_models import requests

ROOT = Path(__file__).parent.parent

MODULE = """
import numpy as np

from messcli.energy import MeterKind
from messcli.files.dialects import Dialect
from messcli.metrics import Metric
from messcli.models.backend import InBatches
from messcli.predict.mean import MeanPredictor
from messcli.records import Generation
from messcli.routing.policy import Largest


def length():
    def score(output, references):
        longest = max(len(output), *(len(one) for one in references), 1)
        return max(1.0 - abs(len(output) - len(one)) / longest for one in references)

    return Metric("length", "length|unit:char|version:1", score)


class Cautious(MeanPredictor):
    name = "cautious"


def good_enough(setup):
    class GoodEnough(Largest):
        def choose(self, view):
            good = [m for m in view.allowed if view.estimates and view.estimates[m] >= view.alpha]
            return good[0] if good else view.allowed[-1]

        def exploration_probability(self, t, explored, accounts):
            return 1.0 if explored < 5 else 0.0

    return GoodEnough("good-enough")


class Wall:
    kind, provenance, period, partitioned = "wall", "a wall plug, a joule a reading", 0.01, False

    def __init__(self):
        self.joules = 0.0

    def read(self):
        self.joules += 1.0
        return self.joules

    def warnings(self):
        return []

    def close(self):
        pass


WALL = MeterKind(lambda device, options: Wall(), devices=("cpu",))


class Echo(InBatches):
    devices, occupies_memory, context_length = ("cpu",), True, 1000

    def __init__(self, spec, *, batch_size):
        self.spec, self.loaded, self._size = spec, False, batch_size or 8

    def load(self):
        self.loaded = True

    def unload(self):
        self.loaded = False

    def prompt_tokens(self, request):
        return len(request.prompt.split())

    def plan(self, requests):
        return [list(range(len(requests)))[k : k + self._size] for k in range(0, len(requests), self._size)]

    def generate(self, batch):
        self.load()
        words = 2 if self.spec.name == "small" else 100
        outputs = [" ".join(request.prompt.split()[:words]) for request in batch]
        return [
            Generation(output, self.prompt_tokens(request), len(output.split()))
            for request, output in zip(batch, outputs)
        ]

    def generate_exactly(self, prompt_tokens, output_tokens, batch_size):
        return [Generation("x", prompt_tokens, output_tokens)] * batch_size


QUESTIONS = Dialect(
    "questions",
    looks_like=lambda line: "frage" in line,
    read=lambda line: {"id": line.get("nummer"), "prompt": line["frage"], "reference": line.get("antwort")},
)
"""
POINTS = """
[messcli.metrics]
length = acme:length
exact = acme:length
[messcli.predictors]
cautious = acme:Cautious
[messcli.policies]
good-enough = acme:good_enough
[messcli.meters]
wall = acme:WALL
[messcli.backends]
echo = acme:Echo
[messcli.dialects]
questions = acme:QUESTIONS
"""
CONFORMS = """
from messcli import conformance
from messcli.energy import MeterOptions
from messcli.files.dialects import load_dialect
from messcli.metrics import load_metric
from messcli.models.backend import create
from messcli.registry import METERS, METRICS, POLICIES, PREDICTORS
from messcli.zoo import ModelSpec

conformance.check(conformance.METRIC, load_metric("length"))
conformance.check(conformance.PREDICTOR, PREDICTORS.load("cautious"))
conformance.check(conformance.POLICY, POLICIES.load("good-enough"))
conformance.check(conformance.METER, METERS.load("wall").open("cpu", MeterOptions()), conformance.burn)
conformance.check(conformance.BACKEND, create(ModelSpec("m", "p", backend="echo"), batch_size=2))
conformance.check(conformance.DIALECT, load_dialect("questions"), {"frage": "a", "antwort": "b"})
assert METRICS.package("length") == "acme-plugins 1.2", METRICS.package("length")
assert METRICS.shadowed() == ("exact",)
assert load_metric("exact").signature.startswith("exact|")
"""


def install(folder: Path, name: str, points: str, module: str | None) -> None:
    """As pip leaves a package behind."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)
    if module is not None:
        (folder / "acme.py").write_text(module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    install(tmp_path / "site", "acme-plugins", POINTS, MODULE)
    models = "".join(
        f'[[models]]\nname = "{name}"\npath = "x"\nbackend = "echo"\n' for name in ("small", "large")
    )
    (tmp_path / "zoo.toml").write_text(f'[sla]\nalpha = 0.6\nmetric = "length"\n{models}')
    lines = [{"nummer": row["id"], "frage": row["prompt"], "antwort": row["prompt"]} for row in requests(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def messcli(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = python(folder, "-m", "messcli", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_help_and_completion_list_its_names(folder: Path) -> None:
    # lines are broken at hyphens
    route, simulate = (
        "".join(messcli(folder, command, "--help-all").stdout.split()) for command in ("route", "simulate")
    )
    for name in ("length", "cautious", "good-enough", "wall", "questions"):
        assert name in route, name
    for name in ("length", "cautious", "good-enough"):
        assert name in simulate, name


def test_a_slip_suggests_its_names(folder: Path) -> None:
    route = ("route", "in.jsonl", "-o", "out.jsonl")
    for option, slip, meant in (
        ("--metric", "lenght", "length"),
        ("--predictor", "cautios", "cautious"),
        ("--policy", "good-enogh", "good-enough"),
        ("--meter", "wal", "wall"),
        ("--format", "question", "questions"),
    ):
        done = python(folder, "-m", "messcli", *route, option, slip)
        assert done.returncode in (1, 2)
        assert f'did you mean "{meant}"?' in " ".join(done.stderr.split()), done.stderr


@pytest.mark.slow
def test_every_command_takes_its_names(folder: Path) -> None:
    calibrated = messcli(folder, "calibrate", "in.jsonl", "--meter", "wall", "--quick", "--budget", "1")
    assert "echo" not in calibrated.stderr or "Error" not in calibrated.stderr
    names = ("--predictor", "cautious", "--policy", "good-enough", "--meter", "wall")
    done = messcli(folder, "route", "in.jsonl", "-o", "out.jsonl", *names)
    assert "holds questions (--format questions, guessed from its first line)" in done.stderr
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert {row["meter"] for row in rows} == {"wall"}
    assert sum(row["explored"] for row in rows) == 5
    assert all(0 <= row["accuracy"] <= 1 and row["joules"] > 0 for row in rows)
    assert "length" in messcli(folder, "report", "out.jsonl.state").stdout
    messcli(folder, "record", "in.jsonl", "-o", "table.jsonl", "--meter", "wall", "--metric", "length")
    simulated = messcli(
        folder, "simulate", "table.jsonl", "--alpha", "0.6", "--policy", "good-enough", "--predictor", "cautious",
        "--metric", "length", "--jobs", "1",
    )  # fmt: skip
    assert re.search(r"good-enough +0\.\d+", simulated.stdout)


def test_it_passes_the_suites_that_ours_pass(folder: Path) -> None:
    done = python(folder, "-c", CONFORMS)
    assert done.returncode == 0, done.stderr


def test_a_package_that_cannot_be_imported_is_named(folder: Path) -> None:
    points = "[messcli.metrics]\ngone = nowhere:metric\n[messcli.meters]\nbroken = nowhere:METER\n"
    install(folder / "site", "broken-plugins", points, None)
    done = messcli(folder, "route", "in.jsonl", "-o", "out.jsonl", "--metric", "gone", code=1)
    assert done.stderr.strip() == (
        'Error: metric "gone": broken-plugins 1.2 has it, and importing it failed: ModuleNotFoundError: '
        "No module named 'nowhere'. Mend or uninstall that package"
    )
    done = messcli(folder, "route", "in.jsonl", "-o", "out.jsonl", "--limit", "3")  # the other meters go on
    assert 'meter "broken": broken-plugins 1.2 has it' in done.stderr
