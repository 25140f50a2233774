"""What the bar of a long window shows, and when it is told."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_models import requests, write_joules, write_zoo

from messcli.jobs.watch import EVERY_SECONDS, SPAN_SECONDS, Activity, Watched
from messcli.records import Answer, Asked, Outcome, Request
from messcli.routing.source import Recorded

HERE = Path(__file__).parent


class Slow(Recorded):
    """Answers one after another; the clock moves a second for each."""

    now = 100.0

    def __init__(self) -> None:
        outcomes = {
            n: {name: Outcome("x", 1.0, 1.0, output_tokens=5) for name in ("a", "b")} for n in range(3)
        }
        super().__init__(("a", "b"), outcomes)

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        for group in super().answers(asked):
            for answer in group:
                self.now += 1.0
                yield [answer]
        yield ()

    def running_joules(self) -> dict[str, float]:
        return {"estimate": 0.5}


def test_activity_is_counted_as_answers_come() -> None:
    source = Slow()
    seen: list[Activity] = []
    watched = Watched(source, lambda: seen.append(watched.activity), lambda: source.now)
    assert watched.activity == Activity(0, None, {}, 0.5)
    asked = [(Request(n, "p"), (0, 1)) for n in range(3)]
    groups = list(watched.answers(asked))
    assert sum(map(len, groups)) == 6
    assert [activity.answers for activity in seen] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # the last group is empty, and comes at once
    assert seen[0].running is not None
    assert sum(seen[0].running.values()) == 5
    assert seen[-1].running == {}
    assert seen[-1].tokens_per_second == pytest.approx(6 * 5 / 5)  # six answers in five seconds
    source.now += SPAN_SECONDS + 1
    assert watched.activity.tokens_per_second is None


def test_it_is_not_told_more_often_than_eyes_follow() -> None:
    source = Slow()
    seen: list[Activity] = []
    clock = iter(range(10**6))
    watched = Watched(
        source, lambda: seen.append(watched.activity), lambda: next(clock) * EVERY_SECONDS / 100
    )
    list(watched.answers([(Request(n, "p"), (0, 1)) for n in range(3)]))
    assert len(seen) == 1


def test_a_window_that_is_left_early_has_nothing_running() -> None:
    source = Slow()
    watched = Watched(source, lambda: None, lambda: source.now)
    stream: Any = watched.answers([(Request(n, "p"), (0, 1)) for n in range(3)])
    next(stream)
    stream.close()
    assert watched.activity.running == {}


def test_the_bar_shows_it_on_a_terminal_and_nothing_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zoo(tmp_path, monkeypatch)
    rows = requests(40)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_joules(tmp_path, rows)
    program = (
        "import sys; from messcli.registry import BACKENDS; from messcli.cli import main\n"
        'BACKENDS["fake"] = "fake_models:FakeBackend"\nmain(sys.argv[1:], prog_name="messcli")'
    )
    command = [sys.executable, "-c", program, "route", "in.jsonl", "--meter", "replay:joules.jsonl", "-o"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "COLUMNS": "200"}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    process = subprocess.Popen([*command, "a.jsonl"], cwd=tmp_path, env=environment, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # noqa: PERF203  # EIO: the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "40/40" in text
    assert " answers, " in text
    assert " J" in text
    piped = subprocess.run(
        [*command, "b.jsonl"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert " answers, " not in piped.stderr
    assert "40/40" not in piped.stderr
