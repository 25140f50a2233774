"""Error rows that the same command mends: asked again, completed or mended lines, and crashes in between."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fault_server import Ended, Server
from marks import slow
from toy_job import PLAIN, ledger, requests, write_job


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("retry") / "work"
    folder.mkdir()
    server = Server(folder, None)
    yield server
    server.close()


class Job:
    def __init__(self, server: Server, folder: Path, output: str = "out.jsonl", window: str = "8") -> None:
        self.server, self.folder, self.output = server, folder, output
        self.args = ["route", "in.jsonl", "-o", output, *PLAIN, "--window", window]

    def write(self, lines: list[dict[str, Any] | str]) -> None:
        write_job(self.folder, lines)

    def route(self, *options: str, status: int | None = 0, **how: Any) -> Ended:
        ended = self.server.run([*self.args, *options], self.folder, **how)
        assert "Traceback" not in ended.stderr
        assert status is None or ended.status == status, ended.stderr
        return ended

    def rows(self) -> list[dict[str, Any]]:
        data = (self.folder / self.output).read_bytes()
        text = gzip.decompress(data) if self.output.endswith(".gz") else data
        return [json.loads(line) for line in text.decode().splitlines()]

    def query(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.folder / f"{self.output}.state")) as db:
            return db.execute(query).fetchall()


FLAKY = {"TOY_STUMBLES_ON": "flaky"}  # prompts with this word fail everywhere, in runs that are told so


def flaky(count: int) -> list[dict[str, Any] | str]:
    lines: list[dict[str, Any] | str] = []
    for n, line in enumerate(requests(count)):
        lines.append({**line, "prompt": f"flaky {line['prompt']}"} if n % 5 == 2 else line)
    return lines


@pytest.mark.parametrize("window", ["1", slow("8"), "4096"])
@pytest.mark.parametrize("output", ["out.jsonl", slow("out.jsonl.gz")])
def test_what_failed_is_answered_by_the_same_command_in_its_place(
    server: Server, tmp_path: Path, window: str, output: str
) -> None:
    job = Job(server, tmp_path, output, window)
    lines = flaky(700 if window != "1" else 60)
    job.write(lines)
    job.route(status=4, environment=FLAKY)
    failed = [row["id"] for row in job.rows() if "error" in row]
    assert failed == [line["id"] for line in lines if isinstance(line, dict) and "flaky" in line["prompt"]]
    before = {row["id"]: row for row in job.rows()}
    ended = job.route()
    assert f"{len(failed)} in place of error rows" in ended.stderr
    rows = job.rows()
    assert [row["id"] for row in rows] == [line["id"] for line in lines if isinstance(line, dict)]
    assert not any("error" in row for row in rows)
    for row in rows:
        if row["id"] in failed:  # both tries are billed
            assert row["billed_joules"] > row["joules"]
            assert row["billed_joules"] == pytest.approx(
                before[row["id"]]["billed_joules"] + sum_of(job, row), rel=1e-9
            )
        else:
            assert row == before[row["id"]]
    assert job.query("SELECT count(*), sum(failed) FROM accounts WHERE plan = ''") == [(1, 0)]
    assert job.query("SELECT requests FROM periods") == [(len(lines),)]
    assert job.query("SELECT count(*) FROM failures") == [(0,)]
    billed = job.query("SELECT sum(billed_joules) FROM requests")[0][0]
    assert billed == pytest.approx(sum(row["billed_joules"] for row in rows))
    assert billed == pytest.approx(job.query("SELECT sum(joules) FROM energy WHERE kind <> 'overhead'")[0][0])
    same = (tmp_path / output).read_bytes()
    job.route()  # nothing is left to do
    assert (tmp_path / output).read_bytes() == same
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["in.jsonl", "joules.jsonl", "zoo.toml", output, f"{output}.state"]
    )


def sum_of(job: Job, row: dict[str, Any]) -> float:
    """Joules of a request's last try: of all models on an exploration, else of the served one."""
    recorded = [json.loads(line) for line in (job.folder / "joules.jsonl").read_text().splitlines()]
    models = next(line["models"] for line in recorded if line["id"] == row["id"])
    return sum(one["joules"] for name, one in models.items() if row["explored"] or name == row["model"])


def test_tries_are_bounded_and_can_be_forbidden_or_forced(server: Server, tmp_path: Path) -> None:
    job = Job(server, tmp_path)
    job.write(flaky(20))
    job.route(status=4, environment=FLAKY)
    job.route("--retry", "none", status=4)
    assert sum("error" in row for row in job.rows()) == 4
    for tries in (2, 3):
        job.route(status=4, environment=FLAKY)
        assert job.query("SELECT DISTINCT tries FROM failures") == [(tries,)]
    ended = job.route(status=4)  # three tries are enough
    assert "0 routed" in ended.stderr
    assert "4 rows of the output have `error`" in ended.stderr
    job.route("--retry", "all")
    assert not any("error" in row for row in job.rows())


