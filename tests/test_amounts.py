"""Numbers from outside are refused where they are read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from messcli.amounts import MOST, is_amount
from messcli.cli import main


@pytest.mark.parametrize("value", [0, 1.5, MOST, 10**15])
def test_amounts(value: float) -> None:
    assert is_amount(value)


@pytest.mark.parametrize("value", [-1, -0.5, math.inf, math.nan, 1e308, 10**400, True, "1", None, [1]])
def test_no_amounts(value: object) -> None:
    assert not is_amount(value)


@pytest.mark.parametrize("joules", ["1e308", "Infinity", "NaN", "-1", "1" + "0" * 400])
def test_a_table_of_such_joules_is_refused(tmp_path: Path, joules: str) -> None:
    row = f'{{"id": 1, "prompt": "a", "models": {{"m": {{"accuracy": 1.0, "joules": {joules}}}}}}}\n'
    (tmp_path / "table.jsonl").write_text(row)
    done = CliRunner().invoke(main, ["simulate", str(tmp_path / "table.jsonl"), "--alpha", "0.5"])
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "table.jsonl:1" in done.stderr


@pytest.mark.parametrize("joules", [1e308, math.inf, math.nan])
def test_an_output_of_such_joules_is_refused(tmp_path: Path, joules: float) -> None:
    (tmp_path / "out.jsonl").write_text(json.dumps({"id": 1, "model": "m", "joules": joules}) + "\n")
    done = CliRunner().invoke(main, ["report", str(tmp_path / "out.jsonl")])
    told = '"joules"' if math.isfinite(joules) else "is no JSON; write null"
    assert (done.exit_code, told in done.stderr) == (1, True)
