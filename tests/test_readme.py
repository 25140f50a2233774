"""The README's first screen is real: its command prints what stands there, but for measured numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def block(name: str) -> str:
    """The code block after the marker <!-- name -->."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, f"no block {name}"
    return found[1]


def without_numbers(text: str) -> str:
    """Energy is measured, and decides: its numbers differ from run to run, as does who served how many."""
    text = re.sub(r"served by .*", "served by", text)
    text = re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", text)
    return re.sub(r"SLA (kept|MISSED)", "SLA", re.sub(r" +", " ", text)).strip()


@pytest.mark.slow
def test_the_first_command_prints_what_the_readme_shows(tmp_path):
    command = block("main").split("&&")[-1].split()
    assert command[0] == ".venv/bin/messcli"
    output = tmp_path / "out.jsonl"
    arguments = [str(ROOT / a) if a.startswith("samples/") else a for a in command[1:]]
    arguments[arguments.index("out.jsonl")] = str(output)
    done = subprocess.run(
        [sys.executable, "-m", "messcli", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    shown = without_numbers(block("output: main"))
    printed = without_numbers(
        "\n".join(line for line in done.stderr.splitlines() if not line.startswith("energy: "))
    )
    assert printed == shown
    row = json.loads(output.read_text(encoding="utf-8").splitlines()[-1])
    assert list(row) == list(json.loads(block("output: row")))


def test_the_row_that_the_readme_shows_is_one():
    row = json.loads(block("output: row"))
    assert {"id", "model", "output", "accuracy", "joules", "billed_joules", "explored", "queue"} <= set(row)
