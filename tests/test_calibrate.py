"""`messcli calibrate` and what `route` makes of it: known coefficients found again, every stop survived, every
mismatch refused.

Models here use energy by known coefficients, told to a counter; under the NVML stub they take time instead, at
known watts.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import nvml_stub
import pytest
import tiny_models
from click.testing import CliRunner
from marks import slow
from nvml_stub import control

from messcli.calibration import CalibrateConfig, CalibrateSummary, calibrate
from messcli.calibration import measure as measuring
from messcli.calibration.file import (
    BUNDLED_ZOO,
    Cell,
    Coefficients,
    default_path,
    find_calibration,
    load_calibration,
    save,
)
from messcli.calibration.fit import fit
from messcli.calibration.readings import Kept
from messcli.cli import main
from messcli.energy import Meter, split
from messcli.errors import CalibrationError, MeterError, ModelError, StateBusy, UsageError
from messcli.jobs import fleet as engine
from messcli.jobs.config import RouteConfig, Running
from messcli.jobs.route import route
from messcli.models.backend import Exact, InBatches, create
from messcli.predict.joules import EnergyPrior, JoulesPredictor
from messcli.predict.tuning import JOULES
from messcli.records import Generation, Request
from messcli.registry import BACKENDS
from messcli.zoo import ModelSpec, load_zoo

HERE = Path(__file__).parent
TRUE = {
    "small": Coefficients(0.02, 1e-4, 2e-3, 1e-6),
    "large": Coefficients(0.05, 1e-3, 2e-2, 2e-5),
}
GRID = ((8, 64, 256), (4, 16, 32))
WATTS = 200.0  # of the stub's card


class KnownCounter:
    """What the models say that they used, and watts for the time that passes."""

    kind = "estimate"
    provenance = "known coefficients"
    partitioned = False
    period = 1e-9
    joules: ClassVar[float] = 0.0
    idle_watts: ClassVar[float] = 0.0
    error: ClassVar[MeterError | None] = None

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), KnownCounter.joules

    def read(self) -> float:
        if KnownCounter.error is not None:
            raise KnownCounter.error
        idle = self.idle_watts * (time.monotonic() - self._began)
        return KnownCounter.joules - self._before + idle

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        return


class CountedBackend(InBatches):
    """A model that answers as many tokens as the prompt has words, by `TRUE` coefficients."""

    noise: ClassVar[float] = 0.02
    seconds: ClassVar[float] = 0.0  # that a call takes
    calls: ClassVar[int] = 0
    fail_after: ClassVar[int | None] = None
    rng: ClassVar[random.Random] = random.Random(1)
    occupies_memory = True
    context_length = 300

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        self.spec = spec
        self.devices = (spec.device,)
        self.loaded = False
        self._most = batch_size or 32

    def load(self) -> None:
        self.loaded = True

    def unload(self) -> None:
        self.loaded = False

    def prompt_tokens(self, request: Request) -> int:
        return 3 + len(request.prompt) // 5

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        return [
            list(range(start, min(start + self._most, len(requests))))
            for start in range(0, len(requests), self._most)
        ]

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        lengths = [(self.prompt_tokens(r), min(10, len(r.prompt.split()))) for r in batch]
        self.use(lengths)
        return [Generation(r.prompt, p, o) for r, (p, o) in zip(batch, lengths, strict=True)]

    def generate_exactly(self, prompt_tokens: int, output_tokens: int, batch_size: int) -> list[Generation]:
        self.use([(prompt_tokens, output_tokens)] * batch_size)
        return [Generation("", prompt_tokens, output_tokens)] * batch_size

    def use(self, lengths: Sequence[tuple[int, int]]) -> None:
        cls = type(self)
        cls.calls += 1
        if cls.fail_after is not None and cls.calls > cls.fail_after:
            KnownCounter.error = MeterError("the counter is gone. Run the same command again")
        joules = sum(TRUE[self.spec.name].joules(p, o) for p, o in lengths)
        joules *= math.exp(cls.noise * cls.rng.gauss(0, 1))
        time.sleep(joules / WATTS if self.spec.device.startswith("cuda") else cls.seconds)
        KnownCounter.joules += joules


def known_meter(choice: str, devices: Sequence[str], **_: Any) -> Meter:
    return Meter({"cpu": KnownCounter()}, dict.fromkeys(devices, ("cpu",)), choice=choice)


def write_zoo(folder: Path, device: str = "cpu", **fields: object) -> Path:
    extra = "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())
    models = "".join(
        f'[[models]]\nname = "{name}"\npath = "./{name}"\nbackend = "counted"\ndevice = "{device}"\n'
        f"max_new_tokens = 32\n{extra}"
        for name in TRUE
    )
    file = folder / "zoo.toml"
    file.write_text(f'[sla]\nalpha = 0.7\nmetric = "exact"\n{models}')
    return file


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo file in the working folder; its models' energy is known."""
    monkeypatch.setitem(BACKENDS, "counted", "test_calibrate:CountedBackend")
    for module in (measuring, engine):
        monkeypatch.setattr(module, "open_meter", known_meter)
    for owner, values in (
        (CountedBackend, {"noise": 0.02, "seconds": 0.0, "calls": 0, "fail_after": None}),
        (CountedBackend, {"rng": random.Random(1)}),
        (KnownCounter, {"idle_watts": 0.0, "error": None}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(measuring, "LEAST_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    return write_zoo(tmp_path)


def measure(**options: Any) -> CalibrateSummary:
    settings = {"prompt_tokens": GRID[0], "output_tokens": GRID[1], "quick": True, "budget_seconds": 20.0}
    return calibrate(CalibrateConfig(**settings | options))


@pytest.fixture(scope="module")
def measured_once() -> list[bytes]:
    """The calibration of `calibrated`, once it was measured."""
    return []


@pytest.fixture
def calibrated(zoo: Path, measured_once: list[bytes]) -> Path:
    file = zoo.parent / "calibration.json"
    if not measured_once:
        measure()
        measured_once.append(file.read_bytes())
    file.write_bytes(measured_once[0])
    return file


def write_requests(folder: Path, count: int, name: str = "in.jsonl") -> Path:
    prompts = [" ".join(f"word{(n * 7 + k) % 13}" for k in range(1 + n * 5 % 11)) for n in range(count)]
    rows = [{"id": f"r{n}", "prompt": text, "reference": text} for n, text in enumerate(prompts)]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- measuring


def test_known_coefficients_are_found_again(zoo: Path) -> None:
    summary = measure()
    calibration = summary.calibration
    assert calibration is not None
    assert calibration.converged
    assert Path(summary.output).samefile(zoo.parent / "calibration.json")
    for model in calibration.models:
        assert len(model.cells) == 9
        assert model.batch_size == 32  # a window of 64 over two models
        for cell in model.cells:
            truth = TRUE[model.name].joules(cell.prompt_tokens, cell.output_tokens)
            assert cell.mean_joules == pytest.approx(truth, rel=0.04)
            assert len(cell.joules) >= 5
            assert cell.half_interval is not None
            assert cell.half_interval <= 0.05 * cell.mean_joules
        for lengths in ((16, 8), (128, 24), (256, 32), (8, 4)):
            found = model.gross.coefficients.joules(*lengths)
            assert found == pytest.approx(TRUE[model.name].joules(*lengths), rel=0.04)
        assert model.gross.left_out_error is not None
        assert model.gross.left_out_error < 0.05
        assert model.gross.standard_errors is not None
        assert model.prompt_tokens_per_character == pytest.approx(0.2, rel=0.05)
        assert model.constant_prompt_tokens == pytest.approx(3, abs=0.6)


def test_the_file_says_everything_and_reads_back(calibrated: Path) -> None:
    document = json.loads(calibrated.read_text())
    assert document["format"] == 2
    assert {"meter", "versions", "hardware", "models", "warnings", "made", "seed", "window"} <= set(document)
    assert document["versions"]["torch"]
    assert "cpu" in document["hardware"]
    assert document["meter"]["sources"]["cpu"]["provenance"] == "known coefficients"
    for model in document["models"]:
        assert {"signature", "device", "dtype", "batch_size", "idle_watts", "gross", "net"} <= set(model)
        for cell in model["cells"]:
            assert len(cell["joules"]) == len(cell["seconds"])
            assert {"mean_joules", "half_interval_joules", "mean_net_joules", "converged"} <= set(cell)
    calibration = load_calibration(calibrated)
    assert calibration.dumps() == calibrated.read_text()
    assert not list(calibrated.parent.glob("*.partial"))
    assert not list(calibrated.parent.glob(".*.tmp"))


@pytest.mark.slow
def test_gross_and_net_of_idle(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnownCounter, "idle_watts", 50.0)
    monkeypatch.setattr(CountedBackend, "seconds", 0.02)
    calibration = measure(prompt_tokens=(8, 256), output_tokens=(4, 32)).calibration
    assert calibration is not None
    large = calibration.of("large")
    assert large.idle_watts == pytest.approx(50, rel=0.1)
    for cell in large.cells:
        truth = TRUE["large"].joules(cell.prompt_tokens, cell.output_tokens)
        net = cell.net_joules(large.idle_watts)
        assert np.mean(net) == pytest.approx(truth, rel=0.1)
        assert cell.mean_joules > np.mean(net)
    assert large.net.coefficients.joules(64, 16) < large.gross.coefficients.joules(64, 16)


def test_own_prompts_give_lengths_and_what_uneven_batches_take(zoo: Path) -> None:
    prompts = write_requests(zoo.parent, 120)
    summary = calibrate(CalibrateConfig(prompts=str(prompts), quick=True, budget_seconds=20.0))
    calibration = summary.calibration
    assert calibration is not None
    texts = [row["prompt"] for row in rows_of(prompts)]
    assert calibration.characters == np.median([len(text) for text in texts])
    for model in calibration.models:
        lengths = sorted({cell.prompt_tokens for cell in model.cells})
        assert len(lengths) == 3
        assert lengths[0] >= 4
        assert lengths[-1] <= 3 + max(map(len, texts)) // 5
        own = model.own_prompts
        assert own is not None
        assert own.output_tokens == pytest.approx(np.mean([min(10, len(t.split())) for t in texts]), rel=0.2)
        assert own.factor == pytest.approx(1, abs=0.2)  # these models charge no more for uneven batches
        mean = np.mean([TRUE[model.name].joules(3 + len(t) // 5, min(10, len(t.split()))) for t in texts])
        assert np.mean([model.joules(len(t)) for t in texts]) == pytest.approx(mean, rel=0.15)
    assert "own prompts" in "\n".join(summary.text())


@pytest.mark.slow
def test_a_budget_that_ends_marks_cells_and_the_next_run_goes_on(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountedBackend, "noise", 1.0)
    first = measure(budget_seconds=0.01)
    assert first.calibration is not None
    assert not first.calibration.converged
    assert first.readings == 18  # every cell once, whatever the time
    text = "\n".join(first.text())
    assert text.count("not converged") == 18
    assert "NOT converged: run again to go on measuring" in text
    assert first.calibration.of("small").gross.standard_errors is None
    monkeypatch.setattr(CountedBackend, "noise", 0.0)
    lines: list[str] = []
    second = calibrate(
        CalibrateConfig(prompt_tokens=GRID[0], output_tokens=GRID[1], quick=True, budget_seconds=0.01),
        tell=lines.append,
    )
    assert "going on from 18 readings of an earlier run" in lines
    assert second.calibration is not None
    assert all(len(cell.joules) >= 1 for model in second.calibration.models for cell in model.cells)


@pytest.mark.slow
def test_a_converged_calibration_measures_nothing_again_unless_asked_to(calibrated: Path) -> None:
    assert measure().readings == 0
    assert measure(fresh=True).readings >= 5 * 18


def test_net_and_json_on_the_command_line(zoo: Path) -> None:
    runner = CliRunner()
    args = ["calibrate", "--quick", "--prompt-tokens", "8,64", "--output-tokens", "4,32", "-o", "-", "--net"]
    ended = runner.invoke(main, args)
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["format"] == 2
    assert "net of idle" in ended.stderr
    assert not (zoo.parent / "calibration.json").exists()
    bad = runner.invoke(main, ["calibrate", "--prompt-tokens", "8,x"])
    assert bad.exit_code == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"meter": "replay:x"}, "replay reads no energy"),
        ({"prompt_tokens": (400,)}, "takes at most 300"),
        ({"output_tokens": (64,)}, "max_new_tokens of the zoo file is 32"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(zoo: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        measure(**options)


def test_a_backend_without_exact_lengths_is_refused(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "counted", "fake_models:FakeBackend")
    with pytest.raises(CalibrationError, match=r"counted backend can't .* exact lengths\. Route without"):
        measure()


@pytest.mark.slow
def test_a_counter_that_fails_keeps_what_was_measured(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedBackend, "fail_after", 20)
    with pytest.raises(MeterError, match="the counter is gone"):
        measure()
    kept = (zoo.parent / "calibration.json.partial").read_text().splitlines()
    assert len(kept) > 5
    monkeypatch.setattr(KnownCounter, "error", None)
    monkeypatch.setattr(CountedBackend, "fail_after", None)
    summary = measure()
    assert summary.calibration is not None
    measured = [c for m in summary.calibration.models for c in (*m.cells, *m.load_cells)]
    assert sum(len(cell.joules) for cell in measured) == (summary.readings + len(kept) - 1)


# ---------------------------------------------------------------- the fit


def cells(coefficients: Coefficients, noise: float = 0.0) -> list[Cell]:
    rng = np.random.default_rng(0)
    return [
        Cell(p, o, tuple(coefficients.joules(p, o) * rng.lognormal(0, noise, 6)), (0.1,) * 6, 32)
        for p in GRID[0]
        for o in GRID[1]
    ]


def test_fit_is_exact_without_noise() -> None:
    found = fit(cells(TRUE["large"]), seed=0)
    assert found.coefficients.values() == pytest.approx(TRUE["large"].values(), rel=1e-6)
    assert found.left_out_error == pytest.approx(0, abs=1e-6)


def test_fit_is_never_negative_and_its_errors_cover_the_truth() -> None:
    truth = Coefficients(0.05, 0.0, 2e-2, 0.0)
    found = fit(cells(truth, 0.1), seed=0)
    assert min(found.coefficients.values()) >= 0
    assert found.standard_errors is not None
    pairs = zip(found.coefficients.values(), truth.values(), found.standard_errors.values(), strict=True)
    assert all(abs(value - true) <= 4 * error + 1e-12 for value, true, error in pairs)


def test_fit_of_nothing_is_nothing() -> None:
    zeros = [Cell(p, 4, (0.0, 0.0), (0.1, 0.1), 32) for p in (1, 2, 3, 4, 5)]
    assert fit(zeros, seed=0).coefficients.values() == (0, 0, 0, 0)


def test_intervals_are_students() -> None:
    cell = Cell(8, 4, (1.0, 2.0, 3.0), (0.1,) * 3, 1)
    assert cell.half_interval == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-5)
    assert Cell(8, 4, (1.0,), (0.1,), 1).half_interval is None
    assert not Cell(8, 4, (1.0,) * 4, (0.1,) * 4, 1).converged  # too few to tell
    assert Cell(8, 4, (1.0,) * 5, (0.1,) * 5, 1).converged


# ---------------------------------------------------------------- stopping and going on


def run_cli() -> None:
    """The command line in a process of its own, with models whose calls take 20 ms."""
    BACKENDS["counted"] = "test_calibrate:CountedBackend"
    import test_calibrate  # the backend's module, not __main__

    test_calibrate.CountedBackend.seconds = 0.02
    test_calibrate.CountedBackend.noise = 0.3
    measuring.open_meter = test_calibrate.known_meter  # type: ignore[assignment]
    main(sys.argv[1:], prog_name="messcli")


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    code = "import test_calibrate as t; t.run_cli()"
    args = ["calibrate", "--prompt-tokens", "8,256", "--output-tokens", "4,32", "--quick", *options]
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=folder, env=environment, text=True, stderr=subprocess.PIPE
    )


def wait_for_readings(folder: Path, count: int) -> None:
    partial = folder / "calibration.json.partial"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if partial.is_file() and len(partial.read_text().splitlines()) > count:
            return
        time.sleep(0.01)
    pytest.fail("nothing was measured")


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM), slow(signal.SIGINT)])
@pytest.mark.slow
def test_stopped_in_the_middle_and_gone_on(tmp_path: Path, number: signal.Signals) -> None:
    write_zoo(tmp_path)
    process = start(tmp_path, "--budget", "60")
    wait_for_readings(tmp_path, 6)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}; run the same command again to go on" in text
    partial = tmp_path / "calibration.json.partial"
    kept = partial.read_text().splitlines()
    assert not (tmp_path / "calibration.json").exists()
    if number == signal.SIGKILL:
        partial.write_text("\n".join(kept) + '\n["small", 8, 4, 0.0')  # as a crash may tear it
    process = start(tmp_path, "--budget", "3")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert f"going on from {len(kept) - 1} readings of an earlier run" in text
    calibration = load_calibration(tmp_path / "calibration.json")
    readings = [json.loads(line) for line in kept[1:]]
    for name, *key, joules, _ in readings:
        cells = (*calibration.of(name).cells, *calibration.of(name).load_cells)
        cell = next(c for c in cells if [c.prompt_tokens, c.output_tokens, c.batch_size] == key)
        assert joules in cell.joules
    assert not partial.exists()


