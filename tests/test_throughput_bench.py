"""`tools/bench/throughput.py` in miniature: that it runs, and counts what it says. Its figures are no test's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def bench(*args: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / "bench" / "throughput.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1), done.stderr  # 1: not as fast as expected, here
    return done.stdout


def test_the_controllers_time_is_told_of_both_predictors() -> None:
    said = bench("controller", "--requests", "600")
    assert [line.split()[4] for line in said.splitlines()] == ["linear:", "ridge:"]


def test_memory_is_watched_from_the_first_tenth_on() -> None:
    assert "memory gained over the other nine" in bench("memory", "--requests", "100000")


def test_both_loops_write_the_same_tokens() -> None:
    said = bench("engine", "--windows", "2", "--window", "32")
    tokens = dict(re.findall(r"(\w+) +\d+ tokens/s \((\d+) in", said))
    assert tokens["route"] == tokens["plain"]
