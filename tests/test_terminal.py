"""What a person meets at the terminal: help on one screen, streams that are closed or full, signals, odd text."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner
from fake_models import requests, write_joules, write_zoo
from hypothesis import given
from hypothesis import strategies as st
from marks import slow

from messcli.cli import main
from messcli.cli.terminal import visible
from messcli.files.standard import data_output, reserved_output, write_data

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "samples" / "requests.jsonl"
PROGRAM = (
    "import sys; from messcli.registry import BACKENDS; from messcli.cli import main\n"
    'BACKENDS["fake"] = "fake_models:FakeBackend"\nmain(sys.argv[1:], prog_name="messcli")'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_zoo(tmp_path, monkeypatch)
    rows = requests(24)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_joules(tmp_path, rows)
    return tmp_path


def start(folder: Path, *arguments: str, **how: Any) -> subprocess.Popen[str]:
    return _start(folder, ["-c", PROGRAM, *arguments], **how)


def start_as_installed(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Without models of ours: what a user runs, from its first line on."""
    return _start(folder, ["-m", "messcli", *arguments])


def _start(folder: Path, arguments: list[str], **how: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}:{folder}"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    # a shell that runs the tests in the background has SIGINT ignored, and children inherit that
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # no threads here
        **how,
    )


def run(folder: Path, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    process = start(folder, *arguments, **how)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


ROUTE = ("route", "in.jsonl", "--meter", "replay:joules.jsonl", "-q")


# ---- help -----------------------------------------------------------------------------------------


def test_help_of_route_fits_one_screen() -> None:
    text = CliRunner().invoke(main, ["route", "--help"], env={"COLUMNS": "80"}, terminal_width=80).output
    lines = text.splitlines()
    assert len(lines) <= 24, text
    assert max(map(len, lines)) <= 80
    assert "--help-all" in lines[-1]


@pytest.mark.parametrize("name", ["route", "record", "calibrate", "simulate"])
def test_help_all_has_every_option_once_under_a_heading(name: str) -> None:
    text = CliRunner().invoke(main, [name, "--help-all"]).output
    command = main.commands[name]
    for param in command.params:
        for spelled in (one for one in param.opts if one.startswith("--")):
            assert len(re.findall(rf"^  (?:-\w, )?{spelled}\b(?!-)", text, re.M)) == 1, spelled
    short = CliRunner().invoke(main, [name, "--help"]).output
    shown, hidden = len(re.findall(r"^  (?:-\w, )?--", short, re.M)), int(re.search(r"(\d+) more", short)[1])  # type: ignore[index]
    assert shown + hidden == len([param for param in command.params if param.param_type_name == "option"])
    assert "<=x" not in text


def test_route_has_the_promised_headings() -> None:
    text = CliRunner().invoke(main, ["route", "--help-all"]).output
    headings = [
        "Input and output",
        "What is promised",
        "How models run",
        "What is kept",
        "The paper's algorithm",
    ]
    assert [
        line[:-1] for line in text.splitlines() if line[:-1] in headings and line.endswith(":")
    ] == headings


@pytest.mark.parametrize(
    "arguments",
    [
        ("route", "in.jsonl", "-o", "-", "--limit", "9" * 20),
        ("route", "in.jsonl", "-o", "-", "--window", "9" * 20),
        ("route", "in.jsonl", "-o", "-", "--wait", "inf"),
        ("route", "in.jsonl", "-o", "-", "--v", "nan"),
        ("route", "in.jsonl", "-o", "-", "--c", "inf"),
        ("route", "in.jsonl", "-o", "-", "--seed", "-1"),
        ("route", "in.jsonl", "-o", "-", "--horizon", "1e9"),
        ("calibrate", "--budget", "inf"),
        ("calibrate", "--prompt-tokens", "9" * 30),
        ("simulate", "x.jsonl", "--alpha", "nan"),
        ("simulate", "x.jsonl", "--v", "1e999"),
        ("simulate", "x.jsonl", "--seed", "9" * 30),
        ("report", "x", "--alpha", "nan"),
    ],
)
def test_values_that_overflow_are_refused_where_they_are_read(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert arguments[-2] in done.stderr
    assert done.stdout == ""


# ---- text from outside ----------------------------------------------------------------------------


@given(st.text())
def test_visible_text_is_one_line_that_no_terminal_obeys(text: str) -> None:
    shown = visible(text)
    assert not re.search("[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    "arguments",
    [
        ("route", "\x1b[2J.jsonl", "-o", "out.jsonl"),
        ("route", "in.jsonl", "-o", "out.jsonl", "--plan", "\x1b[31mgold"),
        ("route", "in.jsonl", "-o", "out.jsonl", "--zoo", "\x1b]0;x\x07.toml"),
        ("route", "in.jsonl", "-o", "out.jsonl", "--policy", "\x9brandom"),
        ("report", "\x1b[2J"),
        ("rows", "\u202ereversed"),
        ("simulate", "\x9b31m.jsonl", "--alpha", "0.5"),
    ],
)
def test_control_characters_are_shown_not_obeyed(folder: Path, arguments: tuple[str, ...]) -> None:
    done = run(folder, *arguments)
    assert done.returncode in (1, 2)
    assert not re.search("[\x1b\x07\x9b\u202e]", done.stderr + done.stdout)
    assert re.search(r"\\x1b|\\x9b|\\u202e", done.stderr)


def test_what_a_summary_and_a_report_repeat_is_shown_too(folder: Path) -> None:
    odd = "2026\x1b[31m"
    done = run(folder, *ROUTE[:-1], "-o", "out.jsonl", "--period", odd)
    assert done.returncode == 0
    told = run(folder, "report", "out.jsonl.state")
    for text in (done.stderr, told.stdout):
        assert "\x1b" not in text
        assert "2026\\x1b[31m" in text


def test_a_file_name_that_is_no_utf8_is_named(folder: Path) -> None:
    done = run(folder, "report", os.fsdecode(b"caf\xe9.state"))
    assert (done.returncode, done.stderr) == (1, "Error: caf\\udce9.state: can't be read: No such file or directory. "
                                                 "Name a state file or the output of `messcli route`\n")  # fmt: skip


# ---- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "full", "gone"])
def test_standard_error_never_decides_a_run(folder: Path, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, *ROUTE[:-1], "-o", "out.jsonl"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    ends = {"closed": "2>&-", "full": "2>/dev/full", "gone": "2> >(true)"}
    done = subprocess.run(
        ["bash", "-c", f'"$@" {ends[how]}', "bash", *command],
        cwd=folder,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0
    assert len((folder / "out.jsonl").read_text().splitlines()) == 24
    found = subprocess.run(
        ["bash", "-c", '"$@" 2>&- >&-', "bash", *command], cwd=folder, env=environment, check=False
    )
    assert found.returncode == 0  # a finished job with nothing to say


@pytest.mark.slow
def test_a_full_disk_under_what_is_printed_is_one_line(folder: Path) -> None:
    assert run(folder, *ROUTE, "-o", "-", "--state", "s.state").returncode == 0
    assert run(folder, "record", *ROUTE[1:], "-o", "table.jsonl").returncode == 0
    for arguments in (
        ("report", "s.state"),
        ("report", "s.state", "--json"),
        ("rows", "s.state"),
        ("simulate", "table.jsonl", "--alpha", "0.5", "-q", "--jobs", "1", "--policy", "smallest"),
        (*ROUTE, "-o", "-"),
    ):
        with Path("/dev/full").open("w") as full:
            done = run(folder, *arguments, stdout=full)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), (arguments, done.stderr)
        assert "No space left on device" in done.stderr


def test_a_metric_that_prints_cannot_reach_standard_output(folder: Path) -> None:
    (folder / "talk.py").write_text(
        "import os\n\n\ndef score(output, references):\n    print('scoring', output)\n"
        "    os.write(1, b'from C')\n    os.system('echo from a child')\n    return 1.0\n"
    )
    done = run(folder, *ROUTE, "-o", "-", "--metric", "talk:score")
    assert [json.loads(line)["accuracy"] for line in done.stdout.splitlines()] == [1.0] * 24
    for words in ("scoring", "from C", "from a child"):
        assert words in done.stderr


def test_a_reserved_output_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    with reserved_output():
        print("lost")
        write_data(b"data\n")
        with reserved_output():
            assert data_output() is not None
    print("found")
    out, err = capfd.readouterr()
    assert (out, err) == ("data\nfound\n", "lost\n")


def test_quiet_tells_of_failed_rows(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"promt": "our ugly letter"}\n')
    done = run(folder, *ROUTE, "-o", "out.jsonl")
    assert done.returncode == 4
    assert done.stderr == (
        '1 row has `error`; the first: in.jsonl:1: field "prompt" is missing. It has "promt"; name one with '
        "--prompt-field\n"
    )
    assert run(folder, "record", *ROUTE[1:], "-o", "table.jsonl").stderr.startswith("1 row has `error`")


def test_a_failed_model_names_line_and_id(folder: Path) -> None:
    (folder / "in.jsonl").write_text('\n{"id": "p", "prompt": "poison"}\n')
    (folder / "joules.jsonl").write_text('{"id": "p", "models": {"medium": {"joules": 1.0}}}\n')
    done = run(folder, *ROUTE, "-o", "out.jsonl", "--policy", "smallest")
    assert "Traceback" not in done.stderr
    assert "in.jsonl:2" in done.stderr or done.returncode != 4


# ---- signals --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that takes long to simulate."""
    path = tmp_path_factory.mktemp("tables") / "long.jsonl"
    with path.open("w") as handle:
        for number in range(3000):
            models = {
                name: {"accuracy": float(number % (4 - m) == 0), "joules": 4.0**m}
                for m, name in enumerate(("small", "medium", "large"))
            }
            row = {"id": number, "prompt": f"question {number} of {number % 7}", "models": models}
            handle.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), slow(signal.SIGINT, 130), slow(signal.SIGKILL, -9)]
)
@pytest.mark.slow
def test_a_signal_ends_simulates_workers(folder: Path, long_table: Path, number: int, code: int) -> None:
    simulate = ("simulate", str(long_table), "--alpha", "0.5", "--order-seeds", "40", "--jobs", "2", "-q")
    process = start(folder, *simulate)
    deadline = time.monotonic() + 60
    workers: list[Any] = []
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) >= 2
    process.send_signal(number)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 10
    if code > 0:
        assert err == "stopped at once; run the same command again to go on\n"
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


