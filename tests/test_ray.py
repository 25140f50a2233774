"""Models as actors of a real Ray cluster: two nodes on this machine, one of which is killed while it works."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from messcli.zoo import BUNDLED_ZOO

ray = pytest.importorskip("ray", reason="Ray isn't installed: pip install 'messcli[ray]'")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SAMPLES = Path(__file__).parent.parent / "samples" / "requests.jsonl"
MODELS = BUNDLED_ZOO.parent


def write_zoo(folder: Path, *, small: str = "", large: str = "") -> Path:
    tables = []
    for name, more in (("small", small), ("large", large)):
        tables.append(
            f'[[models]]\nname = "{name}"\npath = "{MODELS / name}"\ndevice = "cpu"\ndtype = "float32"\n'
            f'max_new_tokens = 24\nprompt_template = "{{prompt}} =>"\n{more}\n'
        )
    file = folder / "zoo.toml"
    file.write_text('[sla]\nalpha = 0.9\nmetric = "bleu1"\n' + "\n".join(tables))
    return file


@pytest.fixture
def cluster():
    """Two nodes, the one that the driver joins and `other`. An actor that asks for `one` is alone on its node."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"here": 9, "one": 1}})
    made.other = made.add_node(num_cpus=2, resources={"there": 9, "one": 1})
    made.wait_for_nodes()
    yield made
    made.shutdown()


def command(*arguments: Any) -> list[str]:
    code = "from messcli.cli import main; main(prog_name='messcli')"
    return [sys.executable, "-c", code, *map(str, arguments)]


