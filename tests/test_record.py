"""`record`: every model answers everything, exactly once, through route's own loop."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from fake_models import SKILLS, FakeBackend, requests, write_zoo

from messcli.cli import main
from messcli.errors import ModelError, StateError
from messcli.jobs.record import record
from messcli.jobs.route import RouteConfig, route
from messcli.simulation.table import read_table

METERED = ("joules", "seconds")  # differ from run to run


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Records `rows` (default: 20 requests) to a file of the given name."""
    zoo = write_zoo(tmp_path, monkeypatch)

    def run(name="out.jsonl", rows=None, **options):
        source = tmp_path / "in.jsonl"
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows or requests(20)))
        config = RouteConfig.of(str(source), str(tmp_path / name), zoo=str(zoo), meter="estimate", **options)
        return record(config), [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    return run


def unmetered(rows):
    for row in rows:
        for outcome in row.get("models", {}).values():
            for name in METERED:
                outcome.pop(name, None)
    return rows


def test_every_model_answers_every_request_in_input_order(job, tmp_path):
    summary, rows = job()
    assert [row["id"] for row in rows] == [f"r{n}" for n in range(20)]
    for row in rows:
        assert list(row) == ["id", "prompt", "reference", "models"]
        assert list(row["models"]) == list(SKILLS)
        for name, outcome in row["models"].items():
            right = len(row["prompt"].split()) <= SKILLS[name]
            assert outcome["accuracy"] == float(right)
            assert outcome["joules"] >= 0
            assert outcome["meter"] == "estimate"
    assert summary.incomplete == 0
    assert summary.accuracies["large"] == 1.0 > summary.accuracies["small"]
    table = read_table(str(tmp_path / "out.jsonl"))
    assert table.names == tuple(SKILLS)
    assert table.seconds is not None


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 7, "batch_size": 3}, {"window": 100}])
def test_the_table_depends_on_no_window_or_batch(job, options):
    _, expected = job("a.jsonl")
    _, rows = job("b.jsonl", **options)
    assert unmetered(rows) == unmetered(expected)


def test_what_is_recorded_is_never_asked_again(job):
    _, expected = job("a.jsonl", window=4)
    FakeBackend.calls, FakeBackend.fail_after = 0, 7
    with pytest.raises(ModelError, match="broke"):
        job("b.jsonl", window=4)
    FakeBackend.fail_after = None
    summary, rows = job("b.jsonl", window=4)
    assert summary.run.requests.already_done == 8  # two windows of three calls each were committed
    assert unmetered(rows) == unmetered(expected)
    FakeBackend.calls = 0
    summary, again = job("b.jsonl", window=4)
    assert (FakeBackend.calls, summary.run.requests.routed) == (0, 0)
    assert unmetered(again) == unmetered(expected)


def test_failures_stand_in_the_table_and_simulate_names_them(job, tmp_path):
    rows = requests(6)
    rows[1]["prompt"] = "poison apple"
    rows[2] = {"id": "chat", "messages": [{"role": "user", "content": "apple bird"}], "reference": ["x", "y"]}
    rows[3]["prompt"] = " ".join(["word"] * 30)  # too long for the small model
    rows[4] = {"id": "none"}
    rows[5]["topic"] = "passes through"
    summary, table = job(rows=rows)
    assert table[1]["models"]["medium"]["error"] == "the model choked"
    assert table[2]["messages"] == rows[2]["messages"]
    assert (table[2]["prompt"], table[2]["reference"]) == ("apple bird", ["x", "y"])
    assert "longer than the model's context" in table[3]["models"]["small"]["error"]
    assert set(table[4]) == {"id", "error"}
    assert table[5]["topic"] == "passes through"
    assert summary.incomplete == 2
    assert summary.run.requests.failed == 1
    assert read_table(str(tmp_path / "out.jsonl"), complete_only=True).left_out == 3


def test_a_recording_and_a_routing_keep_separate_states(job, tmp_path):
    job()
    with pytest.raises(StateError, match="policy record"):
        route(
            RouteConfig.of(
                str(tmp_path / "in.jsonl"),
                str(tmp_path / "out.jsonl"),
                zoo=str(tmp_path / "zoo.toml"),
                meter="estimate",
            )
        )


def test_the_command_tells_what_it_recorded(job, tmp_path):
    job(rows=[*requests(3), {"id": "bad"}], limit=3)
    command = ["record", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--meter", "estimate"]
    result = CliRunner().invoke(main, [*command, "--zoo", str(tmp_path / "zoo.toml")])
    assert result.exit_code == 4
    assert "recorded 0 requests (3 were done before), 1 with error" in result.stderr
    assert result.stdout == ""
