"""tools/bench/gpu.py in miniature: without a card, but with NVML's real binding over the stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvml_stub
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "tools" / "bench" / "gpu.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on a machine with a made-up card of 120 W (+- 60 W) reports."""
    stub = nvml_stub.build(tmp_path_factory.mktemp("nvml"))
    (stub / "world").write_text("watts 0 120 60 0.7\nname 0 Made-Up\n")
    out = tmp_path_factory.mktemp("out")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub), "NVML_STUB": str(stub / "world")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    found = json.loads((out / "report.json").read_text())
    failed = [stage for stage in found["stages"] if stage["status"] != "ok"]
    assert not failed, json.dumps(failed, indent=1)
    assert done.returncode == 0, done.stderr
    found["engines"] = json.loads((out / "engines.json").read_text())["engines"]
    return found


def figures(report: dict[str, Any], stage: str) -> dict[str, Any]:
    return next(found["figures"] for found in report["stages"] if found["stage"] == stage)


def test_says_what_it_ran_on(report):
    machine = figures(report, "machine")
    assert machine["card"]["card"] == "Made-Up"
    assert machine["transformers"]
    # the counter's tick and the sampling, over a span that is no whole number of cycles
    assert machine["idle_watts_without_context"] == pytest.approx(120, rel=0.25)


def test_the_counter_agrees_with_integrated_power(report):
    counter = figures(report, "counter")
    assert counter["counter_update_seconds"]["median"] == pytest.approx(0.1, rel=0.15)
    assert counter["steady"]["counter_over_integrated"] == pytest.approx(1, abs=0.1)


def test_rows_and_state_bill_the_same(report):
    for run in (figures(report, "conservation"), *figures(report, "windows").values()):
        if isinstance(run, dict):
            assert run["rows_against_state_relative"] < 1e-9
    served = figures(report, "conservation")["served"]
    assert len(served) > 1, "the made-up metric gives the router nothing to choose"


def test_the_curve_has_the_form_of_engines(report):
    assert [engine["model"] for engine in report["engines"]] == ["tiny-s", "tiny-m", "tiny-l"]
    for engine in report["engines"]:
        assert [point["max_running"] for point in engine["points"]] == [1, 2, 4]
        for point in engine["points"]:
            watts = point["joules_per_output_token"] * point["output_tokens_per_second"]
            assert point["watts"] == pytest.approx(watts)


def test_killed_runs_go_on_with_the_same_decisions(report):
    for run in (figures(report, "resume")["window_64"], figures(report, "resume")["window_large"]):
        assert run["ids_once"]
        assert run["decisions_that_differ"] == 0
    killed = figures(report, "resume")["window_64"]
    assert killed["killed"]
    assert 0 < killed["rows_when_killed"] < killed["rows"]


def test_models_beside_each_other_answer_everything(report):
    for run in figures(report, "beside").values():
        assert run["failed_requests"] == 0
        assert run["rows_against_state_relative"] < 1e-9
        assert not [line for line in run["warnings"] if "beside" in line]


def test_a_stage_that_is_not_known_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--only", "everything"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no stage everything" in done.stderr


def test_a_stage_that_fails_stops_no_other(tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ImportError('no tokenizers today')\n")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--out", str(out), "--only", "calibrate"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    stages = {stage["stage"]: stage for stage in json.loads((out / "report.json").read_text())["stages"]}
    assert done.returncode == 1
    assert stages["models"]["status"] == "failed"
    assert "no tokenizers today" in stages["models"]["stderr"][-1]
    assert stages["calibrate"]["status"] == "skipped"