def test_what_every_model_refuses_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    job = Job(server, tmp_path)
    refused = {"id": "no", "prompt": "small refuses and large refuses", "reference": "w"}
    job.write([*requests(10), refused, {"id": "long", "prompt": "word " * 50}])
    job.route(status=4)
    assert "0 routed" in job.route(status=4).stderr
    assert "2 in place of error rows" in job.route("--retry", "all", status=4).stderr
    assert [row["id"] for row in job.rows()][10:] == ["no", "long"]


MENDED: list[tuple[dict[str, Any] | str, dict[str, Any], int]] = [  # a bad line, what is made of it, errors left
    ('{"id": "x", "prompt": "our ug', {"id": "x", "prompt": "our ugly letter"}, 0),
    ({"id": "x", "promt": "our ugly letter"}, {"id": "x", "prompt": "our ugly letter"}, 0),
    ({"promt": "our ugly letter"}, {"prompt": "our ugly letter"}, 0),
    ("{bad", {"prompt": "our ugly letter"}, 0),
    ({"id": "x", "prompt": "word " * 50}, {"id": "x", "prompt": "a word"}, 0),
    ({"prompt": "word " * 50}, {"prompt": "a word"}, 0),
    ({"id": "x", "prompt": "small refuses large refuses"}, {"id": "x", "prompt": "a word"}, 0),
    ({"id": "x", "prompt": "hi", "plan": "lead"}, {"id": "x", "prompt": "hi", "plan": "gold"}, 0),
    ({"id": "r3", "prompt": "twice"}, {"id": "x", "prompt": "twice"}, 1),  # two ids: that row may be another's
    ("{bad", {"id": "y", "promt": "still bad"}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "good", "left"), MENDED)
@pytest.mark.parametrize("window", ["1", "4096"])
@pytest.mark.slow
def test_a_mended_line_takes_the_place_of_its_error_row(
    server: Server, tmp_path: Path, bad: Any, good: dict[str, Any], left: int, window: str
) -> None:
    job = Job(server, tmp_path, window=window)
    lines: list[Any] = requests(30)
    job.write([*lines[:12], bad, *lines[12:]])
    job.route(status=4)
    assert [n for n, row in enumerate(job.rows()) if "error" in row] == [12]
    job.write([*lines[:12], good, *lines[12:]])
    shutil.copy(tmp_path / "joules.jsonl", tmp_path / "kept")
    add_joules(tmp_path, job)
    job.route(status=4 if left else 0)
    rows = job.rows()
    assert sum("error" in row for row in rows) == left
    if not (left and good.get("id") == "x"):
        assert [n for n, row in enumerate(rows) if row["id"] not in {line["id"] for line in lines}] == [12]
        assert len(rows) == 31
    job.write([*lines[:12], good, *lines[12:]])
    add_joules(tmp_path, job)
    assert "0 routed" in job.route(status=4 if left else 0).stderr


def add_joules(folder: Path, job: Job) -> None:
    """Joules for ids that are made from content, which `write_job` doesn't know."""
    del job
    with (folder / "joules.jsonl").open("a") as file:
        for identity in content_ids(folder):
            models = {name: {"joules": 1.0, "seconds": 0.1} for name in ("small", "large")}
            file.write(json.dumps({"id": identity, "prompt": "", "models": models}) + "\n")


def content_ids(folder: Path) -> list[str]:
    from messcli.files.requests import open_input, read_requests
    from messcli.records import Request

    with open_input(str(folder / "in.jsonl")) as handle:
        read = list(read_requests(handle, "in.jsonl"))
    return [str(one.id) for one in read if isinstance(one, Request) and not one.has_own_id]


