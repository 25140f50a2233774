"""Failed requests in the promise: stated apart, and --check-sla fails where they could hide a miss."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fault_server import Ended, Server
from marks import slow
from toy_job import PLAIN, requests, write_job

from messcli.metrics import failure_words, with_failures


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("promise") / "work"
    folder.mkdir()
    server = Server(folder, None)
    yield server
    server.close()


FAILING = {
    "refused by all": "small refuses and large refuses",
    "odd answers from all": "small stumbles and large stumbles",
    "too long for all": "word " * 50,
}


def lines(why: str, failing: int) -> list[dict[str, Any]]:
    rows = [{"id": f"bad {n}", "prompt": FAILING[why], "reference": "w"} for n in range(failing)]
    good = list(requests(60))
    return [row for pair in zip(good, [*rows, *good]) for row in pair][: 2 * failing] + good[failing:]  # noqa: B905  # the shorter one


def route(server: Server, folder: Path, *options: str, **how: Any) -> Ended:
    args = ["route", "in.jsonl", "-o", "out.jsonl", *PLAIN, "--window", "16", *options]
    ended = server.run(args, folder, **how)
    assert "Traceback" not in ended.stderr
    return ended


def failed(folder: Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(folder / "out.jsonl.state")) as db:
        return db.execute("SELECT plan, failed FROM accounts WHERE plan = '' ORDER BY plan").fetchall()


@pytest.mark.parametrize("why", FAILING)
@pytest.mark.parametrize(
    ("options", "status"),
    [
        ((), 4),
        (("--check-sla",), 3),
        (("--check-sla", "--ignore-failures"), 4),
        (("--check-sla", "--quiet"), 3),
    ],
)
def test_failures_that_could_hide_a_miss_fail_the_check(
    server: Server, tmp_path: Path, why: str, options: Sequence[str], status: int
) -> None:
    write_job(tmp_path, lines(why, 50))
    ended = route(server, tmp_path, "--alpha", "0.5", *options)
    assert ended.status == status, ended.stderr
    assert failed(tmp_path) == [("", 50)]
    if status == 3 or "--quiet" not in options:
        assert "50 failed; with accuracy 0 for them 0." in ended.stderr
        assert "alpha 0.5: SLA kept" in ended.stderr
        assert ended.stderr.split("50 failed; ")[1].split("\n")[0].endswith("SLA MISSED")


def test_failures_that_hide_nothing_fail_no_check(server: Server, tmp_path: Path) -> None:
    write_job(tmp_path, lines("refused by all", 2))
    ended = route(server, tmp_path, "--alpha", "0.5", "--check-sla")
    assert ended.status == 4, ended.stderr
    assert "2 failed; with accuracy 0 for them 0." in ended.stderr


def test_nothing_but_failures_is_a_miss(server: Server, tmp_path: Path) -> None:
    write_job(tmp_path, [{"id": n, "prompt": FAILING["refused by all"], "reference": "w"} for n in range(5)])
    assert route(server, tmp_path, "--alpha", "0.5", "--check-sla").status == 3
    assert route(server, tmp_path, "--alpha", "0.5", "--check-sla", "--ignore-failures").status == 4


def test_the_report_states_them(server: Server, tmp_path: Path) -> None:
    write_job(tmp_path, lines("too long for all", 30))
    route(server, tmp_path, "--alpha", "0.5")
    told = server.run(["report", "out.jsonl.state"], tmp_path).stdout.decode()
    assert "30 failed; with accuracy 0 for them 0." in told
    (promise,) = (
        one
        for one in json.loads(server.run(["report", "out.jsonl.state", "--json"], tmp_path).stdout)[
            "promises"
        ]
        if one["plan"] == ""
    )
    assert promise["failed"] == 30
    assert promise["verdict"] == "kept"
    mean, count = promise["observed"]["mean"], promise["observed"]["count"]
    assert promise["with_failures"] == pytest.approx(mean * count / (count + 30))
    server.run(["report", "out.jsonl.state", "--html", "page.html"], tmp_path)
    assert "30 failed; with accuracy 0 for them" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("why", [next(iter(FAILING)), *map(slow, list(FAILING)[1:])])
@pytest.mark.slow
def test_what_failed_is_counted_once_however_often_a_run_is_stopped(
    server: Server, tmp_path: Path, why: str
) -> None:
    write_job(tmp_path, lines(why, 25))
    for limit in range(5, 90, 10):
        route(server, tmp_path, "--alpha", "0.5", "--limit", str(limit))
        route(server, tmp_path, "--alpha", "0.5", "--limit", str(limit + 7), kill_after=0.25)
    assert route(server, tmp_path, "--alpha", "0.5").status in (0, 4)
    assert failed(tmp_path) == [("", 25)]
    assert route(server, tmp_path, "--alpha", "0.4").status in (0, 4)  # other settings: the ledger stays
    assert failed(tmp_path) == [("", 25)]


@pytest.mark.parametrize(
    ("mean", "count", "failures", "expected"),
    [(1.0, 104, 96, 0.52), (0.5, 10, 0, 0.5), (None, 0, 7, 0.0), (None, 0, 0, 0.0), (0.9, 9, 1, 0.81)],
)
def test_the_mean_with_failures(mean: float | None, count: int, failures: int, expected: float) -> None:
    assert with_failures(mean, count, failures) == pytest.approx(expected)
    assert bool(failure_words(mean, count, failures, 0.6)) == bool(failures)
