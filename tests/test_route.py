"""`messcli route` from the outside: what goes in, what comes out, and what the state remembers in between."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_server import Ended, Server
from toy_job import OPTIONS, ledger, mixed_requests, requests, write_job

from messcli.routing.sla import Account
from messcli.routing.tuning import TUNING
from messcli.snapshots import Part

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("route") / "work"
    folder.mkdir()
    server = Server(folder, None)
    yield server
    server.close()


class Job:
    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder

    def write(self, lines: list[Any]) -> None:
        write_job(self.folder, lines)

    def route(self, *args: str, status: int = 0, **how: Any) -> Ended:
        """Route in.jsonl to out.jsonl, unless `args` say otherwise: later options win."""
        first = [] if args and (args[0] == "-" or not args[0].startswith("-")) else ["in.jsonl"]
        ended = self.server.run(["route", *first, "-o", "out.jsonl", *OPTIONS, *args], self.folder, **how)
        assert ended.status == status, ended.stderr
        assert "Traceback" not in ended.stderr
        return ended

    def rows(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def query(self, query: str, state: str = "out.jsonl.state") -> list[tuple[Any, ...]]:
        db = sqlite3.connect(self.folder / state)
        try:
            return db.execute(query).fetchall()
        finally:
            db.close()

    def accounts(self, state: str = "out.jsonl.state") -> dict[tuple[str, str], tuple[Any, ...]]:
        rows = self.query("SELECT period, plan, alpha, queue, observed, estimated FROM accounts", state)
        return {(period, plan): tuple(rest) for period, plan, *rest in rows}


@pytest.fixture
def job(server: Server, tmp_path: Path) -> Job:
    return Job(server, tmp_path)


def error_of(ended: Ended) -> str:
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: "), ended.stderr
    return last


# ---- rows ----------------------------------------------------------------------------------------


def test_one_row_per_line_in_order(job: Job) -> None:
    job.write(mixed_requests(60))
    ended = job.route(status=4)
    rows = job.rows()
    assert len(rows) == 70
    expected = [json.loads(line)["id"] if line.startswith('{"') else None
                for line in (job.folder / "in.jsonl").read_text().splitlines()]  # fmt: skip
    assert [row["id"] for row in rows] == expected
    errors = {row["id"]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {None, "r3", "long", "bad", "stumbled", "lead one"}
    assert errors[None].startswith("in.jsonl:8: not valid JSON")
    assert errors["r3"] == "in.jsonl:21: field \"id\": 'r3' stands on line 4 already. Ids must differ"
    assert "longer than every model's context" in errors["long"]
    assert errors["bad"] == "this one fails"
    assert 'unknown plan "lead". Plans of the zoo file: gold, silver' in errors["lead one"]
    assert "6 failed" in ended.stderr
    good = next(row for row in rows if "error" not in row)
    assert list(good) == [
        "id", "level", "model", "output", "estimated_accuracy", "accuracy", "joules", "joules_predicted",
        "billed_joules", "explored", "queue", "prompt_tokens", "output_tokens", "seconds", "meter", "finish",
    ]  # fmt: skip


def test_fields_that_pass_through(job: Job) -> None:
    job.write([{"id": 1, "prompt": "a b", "model": "mine", "error": "mine", "nested": {"x": [1, "\ud800"]}}])
    job.route("--include-prompt")
    (row,) = job.rows()
    assert row["input_model"] == "mine"
    assert row["input_error"] == "mine"
    assert row["nested"] == {"x": [1, "\ud800"]}
    assert row["prompt"] == "a b"
    assert row["model"] in ("small", "large")


def test_columns(job: Job) -> None:
    job.write([{"id": 1, "prompt": "a b"}, {"id": 2}])
    job.route("--fields", "id, output", status=4)
    good, bad = job.rows()
    assert list(good) == ["id", "output"]
    assert list(bad) == ["id", "output", "error"]


def test_nothing_to_route(job: Job) -> None:
    job.write([])
    assert "no line of the input is to be routed" in job.route().stderr
    assert (job.folder / "out.jsonl").read_bytes() == b""
    job.write(requests(5))
    job.route("--limit", "0")
    assert job.rows() == []


def test_gzip_in_and_out(job: Job) -> None:
    job.write(requests(20))
    (job.folder / "in.jsonl.gz").write_bytes(gzip.compress((job.folder / "in.jsonl").read_bytes()))
    job.route("in.jsonl.gz", "-o", "out.jsonl.gz")
    job.route()
    assert (
        gzip.decompress((job.folder / "out.jsonl.gz").read_bytes()) == (job.folder / "out.jsonl").read_bytes()
    )


def test_standard_input_and_output(job: Job) -> None:
    job.write(requests(20))
    ended = job.route("-", "-o", "-", stdin=str(job.folder / "in.jsonl"))
    job.route()
    assert ended.stdout == (job.folder / "out.jsonl").read_bytes()
    assert not list(job.folder.glob("*-*"))  # no file is called "-"


@pytest.mark.slow
def test_a_damaged_archive_keeps_what_was_before_the_damage(job: Job) -> None:
    job.write([{"id": n, "prompt": f"a {n * n} b"} for n in range(4000)])
    packed = gzip.compress((job.folder / "in.jsonl").read_bytes())
    (job.folder / "in.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    ended = job.route("in.jsonl.gz", status=1)
    assert "can't be read on" in error_of(ended)
    before = len(job.rows())
    assert before > 100
    (job.folder / "in.jsonl.gz").write_bytes(packed)
    job.route("in.jsonl.gz")
    assert [row["id"] for row in job.rows()] == list(range(4000))


# ---- finished jobs, growing files, changed requests -----------------------------------------------


def test_a_finished_job_does_nothing(job: Job) -> None:
    job.write(mixed_requests(60))
    job.route(status=4)
    before = {path.name: path.read_bytes() for path in job.folder.iterdir()}
    ended = job.route("--retry", "none", status=4)  # as long as error rows stand in the output
    assert "0 routed (70 were done before)" in ended.stderr
    assert "6 rows of the output have `error`" in ended.stderr
    assert ended.seconds < 5
    assert {path.name: path.read_bytes() for path in job.folder.iterdir()} == before


def test_a_growing_file_gets_its_new_lines_routed(job: Job) -> None:
    everything = requests(60)
    job.write(everything)
    lines = (job.folder / "in.jsonl").read_text().splitlines(keepends=True)
    for size, new in ((10, 10), (10, 0), (11, 1), (60, 49)):
        (job.folder / "in.jsonl").write_text("".join(lines[:size]))
        assert re.search(rf"requests +{new} routed", job.route().stderr)
    assert [row["id"] for row in job.rows()] == [line["id"] for line in everything]
    assert [t for (t,) in job.query("SELECT t FROM requests ORDER BY seq")] == list(range(1, 61))


def test_a_file_that_is_being_written(job: Job) -> None:
    job.write(requests(3))
    whole = (job.folder / "in.jsonl").read_bytes()
    (job.folder / "in.jsonl").write_bytes(whole[:-30])
    job.route(status=4)
    assert "was the file still being written?" in job.rows()[-1]["error"]
    (job.folder / "in.jsonl").write_bytes(whole)
    job.route()
    assert [row["id"] for row in job.rows()] == ["r0", "r1", "r2"]  # in the place of the torn line


def test_requests_are_known_by_id_wherever_they_stand(job: Job) -> None:
    lines = requests(20)
    job.write(lines)
    job.route()
    job.write([{"id": "new", "prompt": "a new one"}, *reversed(lines)])
    assert "1 routed (20 were done before)" in job.route().stderr


def test_requests_without_ids_are_known_by_content(job: Job) -> None:
    lines = [{"prompt": "a b"}, {"prompt": "c"}, {"prompt": "a b"}]
    write_job(job.folder, lines)
    plain = ["route", "in.jsonl", "-o", "out.jsonl", "--policy", "smallest", "--meter", "estimate"]
    assert job.server.run(plain, job.folder).status == 0
    write_job(job.folder, [*lines, {"prompt": "a b"}])
    assert "1 routed (3 were done before)" in job.server.run(plain, job.folder).stderr
    assert len({row["id"] for row in job.rows()}) == 4


def test_a_changed_prompt_under_a_known_id(job: Job) -> None:
    lines = requests(10)
    job.write(lines)
    job.route()
    lines[4]["prompt"] = "something else"
    job.write(lines)
    job.route(status=4)
    error = job.rows()[-1]
    assert error["id"] == "r4"
    assert error["error"] == (
        "in.jsonl:5: 'r4': has another prompt than when it was routed. Give the new prompt a new id"
    )
    job.route(status=4)  # told once
    assert len(job.rows()) == 11
    lines[5]["prompt"] = "something else again"
    job.write(lines)
    assert "in.jsonl:6: 'r5': has another prompt" in error_of(job.route("--on-error", "stop", status=1))
    assert len(job.rows()) == 11


def test_a_bad_line_stops_the_run_when_asked_to(job: Job) -> None:
    lines: list[Any] = requests(30)
    job.write([*lines[:20], "{bad", *lines[20:]])
    ended = job.route("--on-error", "stop", status=1)
    assert "in.jsonl:21: not valid JSON" in error_of(ended)
    assert len(job.rows()) == 20  # what stands before it is done
    job.write(lines)
    job.route("--on-error", "stop")
    assert [row["id"] for row in job.rows()] == [line["id"] for line in lines]


def test_a_failed_request_stops_the_run_when_asked_to(job: Job) -> None:
    lines = requests(30)
    job.write([*lines[:20], {"id": "bad", "prompt": "this one fails"}, *lines[20:]])
    ended = job.route("--on-error", "stop", status=1)
    assert error_of(ended) == "Error: in.jsonl:21: 'bad': this one fails"
    assert len(job.rows()) == 20  # what stands before it; the next run tries it again
    job.route(status=4)
    assert len(job.rows()) == 31


def test_limit_counts_lines_of_the_input(job: Job) -> None:
    job.write(["{bad", *requests(20)])
    job.route("--limit", "5", status=4)
    assert [row["id"] for row in job.rows()] == [None, "r0", "r1", "r2", "r3"]
    job.route("--limit", "5", status=4)
    job.route("--limit", "8", status=4)
    assert len(job.rows()) == 8


# ---- one state, many runs -------------------------------------------------------------------------


def test_one_state_over_many_inputs_and_outputs(job: Job) -> None:
    """As an hourly cron job does: t, the queue, the ledger and what was learnt go on."""
    everything = requests(96)
    job.write(everything)
    lines = (job.folder / "in.jsonl").read_text().splitlines(keepends=True)
    for hour in range(4):
        (job.folder / f"hour{hour}.jsonl").write_text("".join(lines[24 * hour : 24 * hour + 24]))
        job.route(f"hour{hour}.jsonl", "-o", f"out{hour}.jsonl", "--state", "year.state")
    job.route()
    hourly = [row for hour in range(4) for row in job.rows(f"out{hour}.jsonl")]
    assert hourly == job.rows()
    assert ledger(job.folder / "year.state")["requests"] == ledger(job.folder / "out.jsonl.state")["requests"]
    assert job.accounts("year.state") == job.accounts()


@pytest.mark.parametrize(
    ("options", "was", "now"),
    [
        (["--window", "9"], "window 8", "window 9"),
        (["--window", "auto"], "window 8", "window auto"),
        (["--seed", "1"], "seed 0", "seed 1"),
        (["--predictor", "linear"], "predictor mean", "predictor linear"),
        (["--policy", "largest"], "policy mess+", "policy largest"),
        (["--metric", "exact"], "metric fault_server:metric", "metric exact"),
    ],
)
def test_settings_that_do_not_mix_are_refused(job: Job, options: list[str], was: str, now: str) -> None:
    job.write(requests(10))
    job.route("--limit", "5")
    error = error_of(job.route(*options, status=1))
    assert f"out.jsonl.state: was made with {was}" in error
    assert f"and this run has {now}" in error
    assert "Run with what it was made with, or start anew with another --state and output" in error
    assert len(job.rows()) == 5
    job.route()
    assert len(job.rows()) == 10


@pytest.mark.slow
def test_a_state_goes_on_under_the_metric_that_follows_its_own(job: Job) -> None:
    job.write(requests(15))
    options = ["--metric", "rouge1"]
    job.route(*options, "--limit", "5")

    def write_signature(tokenizer: str) -> None:
        db = sqlite3.connect(job.folder / "out.jsonl.state")
        ((text,),) = db.execute("SELECT value FROM meta WHERE name = 'signature'").fetchall()
        signature = json.loads(text)
        signature["metric"] = re.sub(r"tok:[^|]+", f"tok:{tokenizer}", signature["metric"])
        db.execute("UPDATE meta SET value = ? WHERE name = 'signature'", (json.dumps(signature),))
        db.commit()
        db.close()

    write_signature("a-z0-9")  # of version 0.1: words of other scripts were none
    job.route(*options, "--limit", "10")
    assert "tok:auto" in job.query("SELECT value FROM meta WHERE name = 'signature'")[0][0]
    write_signature("zh")
    assert "tok:zh" in error_of(job.route(*options, status=1))
    zoo = (job.folder / "zoo.toml").read_text()
    (job.folder / "zoo.toml").write_text(zoo.replace("[sla]", '[sla]\ntokenizer = "zh"'))
    job.route(*options)
    assert len(job.rows()) == 15


@pytest.mark.parametrize(
    ("before", "after", "was", "now"),
    [
        ('name = "small"', 'name = "tiny"', "the models small, large", "the models tiny, large"),
        ('path = "toy/large"', 'path = "toy/huge"', 'path of model "large" = "toy/large"', '"toy/huge"'),
        (
            'name = "small"',
            'name = "small"\nmax_new_tokens = 5',
            'max_new_tokens of model "small" = 128',
            "this run has 5",
        ),
        (
            "[sla]",
            '[look]\ncheck = "{request} {answer}?"\n[sla]',
            "was made with [look] check",
            "this run has '{request} {answer}?'",
        ),
    ],
)
def test_another_zoo_is_refused(job: Job, before: str, after: str, was: str, now: str) -> None:
    job.write(requests(10))
    job.route("--limit", "5")
    zoo = (job.folder / "zoo.toml").read_text()
    (job.folder / "zoo.toml").write_text(zoo.replace(before, after))
    error = error_of(job.route(status=1))
    assert was in error
    assert now in error


def test_what_may_change_is_recorded_with_its_time_and_request(job: Job) -> None:
    job.write(requests(24))
    job.route("--limit", "8")
    job.route("--limit", "8")  # the same again: nothing to note
    job.route("--limit", "16", "--alpha", "0.9")
    job.route("--alpha", "0.9", "--v", "0.5", "--c", "2")
    found = [(t, json.loads(value)) for t, _, value in job.query("SELECT * FROM settings ORDER BY rowid")]
    assert [(t, value["alphas"][""], value["v"], value["c"]) for t, value in found] == [
        (1, 0.7, 0.1, 3.0),
        (9, 0.9, 0.1, 3.0),
        (17, 0.9, 0.5, 2.0),
    ]


def test_earlier_requests_are_not_judged_by_a_new_alpha(job: Job) -> None:
    """Also after a kill, when the queue is found again from the requests that were kept."""
    job.write(requests(200))
    job.route(status=9, environment={"TOY_CRASH": "exit:40"})
    kept = job.query("SELECT queue FROM requests WHERE plan IS NULL ORDER BY seq DESC LIMIT 1")
    assert kept
    job.route("--alpha", "0.95", "--limit", "0")
    assert job.accounts()["", ""][:2] == (0.95, *kept[0])


@pytest.mark.parametrize(("first", "then"), [([], ["--v", "0.1"]), (["--v", "0.1"], [])])
def test_from_a_found_price_to_a_given_v_and_back(job: Job, first: list[str], then: list[str]) -> None:
    job.write(requests(120))
    options = ["--predictor", "ridge", "--window", "8", "--meter", "replay:joules.jsonl"]
    args = ["route", "in.jsonl", "-o", "out.jsonl", *options]
    for more in ([*first, "--limit", "60"], [*then, "--limit", "90"], first):
        ended = job.server.run([*args, *more], job.folder)
        assert ended.status == 0, ended.stderr
    assert [row["id"] for row in job.rows()] == [f"r{n}" for n in range(120)]


@pytest.mark.parametrize(("version", "predictor"), [(1, "linear"), (2, "ridge"), (3, "ridge"), (4, "ridge")])
def test_a_state_of_an_earlier_version_goes_on(job: Job, version: int, predictor: str) -> None:
    job.write(mixed_requests(60)[:48])
    db = sqlite3.connect(job.folder / "S")
    db.executescript((HERE / "data" / f"state-{version}.sql").read_text(encoding="utf-8"))
    db.close()
    shutil.copy(HERE / "data" / f"state-{version}.jsonl", job.folder / "out.jsonl")
    args = ["--state", "S", "--metric", "exact", "--predictor", predictor]
    ended = job.route(*args, "--limit", "26", status=4)
    assert "0 routed (26 were done before)" in ended.stderr
    assert job.accounts("S")["", ""] == (0.7, pytest.approx(1.2), 24, 0)
    job.route(*args, status=4)
    assert len(job.rows()) == 48
    assert [t for (t,) in job.query("SELECT t FROM requests WHERE t > 0 ORDER BY seq", "S")] == list(
        range(1, 46)
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_an_earlier_version_that_had_no_request_yet(job: Job, version: int) -> None:
    job.write(requests(20))
    db = sqlite3.connect(job.folder / "S")
    db.executescript((HERE / "data" / f"state-{version}.sql").read_text(encoding="utf-8"))
    for table in ("requests", "rows", "outputs", "events", "energy", "accounts"):
        db.execute(f"DELETE FROM {table}")  # noqa: S608  # no input in it
    db.commit()
    db.close()
    job.route("--state", "S", "--metric", "exact", "--predictor", "linear" if version == 1 else "ridge")
    assert [t for (t,) in job.query("SELECT t FROM requests ORDER BY seq", "S")] == list(range(1, 21))


# ---- outputs that somebody touched ----------------------------------------------------------------


def test_an_output_with_foreign_rows_is_left_alone(job: Job) -> None:
    job.write(requests(5))
    (job.folder / "out.jsonl").write_text("mine\n")
    assert "has rows that out.jsonl.state knows nothing of" in error_of(job.route(status=1))
    assert (job.folder / "out.jsonl").read_text() == "mine\n"


def test_the_input_as_output(job: Job) -> None:
    job.write(requests(5))
    before = (job.folder / "in.jsonl").read_bytes()
    assert "both the output and the input" in error_of(job.route("-o", "in.jsonl", status=2))
    assert (job.folder / "in.jsonl").read_bytes() == before


def test_an_output_that_was_deleted_or_edited(job: Job) -> None:
    job.write(requests(20))
    job.route("--limit", "10")
    output = job.folder / "out.jsonl"
    rows = output.read_text()
    output.unlink()
    assert "the file is gone. Put it back, or route anew" in error_of(job.route(status=1))
    output.write_text(rows + "a note\n")
    assert "was changed since messcli closed it" in error_of(job.route(status=1))
    output.write_text(rows)
    job.route()
    assert output.read_text().startswith(rows)
    assert len(job.rows()) == 20


# ---- standard output ------------------------------------------------------------------------------


def test_rows_are_printed_once_and_can_be_printed_again(job: Job) -> None:
    job.write(requests(30))
    first = job.route("-o", "-", "--state", "S", "--limit", "16").stdout
    second = job.route("-o", "-", "--state", "S").stdout
    again = job.server.run(["rows", "S"], job.folder)
    assert (again.status, again.stderr) == (0, "")
    job.route()
    of_a_file = job.server.run(["rows", "out.jsonl.state"], job.folder)
    assert (of_a_file.status, of_a_file.stdout) == (0, b"")
    assert of_a_file.stderr == "nothing to print: its rows stand in out.jsonl\n"
    assert first + second == again.stdout == (job.folder / "out.jsonl").read_bytes()
    assert job.route("-o", "-", "--state", "S").stdout == b""


def test_a_kill_loses_no_printed_row(job: Job) -> None:
    """Rows may be printed twice, in whole windows; none is left out, and the state has each once."""
    job.write(requests(160))
    printed = b""
    for seconds in (0.3, 0.4, 0.5, 0.6, None):
        args = ["route", "in.jsonl", "-o", "-", "--state", "S", *OPTIONS]
        ended = job.server.run(args, job.folder, kill_after=seconds, environment={"TOY_SECONDS": "0.01"})
        printed += ended.stdout[: ended.stdout.rfind(b"\n") + 1]
    rows = job.server.run(["rows", "S"], job.folder).stdout
    assert [json.loads(line)["id"] for line in rows.splitlines()] == [f"r{n}" for n in range(160)]
    unique = list(dict.fromkeys(printed.splitlines()))
    assert unique == rows.splitlines()


def test_a_reader_that_goes_away(job: Job) -> None:
    job.write(requests(200))
    script = (
        "import sys, fault_server; from messcli.registry import BACKENDS; from messcli.cli import main\n"
        'BACKENDS["toy"] = "fault_server:ToyBackend"\nmain(sys.argv[1:])'
    )
    route = " ".join(["route", "in.jsonl", "-o", "-", "--state", "S", *OPTIONS])
    command = f"{sys.executable} -c '{script}' {route} | head -1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=job.folder,
        env={"PYTHONPATH": f"{HERE.parent}:{HERE}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, code = ended.stdout.splitlines()
    assert json.loads(first)["id"] == "r0"
    assert code == "0"
    assert "Error" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr
    rest = job.route("-o", "-", "--state", "S").stdout
    assert json.loads(rest.splitlines()[-1])["id"] == "r199"
    assert len(job.server.run(["rows", "S"], job.folder).stdout.splitlines()) == 200


# ---- plans and periods ----------------------------------------------------------------------------


def planned(count: int) -> list[dict[str, Any]]:
    """Requests of three plans by turns; the default one has no name."""
    plans = ({}, {"plan": "silver"}, {"plan": "gold"})
    return [{**request, **plans[n % 3]} for n, request in enumerate(requests(count))]


def test_each_plan_has_its_own_alpha_queue_and_ledger(job: Job) -> None:
    job.write(planned(90))
    ended = job.route()
    rows = job.rows()
    for plan, alpha in (("", 0.7), ("silver", 0.6), ("gold", 0.8)):
        queue, observed = 0.0, 0
        for row in (row for row in rows if row.get("plan", "") == plan):
            served = row["estimated_accuracy"] if row["accuracy"] is None else row["accuracy"]
            observed += row["accuracy"] is not None
            queue = queue if served is None else max(0.0, queue + alpha - served)
            assert row["queue"] == pytest.approx(queue)
        assert job.accounts()["", plan][:3] == (alpha, pytest.approx(queue), observed)
        assert f"accuracy {plan}".strip() in ended.stderr
    assert {plan for (plan,) in job.query("SELECT DISTINCT plan FROM requests")} == {None, "silver", "gold"}


def test_a_plan_for_requests_that_name_none(job: Job) -> None:
    job.write(planned(30))
    job.route("--plan", "silver")
    assert {row["plan"] for row in job.rows()} == {"silver", "gold"}
    assert job.accounts()["", "silver"][2] + job.accounts()["", "silver"][3] == 20
    error = error_of(job.route("--plan", "lead", status=2))
    assert 'unknown plan "lead". Plans of the zoo file ([plans]): gold, silver' in error


def test_a_period_opens_the_queue_anew_and_keeps_what_was_learnt(job: Job) -> None:
    job.write(requests(96))
    job.route("--limit", "32", "--alpha", "0.99", "--period", "2026-11", "--horizon", "1000")
    november = job.accounts()["2026-11", ""]
    assert november[1] > 1.0
    job.route("--limit", "64", "--alpha", "0.99", "--period", "2026-12")
    first = job.rows()[32]
    assert first["estimated_accuracy"] is not None  # learnt in November
    assert first["queue"] <= 0.99
    assert job.accounts()["2026-11", ""] == november
    ended = job.route("--alpha", "0.99")  # the period that is open
    assert "2026-12: 64 requests" in ended.stderr
    assert job.query("SELECT name, horizon, requests FROM periods ORDER BY name") == [
        ("2026-11", 1000, 32),
        ("2026-12", None, 64),
    ]
    assert [t for (t,) in job.query("SELECT t FROM requests ORDER BY seq")] == list(range(1, 97))
    # November's last lines came late: its ledger is taken up where it was left
    job.write([*requests(96), {"id": "late", "prompt": "a late one", "reference": "x"}])
    ended = job.route("--alpha", "0.99", "--period", "2026-11")
    assert "2026-11: 33 of 1000 requests" in ended.stderr
    assert job.accounts()["2026-11", ""][2] == november[2] + 1


def test_the_price_of_accuracy_starts_a_period_without_what_was_saved_up(job: Job) -> None:
    def account() -> Account:
        return Account.of(learnt().parts["accounts"].parts[""])

    def learnt() -> Part:
        ((data,),) = job.query("SELECT data FROM snapshot")
        return Part.loads(zlib.decompress(data))

    job.write(requests(120))
    args = ["route", "in.jsonl", "-o", "out.jsonl", "--meter", "replay:joules.jsonl"]
    for more in (["--limit", "60"], ["--limit", "60", "--period", "2026-12", "--horizon", "500"]):
        assert job.server.run([*args, *more], job.folder).status == 0
    assert account() == Account()
    residuals = learnt().parts["policy"].parts[""].parts["residuals"]
    assert residuals.values["variance"] != TUNING.margin.variance  # learnt before
    assert job.server.run(args, job.folder).status == 0
    assert job.server.run([*args, "--limit", "0", "--period", ""], job.folder).status == 0
    (_, queue, observed, estimated), again = job.accounts()["", ""], account()
    rows = job.rows()[:60]
    delivered = sum(
        (row["estimated_accuracy"] or 0.0) if row["accuracy"] is None else row["accuracy"] for row in rows
    )
    assert queue > 0.0 or observed > 0
    assert again.settled == observed + estimated
    assert again.surplus == pytest.approx(delivered - 0.7 * again.settled)


@pytest.mark.parametrize(
    ("changed", "what"), [(False, "what was learnt stays"), (True, "accuracies are learnt anew")]
)
def test_an_upgrade_with_other_tuned_numbers_says_so_once(job: Job, changed: bool, what: str) -> None:
    job.write(requests(60))
    args = ["--policy", "mess+", "--predictor", "linear"]
    job.route(*args, "--limit", "20")
    db = sqlite3.connect(job.folder / "out.jsonl.state")
    ((settings,),) = db.execute("SELECT value FROM settings ORDER BY rowid DESC LIMIT 1")
    now = json.loads(settings)["tuning"]
    db.execute("UPDATE settings SET value = ?", (settings.replace(now, "0123456789ab"),))
    if changed:  # the linear models were learnt under others as well
        ((data,),) = db.execute("SELECT data FROM snapshot")
        kept = Part.loads(zlib.decompress(data))
        predictor = replace(kept.parts["predictor"], tuning="0123456789ab")
        other = replace(kept, parts={**kept.parts, "predictor": predictor})
        db.execute("UPDATE snapshot SET data = ?", (zlib.compress(other.dumps()),))
    db.commit()
    db.close()
    ended = job.route(*args, "--limit", "40")
    assert ended.stderr.count("was made under other tuned numbers of messcli") == 1
    assert what in ended.stderr
    ended = job.route(*args)
    assert "tuned numbers" not in ended.stderr
    assert len(job.rows()) == 60
    kept = [
        json.loads(value)["tuning"] for (value,) in job.query("SELECT value FROM settings ORDER BY rowid")
    ]
    assert kept == ["0123456789ab", now]


def test_what_was_learnt_and_is_not_known_is_refused_in_one_line(job: Job) -> None:
    job.write(requests(30))
    job.route("--limit", "10")
    db = sqlite3.connect(job.folder / "out.jsonl.state")
    ((data,),) = db.execute("SELECT data FROM snapshot")
    newer = replace(Part.loads(zlib.decompress(data)), version=9)
    db.execute("UPDATE snapshot SET data = ?", (zlib.compress(newer.dumps()),))
    db.commit()
    db.close()
    said = error_of(job.route(status=1))
    assert 'out.jsonl.state: what was learnt of "controller" has version 9' in said
    assert "Go on with the messcli that wrote it, or start anew with another --state and output" in said
    assert len(job.rows()) == 10


def test_a_plan_that_is_gone_does_not_break_the_state(job: Job) -> None:
    job.write(planned(60))
    job.route("--limit", "30")
    zoo = (job.folder / "zoo.toml").read_text()
    (job.folder / "zoo.toml").write_text(zoo.replace("gold = 0.8\n", "platinum = 0.9\n"))
    ended = job.route(status=4)
    assert "accuracy gold" not in ended.stderr
    assert 'unknown plan "gold"' in next(row["error"] for row in job.rows() if "error" in row)
    (job.folder / "zoo.toml").write_text(zoo)
    job.write([*planned(60), {"id": "new", "prompt": "a", "reference": "a", "plan": "gold"}])
    before = job.accounts()["", "gold"]
    job.route()
    assert job.accounts()["", "gold"][2] == before[2] + 11  # with the ten that were turned away


# ---- bad places -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "status", "expected"),
    [
        (["-o", "none/out.jsonl"], 1, "existing, writable folder"),
        (["-o", "out.jsonl.zst"], 2, ".zst isn't written"),
        (["none.jsonl"], 1, "none.jsonl: no such file"),
        (["--state", "out.jsonl"], 2, "is the state's own file"),
        (["--state", "zoo.toml"], 1, "is no messcli state"),
    ],
)
def test_places_that_do_not_work(job: Job, args: list[str], status: int, expected: str) -> None:
    job.write(requests(3))
    assert expected in error_of(job.route(*args, status=status))


@pytest.mark.parametrize("args", [["loop"], ["-o", "loop"], ["--state", "loop"], ["--zoo", "loop"]])
def test_a_link_to_itself_is_one_line(job: Job, args: list[str]) -> None:
    job.write(requests(3))
    (job.folder / "loop").symlink_to("loop")
    assert "loop: " in error_of(job.route(*args, status=1))


@pytest.mark.parametrize(
    "args",
    [["none.jsonl"], ["-o", "out.jsonl.zst"], ["-o", ""], ["--zoo", "none.toml"], ["--state", "in.jsonl"]],
)
def test_a_slip_leaves_nothing_behind(job: Job, args: list[str]) -> None:
    job.write(requests(3))
    before = {path.name: path.read_bytes() for path in job.folder.iterdir()}
    ended = job.server.run(["route", "in.jsonl", "-o", "out.jsonl", *OPTIONS, *args], job.folder)
    if args == ["none.jsonl"]:
        ended = job.server.run(["route", "none.jsonl", "-o", "out.jsonl", *OPTIONS], job.folder)
    assert ended.status in (1, 2)
    assert {path.name: path.read_bytes() for path in job.folder.iterdir()} == before


def test_a_run_that_failed_before_any_answer_does_not_bind_the_mended_one(job: Job) -> None:
    job.write(requests(3))
    zoo = (job.folder / "zoo.toml").read_text()
    (job.folder / "zoo.toml").write_text(zoo.replace("toy/small", "toy/smal"))
    args = ["route", "in.jsonl", "-o", "out.jsonl", *OPTIONS]
    crashed = job.server.run(args, job.folder, environment={"TOY_CRASH": "exit:1"})
    assert crashed.status == 9
    assert job.query("SELECT lines, finished FROM window") == [(3, 0)]
    (job.folder / "zoo.toml").write_text(zoo)
    job.route()
    assert len(job.rows()) == 3
    (job.folder / "zoo.toml").write_text(zoo.replace("toy/small", "toy/smal"))
    assert "don't mix" in error_of(job.route(status=1))


@pytest.mark.slow
def test_a_window_is_taken_up_with_what_the_input_still_has(job: Job) -> None:
    lines = requests(70)
    job.write(lines)
    log = {"TOY_LOG": str(job.folder / "asked")}
    job.route("--window", "4096", status=9, environment={"TOY_CRASH": "exit:17", "TOY_SECONDS": "0.1", **log})
    assert job.query("SELECT lines, finished FROM window") == [(70, 0)]
    ((ahead,),) = job.query("SELECT count(*) FROM answers")
    assert (
        ahead >= 40
    )  # by the small model, which has its turn first; those of the last second may be missing
    ended = job.route("--window", "4096", "--limit", "0")
    assert job.query("SELECT lines, finished FROM window") == [(70, 0)]  # it waits
    asked = (job.folder / "asked").read_text().splitlines()
    job.write([{"id": "new", "prompt": "a line that came later", "reference": "x"}, *lines[:5], *lines[6:]])
    ended = job.route("--window", "4096", environment=log)
    assert "going on in a window of which 70 lines aren't finished" in ended.stderr
    assert [row["id"] for row in job.rows()] == [*(f"r{n}" for n in range(70) if n != 5), "new"]
    again = (job.folder / "asked").read_text().splitlines()[len(asked) :]
    small = {line for line in again if line.startswith("small")}
    assert small <= {f"small r{n}" for n in range(40, 70)} | {"small new"}
    assert job.query("SELECT count(*) FROM answers") == [(0,)]
    job.write([*lines, {"id": "new", "prompt": "a line that came later", "reference": "x"}])
    job.route("--window", "4096")
    assert len(job.rows()) == 71


def test_rows_go_behind_a_torn_line_on_a_line_of_their_own(job: Job) -> None:
    job.write(requests(8))
    torn, whole = job.folder / "torn", job.folder / "whole"
    torn.write_text('{"id": "half a r')
    whole.write_text('{"id": "one"}\n')
    for file in (torn, whole):
        command = [sys.executable, "-c", APPEND, file.name]
        subprocess.run(command, cwd=job.folder, check=True, env={**os.environ, "PYTHONPATH": PATHS})
    assert torn.read_text() == '{"id": "half a r\n{"id": 1}\n'
    assert whole.read_text() == '{"id": "one"}\n{"id": 1}\n'


PATHS = f"{HERE.parent}{os.pathsep}{HERE}"
APPEND = """
import os, sys
from messcli.files.sinks import open_sink
from messcli.files.standard import reserved_output
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), 1)
with reserved_output():
    open_sink("-", 0, torn=False).write(['{"id": 1}'])
"""
