"""Every reader over thousands of mutated files: a value comes, or an error of ours in one line; never a traceback.

`FUZZ_CASES` sets how many mutations of each file are tried.
"""

# ruff: noqa: B023  # each reader is called before the loop goes on
from __future__ import annotations

import io
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_models import requests, write_joules, write_zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dialects import EXAMPLES

from messcli.calibration.file import load_calibration
from messcli.calibration.readings import Kept, Key
from messcli.cli import main
from messcli.energy.replay import Replay
from messcli.errors import MessError
from messcli.files.requests import count_lines, open_input, read_requests
from messcli.metrics import load_metric
from messcli.report import make_report
from messcli.report.text import report_lines
from messcli.simulation.engines import engines_of
from messcli.simulation.table import read_table
from messcli.zoo import load_zoo

CASES = int(os.environ.get("FUZZ_CASES", "1000"))
ROOT = Path(__file__).parent.parent
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, -0.0, 1e308, -1e308, 10**30, 10**400, -(10**400),
    float("nan"), float("inf"), float("-inf"), "", " ", "x",
    "\ud800", "\x1b[2J", "../../etc/passwd", "9" * 400, [], {}, [None], [[]], [1, "a"], {"": None}, {"a": {"b": []}},
)  # fmt: skip

pytestmark = pytest.mark.slow
BLOCK = 50  # mutations per example: hypothesis itself takes longer for one than a reader does


