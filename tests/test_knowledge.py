"""`--learn-from`: a job begins with what an earlier one taught."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fault_server import Server
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_predictors import MODELS, samples, taught
from test_route import Job, error_of
from test_simulate import TABLE
from toy_job import requests

from messcli.cli import main
from messcli.predict.answer import SIGNALS, AnswerPredictor
from messcli.predict.base import Fades, create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.routing.controller import Controller
from messcli.routing.knowledge import Knowledge
from messcli.routing.loop import chunks
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.tuning import TUNING
from messcli.simulation.runs import taught as taught_by
from messcli.simulation.table import OutcomeTable
from messcli.snapshots import Part

ANSWERS = int(TUNING.knowledge.answers)
FADING = ("ridge", "mean")


# ---- predictors ----------------------------------------------------------------------------------


@pytest.mark.slow
@given(most=st.floats(1, 400), count=st.integers(1, 300), seed=st.integers(0, 3))
@hypothesis_settings(max_examples=15)
def test_what_is_known_counts_as_so_many_answers_at_the_most(most: float, count: int, seed: int) -> None:
    rows = samples(count, seed)
    for name in FADING:
        predictor = taught(create_predictor(name, MODELS), rows)
        before = predictor.samples.copy()
        assert isinstance(predictor, Fades)
        predictor.discount(most)
        assert np.allclose(predictor.samples, np.minimum(before, most))
        again = create_predictor(name, MODELS)
        again.load(Part.loads(predictor.state().dumps()))  # a snapshot of it continues
        once = predictor.predict_one(predictor.encode(rows[0][0]))
        again.discount(most)
        twice = again.predict_one(again.encode(rows[0][0]))
        assert (once is None and twice is None) or np.allclose(once, twice)


def test_what_is_known_stays_where_it_counts_as_fewer_answers() -> None:
    rows = samples(400)
    predictor = taught(create_predictor("ridge", MODELS), rows)
    texts = [text for text, _ in samples(50, 1)]
    before = predictor.predict_many(predictor.encode_many(texts))
    predictor.discount(100.0)
    after = predictor.predict_many(predictor.encode_many(texts))
    assert np.abs(after.mean(axis=0) - before.mean(axis=0)).max() < 0.03  # levels stay
    for m in range(MODELS):
        assert np.corrcoef(before[:, m], after[:, m])[0, 1] > 0.9  # and so does what prompts tell


@pytest.mark.slow
def test_own_answers_outweigh_what_was_brought_along() -> None:
    """Every answer was right, and none is any more: the estimate is the mean of what counts."""
    rows = [(text, np.ones(MODELS)) for text, _ in samples(2000)]
    wrong = [(text, np.zeros(MODELS)) for text, _ in samples(300, 1)]
    estimates = {}
    for most in (np.inf, 300.0):
        predictor = taught(create_predictor("ridge", MODELS), rows)
        if most < np.inf:
            predictor.discount(most)
        taught(predictor, wrong)
        estimates[most] = float(predictor.predict_one(predictor.encode(rows[5][0])).mean())
    assert estimates[np.inf] > 0.8
    assert estimates[300.0] == pytest.approx(0.5, abs=0.1)


def test_joules_are_brought_along_as_well() -> None:
    rows = [(text, np.array([1.0, 3.0, 9.0]) * len(text)) for text, _ in samples(900)]
    predictor = taught(JoulesPredictor(MODELS), rows)
    text, joules = rows[7]
    predictor.discount(100.0)
    assert predictor.samples.tolist() == [100.0] * MODELS
    assert np.allclose(predictor.predict_one(predictor.encode(text)), joules, rtol=0.1)


@given(count=st.integers(20, 700), most=st.integers(10, 400))
@hypothesis_settings(max_examples=15)
def test_answers_are_brought_along_with_the_latest_ones(count: int, most: int) -> None:
    predictor = AnswerPredictor(2)
    draw = np.random.default_rng(count)
    for n in range(count):
        sure = float(draw.random())
        predictor.learn_one(0, {"mean": sure, "tokens": float(n)}, [0.5, 0.8], [sure, 0.8])
        predictor.take_in()
    predictor.discount(float(most))
    state = predictor.state().arrays
    assert np.all(state["count"] <= most + 1e-9)
    assert state["seen"][0] == min(count, 256)
    kept = min(count, 256)
    tokens = state["latest"][0][:kept, SIGNALS.index("tokens")]
    assert tokens.tolist() == list(range(count - kept, count))  # in order: the oldest makes room first
    told = [predictor.given(0, {"mean": sure, "tokens": float(count)})[0] for sure in (0.1, 0.9)]
    assert told[0] < told[1]


# ---- controllers ---------------------------------------------------------------------------------


def half(first: bool) -> OutcomeTable:
    places = TABLE.requests[:150] if first else TABLE.requests[150:]
    return OutcomeTable(TABLE.names, places, TABLE.outcomes)


def controller_of(setup: Setup, knowledge: Part | None = None) -> Controller:
    controller = create_controller(setup, len(TABLE.names), {DEFAULT_PLAN: 0.7})
    if knowledge is not None:
        controller.learnt.take_over(Knowledge.of("earlier", "", knowledge))
        controller.begin()
    return controller


@pytest.mark.parametrize("predictor", ["ridge", "linear", "fasttext", "mean"])
@pytest.mark.slow
def test_estimates_are_there_before_the_first_answer_and_all_else_begins_anew(predictor: str) -> None:
    setup = Setup(predictor=predictor, horizon=150)
    earlier = controller_of(setup)
    for _ in chunks(half(True).requests, earlier, half(True).source):
        pass
    controller = controller_of(setup, earlier.state())
    assert (controller.t, controller.explored, controller.owed) == (0, 0, False)
    account = controller.accounts[DEFAULT_PLAN]
    assert (account.settled, account.queue.length, account.surplus) == (0, 0.0, 0.0)
    texts = [request.prompt for request in half(False).requests[:20]]
    for mine, theirs in (
        (controller.learnt.predictor, earlier.learnt.predictor),
        (controller.learnt.joules, earlier.learnt.joules),
    ):
        was = theirs.predict_many(theirs.encode_many(texts))
        now = mine.predict_many(mine.encode_many(texts))
        assert np.allclose(now, was, atol=0.02, rtol=0.05)
    (decision,) = controller.decide(half(False).requests[:1], [range(3)])
    assert decision.t == 1
    assert decision.estimates is not None


@pytest.mark.slow
@given(cut=st.integers(1, 149), window=st.sampled_from([1, 16, None]))
@hypothesis_settings(max_examples=8)
def test_a_job_that_began_with_knowledge_goes_on_exactly(cut: int, window: int | None) -> None:
    setup = Setup(window=window, horizon=150)
    known = taught_by(half(True), setup)
    requests_, source = half(False).requests, half(False).source
    straight = controller_of(setup, known)
    for _ in chunks(requests_, straight, source):
        pass
    first = controller_of(setup, known)
    done = 0
    for chunk in chunks(requests_, first, source):
        done += len(chunk.lines)
        if chunk.ends_window and done >= cut:
            break
    second = controller_of(setup)  # without the knowledge: what it taught stands in the snapshot
    second.load(Part.loads(first.state().dumps()))
    for _ in chunks(requests_[done:], second, source):
        pass
    assert dict(straight.state().flat()).keys() == dict(second.state().flat()).keys()
    assert straight.accounts == second.accounts


def test_knowledge_of_a_table_is_that_of_every_model() -> None:
    known = controller_of(Setup(), taught_by(half(True), Setup()))
    assert known.learnt.predictor.samples.tolist() == [150.0] * 3
    assert known.learnt.joules.samples.tolist() == [150.0] * 3


# ---- route ---------------------------------------------------------------------------------------

RIDGE = ("--predictor", "ridge", "--learn-from")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("knowledge") / "work"
    folder.mkdir()
    server = Server(folder, None)
    yield server
    server.close()


@pytest.fixture(scope="module")
def earlier(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the state of an earlier job and a table of the same requests, and a new job's input."""
    job = Job(server, tmp_path_factory.mktemp("earlier"))
    lines = requests(120)
    job.write(lines)
    job.route("-o", "old.jsonl", "--predictor", "ridge", "--limit", "80")
    recorded = ["record", "in.jsonl", "-o", "table.jsonl", "--limit", "40", "--meter", "replay:joules.jsonl"]
    ended = job.server.run(recorded, job.folder)
    assert ended.status == 0, ended.stderr
    (job.folder / "new.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines[80:]))
    return job.folder


@pytest.fixture
def job(server: Server, earlier: Path, tmp_path: Path) -> Job:
    """One in a copy of `earlier`."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    return Job(server, tmp_path)


@pytest.mark.parametrize("source", ["old.jsonl.state", "table.jsonl"])
def test_a_job_begins_with_what_an_earlier_one_taught(job: Job, source: str) -> None:
    job.route("new.jsonl", *RIDGE, source)
    assert all(row["estimated_accuracy"] is not None for row in job.rows())
    assert job.rows()[0]["joules_predicted"] is not None
    assert job.query("SELECT min(t), max(t) FROM requests") == [(1, 40)]
    assert sum(account[2] + account[3] for account in job.accounts().values()) == 40  # its own requests alone
    ((signature,),) = job.query("SELECT value FROM meta WHERE name = 'signature'")
    assert json.loads(signature)["learnt_from"]["name"] == source
    job.route("new.jsonl", "-o", "plain.jsonl", "--predictor", "ridge")
    assert job.rows("plain.jsonl")[0]["joules_predicted"] is None


@pytest.mark.parametrize("source", ["old.jsonl.state", "table.jsonl"])
@pytest.mark.slow
def test_a_run_that_goes_on_needs_the_file_no_more(job: Job, source: str) -> None:
    job.route("new.jsonl", "-o", "straight.jsonl", *RIDGE, source)
    job.route("new.jsonl", *RIDGE, source, "--limit", "16")
    (job.folder / source).rename(job.folder / "moved")
    job.route("new.jsonl", *RIDGE, source, "--limit", "24")
    job.route("new.jsonl", "--predictor", "ridge")
    assert (job.folder / "out.jsonl").read_bytes() == (job.folder / "straight.jsonl").read_bytes()


def test_what_a_run_began_with_is_part_of_what_it_was_made_with(job: Job) -> None:
    job.route("new.jsonl", *RIDGE, "old.jsonl.state", "--limit", "8")
    error = error_of(job.route("new.jsonl", *RIDGE, "table.jsonl", status=1))
    assert (
        "was made with --learn-from old.jsonl.state, and this run has --learn-from table.jsonl: their "
        "decisions don't mix" in error
    )
    shutil.copy(job.folder / "old.jsonl.state", job.folder / "copy.state")
    job.route("new.jsonl", *RIDGE, "copy.state", "--limit", "9")  # the same by its digest
    job.route("new.jsonl", "-o", "plain.jsonl", "--predictor", "ridge", "--limit", "8")
    error = error_of(job.route("new.jsonl", "-o", "plain.jsonl", *RIDGE, "old.jsonl.state", status=1))
    assert "was made with nothing to begin with, and this run has --learn-from old.jsonl.state" in error


def test_a_slip_of_the_name_does_not_bind_the_mended_command(job: Job) -> None:
    job.route("new.jsonl", *RIDGE, "nowhere.state", status=1)
    assert not (job.folder / "out.jsonl.state").exists()
    job.route("new.jsonl", *RIDGE, "old.jsonl.state")


def test_the_earlier_state_is_read_and_left_as_it_is(job: Job) -> None:
    before = (job.folder / "old.jsonl.state").read_bytes()
    (job.folder / "old.jsonl.state").chmod(0o400)
    job.route("new.jsonl", *RIDGE, "old.jsonl.state")
    assert (job.folder / "old.jsonl.state").read_bytes() == before
    assert not (job.folder / "old.jsonl.state-wal").exists()


def edit_zoo(job: Job, before: str, after: str) -> None:
    zoo = (job.folder / "zoo.toml").read_text()
    assert before in zoo
    (job.folder / "zoo.toml").write_text(zoo.replace(before, after))


def write(name: str, content: bytes) -> Callable[[Job], None]:
    def do(job: Job) -> None:
        (job.folder / name).write_bytes(content)

    return do


def cut(name: str, part: float, *, packed: bool = False) -> Callable[[Job], None]:
    def do(job: Job) -> None:
        data = (job.folder / name).read_bytes()
        data = gzip.compress(data) if packed else data
        (job.folder / "cut").write_bytes(data[: int(part * len(data))])

    return do


def foreign(job: Job) -> None:
    with sqlite3.connect(job.folder / "foreign") as db:
        db.execute("CREATE TABLE meta (name, value)")


def scored_otherwise(job: Job) -> None:
    rows = [json.loads(line) for line in (job.folder / "table.jsonl").read_text().splitlines()]
    for row in rows:
        for outcome in row["models"].values():
            if outcome.get("accuracy") is not None:
                outcome["accuracy"] = 1.0 - outcome["accuracy"]
    (job.folder / "other.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def broken_events(job: Job) -> None:
    shutil.copy(job.folder / "old.jsonl.state", job.folder / "broken")
    with sqlite3.connect(job.folder / "broken") as db:
        db.execute("UPDATE events SET data = x'00'")
        db.execute("UPDATE snapshot SET data = x'00'")


@pytest.mark.parametrize(
    ("prepare", "source", "said"),
    [
        (None, "nowhere", "nowhere: can't be read: No such file"),
        (None, ".", ".: can't be read: Is a directory"),
        (None, "-", "standard input can't be read again. Name a file"),
        (None, "in.jsonl", 'in.jsonl:1: no "models"'),
        (None, "old.jsonl", "one model per line; `record` asks them all"),
        (None, "table.jsonl.state", 'table.jsonl.state: is of policy "record". Name the table'),
        (write("empty", b""), "empty", "empty: is empty. Make a table"),
        (write("noise", b"\x00\xff" * 99), "noise", "noise:1: not valid"),
        (write("bad.csv", b"a,b\n1,2\n"), "bad.csv", "bad.csv: expected the columns doc_id"),
        (cut("table.jsonl", 0.5), "cut", "not valid JSON"),
        (cut("table.jsonl", 0.5, packed=True), "cut", "cut: can't be read"),
        (cut("old.jsonl.state", 0.5), "cut", "cut: "),
        (cut("old.jsonl.state", 0.01), "cut", "cut: "),
        (foreign, "foreign", "foreign: is a database of another program"),
        (broken_events, "broken", "broken: is damaged"),
        (scored_otherwise, "other.jsonl", "other.jsonl: its accuracies are of another metric: of model"),
        (
            lambda job: edit_zoo(job, "toy/large", "toy/larger"),
            "old.jsonl.state",
            'was learnt with path of model "large" = "toy/large", and this run has "toy/larger"',
        ),
        (
            lambda job: edit_zoo(job, 'name = "large"', 'name = "huge"'),
            "old.jsonl.state",
            "was learnt with the models small, large, and this run has the models small, huge",
        ),
        (
            lambda job: edit_zoo(job, 'name = "large"', 'name = "huge"'),
            "table.jsonl",
            "table.jsonl: has no outcomes of huge, but of small, large",
        ),
        (
            lambda job: edit_zoo(job, "fault_server:metric", "exact"),
            "old.jsonl.state",
            "was learnt with metric fault_server:metric",
        ),
    ],
)
def test_what_can_not_be_learnt_from_is_refused_in_one_line(
    job: Job, prepare: Callable[[Job], None] | None, source: str, said: str
) -> None:
    if prepare is not None:
        prepare(job)
    ended = job.route("new.jsonl", *RIDGE, source, status=1)
    assert error_of(ended).startswith("Error: --learn-from: ")
    assert said in error_of(ended)
    assert len([line for line in ended.stderr.splitlines() if "Error" in line]) == 1
    assert not (job.folder / "out.jsonl").exists()


def test_another_predictor_is_refused(job: Job) -> None:
    error = error_of(job.route("new.jsonl", "--learn-from", "old.jsonl.state", status=1))
    assert "was learnt with predictor ridge, and this run has predictor mean" in error


# ---- simulate ------------------------------------------------------------------------------------


def write_table(path: Path, table: OutcomeTable) -> str:
    rows: list[dict[str, Any]] = [
        {
            "id": request.id,
            "prompt": request.prompt,
            "models": {
                name: {"accuracy": outcome.accuracy, "joules": outcome.joules}
                for name, outcome in table.outcomes[request.id].items()
            },
        }
        for request in table.requests
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def simulated(*args: str) -> str:
    ended = CliRunner().invoke(main, ["simulate", *args, "--jobs", "1"])
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.slow
def test_simulate_begins_with_a_table_or_the_authors_csv(tmp_path: Path) -> None:
    first, second = (write_table(tmp_path / f"{n}.jsonl", half(n == 1)) for n in (1, 2))
    names = TABLE.names
    head = [
        "doc_id",
        "input_text",
        *(f"{field}_{n}" for n in names for field in ("acc_norm", "energy_consumption")),
    ]
    lines = [",".join(head)]
    for k, request in enumerate(half(True).requests):
        cells = [str(k), request.prompt]
        for name in names:
            outcome = TABLE.outcomes[request.id][name]
            cells += [str(outcome.accuracy), str(outcome.joules)]
        lines.append(",".join(cells))
    (tmp_path / "first.csv").write_text("\n".join(lines) + "\n")
    options = (second, "--alpha", "0.75", "--policy", "mess+", "--policy", "random", "--order-seeds", "2")
    plain, known = simulated(*options), simulated(*options, "--learn-from", first)
    assert plain != known
    assert known == simulated(*options, "--learn-from", str(tmp_path / "first.csv"))
    random = [[line for line in text.splitlines() if line.startswith("  random")] for text in (plain, known)]
    assert random[0] == random[1]


def test_simulate_refuses_other_models(tmp_path: Path) -> None:
    first, second = (write_table(tmp_path / f"{n}.jsonl", half(n == 1)) for n in (1, 2))
    text = Path(first).read_text().replace('"medium"', '"middle"')
    Path(first).write_text(text)
    ended = CliRunner().invoke(main, ["simulate", second, "--alpha", "0.7", "--learn-from", first])
    assert ended.exit_code == 1
    assert "has no outcomes of medium, but of small, middle, large" in ended.output
