"""`route --against largest`: a promise without references, from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_models import SKILLS, FakeBackend, requests, write_joules, write_zoo

from messcli.cli import main
from messcli.errors import EXIT_ERROR, EXIT_SLA_MISSED, EXIT_USAGE
from messcli.jobs.truth import Agreement
from messcli.metrics import load_metric
from messcli.records import Decision, Generation, Outcome, Request
from messcli.routing.line import Finished

COUNT = 300


class Job:
    """Requests that nobody has references for, of which three models answer the longer the better they are."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, alpha: float = 0.8) -> None:
        self.folder = folder
        self.zoo = write_zoo(folder, monkeypatch, alpha)
        rows = [
            {name: value for name, value in row.items() if name != "reference"} for row in requests(COUNT)
        ]
        self.input = folder / "in.jsonl"
        self.input.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        self.meter = write_joules(folder, rows)

    def route(self, *options: str, output: str = "out.jsonl", status: int = 0) -> Result:
        shown = CliRunner().invoke(
            main,
            [
                "route", str(self.input), "-o", str(self.folder / output),
                "--zoo", str(self.zoo), "--meter", self.meter,
                "--horizon", str(COUNT), "--window", "32", *options,
            ],
        )  # fmt: skip
        assert shown.exit_code == status, shown.output
        return shown

    def rows(self, output: str = "out.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / output).read_text().splitlines()]

    def report(self) -> dict[str, Any]:
        shown = CliRunner().invoke(main, ["report", str(self.folder / "out.jsonl.state"), "--json"])
        assert shown.exit_code == 0, shown.output
        found: dict[str, Any] = json.loads(shown.stdout)
        return found


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def _agreement(row: dict[str, Any]) -> float:
    """What the served answer is worth: the large model answers all of these well."""
    return float(row["output"] != "?")


def test_it_learns_and_saves_without_a_reference(job: Job) -> None:
    job.route("--against", "largest")
    rows = job.rows()
    assert sum(map(_agreement, rows)) / len(rows) >= 0.8
    job.route("--policy", "largest", output="alone.jsonl")
    billed = [sum(row["billed_joules"] for row in job.rows(name)) for name in ("out.jsonl", "alone.jsonl")]
    assert billed[0] < 0.9 * billed[1]


def test_rows_say_what_is_known(job: Job) -> None:
    job.route("--against", "largest")
    rows = job.rows()
    assert {row["audited"] for row in rows} == {True, False}
    for row in rows:
        if row["model"] == "large":
            assert row["accuracy"] == 1.0
        else:
            assert row["accuracy"] is None
            assert not row["audited"]  # an audit serves the large model's answer
    assert "audited" not in _without(job)[0]


def _without(job: Job) -> list[dict[str, Any]]:
    job.route("--policy", "smallest", output="plain.jsonl")
    return job.rows("plain.jsonl")


def test_the_summary_names_estimate_bound_and_audits(job: Job) -> None:
    shown = job.route("--against", "largest").output
    assert "estimated, at least" in shown
    assert "at every moment (95% sure), alpha 0.8: SLA kept by the estimate" in shown
    assert "for answers that were asked for them alone" in shown
    assert "observed over" not in shown


def test_the_report_is_judged_by_the_estimate_and_bills_audits(job: Job) -> None:
    job.route("--against", "largest")
    found = job.report()
    promise = found["promises"][0]
    true = sum(map(_agreement, job.rows())) / COUNT
    audits = promise["audits"]
    assert audits["bound"] <= true
    assert abs(audits["estimate"] - true) < 0.15
    assert audits["known"] + audits["estimated"] == COUNT
    assert {row["kind"] for row in found["energy"]} >= {"served", "audit"}
    billed = sum(row["joules"] for row in found["energy"] if row["kind"] != "overhead")
    assert billed == pytest.approx(sum(row["billed_joules"] for row in job.rows()))


def test_an_output_alone_judges_nothing(job: Job) -> None:
    job.route("--against", "largest")
    output = str(job.folder / "out.jsonl")
    shown = CliRunner().invoke(main, ["report", output, "--alpha", "0.99"])
    assert "what audits tell of the mean accuracy: only the state has it" in shown.output
    assert "SLA" not in shown.output


def test_check_sla_judges_the_estimate_and_with_sure_the_bound(job: Job) -> None:
    options = ("--against", "largest", "--policy", "smallest", "--check-sla")
    shown = job.route(*options, "--alpha", "0.9", output="low.jsonl", status=EXIT_SLA_MISSED)
    assert "SLA MISSED by the estimate" in shown.output
    estimate = job.route("--against", "largest", "--check-sla", "--alpha", "0.6", output="e.jsonl").output
    assert "SLA kept by the estimate" in estimate
    bound = job.route(
        "--against", "largest", "--sure", "--check-sla", "--policy", "smallest", "--alpha", "0.52", output="b.jsonl",
        status=EXIT_SLA_MISSED,
    )  # fmt: skip
    assert "SLA MISSED by the bound" in bound.output


def test_the_zoo_file_can_say_it(job: Job) -> None:
    job.zoo.write_text(job.zoo.read_text().replace("[sla]", '[sla]\nagainst = "largest"'))
    job.route()
    assert "audited" in job.rows()[0]
    job.route("--against", "references", output="plain.jsonl")
    assert "audited" not in job.rows("plain.jsonl")[0]
    job.zoo.write_text(job.zoo.read_text().replace('"largest"', '"judge"', 1))
    assert 'must be "references" or "largest"' in job.route(output="other.jsonl", status=1).output


def test_what_was_thought_is_not_compared() -> None:
    agreement = Agreement(load_metric("exact"), 2)
    answers = {0: Outcome("<think>x</think>B", None, 1.0), 1: Outcome("<think>y</think>\n\nB", None, 2.0)}
    decision = Decision(1, 1, (0, 1), explored=True, estimates=None, joules_predicted=None, owed=False)
    (scored,) = agreement([Finished(Request(1, "a prompt"), decision, answers)])
    assert [outcome.accuracy for outcome in scored.values()] == [1.0, 1.0]


def test_references_are_not_looked_at(job: Job) -> None:
    rows = [{**json.loads(line), "reference": "nonsense"} for line in job.input.read_text().splitlines()]
    job.input.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    job.route("--against", "largest")
    assert all(row["accuracy"] in (1.0, None) for row in job.rows())


def test_stopping_and_going_on_changes_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.route("--against", "largest", output="whole.jsonl")
    monkeypatch.setattr(FakeBackend, "calls", 0)
    monkeypatch.setattr(FakeBackend, "fail_after", 40)
    for _ in range(30):  # each run breaks after 40 calls
        monkeypatch.setattr(FakeBackend, "calls", 0)
        shown = CliRunner().invoke(
            main,
            [
                "route", str(job.input), "-o", str(job.folder / "out.jsonl"),
                "--zoo", str(job.zoo), "--meter", job.meter,
                "--horizon", str(COUNT), "--window", "32", "--against", "largest",
            ],
        )  # fmt: skip
        if shown.exit_code == 0:
            break
        assert "broke" in shown.output
    assert (job.folder / "out.jsonl").read_bytes() == (job.folder / "whole.jsonl").read_bytes()
    whole = CliRunner().invoke(main, ["report", str(job.folder / "whole.jsonl.state"), "--json"])
    assert job.report()["promises"] == json.loads(whole.stdout)["promises"]


def _telling(self: FakeBackend, request: Request) -> Generation:
    """What the models answer, with likely tokens where they are right."""
    words = request.prompt.split()
    right = len(words) <= SKILLS[self.spec.name]
    likely = {"mean": -0.1 if right else -2.0, "tokens": float(len(words))}
    return Generation(request.prompt if right else "?", len(words), len(words), confidence=likely)


def test_answers_are_looked_at_beside_audits_and_a_stopped_run_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeBackend, "_generation", _telling)
    job.route("--against", "largest", "--predictor", "mean", output="whole.jsonl")
    rows = job.rows("whole.jsonl")
    looked = [row for row in rows if "asked" in row]
    assert any(row["audited"] for row in looked)
    assert any(len(row["asked"]) == 2 and not row["audited"] for row in looked)
    for broken in (40, 75, 110):
        name = f"cut{broken}.jsonl"
        monkeypatch.setattr(FakeBackend, "calls", 0)
        monkeypatch.setattr(FakeBackend, "fail_after", broken)
        assert (
            "broke"
            in job.route("--against", "largest", "--predictor", "mean", output=name, status=EXIT_ERROR).output
        )
        monkeypatch.setattr(FakeBackend, "fail_after", None)
        job.route("--against", "largest", "--predictor", "mean", output=name)
        assert job.rows(name) == rows
    report = CliRunner().invoke(main, ["report", str(job.folder / "whole.jsonl.state"), "--json"])
    energy = json.loads(report.stdout)["energy"]
    assert {"served", "audit", "look"} <= {row["kind"] for row in energy}
    assert sum(row["joules"] for row in energy) == pytest.approx(sum(row["billed_joules"] for row in rows))


def test_each_period_has_its_own_estimate_and_is_taken_up_again(job: Job) -> None:
    job.route("--against", "largest", "--limit", "150", "--period", "may")
    may = job.report()["promises"][0]["audits"]
    job.route("--against", "largest", "--limit", "200", "--period", "june")
    june = job.report()["promises"][0]["audits"]
    assert june["known"] + june["estimated"] == 50
    job.route("--against", "largest", "--limit", "200", "--period", "may")
    assert job.report()["promises"][0]["audits"] == may
    job.route("--against", "largest", "--period", "may")
    both = job.report()["promises"][0]["audits"]
    assert both["known"] + both["estimated"] == 250


def test_a_state_is_not_continued_with_another_truth(job: Job) -> None:
    job.route("--against", "largest", "--limit", "50")
    shown = job.route("--limit", "100", status=1)
    assert "against:largest" in shown.output


def test_what_can_not_be_meant_is_said(job: Job) -> None:
    shown = job.route("--sure", status=EXIT_USAGE)
    assert "Give --against largest too" in shown.output
