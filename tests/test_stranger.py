"""A stranger's hour: everything one can do wrong ends in one line that says what to do, never in a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_models import write_zoo

from messcli import jsonl
from messcli.cli import main

LINES = '{"id": "a", "prompt": "one two", "reference": "one two"}\n{"id": "b", "prompt": "ink", "reference": "ink"}\n'
MODEL = '[[models]]\nname = "small"\npath = "./small"\n'
OUTCOME = {"id": "a", "prompt": "p", "reference": "r", "models": {"m": {"output": "r", "joules": 1.0}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a good job in it, and much that is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_zoo(tmp_path, monkeypatch)
    for name, text in {
        "in.jsonl": LINES,
        "notgz.gz": LINES,
        "list.jsonl": "[1, 2]\n",
        "empty.jsonl": "",
        "empty.toml": "",
        "twice.toml": MODEL + MODEL,
        "field.toml": MODEL + "devise = 1\n",
        "temperature.toml": MODEL + "temperature = 1.0\n",
        "alpha.toml": "[sla]\nalpha = 52\n" + MODEL,
        "top.toml": "alpha = 0.5\n" + MODEL,
        "bad.toml": "[[models]\n",
        "nopath.toml": '[[models]]\nname = "small"\n',
        "nomodel.toml": "[sla]\nalpha = 0.5\n" + MODEL,
        "backend.toml": '[sla]\nalpha = 0.5\n[[models]]\nname = "a"\npath = "b"\nbackend = "fast"\n',
        "server.toml": '[[models]]\nname = "a"\npath = "b"\nbackend = "openai"\n',
        "noalpha.toml": MODEL,
        "table.jsonl": json.dumps(OUTCOME) + "\n",
        "out.jsonl": '{"other": 1}\n',
        "rows.jsonl": '{"model": "small", "joules": 1.0}\n',
        "a.state": "SQLite format 3\0",
        "deep.json": "[" * 100_000 + "]" * 100_000,
        "deep.toml": "a = " + "[" * 100_000 + "]" * 100_000,
        "strange_metric.py": "def nan(output, references): return float('nan')\n"
        "def text(output, references): return 'good'\ndef breaks(output, references): return 1 / 0\n",
        "broken_metric.py": "def f(:\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "bin.jsonl").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "latin1.toml").write_bytes(b"# M\xfcnchen\n")
    (tmp_path / "a_folder").mkdir()
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    before = set(sys.modules)
    yield tmp_path
    for name in {"strange_metric", "broken_metric"} - before:
        sys.modules.pop(name, None)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments), standalone_mode=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@dataclass(frozen=True)
class Slip:
    command: str
    says: tuple[str, ...]  # what went wrong, and the way out
    code: int = 1


ROUTE = "route in.jsonl -o o.jsonl "
SLIPS = [
    # the input
    Slip("route no.jsonl -o o.jsonl", ("no.jsonl: no such file", "Check the path")),
    Slip("route a_folder -o o.jsonl", ("is a folder", "Name a JSONL file in it")),
    Slip("route notgz.gz -o o.jsonl", ("Not a gzipped file", "repair the file")),
    Slip("route list.jsonl -o o.jsonl --on-error stop", ("list.jsonl:1", 'such as {"prompt"')),
    Slip("route bin.jsonl -o o.jsonl --on-error stop", ("bin.jsonl:1: not valid",)),
    Slip("route in.jsonl -o o.jsonl --prompt-field text --on-error stop", ("name one with --prompt-field",)),
    Slip("record no.jsonl -o o.jsonl", ("no.jsonl: no such file",)),
    # the output
    Slip("route in.jsonl -o in.jsonl", ("both the output and the input", "Give"), 2),
    Slip("route in.jsonl -o out/", ("out/: is a folder", "Name a file in it"), 2),
    Slip("route in.jsonl -o .", (".: is a folder", "Name a file in it"), 2),
    Slip("route in.jsonl -o ./in.jsonl", ("both the output and the input",), 2),
    Slip("route in.jsonl -o x --state ./x", ("is the state's own file", "another name"), 2),
    Slip("route in.jsonl -o a_folder", ("a_folder: is a folder", "Name a file"), 2),
    Slip("route in.jsonl -o nowhere/o.jsonl", ("No such file or directory", "existing, writable folder")),
    Slip("route in.jsonl -o out.jsonl", ("knows nothing of", "Move it away")),
    Slip("route in.jsonl", ("--output",), 2),
    Slip(
        "simulate table.jsonl --alpha 0.5 --metric exact --out ./table.jsonl",
        ("is a file of this command already",),
        2,
    ),
    Slip(
        "simulate table.jsonl --alpha 0.5 --metric exact --trace table.jsonl",
        ("is a file of this command already",),
        2,
    ),
    Slip(
        "simulate table.jsonl --alpha 0.5 --metric exact --out o --trace o",
        ("--trace o: is a file of this command",),
        2,
    ),
    Slip(
        "simulate table.jsonl --alpha 0.5 --metric exact --out a.state",
        ("--out a.state: is a state", "another name"),
        2,
    ),
    Slip("report table.jsonl --html table.jsonl", ("is an outcomes table",)),
    Slip("report rows.jsonl --html rows.jsonl", ("--html rows.jsonl: is a file of this command",), 2),
    Slip("report rows.jsonl --html a.state", ("--html a.state: is a state",), 2),
    # nested too deeply
    Slip("route deep.json -o o.jsonl --on-error stop", ("deep.json:1: not valid JSON: nested too deeply",)),
    Slip(ROUTE + "--zoo deep.toml", ("deep.toml: not valid TOML: nested too deeply",)),
    Slip(ROUTE + "--calibration deep.json", ("deep.json: is no calibration: nested too deeply",)),
    Slip("simulate deep.json --alpha 0.5", ("nested too deeply",)),
    Slip("report deep.json", ("nested too deeply",)),
    # settings
    Slip(ROUTE + "--alpha 52", ("from 0 to 1", "did you mean 0.52?"), 2),
    Slip(ROUTE + "--alpha -1", ("from 0 to 1",), 2),
    Slip(ROUTE + "--alpha nan", ("from 0 to 1",), 2),
    Slip(ROUTE + "--alpha high", ("'high' is not a valid float",), 2),
    Slip(ROUTE + "--v nan", ("nan is no number",), 2),
    Slip(ROUTE + "--window 0", ("range 1<=x",), 2),
    Slip(ROUTE + "--policy best", ('unknown policy "best"', "mess+"), 2),
    Slip(ROUTE + "--predictor oracle", ('unknown predictor "oracle"', "ridge"), 2),
    Slip(ROUTE + "--meter joulemeter", ("unknown meter", "Known are"), 2),
    Slip(ROUTE + "--meter replay:no.jsonl", ("no.jsonl", "Name a file")),
    Slip(ROUTE + "--plan gold", ('unknown plan "gold"', "Plans of the zoo file"), 2),
    Slip(ROUTE + "--fields acuracy,model", ("did you mean accuracy?",), 2),
    Slip(ROUTE + "--fields model,", ("a name is empty",), 2),
    Slip(ROUTE + "--fields nothing", ("no such column", "a row has id"), 2),
    Slip(ROUTE + "--modle x", ("No such option",), 2),
    Slip(ROUTE + "--calibration no.json", ("no.json: can't be read", "messcli calibrate")),
    Slip(ROUTE + "--calibration in.jsonl", ("is no calibration", "messcli calibrate")),
    Slip("rout in.jsonl", ("No such command 'rout'",), 2),
    Slip("calibrate --output-tokens x", ("whole numbers above 0",), 2),
    # metrics
    Slip(ROUTE + "--metric blue1", ('did you mean "bleu1"?',)),
    Slip(ROUTE + "--metric nowhere:f", ('no module "nowhere"', "PYTHONPATH")),
    Slip(ROUTE + "--metric strange_metric:nam", ('no function "nam"', 'Did you mean "nan"?')),
    Slip(ROUTE + "--metric strange_metric:", ("write it as module:function",)),
    Slip(ROUTE + "--metric broken_metric:f", ("importing it failed", "SyntaxError")),
    Slip(
        ROUTE + "--metric strange_metric:nan --on-error stop", ("returned nan", "Return a number from 0 to 1")
    ),
    Slip(ROUTE + "--metric strange_metric:text --on-error stop", ("returned str", "Return a float")),
    Slip(ROUTE + "--metric strange_metric:breaks --on-error stop", ("ZeroDivisionError",)),
    # the zoo
    Slip(ROUTE + "--zoo no.toml", ("no such zoo file", "Correct --zoo")),
    Slip(ROUTE + "--zoo in.jsonl", ("in.jsonl:1: not valid TOML",)),
    Slip(ROUTE + "--zoo bad.toml", ("bad.toml:1: not valid TOML",)),
    Slip(ROUTE + "--zoo latin1.toml", ("Save the file as UTF-8",)),
    Slip(ROUTE + "--zoo empty.toml", ("no models. Add a [[models]] table",)),
    Slip(ROUTE + "--zoo twice.toml", ("used twice", "Give each model its own")),
    Slip(ROUTE + "--zoo field.toml", ("unknown field `devise`", "did you mean `device`?")),
    Slip(ROUTE + "--zoo temperature.toml", ("put it under [models.generation]",)),
    Slip(ROUTE + "--zoo alpha.toml", ("did you mean 0.52?",)),
    Slip(ROUTE + "--zoo top.toml", ("put it under [sla]",)),
    Slip(ROUTE + "--zoo nopath.toml", ("path: missing",)),
    Slip(ROUTE + "--zoo backend.toml", ('unknown backend "fast"', "Known are")),
    Slip(ROUTE + "--zoo server.toml", ("base_url: missing", "Say where the server is")),
    Slip(ROUTE + "--zoo noalpha.toml", ("no target accuracy", "--alpha"), 2),
    # the state
    Slip(ROUTE + "--state in.jsonl", ("is no messcli state", "Name another")),
    Slip(ROUTE + "--state other.db", ("database of another program", "Name another")),
    Slip(ROUTE + "--state nowhere/s", ("existing, writable folder",)),
    Slip("rows no.state", ("no.state: no such file", "Name the --state")),
    Slip("rows in.jsonl", ("is no messcli state",)),
    # reading results
    Slip("report no.state", ("no.state: can't be read", "Name a state file or the output")),
    Slip("report a_folder", ("Is a directory", "Name a state file or the output")),
    Slip("report in.jsonl", ("no row of `messcli route`", "Name its output")),
    Slip("report in.jsonl --alpha 52", ("0<=x<=1",), 2),
    Slip("simulate no.jsonl --alpha 0.5", ("no.jsonl: no such file",)),
    Slip("simulate in.jsonl --alpha 0.5", ('no "models"', "messcli record")),
    Slip("simulate bin.jsonl --alpha 0.5", ("Is this an outcomes table?",)),
    Slip("simulate empty.jsonl --alpha 0.5", ("is empty", "messcli record")),
    Slip("simulate table.jsonl --alpha 0.5", ("no accuracy", "--metric")),
    Slip("simulate table.jsonl --alpha 0.5 --models x", ('no outcome of model "x"', "the line has m")),
    Slip("simulate table.jsonl --metric exact", ("no target accuracy", "--alpha"), 2),
    Slip("simulate table.jsonl --alpha 52", ("0<=x<=1",), 2),
    Slip("simulate table.jsonl --alpha nan", ("is no number",), 2),
    Slip("simulate table.jsonl --alpha 0.5 --metric exact --out a_folder", ("a_folder", "--out")),
]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.command)
def test_a_slip_is_told_in_one_line_with_its_cure(slip: Slip, folder: Path) -> None:
    result = run(*slip.command.split())
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == slip.code, result.output
    assert len(told) == 1, result.stderr
    for words in slip.says:
        assert words in told[0]
    assert result.stdout == ""
    if slip.code == 1:
        assert result.stderr.splitlines()[-1] == told[0]
    assert (folder / "in.jsonl").read_text(encoding="utf-8") == LINES


def test_a_file_of_something_else_says_why_its_lines_fail(folder: Path) -> None:
    result = run("route", "bin.jsonl", "-o", "o.jsonl")
    assert result.exit_code == 4
    assert "first error" in result.stderr
    assert "bin.jsonl:1: not valid" in result.stderr
    assert "nothing to do" not in result.stderr


def test_a_huge_line_is_a_row_with_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1 << 20)
    (folder / "huge.jsonl").write_text('{"prompt": "' + "x" * (2 << 20) + '"}\n' + LINES, encoding="utf-8")
    result = run("route", "huge.jsonl", "-o", "o.jsonl", "--meter", "estimate")
    assert result.exit_code == 4, result.stderr
    rows = [json.loads(line) for line in (folder / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "longer than 1 MB" in rows[0]["error"]
    assert [row["id"] for row in rows[1:]] == ["a", "b"]


def test_an_empty_input_is_no_error(folder: Path) -> None:
    result = run("route", "empty.jsonl", "-o", "o.jsonl")
    assert (result.exit_code, (folder / "o.jsonl").read_text(encoding="utf-8")) == (0, "")


def test_without_any_reference_the_summary_promises_nothing(folder: Path) -> None:
    (folder / "bare.jsonl").write_text('{"prompt": "ink"}\n' * 3, encoding="utf-8")
    result = run("route", "bare.jsonl", "-o", "o.jsonl", "--meter", "estimate", "--check-sla")
    assert result.exit_code == 0, result.stderr
    assert "SLA kept" not in result.stderr


def test_a_missed_promise_is_said_even_when_quiet(folder: Path) -> None:
    (folder / "hard.jsonl").write_text('{"prompt": "ink", "reference": "xyzzy"}\n' * 3, encoding="utf-8")
    result = run("route", "hard.jsonl", "-o", "o.jsonl", "--meter", "estimate", "--check-sla", "--quiet")
    assert result.exit_code == 3, result.stderr
    assert "SLA MISSED" in result.stderr


def test_a_state_of_another_zoo_is_refused(folder: Path) -> None:
    assert run("route", "in.jsonl", "-o", "o.jsonl", "--meter", "estimate").exit_code == 0
    text = (folder / "zoo.toml").read_text(encoding="utf-8")
    (folder / "zoo.toml").write_text(text.replace('"small"', '"tiny"'), encoding="utf-8")
    result = run("route", "in.jsonl", "-o", "o.jsonl")
    assert result.exit_code == 1
    assert "was made with the models small" in result.stderr
    assert "another --state" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["in.jsonl", "zoo.toml"])
def test_a_file_without_permission_is_told(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    with contextlib.ExitStack() as stack:
        stack.callback((folder / name).chmod, 0o600)
        result = run("route", "in.jsonl", "-o", "o.jsonl")
    assert result.exit_code == 1
    assert f"{name}: can't be read: Permission denied" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told(folder: Path) -> None:
    result = run("route", "in.jsonl", "-o", "/dev/full", "--state", "s")
    assert result.exit_code == 2
    assert "is no regular file" in result.stderr