@pytest.mark.slow
def test_ctrl_c_at_any_moment_is_one_line(folder: Path, long_table: Path) -> None:
    """From the moment our code runs: what Python itself does before that is not ours to catch."""
    simulate = ("simulate", str(long_table), "--alpha", "0.5", "--jobs", "1", "-q", "--policy", "mess+")
    route = ("route", str(SAMPLES), "-o", "out.jsonl", "-q")
    for arguments in (simulate, route, ("report", "out.jsonl.state")):
        for delay in range(12):
            process = start_as_installed(folder, *arguments)
            time.sleep(0.25 + delay * 0.12)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert "Traceback" not in err or "<frozen" in err or "site-packages" in err, err
            assert process.returncode in (0, 130, -2, 1)
            if process.returncode == 130:
                assert len(err.splitlines()) <= 2, err


@pytest.mark.parametrize("option", ["--state", "--zoo", "--metric", "-o", "--state=", ""])
def test_an_empty_value_is_told_for_what_it_mostly_is(folder: Path, option: str) -> None:
    """`--zoo "$ZOO"` with a variable that isn't set would route over the bundled zoo."""
    args = [option] if option.endswith("=") else [option, ""] if option else [""]
    ended = CliRunner().invoke(main, ["route", "in.jsonl", *args])
    assert ended.exit_code == 2
    assert ended.stderr.splitlines()[-1] == (
        f"Error: {option.rstrip('=') or 'an argument'} is empty: perhaps a variable of the shell isn't set"
    )
