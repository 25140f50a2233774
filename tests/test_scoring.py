"""What becomes of answers that a metric fails on, and of what a model wrote while it thought."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_models import FakeBackend, requests, write_zoo

from messcli.cli import main
from messcli.errors import EXIT_ROWS_WITH_ERRORS, MessError
from messcli.jobs.route import RouteConfig, route
from messcli.records import Generation, Request

METRICS = """
def percent(output, references): return 100.0 * (output in references)
def picky(output, references):
    if len(output.split()) > 6: raise KeyError("long")
    return float(output in references)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A job of 30 requests on the fake zoo, and metrics that fail."""
    (tmp_path / "failing_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    zoo = write_zoo(tmp_path, monkeypatch, alpha=0.5)
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in requests(30)))
    yield {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl"), "zoo": str(zoo)}
    sys.modules.pop("failing_metrics", None)


def rows_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(job["output"]).read_text(encoding="utf-8").splitlines()]


def test_a_metric_that_always_fails_throws_no_answer_away(job: dict[str, Any]) -> None:
    command = ["route", job["input"], "-o", job["output"], "--zoo", job["zoo"], "--meter", "estimate"]
    ended = CliRunner().invoke(main, [*command, "--metric", "failing_metrics:percent"])
    assert ended.exit_code == EXIT_ROWS_WITH_ERRORS
    rows = rows_of(job)
    assert all(row["model"] is not None and row["output"] is not None for row in rows)
    failed = [row for row in rows if "error" in row]
    assert failed  # 0 is a score, 100 is none
    for row in failed:
        assert row["accuracy"] is None
        assert 'metric "failing_metrics:percent" returned 100 for' in row["error"]
    said = ended.stderr
    assert f"{len(failed)} not scored" in said
    assert "first error" in said


def test_what_a_metric_fails_on_counts_as_unobserved_and_no_worse_model_serves(job: dict[str, Any]) -> None:
    summary = route(RouteConfig.of(**job, metric="failing_metrics:picky", meter="estimate", c=2.0))
    rows = rows_of(job)
    failed = [row for row in rows if "error" in row]
    assert summary.requests.failed == 0
    assert summary.requests.unscored == len(failed) > 0
    assert summary.promises.accounts[""].observed == sum(row["accuracy"] is not None for row in rows) > 0
    account = summary.promises.accounts[""]
    assert account.estimated + account.unknown == len(failed)
    explored = [row for row in failed if row["explored"]]
    assert explored
    assert {row["model"] for row in explored} == {
        "large"
    }  # it was "small" where the metric failed on the others


def test_on_error_stop_ends_at_the_first_failure_of_the_metric(job: dict[str, Any]) -> None:
    config = RouteConfig.of(**job, metric="failing_metrics:percent", meter="estimate", on_error="stop")
    with pytest.raises(MessError, match='metric "failing_metrics:percent" returned 100 for'):
        route(config)


def test_reasoning_has_a_column_of_its_own(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def think(self: FakeBackend, batch: list[Request]) -> list[Generation]:
        return [Generation(f"<think>hm, {r.prompt}</think>\n{r.prompt}", 3, 3) for r in batch]

    monkeypatch.setattr(FakeBackend, "generate", think)
    lines = [json.loads(line) for line in Path(job["input"]).read_text().splitlines()]
    lines[0]["reasoning"] = "mine"
    Path(job["input"]).write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    route(RouteConfig.of(**job, metric="exact", meter="estimate"))
    rows = rows_of(job)
    for line, row in zip(lines, rows, strict=True):
        assert (row["output"], row["reasoning"]) == (line["prompt"], f"hm, {line['prompt']}")
    assert rows[0]["input_reasoning"] == "mine"
    assert "reasoning" in Path(job["output"]).read_text().splitlines()[1]
