"""`report`: verdict, interval, savings, reliability and the page, from a state and from an output file."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from fake_models import SKILLS, requests, write_joules, write_zoo

from messcli.cli import main
from messcli.errors import InputError, MessError
from messcli.files.dialects import load_dialect
from messcli.jobs.record import record
from messcli.jobs.route import RouteConfig, route
from messcli.report import make_report
from messcli.report.numbers import mean_interval
from messcli.report.text import report_lines

COUNT = 240
WITHOUT_REFERENCE = range(5, COUNT, 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder, with out.jsonl and out.jsonl.state."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        zoo = write_zoo(folder, patch, alpha=0.8)
        rows = requests(COUNT, WITHOUT_REFERENCE)
        rows[7] = {"id": "broken"}
        (folder / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        config = RouteConfig.of(
            str(folder / "in.jsonl"),
            str(folder / "out.jsonl"),
            zoo=str(zoo),
            meter=write_joules(folder, rows),
            window=4,
            v=0.1,
            c=1.0,
        )
        route(config)
    return folder


@pytest.fixture(scope="module")
def rows(finished):
    return [json.loads(line) for line in (finished / "out.jsonl").read_text().splitlines()]


def test_the_promise_is_judged_by_what_was_observed(finished, rows):
    report = make_report(str(finished / "out.jsonl.state"))
    observed = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    estimated = [
        row["estimated_accuracy"]
        for row in rows
        if row["accuracy"] is None and row["estimated_accuracy"] is not None
    ]
    (promise,) = report.promises
    assert promise.alpha == 0.8
    assert promise.observed.mean == pytest.approx(np.mean(observed))
    assert promise.observed.low < promise.observed.mean < promise.observed.high
    assert promise.observed.count == len(observed)
    assert promise.estimated == pytest.approx(np.mean(estimated))
    assert promise.estimated_share == pytest.approx(len(estimated) / (len(observed) + len(estimated)))
    assert promise.verdict == ("kept" if np.mean(observed) >= 0.8 else "missed")
    assert report.requests == COUNT - 1
    assert report.failed == 1
    assert list(report.mix) == list(SKILLS)
    assert sum(report.mix.values()) == COUNT - 1
    assert report.explored == sum(bool(row["explored"]) for row in rows)
    assert report.series.requests[-1] == COUNT - 1
    assert report.series.queue[-1] == pytest.approx(rows[-1]["queue"])


def test_energy_adds_up_by_model_and_kind(finished, rows):
    report = make_report(str(finished / "out.jsonl.state"))
    billed = sum(row["billed_joules"] or 0 for row in rows)
    parts = {
        kind: sum(r["joules"] for r in report.energy if r["kind"] == kind)
        for kind in ("served", "exploration")
    }
    assert report.billed_joules == pytest.approx(billed) == pytest.approx(sum(parts.values()))
    assert parts["served"] == pytest.approx(sum(row["joules"] or 0 for row in rows))
    saved = report.savings
    assert saved.largest == "large"
    assert saved.total_joules == saved.billed_joules  # a replay has no overhead
    assert saved.of_largest == pytest.approx(saved.billed_joules / saved.largest_joules)
    assert saved.share == pytest.approx(1 - saved.of_largest)
    assert "answers here" in saved.basis


def test_overhead_is_told_apart(tmp_path, monkeypatch):
    zoo = write_zoo(tmp_path, monkeypatch)
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in requests(9)))
    route(
        RouteConfig.of(str(tmp_path / "in.jsonl"), str(tmp_path / "o.jsonl"), zoo=str(zoo), meter="estimate")
    )
    report = make_report(str(tmp_path / "o.jsonl.state"))
    assert report.energy[-1]["kind"] == "overhead"
    assert report.savings.overhead_joules == pytest.approx(report.energy[-1]["joules"] / 9)
    saved = report.savings
    assert saved.total_joules == pytest.approx(saved.billed_joules + saved.overhead_joules)
    assert saved.of_largest == pytest.approx(saved.total_joules / saved.largest_joules)
    text = "\n".join(report_lines(report))
    assert f"at least {saved.of_largest:.0%} of everything on large" in text
    assert text.count("of everything on large") == 1  # one headline
    assert set(report.overhead_parts) == {"starting", "loading models", "deciding and learning"}
    assert sum(report.overhead_parts.values()) <= report.overhead_joules * (1 + 1e-9)
    assert f"overhead: {report.overhead_joules:.4g} J\n    " in text


def test_beside_a_measured_run_of_the_largest(tmp_path, monkeypatch):
    zoo = write_zoo(tmp_path, monkeypatch)
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in requests(9)))
    for name, policy in (("o", "mess+"), ("l", "largest")):
        out = str(tmp_path / f"{name}.jsonl")
        route(RouteConfig.of(str(tmp_path / "in.jsonl"), out, zoo=str(zoo), meter="estimate", policy=policy))
    ours, largest = str(tmp_path / "o.jsonl.state"), str(tmp_path / "l.jsonl.state")
    saved = make_report(ours, beside=largest).savings
    run = make_report(largest)
    assert saved.largest_joules == pytest.approx(sum(row["joules"] for row in run.energy) / 9)
    assert saved.of_largest == pytest.approx(saved.total_joules / saved.largest_joules)
    assert saved.basis == "measured over 9 requests, overhead included"
    for other, told in ((ours, "its policy is mess+"), (str(tmp_path / "o.jsonl"), "is no state")):
        with pytest.raises(InputError, match=told):
            make_report(ours, beside=other)


def test_an_output_file_tells_what_it_holds_and_what_is_missing(finished):
    state = make_report(str(finished / "out.jsonl.state"))
    output = make_report(str(finished / "out.jsonl"), alpha=0.8)
    assert output.promises[0].observed == state.promises[0].observed
    assert output.mix == state.mix
    assert output.billed_joules == pytest.approx(state.billed_joules)
    assert output.reliability == state.reliability
    assert output.savings.billed_joules == pytest.approx(state.savings.billed_joules)
    assert output.savings.overhead_joules is None
    assert "overhead (loading, learning, idle) isn't known" in "\n".join(report_lines(output))
    text = "\n".join(report_lines(output))
    assert "overhead joules" in text
    assert "out.jsonl.state" in text
    bare = make_report(str(finished / "out.jsonl"))
    assert bare.promises[0].verdict == "unknown"
    assert "alpha: give it with --alpha" in bare.missing


def test_an_output_in_openais_shape_tells_the_same(finished, tmp_path):
    lines = (finished / "out.jsonl").read_text().splitlines()
    batch = load_dialect("openai-batch").write
    (tmp_path / "batch.jsonl").write_text("".join(f"{json.dumps(batch(json.loads(row)))}\n" for row in lines))
    theirs, ours = (
        make_report(str(folder / name), alpha=0.8)
        for folder, name in ((tmp_path, "batch.jsonl"), (finished, "out.jsonl"))
    )
    assert theirs.requests == ours.requests > 0
    assert (theirs.failed, theirs.mix, theirs.promises) == (ours.failed, ours.mix, ours.promises)
    assert theirs.billed_joules == ours.billed_joules
    # of a server, or of `vllm run-batch`
    (tmp_path / "other.jsonl").write_text('{"id": "x", "custom_id": "a", "response": {}, "error": null}\n')
    with pytest.raises(InputError, match=r"other\.jsonl:1: has no \"model\": no row of `messcli route`"):
        make_report(str(tmp_path / "other.jsonl"))


def test_reliability_compares_estimates_with_what_came(finished, rows):
    both = [r for r in rows if r["accuracy"] is not None and r["estimated_accuracy"] is not None]
    found = make_report(str(finished / "out.jsonl.state")).reliability
    assert found.count == len(both) == sum(b.count for b in found.bins)
    assert found.bias == pytest.approx(np.mean([r["accuracy"] - r["estimated_accuracy"] for r in both]))
    means = [b.estimated for b in found.bins]
    assert means == sorted(means)


def test_reading_a_state_leaves_no_trace(finished):
    before = sorted(path.name for path in finished.iterdir())
    data = (finished / "out.jsonl.state").read_bytes()
    make_report(str(finished / "out.jsonl.state"))
    assert sorted(path.name for path in finished.iterdir()) == before
    assert (finished / "out.jsonl.state").read_bytes() == data


# ---- the interval -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "correlation"), [(50, 0.0), (2000, 0.0), (2000, 0.5)])
def test_the_interval_covers_the_mean_as_often_as_it_says(count, correlation):
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        noise = draw.normal(0, 0.1, count)
        for t in range(1, count if correlation else 0):
            noise[t] += correlation * noise[t - 1]
        interval = mean_interval(0.5 + noise)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.91 <= covered / 300 <= 0.985


def test_an_interval_needs_two_values():
    interval = mean_interval(np.array([0.5]))
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.0, 1.0)


# ---- the page and the command -----------------------------------------------------------------------


class _Page(HTMLParser):
    VOID = ("meta", "br", "img", "link", "rect", "line", "circle", "path")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(finished, tmp_path):
    page = tmp_path / "report.html"
    result = CliRunner().invoke(main, ["report", str(finished / "out.jsonl.state"), "--html", str(page)])
    assert result.exit_code == 0
    text = page.read_text()
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.links == []
    assert "script" not in parsed.tags
    assert parsed.tags.count("svg") == 8  # seven charts and the promise's interval
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in text
    assert "nan" not in text.lower().replace("finance", "")
    assert "prefers-color-scheme:dark" in text
    report = make_report(str(finished / "out.jsonl.state"))
    headline = text.index('class="headline"')
    assert (
        f"{report.total_joules / 1000:.4g} kJ in total" in text[headline : headline + 200]
    )  # the total comes first
    seen = report.promises[0].observed
    assert f"mean accuracy {seen.mean:.4f} (95% interval {seen.low:.4f} to {seen.high:.4f})" in text


def test_the_total_is_what_was_billed_and_the_overhead(finished):
    report = make_report(str(finished / "out.jsonl.state"))
    assert report.total_joules == pytest.approx(sum(row["joules"] for row in report.energy))
    assert report.as_json()["total_joules"] == report.total_joules
    assert make_report(str(finished / "out.jsonl")).overhead_joules is None


def test_names_are_text_on_the_page(tmp_path):
    draw = random.Random(0)
    rows = [
        {
            "id": n,
            "model": "<b>&big",
            "accuracy": draw.random(),
            "estimated_accuracy": 0.5,
            "joules": 1.0,
            "billed_joules": 1.0,
            "explored": False,
            "queue": 0.0,
            "meter": "nvml",
        }
        for n in range(40)
    ]
    out = tmp_path / "out.jsonl"
    out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = CliRunner().invoke(main, ["report", str(out), "--html", str(tmp_path / "r.html")])
    assert result.exit_code == 0
    text = (tmp_path / "r.html").read_text()
    assert "<b>&big" not in text
    assert "&lt;b&gt;&amp;big" in text


def test_json_is_the_whole_report(finished):
    result = CliRunner().invoke(main, ["report", str(finished / "out.jsonl.state"), "--json"])
    plain = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert plain["promises"][0]["verdict"] in ("kept", "missed")
    assert plain["savings"]["largest"] == "large"
    assert plain["reliability"]["bins"]
    assert plain["settings"]["policy"] == "mess+"


def test_text_tells_verdict_interval_savings_and_basis(finished):
    text = CliRunner().invoke(main, ["report", str(finished / "out.jsonl.state")]).stdout
    for words in ("SLA", "95% interval", "batch means", "rests on estimates", "basis:", "overhead", "Queue"):
        assert words in text


def test_what_is_no_run_is_told(finished, tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        make_report(str(tmp_path / "none"))
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(InputError, match="neither a state nor JSON lines"):
        make_report(str(tmp_path / "text"))
    (tmp_path / "table").write_text('{"id": 1, "prompt": "p", "models": {}}\n')
    with pytest.raises(InputError, match="is an outcomes table"):
        make_report(str(tmp_path / "table"))
    (tmp_path / "db").write_bytes(b"SQLite format 3\0" + b"x" * 100)
    with pytest.raises(MessError, match="can't be read"):
        make_report(str(tmp_path / "db"))


def test_a_recordings_state_is_no_run(tmp_path, monkeypatch):
    zoo = write_zoo(tmp_path, monkeypatch)
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in requests(3)))
    record(
        RouteConfig.of(str(tmp_path / "in.jsonl"), str(tmp_path / "o.jsonl"), zoo=str(zoo), meter="estimate")
    )
    with pytest.raises(InputError, match="state of a recording"):
        make_report(str(tmp_path / "o.jsonl.state"))


def test_an_empty_state_is_reported(tmp_path, monkeypatch):
    zoo = write_zoo(tmp_path, monkeypatch)
    (tmp_path / "in.jsonl").write_text("")
    route(
        RouteConfig.of(str(tmp_path / "in.jsonl"), str(tmp_path / "o.jsonl"), zoo=str(zoo), meter="estimate")
    )
    report = make_report(str(tmp_path / "o.jsonl.state"))
    assert report.requests == 0
    assert report_lines(report)
    from messcli.report.page import page

    assert "0 requests" in page(report)