def route(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("route", *arguments), capture_output=True, text=True, timeout=300, **options
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_answers_are_those_of_the_local_engine(cluster, tmp_path):
    zoo = write_zoo(tmp_path, small="resources = { there = 1 }", large="replicas = 2")
    table, local, remote = tmp_path / "table.jsonl", tmp_path / "local.jsonl", tmp_path / "remote.jsonl"
    recorded = subprocess.run(
        command("record", SAMPLES, "-o", table, "--zoo", zoo, "--limit", 64),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert recorded.returncode == 0, recorded.stderr
    # the same joules for both, so that the same is decided
    options = (SAMPLES, "--zoo", zoo, "--limit", 64, "--meter", f"replay:{table}", "--window", 16)
    here = route(*options, "-o", local)
    assert here.returncode == 0, here.stderr
    there = route(*options, "-o", remote, "--engine", "ray", "--address", cluster.address)
    assert there.returncode == 0, there.stderr
    assert local.read_bytes() == remote.read_bytes()
    assert len({row["model"] for row in rows(remote)}) == 2
    # audits are the controller's, who asks through the same actors
    audited = [tmp_path / f"audited-{where}.jsonl" for where in ("here", "there")]
    for output, more in zip(audited, ((), ("--engine", "ray", "--address", cluster.address)), strict=True):
        done = route(*options, "--against", "largest", "-o", output, *more)
        assert done.returncode == 0, done.stderr
    assert audited[0].read_bytes() == audited[1].read_bytes()
    assert {row["audited"] for row in rows(audited[1])} == {True, False}


def test_an_actor_weighs_the_words_of_a_check(cluster, tmp_path):
    """What `route` asks of a larger model: one token, and how likely each of two words is."""
    from messcli.models.ray import connect
    from messcli.models.transformers import TransformersBackend
    from messcli.records import Request
    from messcli.zoo import load_zoo

    zoo = load_zoo(str(write_zoo(tmp_path, large="replicas = 2")))
    options = ("der", "die")
    asked = [Request(n, "the dog", key=b"%d" % n, options=options if n % 2 else ()) for n in range(6)]
    alone = TransformersBackend(zoo.models[1], batch_size=None).generate(asked)
    try:
        small, large = connect(cluster.address, lambda line: None).backends(zoo, "estimate", None)
        there = large.generate(asked)
        small.unload()
        large.unload()
    finally:
        ray.shutdown()
    assert [one.output for one in there] == [one.output for one in alone]
    for ours, theirs in zip(there, alone, strict=True):
        assert (ours.weights is None) == (theirs.weights is None)
        assert theirs.weights is None or ours.weights == pytest.approx(theirs.weights, abs=1e-5)


def test_an_adapter_runs_in_its_models_actor(cluster):
    from messcli.models.ray import connect
    from messcli.models.transformers import TransformersBackend
    from messcli.records import Request
    from messcli.zoo import load_zoo

    zoo = load_zoo(str(SAMPLES.parent / "zoos" / "one-checkpoint.toml"))
    zoo = replace(zoo, models=zoo.models[:2])
    asked = [Request(str(row["id"]), row["prompt"]) for row in rows(SAMPLES)[:24]]
    alone = [TransformersBackend(spec, batch_size=None).generate(asked) for spec in zoo.models]
    try:
        made = connect(cluster.address, lambda line: None).backends(zoo, "estimate", None)
        there = [backend.generate(asked) for backend in made]
        for backend in made:
            backend.unload()
    finally:
        ray.shutdown()
    plain, tuned = ([one.output for one in answers] for answers in there)
    assert [plain, tuned] == [[one.output for one in answers] for answers in alone]
    assert plain != tuned


def test_each_node_meters_its_own_work(cluster, tmp_path):
    zoo = write_zoo(tmp_path, small="resources = { here = 1 }", large="resources = { there = 1 }")
    output = tmp_path / "out.jsonl"
    done = route(
        SAMPLES, "-o", output, "--zoo", zoo, "--limit", 40, "--engine", "ray", "--address", cluster.address
    )
    assert done.returncode == 0, done.stderr
    made = rows(output)
    assert len(made) == 40
    assert {row["meter"] for row in made} == {"estimate"}
    assert all(row["joules"] > 0 and row["billed_joules"] >= row["joules"] for row in made)
    assert "energy: cpu: estimate" in done.stderr


def workers(node: Any) -> dict[int, str]:
    """The actors' processes on `node`, by pid, with the name that Ray gives a process: Class, or Class.method."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes().decode(errors="replace").strip("\0 ")
        except OSError:
            continue  # it has just ended
        if parent == raylet and title.startswith("ray::Worker"):
            found[int(folder.name)] = title.removeprefix("ray::")
    return found


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300  # seconds; actors are slow to start on a busy machine
    while not true():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def committed(state: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{state}?mode=ro", uri=True)) as database:
            return database.execute("select count(*) from requests").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


def kill(cluster) -> None:
    """Take the other node away as a power cut does: its raylet and its actors at once."""
    actors = workers(cluster.other)
    assert actors
    cluster.remove_node(cluster.other, allow_graceful=False)
    for pid in actors:
        with suppress(ProcessLookupError):  # gone with its raylet
            os.kill(pid, signal.SIGKILL)


def routed_over_a_lost_node(cluster, zoo: Path, output: Path) -> tuple[int, str]:
    """Route the samples through a pipe; the other node is lost while windows are still to come.

    Returns the exit status and stderr.
    """
    lines = SAMPLES.read_text().splitlines(keepends=True)
    state = output.with_name(output.name + ".state")
    options = ("--zoo", zoo, "--policy", "largest", "--window", 16, "-o", output)
    with subprocess.Popen(
        command("route", "-", *options, "--engine", "ray", "--address", cluster.address),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        fed, answers = 0, False

        def feed(count: int) -> None:
            nonlocal fed
            process.stdin.writelines(lines[fed : fed + count])
            process.stdin.flush()
            fed += count

        def is_committed() -> bool:
            nonlocal answers
            answers |= "Worker.answer" in workers(cluster.other).values()
            return committed(state) >= fed

        feed(16)
        until(is_committed, process)
        until(lambda: set(workers(cluster.other).values()) == {"Worker"}, process)  # not starting any more
        while not answers:  # only an actor that has answered is one to be lost
            assert fed < len(lines) // 2
            feed(16)
            until(is_committed, process)
        feed(len(lines) - fed)
        kill(cluster)
        _, told = process.communicate(timeout=400)
    return process.returncode, told


def test_a_lost_node_costs_no_request_while_a_replica_is_left(cluster, tmp_path):
    zoo = write_zoo(tmp_path, small="resources = { here = 1 }", large="replicas = 2\nresources = { one = 1 }")
    output, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    status, told = routed_over_a_lost_node(cluster, zoo, output)
    assert status == 0, told
    assert 'warning: model "large": lost an actor' in told
    done = route(SAMPLES, "--zoo", zoo, "--policy", "largest", "--window", 16, "-o", alone)
    assert done.returncode == 0, done.stderr
    for ours, reference in zip(rows(output), rows(alone), strict=True):
        for field in ("id", "model", "output", "accuracy", "queue", "prompt_tokens", "output_tokens"):
            assert ours[field] == reference[field]
        assert ours["joules"] > 0


def test_a_replica_that_is_still_starting_takes_over_when_the_only_one_that_answers_is_lost(
    tmp_path, monkeypatch
):
    from ray.cluster_utils import Cluster

    from messcli.models.ray import connect
    from messcli.records import Request
    from messcli.zoo import load_zoo

    monkeypatch.setattr("messcli.models.ray.RESTART_SECONDS", 300.0)  # a busy machine starts actors slowly
    zoo = load_zoo(str(write_zoo(tmp_path, large="replicas = 2\nresources = { one = 1 }")))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "resources": {"one": 1}})
    try:
        small, large = connect(cluster.address, lambda line: None).backends(zoo, "estimate", None)
        large.load()  # one replica answers, for the other there is no room yet
        request = Request("x", "Translate: the dog", None, (), {}, {})
        assert large.fitting([request]) == [True]
        cluster.add_node(num_cpus=1, resources={"one": 1})
        for actor in large.actors():
            ray.kill(actor)
        assert large.fitting([request]) == [True]
        assert any("lost an actor" in warning for warning in large.take_warnings())
        small.unload()
        large.unload()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_where_no_replica_is_left_there_are_error_rows_and_nothing_is_lost(cluster, tmp_path):
    zoo = write_zoo(tmp_path, small="resources = { here = 1 }", large="resources = { there = 1 }")
    output = tmp_path / "out.jsonl"
    status, told = routed_over_a_lost_node(cluster, zoo, output)
    made = rows(output)
    ids = [json.loads(line)["id"] for line in SAMPLES.read_text().splitlines()]
    assert [row["id"] for row in made] == ids, told
    failed = [row for row in made if "error" in row]
    assert status == (4 if failed else 0), told
    assert all("the last actor that ran it was lost" in row["error"] for row in failed)
    assert len(failed) <= 16  # the window in hand; later ones go to the model that is left
    assert "no replica is left" in told
    assert {row["model"] for row in made if "error" not in row} == {"small", "large"}
    assert made[-1]["model"] == "small"


def test_what_keeps_it_from_starting_is_told_in_a_line(cluster, tmp_path):
    outputs = (tmp_path / f"{number}.jsonl" for number in range(9))

    def told(*arguments: Any, **options: Any) -> str:
        done = route(SAMPLES, "-o", next(outputs), "--limit", 2, *arguments, **options)
        assert done.returncode in (1, 2), done.stderr
        error = done.stderr.splitlines()[-1]  # before it, what meters the nodes
        assert error.startswith("Error: "), done.stderr
        assert "Traceback" not in done.stderr
        return error

    greedy = write_zoo(tmp_path, large="resources = { CPU = 64 }")
    at = ("--engine", "ray", "--address", cluster.address)
    assert "the zoo asks for 65 CPU, one actor of each model, and the cluster has 4" in told(
        "--zoo", greedy, *at
    )
    wrong = (tmp_path / "wrong").resolve()
    wrong.mkdir()
    file = write_zoo(wrong)
    file.write_text(file.read_text().replace(str(MODELS / "large"), str(tmp_path / "gone")))
    assert f'model "large" ({tmp_path / "gone"}): there is no such folder' in told("--zoo", file, *at)
    assert "no Ray cluster could be reached at 127.0.0.1:1" in told(
        "--engine", "ray", "--address", "127.0.0.1:1"
    )
    assert "--address is where a Ray cluster is. Add --engine ray" in told("--address", "x:1")
