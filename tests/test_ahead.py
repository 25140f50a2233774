"""A file is read ahead: a sample of its prompts, and what becomes of it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_server import Server
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_policy import table
from test_route import Job
from toy_job import requests

from messcli.files.ahead import prompts_ahead, reservoir
from messcli.files.requests import InputFields
from messcli.predict.text import SHAPE
from messcli.routing.controller import Controller
from messcli.routing.loop import chunks
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.tuning import TUNING
from messcli.snapshots import Part

# ---- the sample ----------------------------------------------------------------------------------


@given(count=st.integers(0, 60), size=st.integers(0, 20), seed=st.integers(0, 5))
def test_a_reservoir_is_a_function_of_what_is_seen(count: int, size: int, seed: int) -> None:
    items = [f"item {n}" for n in range(count)]
    found = reservoir(iter(items), size, seed)
    assert found == reservoir(items, size, seed)
    places = [place for place, _ in found]
    assert places == sorted(set(places))
    assert all(items[place] == item for place, item in found)
    assert len(found) == min(size, count)


def test_every_item_is_as_likely() -> None:
    counts = Counter(place for seed in range(2000) for place, _ in reservoir(range(40), 10, seed))
    expected, deviation = 2000 * 10 / 40, (2000 * 0.25 * 0.75) ** 0.5
    assert len(counts) == 40
    assert all(abs(count - expected) < 4.5 * deviation for count in counts.values())


def ahead(path: Path, size: int = 5, dialect: str | None = None) -> list[tuple[int, str]]:
    return prompts_ahead(str(path), InputFields(), dialect, size=size, seed=1)


def test_a_sample_of_a_file_has_the_prompts_of_its_places(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"r{n}", "prompt": f"prompt {n}"}) for n in range(50)]
    lines[3:3] = ["", "{bad", "   "]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    kept = [line for line in lines if line.strip()]
    found = ahead(tmp_path / "in.jsonl", size=20)
    assert 18 < len(found) <= 20
    assert all(json.loads(kept[place])["prompt"] == prompt for place, prompt in found)
    assert max(place for place, _ in found) > 40
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    assert ahead(tmp_path / "in.jsonl.gz", size=20) == found
    assert len(ahead(tmp_path / "in.jsonl", size=1000)) == 50  # all of it, without the bad line


def test_a_sample_of_a_dialect_is_told_by_the_first_line(tmp_path: Path) -> None:
    lines = [{"instruction": f"do {n}", "input": "", "output": "x"} for n in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = ahead(tmp_path / "in.jsonl")
    assert len(found) == 5
    assert all(prompt == f"do {place}" for place, prompt in found)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[\n{}\n]", b"\xff\xfe\x00", b"\x1f\x8b\x08broken", None])
def test_what_can_not_be_read_has_no_sample(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    assert ahead(tmp_path / "in.jsonl") == []


# ---- controllers ---------------------------------------------------------------------------------


def controller_of(sample: list[tuple[int, str]], rows: int = 200) -> Controller:
    controller = create_controller(Setup(window=16, horizon=rows), 3, {DEFAULT_PLAN: 0.7})
    controller.read_ahead(sample)
    return controller


def test_directions_are_there_before_the_first_answer_and_stay() -> None:
    lines, source = table(200)
    controller = controller_of(reservoir([line.prompt for line in lines], 100, 0))
    assert controller.learnt.space.settled
    before = controller.learnt.space.encode(lines[0].prompt).at
    assert before[SHAPE:].any()
    for _ in chunks(lines, controller, source):
        pass
    assert np.array_equal(controller.learnt.space.encode(lines[0].prompt).at, before)


def test_what_is_learnt_is_as_if_the_directions_had_always_been_known() -> None:
    """Read ahead in the middle of a job: what was learnt is learnt anew."""
    lines, source = table(120)
    sample = reservoir([line.prompt for line in lines], 100, 0)
    late, early = controller_of([]), controller_of(sample)
    for one in (late, early):
        for _ in chunks(lines[:24], one, source):
            pass
    late.read_ahead(sample)
    assert late.learnt.space.settled
    texts = [line.prompt for line in lines[24:40]]
    for mine, theirs in (
        (late.learnt.joules, early.learnt.joules),
        (late.learnt.predictor, early.learnt.predictor),
    ):
        assert mine.samples.sum() > 0
        mine.solve()
        one = mine.predict_many(mine.encode_many(texts))
        assert np.isfinite(one).all()
        assert one.shape == theirs.predict_many(theirs.encode_many(texts)).shape


@pytest.mark.slow
@given(cut=st.integers(1, 11), size=st.sampled_from([0, 3, 50, 1000]))
@hypothesis_settings(max_examples=8)
def test_a_job_that_was_read_ahead_goes_on_exactly(cut: int, size: int) -> None:
    lines, source = table(180)
    sample = reservoir([line.prompt for line in lines], size, 0)
    straight = controller_of(sample)
    for _ in chunks(lines, straight, source):
        pass
    first = controller_of(sample)
    windows = done = 0
    for chunk in chunks(lines, first, source):
        done += len(chunk.lines)
        windows += chunk.ends_window
        if windows == cut:
            break
    second = controller_of([])
    second.load(Part.loads(first.state().dumps()))
    for _ in chunks(lines[done:], second, source):
        pass
    for (path, value), (same, other) in zip(straight.state().flat(), second.state().flat(), strict=True):
        assert path == same
        assert (
            np.array_equal(value, other, equal_nan=True) if isinstance(value, np.ndarray) else value == other
        )


def test_prices_know_what_is_to_come_once_enough_is_settled() -> None:
    lines, source = table(900)
    lines[600:] = [replace(line, prompt="unlike " * 20 + line.prompt) for line in lines[600:]]
    sample = reservoir([line.prompt for line in lines], 300, 0)
    with_prices, without = controller_of(sample, 900), controller_of(sample, 900)
    without.read_ahead(())  # the directions stay
    served = [
        [line.decision.model for chunk in chunks(lines, one, source) for line in chunk.lines]
        for one in (with_prices, without)
    ]
    after = TUNING.ahead.after
    assert served[0][:after] == served[1][:after]
    assert served[0][after:] != served[1][after:]


# ---- route ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ahead") / "work"
    folder.mkdir()
    server = Server(folder, None)
    yield server
    server.close()


class Found(Job):
    """A job whose price is found by the program."""

    def go(self, *args: str, **how: object) -> None:
        command = ["route", *(args or ("in.jsonl", "-o", "out.jsonl"))]
        ended = self.server.run(
            [*command, "--meter", "replay:joules.jsonl", "--alpha", "0.5"], self.folder, **how
        )
        assert ended.status in (0, -9), ended.stderr

    def ahead(self, state: str = "out.jsonl.state") -> object:
        ((value,),) = self.query("SELECT value FROM meta WHERE name = 'ahead'", state) or [("null",)]
        return json.loads(value)


@pytest.fixture
def job(server: Server, tmp_path: Path) -> Found:
    job = Found(server, tmp_path)
    job.write([line for line in requests(160) if "plan" not in line])
    (tmp_path / "zoo.toml").write_text((tmp_path / "zoo.toml").read_text().split("[plans]")[0] + "\n" + "[[models]]" +
                                       (tmp_path / "zoo.toml").read_text().split("[[models]]", 1)[1])  # fmt: skip
    return job


def test_a_file_is_read_ahead_once_and_a_pipe_is_not(job: Found) -> None:
    job.go("in.jsonl", "-o", "out.jsonl", "--limit", "40")
    kept = job.ahead()
    assert isinstance(kept, str)
    job.go()  # the file is the same one, however long it is by now
    assert job.ahead() == kept
    job.go("-", "-o", "-", "--state", "pipe.state", stdin=str(job.folder / "in.jsonl"))
    assert job.ahead("pipe.state") is None
    assert len(job.rows()) == 160


@pytest.mark.parametrize("seconds", [0.6, 0.9, 1.3])
@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_that_was_not(job: Found, seconds: float) -> None:
    job.go("in.jsonl", "-o", "straight.jsonl")
    job.go(kill_after=seconds)
    job.go()
    assert (job.folder / "out.jsonl").read_bytes() == (job.folder / "straight.jsonl").read_bytes()


def test_a_file_that_grew_keeps_the_sample_it_had(job: Found) -> None:
    lines = (job.folder / "in.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "in.jsonl").write_text("".join(lines[:80]))
    job.go()
    kept = job.ahead()
    (job.folder / "in.jsonl").write_text("".join(lines))
    job.go()
    assert job.ahead() == kept
    assert len(job.rows()) == 160


def test_the_next_input_of_a_shared_state_is_read_ahead_anew(job: Found) -> None:
    heads = []
    lines = (job.folder / "in.jsonl").read_text().splitlines(keepends=True)
    for n, part in enumerate((lines[:80], lines[80:])):
        (job.folder / f"in{n}.jsonl").write_text("".join(part))
        job.go(f"in{n}.jsonl", "-o", f"out{n}.jsonl", "--state", "year.state")
        heads.append(job.ahead("year.state"))
    assert None not in heads
    assert len(set(heads)) == 2