def test_two_at_a_time_are_one_too_many(tmp_path: Path) -> None:
    output = str(tmp_path / "c.json")
    with (
        Kept.open(output),
        pytest.raises(StateBusy, match="another calibration writes it"),
        Kept.open(output),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_readings_of_another_setup_are_not_mixed_in(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedBackend, "fail_after", 20)
    with pytest.raises(MeterError):
        measure()
    monkeypatch.setattr(KnownCounter, "error", None)
    monkeypatch.setattr(CountedBackend, "fail_after", None)
    lines: list[str] = []
    config = CalibrateConfig(
        prompt_tokens=(8, 64), output_tokens=(4, 32), quick=True, batch_size=3, budget_seconds=5.0
    )
    summary = calibrate(config, tell=lines.append)
    assert any("measured on another setup; starting anew" in line for line in lines)
    assert summary.calibration is not None
    assert {model.batch_size for model in summary.calibration.models} == {3}


def test_a_meter_that_cannot_be_opened_costs_no_readings(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = zoo.parent / "calibration.json.partial"
    partial.write_text('{"a": 1}\n["small", 8, 4, 0.1, 0.1]\n')
    monkeypatch.setattr(measuring, "open_meter", lambda **_: (_ for _ in ()).throw(MeterError("none")))
    with pytest.raises(MeterError):
        measure()
    assert len(partial.read_text().splitlines()) == 2


# ---------------------------------------------------------------- the file's place, and writing it


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.json"
    save(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CalibrationError, match=r"calibration\.json: can't be written: No space left"):
            save(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"]
    with pytest.raises(CalibrationError, match="can't be written"):
        save(tmp_path / "nowhere" / "calibration.json", "new")


def test_where_it_goes(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_path(load_zoo(zoo)) == zoo.parent / "calibration.json"
    assert default_path(load_zoo(BUNDLED_ZOO)) == Path("calibration.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert default_path(load_zoo(zoo)) == Path("calibration.json")


# ---------------------------------------------------------------- route: what doesn't fit is refused


def change(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        document = document[int(name) if isinstance(document, list) else name]
    document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("models/0/name", "tiny", 'it has no model "small", only tiny, large'),
        ("models/1/device", "cuda:0", 'model "large": device was "cuda:0", and is "cpu"'),
        ("models/1/signature/dtype", "float16", 'model "large": dtype was "float16", and is "auto"'),
        ("models/0/signature/max_new_tokens", 64, 'model "small": max_new_tokens was 64, and is 32'),
        ("models/0/signature/path", "./other", 'path was "./other", and is "./small"'),
        ("versions/torch", "1.0", "version of torch was 1.0, and is "),
        ("hardware/cpu", "Abacus x 1", "cpu was Abacus x 1, and is "),
        ("meter/cpu_watts", 99.0, "cpu_watts was 99.0, and is the default"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(
    calibrated: Path, path: str, value: Any, message: str
) -> None:
    document = json.loads(calibrated.read_text())
    change(document, path, value)
    calibrated.write_text(json.dumps(document))
    folder = calibrated.parent
    write_requests(folder, 8)
    runner = CliRunner()
    ended = runner.invoke(main, ["route", "in.jsonl", "-o", "out.jsonl"])
    assert ended.exit_code == 1
    error = ended.stderr.strip()
    assert "\n" not in error
    assert message in error
    assert error.endswith("Run `messcli calibrate` again, or route with --no-calibration")
    assert not (folder / "out.jsonl.state").exists()
    ended = runner.invoke(main, ["route", "in.jsonl", "-o", "out.jsonl", "--no-calibration"])
    assert ended.exit_code in (0, 4), ended.stderr


def test_a_named_meter_that_differs_is_refused(calibrated: Path) -> None:
    zoo = load_zoo(calibrated.parent / "zoo.toml")
    with pytest.raises(CalibrationError, match="metered by estimate, and this run has --meter rapl"):
        find_calibration(None, zoo, "rapl")
    assert find_calibration(None, zoo, "estimate") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no calibration: "),
        ("[]", "has format None, and this messcli reads 1 to 2"),
        ('{"format": 99}', "has format 99"),
        ('{"format": 1}', "lacks 'models'"),
        (None, "can't be read: No such file"),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CalibrationError) as refused:
        load_calibration(path)
    assert message in str(refused.value)
    assert "messcli calibrate" in str(refused.value)


@pytest.mark.parametrize("value", [-1.0, math.nan, "x"])
def test_numbers_that_are_none_are_refused(calibrated: Path, value: Any) -> None:
    document = json.loads(calibrated.read_text())
    change(document, "models/0/gross/coefficients/request_joules", value)
    calibrated.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="is no calibration"):
        load_calibration(calibrated)


# ---------------------------------------------------------------- in load

STEP = {"small": (0.5, 0.01), "large": (6.0, 0.1)}  # joules of a step with b running: a + k b
PROMPT = 0.002  # joules per prompt token


@pytest.fixture
def in_steps(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models that draw per step, as engines do."""

    def use(self: CountedBackend, lengths: Sequence[tuple[int, int]]) -> None:
        cls = type(self)
        cls.calls += 1
        a, k = STEP[self.spec.name]
        steps = max(o for _, o in lengths)
        joules = sum(p for p, _ in lengths) * PROMPT + steps * a + sum(o for _, o in lengths) * k
        time.sleep(2e-4 * steps)
        KnownCounter.joules += joules * math.exp(cls.noise * cls.rng.gauss(0, 1))

    monkeypatch.setattr(CountedBackend, "use", use)
    return zoo


@pytest.mark.slow
def test_steps_in_load_are_found_again(in_steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = measure(prompt_tokens=(8, 64, 256), output_tokens=(4, 32), budget_seconds=30.0)
    assert summary.calibration is not None
    for model in summary.calibration.models:
        a, k = STEP[model.name]
        load = model.load
        assert load is not None
        assert [point.running for point in load.points] == [1, 8, 32]  # as many as a batch holds
        assert load.most_running == 32
        assert load.joules_per_step == pytest.approx(a, rel=0.1)
        for running in (1, 8, 20, 32):
            assert load.step_joules(running) == pytest.approx(a + k * running, rel=0.1)
        assert load.joules_per_prompt_token == pytest.approx(PROMPT, rel=0.5)
        assert load.error is not None
        assert load.error < 0.2
        assert {cell.batch_size for cell in model.load_cells} == {1, 8}  # 32 is the grid's own
    assert "in load, per output token by requests running" in "\n".join(summary.text())
    read = load_calibration(in_steps.parent / "calibration.json")
    assert [model.load for model in read.models] == [model.load for model in summary.calibration.models]
    assert measure(prompt_tokens=(8, 64, 256), output_tokens=(4, 32)).readings == 0


@pytest.mark.slow
def test_loads_that_memory_refuses_are_left_out(in_steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CountedBackend.generate_exactly

    def refusing(self: CountedBackend, p: int, o: int, batch_size: int) -> list[Generation]:
        if batch_size > 40:
            raise ModelError(f"{batch_size} prompts don't fit into memory")
        return whole(self, p, o, batch_size)

    monkeypatch.setattr(CountedBackend, "generate_exactly", refusing)
    monkeypatch.setattr(CountedBackend, "plan", lambda self, requests: [list(range(len(requests)))])
    lines: list[str] = []
    grid = {"prompt_tokens": (8, 64), "output_tokens": (4, 32), "quick": True, "budget_seconds": 20.0}
    summary = calibrate(CalibrateConfig(**grid), tell=lines.append)
    assert summary.calibration is not None
    assert [point.running for point in summary.calibration.of("large").load.points] == [1, 8, 32]  # type: ignore[union-attr]
    told = [line for line in lines if "at a time" in line]
    assert told == [
        f"{name}: not measured with 128 or more requests at a time: 128 prompts don't fit into memory"
        for name in sorted(
            STEP, key=lambda name: next(n for n, line in enumerate(told) if line.startswith(name))
        )
    ]
    assert len(told) == 2


@pytest.mark.slow
def test_loads_do_not_outlast_the_budget(in_steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes 10 ms per request: 512 at a time would take 5 s a reading."""
    whole = CountedBackend.generate_exactly

    def slow(self: CountedBackend, p: int, o: int, batch_size: int) -> list[Generation]:
        time.sleep(0.01 * batch_size * o / 32)
        return whole(self, p, o, batch_size)

    monkeypatch.setattr(CountedBackend, "generate_exactly", slow)
    monkeypatch.setattr(CountedBackend, "plan", lambda self, requests: [list(range(len(requests)))])
    began = time.monotonic()
    grid = {
        "prompt_tokens": (8,),
        "output_tokens": (4, 32),
        "quick": True,
        "budget_seconds": 5.0,
        "window": 2,
    }
    lines: list[str] = []
    summary = calibrate(CalibrateConfig(**grid), tell=lines.append)
    assert time.monotonic() - began < 8.0
    assert summary.calibration is not None
    assert any("or more requests at a time: the budget" in line for line in lines)
    load = summary.calibration.of("small").load
    assert load is not None
    assert load.points[-1].running < 512


def as_format_1(document: dict[str, Any]) -> dict[str, Any]:
    """As 0.1 wrote it: one batch size per model, nothing in load."""
    document["format"] = 1
    for model in document["models"]:
        del model["load"], model["load_cells"]
        for cell in model["cells"]:
            del cell["batch_size"]
    return document


@pytest.mark.parametrize("name", ["c.json", "c.json.partial"])
@pytest.mark.parametrize(
    "data",
    [b"id,prompt\n1,hello\n", b'{"prompt": "a"}\n', b"[]\n", b"no end", b"\xff\n", b"[" * 100_000 + b"\n"],
)
def test_a_file_of_somebody_else_is_left_as_it_is(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with (
        pytest.raises(CalibrationError, match=r"c\.json.*: is there, and .*name another -o|Name another -o"),
        Kept.open(str(tmp_path / "c.json")) as kept,
    ):
        kept.start({"models": []}, fresh=True, tell=lambda _: None)
    assert (tmp_path / name).read_bytes() == data


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_first_line_that_a_crash_tore_is_written_anew(tmp_path, size):
    (tmp_path / "c.json.partial").write_bytes(b'{"models": []}\n'[:size])
    with Kept.open(str(tmp_path / "c.json")) as kept:
        kept.start({"models": []}, fresh=False, tell=lambda _: None)
    assert (tmp_path / "c.json.partial").read_bytes() == b'{"models": []}\n'


@pytest.mark.slow
def test_a_file_of_0_1_is_read_and_its_readings_are_kept(in_steps: Path) -> None:
    measure()
    calibrated = in_steps.parent / "calibration.json"
    before = load_calibration(calibrated)
    calibrated.write_text(json.dumps(as_format_1(json.loads(calibrated.read_text()))))
    old = load_calibration(calibrated)
    assert [model.cells for model in old.models] == [model.cells for model in before.models]
    assert [model.load for model in old.models] == [None, None]
    assert find_calibration(None, load_zoo(calibrated.parent / "zoo.toml"), "estimate") is not None
    readings = measure().readings  # only what it lacks: two lengths at two more loads
    assert 0 < readings <= 2 * 2 * 2 * 10
    again = load_calibration(calibrated)
    assert [model.cells for model in again.models] == [model.cells for model in before.models]
    assert all(model.load is not None for model in again.models)


@pytest.mark.slow
def test_readings_of_0_1_are_taken_up(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedBackend, "fail_after", 20)
    with pytest.raises(MeterError):
        measure()
    partial = zoo.parent / "calibration.json.partial"
    setup, *lines = partial.read_text().splitlines()
    old = [json.dumps([*line[:3], *line[4:]]) for line in map(json.loads, lines)]
    partial.write_text("\n".join([setup, *old]) + "\n")
    monkeypatch.setattr(KnownCounter, "error", None)
    monkeypatch.setattr(CountedBackend, "fail_after", None)
    told: list[str] = []
    grid = {"prompt_tokens": GRID[0], "output_tokens": GRID[1], "quick": True, "budget_seconds": 20.0}
    calibrate(CalibrateConfig(**grid), tell=told.append)
    assert f"going on from {len(old)} readings of an earlier run" in told


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("points/0/joules", -1.0, 'model "small": load: points 1: field "joules"'),
        ("points/1/running", 1.0, 'model "small": load: field "points": "running" must rise'),
        ("most_running", "x", 'model "small": load: field "most_running"'),
    ],
)
@pytest.mark.slow
def test_numbers_in_load_that_are_none_are_refused(in_steps: Path, path: str, value: Any, named: str) -> None:
    measure()
    file = in_steps.parent / "calibration.json"
    document = json.loads(file.read_text())
    change(document, f"models/0/load/{path}", value)
    file.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="is no calibration") as refused:
        load_calibration(file)
    assert named in str(refused.value)


def test_predictions_are_for_the_load_of_the_window(in_steps: Path) -> None:
    measure(prompt_tokens=(8, 64, 256), output_tokens=(4, 32))
    found = load_calibration(in_steps.parent / "calibration.json")
    a, k = STEP["large"]
    for window, running in ((64, 32), (16, 8), (2, 1), (1, 1), (10_000, 32)):  # two models; batches hold 32
        model = found.at_window(window).of("large")
        prompt = model.constant_prompt_tokens + model.prompt_tokens_per_character * found.characters
        truth = prompt * PROMPT + model.output_tokens * (a / running + k)
        assert model.joules(found.characters) == pytest.approx(truth, rel=0.15), window
    assert found.at_window(64).dumps() == found.dumps()
    old = replace(found, models=tuple(replace(model, load=None) for model in found.models))
    assert old.at_window(2).of("large").joules(40) == old.of("large").joules(40)


def test_simulate_plays_runs_through_what_was_calibrated(in_steps: Path) -> None:
    measure(prompt_tokens=(8, 64), output_tokens=(4, 32))
    draw = random.Random(2)
    with (in_steps.parent / "outcomes.jsonl").open("w") as handle:
        for n in range(60):
            models = {
                name: {
                    "accuracy": float(draw.random() < skill),
                    "joules": 1.0,
                    "prompt_tokens": 9,
                    "output_tokens": 8,
                }
                for name, skill in (("small", 0.5), ("large", 0.9))
            }
            handle.write(json.dumps({"id": n, "prompt": f"word{n % 5}", "models": models}) + "\n")
    options = ["--alpha", "0.6", "--window", "20", "--policy", "largest", "--engines", "calibration.json"]
    ended = CliRunner().invoke(
        main, ["simulate", "outcomes.jsonl", *options, "--out", "out.jsonl", "--quiet"]
    )
    assert ended.exit_code == 0, ended.stderr
    assert "engines: small = small, large = large" in ended.stdout
    (row,) = rows_of(in_steps.parent / "out.jsonl")
    a, k = STEP["large"]  # windows of 20: 8 steps each
    assert row["in_load"]["joules"] == pytest.approx((8 * (a + 20 * k)) / 20 + 9 * PROMPT, rel=0.1)


# ---------------------------------------------------------------- route: what it makes of it


def routed(folder: Path, output: str, **options: Any) -> tuple[list[dict[str, Any]], Any, list[str]]:
    lines: list[str] = []
    config = RouteConfig.of(input=str(folder / "in.jsonl"), output=str(folder / output), **options)
    summary = route(config, tell=lines.append)
    return rows_of(folder / output), summary, lines


def test_route_starts_from_the_calibration(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedBackend, "noise", 0.0)
    folder = calibrated.parent
    prompts = write_requests(folder, 200)
    calibrate(CalibrateConfig(prompts=str(prompts), quick=True, budget_seconds=10.0, fresh=True))
    rows, summary, lines = routed(folder, "with.jsonl")
    assert any(line.startswith("energy: calibrated by calibration.json, made ") for line in lines)
    first = [row for row in rows[:32] if row["joules"]]
    assert all(row["joules_predicted"] for row in first)
    error = np.mean([abs(row["joules_predicted"] / row["joules"] - 1) for row in first])
    assert error < 0.5
    assert summary.energy.predicted["adapted"].mean < summary.energy.predicted["calibration"].mean + 0.02
    assert summary.energy.predicted["calibration"].calls == summary.energy.predicted["adapted"].calls
    assert abs(summary.energy.predicted["calibration"].bias) < 0.2

    bare, summary, lines = routed(folder, "without.jsonl", no_calibration=True)
    assert any(line.startswith("energy: not calibrated") for line in lines)
    assert all(row["joules_predicted"] is None for row in bare[:8])
    assert all(row["joules_predicted"] for row in bare[40:])
    assert set(summary.energy.predicted) == {"adapted"}


def test_decisions_are_the_same_whether_or_not_a_run_is_interrupted(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountedBackend, "noise", 0.0)
    folder = calibrated.parent
    write_requests(folder, 128)
    asked = {
        "window": 8,
        "horizon": 128,
    }  # --limit is another number of requests to come, and decides otherwise
    whole, _, _ = routed(folder, "whole.jsonl", **asked)
    for limit in (8, 32, 64):
        routed(folder, "parts.jsonl", limit=limit, **asked)
    parts, _, _ = routed(folder, "parts.jsonl", **asked)
    volatile = ("seconds", "joules", "billed_joules", "joules_predicted")
    for one, other in zip(whole, parts, strict=True):
        assert {k: v for k, v in one.items() if k not in volatile} == {
            k: v for k, v in other.items() if k not in volatile
        }
        assert one["joules_predicted"] == pytest.approx(other["joules_predicted"], rel=1e-6)


@pytest.mark.slow
def test_a_calibration_made_between_runs_is_taken_up(zoo: Path) -> None:
    folder = zoo.parent
    write_requests(folder, 64)
    routed(folder, "out.jsonl", limit=32)
    measure()
    rows, _, lines = routed(folder, "out.jsonl")
    assert any("calibrated by" in line for line in lines)
    assert len(rows) == 64


def test_batches_are_split_by_the_calibrated_coefficients(calibrated: Path) -> None:
    weight = load_calibration(calibrated).weights()["large"]
    batch = [Generation("a", 100, 10), Generation("b", 10, 30), Generation(None, 500, 0, "too long")]
    parts = split(10.0, batch, weight)
    truth = [TRUE["large"].joules(100, 10), TRUE["large"].joules(10, 30), 0.0]
    assert parts == pytest.approx([10 * value / sum(truth) for value in truth], rel=0.05)


@pytest.mark.parametrize("no_look", [True, False])
def test_a_counter_that_fails_in_the_last_window_is_told(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, no_look: bool
) -> None:
    folder = zoo.parent
    write_requests(folder, 8)
    monkeypatch.setattr(CountedBackend, "fail_after", 0)
    with pytest.raises(MeterError, match="the counter is gone"):
        routed(folder, "out.jsonl", window=8, no_look=no_look)
    rows = rows_of(folder / "out.jsonl")
    assert len(rows) == 8
    assert all(row["joules"] is None and row["output"] for row in rows)


# ---------------------------------------------------------------- E_m(t) with a prior


PRIOR = EnergyPrior((1.0, 4.0), (0.01, 0.1), 100.0)


def test_a_prior_predicts_before_anything_is_read() -> None:
    predictor = JoulesPredictor(2)
    assert predictor.predict_one(predictor.encode("a")) is None
    predictor.calibrate(PRIOR)
    for length in (10, 100, 1000):
        predicted = predictor.predict_one(predictor.encode("a" * length))
        assert predicted == pytest.approx([1 + 0.01 * length, 4 + 0.1 * length])
    assert predictor.unit == pytest.approx(2.0)  # the cheaper one at a typical length
    predictor.calibrate(None)
    assert predictor.predict_one(predictor.encode("a")) is None


def test_readings_correct_the_prior() -> None:
    predictor, blind = JoulesPredictor(2), JoulesPredictor(2)
    predictor.calibrate(PRIOR)
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice("abcdefgh") * rng.randint(1, 9) for _ in range(rng.randint(1, 60)))

    errors: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(400):
        prompt = text()
        truth = np.array([1 + 0.01 * len(prompt), 4 + 0.1 * len(prompt)]) * 2  # answers twice as long
        for which, one in enumerate((predictor, blind)):
            guess = one.predict_one(one.encode(prompt))
            if guess is not None:
                errors[which].append(float(np.mean(abs(guess / truth - 1))))
            one.learn_one(one.encode(prompt), truth)
    assert errors[0][0] == pytest.approx(0.5)
    assert np.mean(errors[0][1:20]) < np.mean(errors[1][:19])  # it starts better
    assert np.mean(errors[0][-100:]) < 0.05
    assert JOULES.belief < 10


def test_a_prior_survives_a_snapshot_exactly() -> None:
    predictor = JoulesPredictor(2)
    predictor.calibrate(PRIOR)
    other = JoulesPredictor(2)
    other.load(predictor.state())
    rng = np.random.default_rng(0)
    for n in range(60):
        prompt = "x y" * int(rng.integers(1, 40))
        joules = rng.lognormal(0, 1, 2)
        if n == 30:
            fresh = JoulesPredictor(2)
            fresh.load(other.state())
            other = fresh
        for one in (predictor, other):
            one.learn_one(one.encode(prompt), joules)
        guesses = [one.predict_one(one.encode(prompt)) for one in (predictor, other)]
        assert (guesses[0] == guesses[1]).all()
        assert predictor.unit == other.unit


# ---------------------------------------------------------------- exact lengths, with transformers


@pytest.mark.parametrize("save_model", [tiny_models.save_llama, tiny_models.save_t5, tiny_models.save_bart])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_exact_lengths(tmp_path: Path, save_model: Callable[[Path], Path], options: dict[str, Any]) -> None:
    spec = ModelSpec(
        "m", str(save_model(tmp_path / "m")), device="cpu", max_new_tokens=12, generation=options
    )
    backend = create(spec, batch_size=None)
    assert isinstance(backend, Exact)
    before = backend.generate([Request("a", "w1 w2", key=b"a")])
    for prompt_tokens, output_tokens in ((1, 1), (5, 12), (20, 3)):
        made = backend.generate_exactly(prompt_tokens, output_tokens, 3)
        assert [(g.prompt_tokens, g.output_tokens) for g in made] == [(prompt_tokens, output_tokens)] * 3
    assert backend.generate([Request("a", "w1 w2", key=b"a")]) == before  # its options are as they were


@pytest.mark.slow
def test_a_quick_look_at_the_bundled_zoo_takes_less_than_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    ended = CliRunner().invoke(
        main, ["calibrate", "--quick", "--zoo", str(BUNDLED_ZOO), "--meter", "estimate"]
    )
    assert ended.exit_code == 0, ended.stderr
    assert time.monotonic() - began < 60
    calibration = load_calibration(tmp_path / "calibration.json")
    assert [model.name for model in calibration.models] == ["small", "medium", "large"]
    small, large = calibration.of("small"), calibration.of("large")
    assert small.joules(30) < large.joules(30)
    assert find_calibration(None, load_zoo(BUNDLED_ZOO), "auto") is not None


# ---------------------------------------------------------------- the real NVML binding


def scenario(folder: str) -> None:
    """In a process where NVML is the stub: a card of known watts, whose models take time by their joules."""
    import test_calibrate

    BACKENDS["counted"] = "test_calibrate:CountedBackend"
    test_calibrate.CountedBackend.noise = 0.0
    os.chdir(folder)
    good = ("cards 1", "tick 0.001", f"watts 0 {WATTS} 0 1", "driver 570.86")
    zoo = write_zoo(Path(folder), device="cuda:0")
    found: dict[str, Any] = {}
    control(*good, "mig 0 1")
    try:
        measure()
    except MeterError as error:
        found["mig"] = str(error)
    control(*good, "pid 0 1")
    summary = measure(prompt_tokens=(8, 256), output_tokens=(8, 32), batch_size=8, budget_seconds=4.0)
    assert summary.calibration is not None
    found["table"] = summary.text()
    found["truth"] = {
        name: [
            TRUE[name].joules(c.prompt_tokens, c.output_tokens) for c in summary.calibration.of(name).cells
        ]
        for name in TRUE
    }
    found["read"] = {name: [cell.mean_joules for cell in summary.calibration.of(name).cells] for name in TRUE}
    found["file"] = json.loads((zoo.parent / "calibration.json").read_text())
    control(*good, "driver 1.0", "name 0 Other")
    control("cards 1", "tick 0.001", "name 0 Other")
    found["difference"] = load_calibration(zoo.parent / "calibration.json").difference(load_zoo(zoo), "auto")
    # a zoo of cards alone: its overhead is the cards' and the CPU's
    control(*good)
    live = engine.open_live(Running(), load_zoo(zoo), lambda *_: 1.0, lambda _: None)  # type: ignore[arg-type]
    groups = live.answers([(Request("a", "one two three", key=b"a"), (0, 1))])
    found["meters"] = sorted({str(outcome.meter) for group in groups for _, _, outcome in group})
    found["overhead"] = sorted(live.take_overhead())
    print(json.dumps(found))


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = nvml_stub.build(tmp_path_factory.mktemp("nvml"))
    result: dict[str, Any] = nvml_stub.run(
        folder, "control", f"import test_calibrate as t; t.scenario({str(folder)!r})"
    )
    return result


@pytest.mark.slow
def test_nvml_calibration_of_known_watts(nvml: dict[str, Any]) -> None:
    # Sleeps end late on a busy machine, and the time between calls of milliseconds is billed too: never less than the
    # truth, and not much more where the machine was busy with something else in fewer than half of the cells.
    pairs = [(r, t) for name in TRUE for r, t in zip(nvml["read"][name], nvml["truth"][name], strict=True)]
    assert all(r >= 0.98 * t for r, t in pairs)
    assert np.median([(r - 0.02) / t for r, t in pairs]) <= 1.25
    cells = [cell for model in nvml["file"]["models"] for cell in model["cells"]]
    ratios = [sum(cell["joules"]) / (WATTS * sum(cell["seconds"])) for cell in cells]
    assert min(ratios) >= 0.98
    assert np.median(ratios) <= 1.2
    model = nvml["file"]["models"][0]
    assert model["meter"] == "nvml"
    assert model["idle_watts"] == pytest.approx(WATTS, rel=0.02)
    assert nvml["file"]["versions"]["NVIDIA driver"] == "570.86"
    assert nvml["file"]["hardware"] == {"cuda:0": "Stub"}
    assert "NVML total energy counter of GPU-" in nvml["file"]["meter"]["sources"]["cuda:0"]["provenance"]


@pytest.mark.slow
def test_nvml_refuses_slices_and_flags_company(nvml: dict[str, Any]) -> None:
    assert "Turn MIG off" in nvml["mig"]
    assert "pid 1)" in nvml["file"]["warnings"][0]
    assert any("pid 1)" in line for line in nvml["table"])


@pytest.mark.slow
def test_nvml_another_card_or_driver_is_refused(nvml: dict[str, Any]) -> None:
    assert nvml["difference"] == "version of NVIDIA driver was 570.86, and is 580.1"


@pytest.mark.slow
def test_overhead_of_a_zoo_of_cards_has_the_cpu_in_it(nvml: dict[str, Any]) -> None:
    assert nvml["meters"] == ["nvml"]
    assert len(nvml["overhead"]) == 2
    assert "nvml" in nvml["overhead"]