@pytest.mark.parametrize("window", ["8", slow("4096")])
@pytest.mark.parametrize("output", [slow("out.jsonl"), "out.jsonl.gz"])
@pytest.mark.slow
def test_killed_while_it_mends(server: Server, tmp_path: Path, window: str, output: str) -> None:
    """A killed retry goes on, and comes to the bytes and the ledger of one that wasn't."""
    rng = random.Random(5)
    first, clean = tmp_path / "first", tmp_path / "clean"
    job = Job(server, first, output, window)
    job.write(flaky(200))
    job.route(status=4, environment=FLAKY)
    shutil.copytree(first, clean)
    whole = Job(server, clean, output, window).route()
    expected, known = (clean / output).read_bytes(), ledger(clean / f"{output}.state")
    kills = 0
    for n in range(6):
        folder = tmp_path / f"broken {n}"
        shutil.copytree(first, folder)
        broken = Job(server, folder, output, window)
        for _ in range(3):
            ended = broken.route(status=None, kill_after=rng.uniform(0.02, min(0.25, 0.7 * whole.seconds)))
            kills += ended.status == -signal.SIGKILL
            if ended.status == 0:
                break
        broken.route()
        assert (folder / output).read_bytes() == expected
        assert ledger(folder / f"{output}.state") == known
        assert {path.name for path in folder.iterdir()} == {path.name for path in clean.iterdir()}
    assert kills >= 3


@pytest.mark.slow
def test_a_run_that_is_taken_up_asks_nothing_twice(server: Server, tmp_path: Path) -> None:
    """What failed before a kill is asked again by the run after the one that ends the job, and not before."""
    job = Job(server, tmp_path)
    job.write(flaky(60))
    log = tmp_path / "asked"
    how = {"environment": {**FLAKY, "TOY_LOG": str(log), "TOY_SECONDS": "0.02"}}
    kills = 0
    while job.route(status=None, kill_after=0.25 + 0.05 * kills, **how).status == -signal.SIGKILL:
        kills += 1
        if job.query("SELECT 1 FROM meta WHERE name = 'runs'"):  # killed when all was done
            break
    assert kills
    assert job.query("SELECT count(*) FROM failures") == [(12,)]
    assert job.query("SELECT DISTINCT tries FROM failures") == [(1,)]


def test_standard_output_prints_mended_rows_behind_the_others(server: Server, tmp_path: Path) -> None:
    job = Job(server, tmp_path, "-")
    job.args += ["--state", "s.state"]
    job.write(flaky(20))
    assert job.route(status=4, environment=FLAKY).stdout.count(b"\n") == 20
    mended = [json.loads(line) for line in job.route().stdout.decode().splitlines()]
    assert [row["id"] for row in mended] == ["r2", "r7", "r12", "r17"]
    printed = server.run(["rows", "s.state"], tmp_path).stdout.decode().splitlines()
    rows = [json.loads(line) for line in printed]
    assert sorted(row["id"] for row in rows) == sorted(line["id"] for line in requests(20))
    assert not any("error" in row for row in rows)


def test_a_link_to_the_output_and_its_mode_stay(server: Server, tmp_path: Path) -> None:
    job = Job(server, tmp_path)
    job.write(flaky(20))
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "rows.jsonl"
    (tmp_path / "out.jsonl").symlink_to(real)
    job.route(status=4, environment=FLAKY)
    real.chmod(0o640)
    job.route()
    assert (tmp_path / "out.jsonl").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert not any("error" in row for row in job.rows())
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_what_stands_in_the_way_is_left_alone(server: Server, tmp_path: Path) -> None:
    job = Job(server, tmp_path)
    job.write(flaky(20))
    job.route(status=4, environment=FLAKY)
    mine = tmp_path / ".out.jsonl.anew"
    mine.write_text("mine")
    assert "is in the way of writing out.jsonl anew. Move it away" in job.route(status=1).stderr
    assert mine.read_text() == "mine"
    mine.unlink()
    job.route()
    assert not any("error" in row for row in job.rows())


def test_a_row_that_the_metric_failed_on_stands_and_is_not_asked_again(
    server: Server, tmp_path: Path
) -> None:
    job = Job(server, tmp_path)
    job.write([*requests(20)])
    job.route(status=4, environment={"METRIC_CRASH": "raise:12"})
    errors = [row for row in job.rows() if "error" in row]
    assert len(errors) == 1
    assert errors[0]["output"]
    ended = job.route(status=4)
    assert "0 routed" in ended.stderr
    assert "1 row of the output has `error`" in ended.stderr
    assert job.query("SELECT sum(failed) FROM accounts") == [(0,)]


def test_record_asks_again_for_what_no_model_answered(server: Server, tmp_path: Path) -> None:
    job = Job(server, tmp_path)
    job.args = ["record", "in.jsonl", "-o", "out.jsonl", "--meter", "replay:joules.jsonl"]
    job.write(flaky(20))
    job.route(status=4, environment=FLAKY)
    job.route()
    assert all(len(row["models"]) == 2 for row in job.rows())
    assert not any("error" in model for row in job.rows() for model in row["models"].values())
    assert [row["id"] for row in job.rows()] == [line["id"] for line in requests(20)]