Block = st.integers(0, 2**40).map(
    lambda seed: [random.Random(seed * BLOCK + number) for number in range(BLOCK)]
)
thousands = settings(
    max_examples=-(-CASES // BLOCK),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def bytes_of(draw: random.Random, data: bytes) -> bytes:
    """`data` with a few bytes flipped, cut out, put in or doubled, or its end cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del changed[at : at + draw.randint(1, 9)]
            case 2:
                changed[at:at] = draw.choice(
                    [b'"', b"[", b"}", b"\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"1e999", b"NaN", b"-"]
                )
            case 3:
                changed[at:at] = changed[at : at + draw.randint(1, 60)]
            case 4:
                del changed[at:]
            case 5:
                swap = draw.randrange(len(changed) + 1)
                changed[at : at + 4], changed[swap : swap + 4] = (
                    changed[swap : swap + 4],
                    changed[at : at + 4],
                )
    return bytes(changed)


def value_of(draw: random.Random, value: Any) -> Any:
    """`value` with one of the values in it replaced, taken out or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        if draw.random() < 0.15:
            return {key: item for key, item in value.items() if key != name}
        if draw.random() < 0.1:
            return {**value, draw.choice(["id", "joules", "x", "", "models"]): draw.choice(ODD)}
        return {**value, name: value_of(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return [*value[:at], *([] if draw.random() < 0.1 else [value_of(draw, value[at])]), *value[at + 1 :]]
    return draw.choice(ODD)


def mutated(draw: random.Random, lines: list[str]) -> bytes:
    """JSON lines with one of them changed, in its values or in its bytes."""
    at = draw.randrange(len(lines))
    if draw.random() < 0.6:
        changed = json.dumps(value_of(draw, json.loads(lines[at]))).encode()
        return b"\n".join(
            [*(line.encode() for line in lines[:at]), changed, *(line.encode() for line in lines[at + 1 :])]
        )
    return bytes_of(draw, "\n".join(lines).encode())


def survives(read: Callable[[], object]) -> None:
    """`read` gives something, or raises an error of ours that is one line."""
    told = "one line"
    try:
        read()
    except MessError as error:
        told = str(error)
    assert told.strip()
    assert "\n" not in told


OUTCOMES = (ROOT / "samples" / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()[:4]
REQUESTS = (ROOT / "samples" / "requests.jsonl").read_text(encoding="utf-8").splitlines()[:3]


@pytest.mark.parametrize("name", EXAMPLES)
@thousands
@given(block=Block)
def test_requests(name: str, block: list[random.Random]) -> None:
    for draw in block:
        data = mutated(draw, [json.dumps(EXAMPLES[name]), *REQUESTS])
        dialect = draw.choice([None, name])
        survives(lambda: list(read_requests(io.BytesIO(data), "in.jsonl", None, dialect)))


@thousands
@given(block=Block)
def test_outcome_tables(tmp_path: Path, block: list[random.Random]) -> None:
    for draw in block:
        (tmp_path / "table.jsonl").write_bytes(mutated(draw, OUTCOMES))

        def read() -> None:
            table = read_table(
                str(tmp_path / "table.jsonl"),
                scorer=lambda: load_metric("exact"),
                complete_only=draw.random() < 0.5,
            )
            table.accuracies.mean()
            assert table.joules.mean() < 1e300

        survives(read)


AUTHORS = (
    b"doc_id,input_text,benchmark_name,label_a,acc_norm_a,energy_consumption_a,inference_time_a\n"
    b"0,What?,b,1,1.0,3.5,0.2\n1,Why?,b,0,0.5,2.5,0.1\n"
)


@thousands
@given(block=Block)
def test_the_authors_tables(tmp_path: Path, block: list[random.Random]) -> None:
    for draw in block:
        (tmp_path / "table.csv").write_bytes(bytes_of(draw, AUTHORS))
        survives(lambda: read_table(str(tmp_path / "table.csv")))


@thousands
@given(block=Block)
def test_replays(tmp_path: Path, block: list[random.Random]) -> None:
    for draw in block:
        (tmp_path / "joules.jsonl").write_bytes(mutated(draw, OUTCOMES))
        survives(lambda: Replay(tmp_path / "joules.jsonl").lookup("s001", "small"))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As `messcli calibrate` writes it."""
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    done = CliRunner().invoke(main, ["calibrate", "--quick", "--budget", "1", "-o", str(path), "-q"])
    assert done.exit_code == 0, done.output
    return json.loads(path.read_text(encoding="utf-8"))


@thousands
@given(block=Block)
def test_calibrations(tmp_path: Path, calibration: Any, block: list[random.Random]) -> None:
    for draw in block:
        changed = value_of(draw, calibration) if draw.random() < 0.6 else None
        data = (
            bytes_of(draw, json.dumps(calibration).encode())
            if changed is None
            else json.dumps(changed).encode()
        )
        (tmp_path / "calibration.json").write_bytes(data)

        def read() -> None:
            found = load_calibration(tmp_path / "calibration.json")
            found.prior([model.name for model in found.models])
            found.weights()

        survives(read)


ZOO = (ROOT / "samples" / "zoos" / "two-on-one-gpu.toml").read_bytes() + (
    b'\n[plans]\ngold = 0.9\n[energy]\ncpu_watts = 10.0\n[[models]]\nname = "served"\npath = "m"\nbackend = "openai"\n'
    b'base_url = "http://localhost:8000/v1"\ntimeout = 60.0\njoules = {request = 1.0, output_token = 0.1}\n'
)
LITERALS = (
    b"-1",
    b"0",
    b"1e308",
    b"1e999",
    b"nan",
    b"inf",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"1979-05-27",
    b'"x"',
    b"9" * 30,
    b"[[1]]",
)


@thousands
@given(block=Block)
def test_readings_of_a_calibration(tmp_path: Path, block: list[random.Random]) -> None:
    setup = {"models": [["small", {}, "cpu", 8, "estimate"]]}
    readings = [["small", 8, 4, 2, 0.5, 0.25], ["small", 16, 4, 0.5, 0.25], ["small", 8, 4, 2, 0.5, 0.25]]
    lines = [json.dumps(line) for line in (setup, *readings)]
    output = tmp_path / "calibration.json"

    def take_up() -> None:
        with Kept.open(str(output)) as kept:
            kept.start(setup, fresh=False, tell=lambda _: None)
            assert all(isinstance(key, Key) and key.batch_size >= 0 for key in kept.readings)

    for draw in block:
        (tmp_path / "calibration.json.partial").write_bytes(mutated(draw, lines))
        survives(take_up)


@thousands
@given(block=Block)
def test_zoo_files(tmp_path: Path, block: list[random.Random]) -> None:
    for draw in block:
        data = ZOO
        if draw.random() < 0.6:
            values = list(re.finditer(rb"(?<== )[^\n]+", data))
            at = draw.choice(values)
            data = data[: at.start()] + draw.choice(LITERALS) + data[at.end() :]
        else:
            data = bytes_of(draw, data)
        (tmp_path / "zoo.toml").write_bytes(data)
        survives(lambda: load_zoo(tmp_path / "zoo.toml").signature())


ENGINES = json.loads((ROOT / "docs" / "evidence" / "gpu" / "engines.json").read_text(encoding="utf-8"))
TABLE = read_table(str(ROOT / "samples" / "outcomes.jsonl"), complete_only=True)


@thousands
@given(block=Block)
def test_engines(tmp_path: Path, block: list[random.Random]) -> None:
    for draw in block:
        changed = value_of(draw, ENGINES) if draw.random() < 0.6 else None
        data = (
            bytes_of(draw, json.dumps(ENGINES).encode()) if changed is None else json.dumps(changed).encode()
        )
        (tmp_path / "engines.json").write_bytes(data)
        survives(lambda: engines_of(TABLE, tmp_path / "engines.json", {}))


ROW = {
    "id": "a", "model": "small", "output": "x", "estimated_accuracy": 0.5, "accuracy": 1.0, "joules": 2.0,
    "joules_predicted": 2.5, "billed_joules": 3.0, "explored": True, "queue": 0.1, "prompt_tokens": 3,
    "output_tokens": 2, "seconds": 0.1,
    "meter": "estimate",
}  # fmt: skip


@thousands
@given(block=Block)
def test_reports_of_outputs(tmp_path: Path, block: list[random.Random]) -> None:
    for draw in block:
        rows = [
            ROW,
            {**ROW, "id": "b", "model": "large", "explored": False},
            {"id": "c", "model": None, "error": "why"},
        ]
        (tmp_path / "out.jsonl").write_bytes(mutated(draw, [json.dumps(row) for row in rows]))

        def read() -> None:
            found = make_report(str(tmp_path / "out.jsonl"), 0.7)
            list(report_lines(found))
            json.dumps(found.as_json(), allow_nan=False)

        survives(read)


@thousands
@given(block=Block)
def test_packed_input(tmp_path: Path, block: list[random.Random]) -> None:
    for draw in block:
        import gzip

        path = tmp_path / "in.gz"
        path.write_bytes(bytes_of(draw, gzip.compress("\n".join(REQUESTS).encode())))
        count_lines(str(path))

        def read() -> None:
            with open_input(str(path)) as handle:
                list(read_requests(handle, str(path)))

        survives(read)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run."""
    folder, rows = tmp_path_factory.mktemp("state"), requests(12)
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        zoo = write_zoo(folder, patch)
        arguments = [
            "route",
            str(folder / "in.jsonl"),
            "-o",
            str(folder / "out.jsonl"),
            "--zoo",
            str(zoo),
            "-q",
        ]
        done = CliRunner().invoke(main, [*arguments, "--meter", write_joules(folder, rows)])
    assert done.exit_code == 0, done.output
    return folder / "out.jsonl.state"


@thousands
@given(block=Block)
def test_states(tmp_path: Path, state: Path, block: list[random.Random]) -> None:
    for draw in block:
        path = tmp_path / "out.state"
        path.write_bytes(bytes_of(draw, state.read_bytes()))
        survives(lambda: list(report_lines(make_report(str(path)))))
