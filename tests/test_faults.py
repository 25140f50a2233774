"""Runs that end badly, at every kind of moment: the same command goes on, and nothing shows in the result.

What is compared: the output's bytes and all that the state knows, with an uninterrupted run's.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from fault_server import Ended, Server
from marks import slow
from toy_job import OPTIONS, PLAIN, WIDE, ledger, mixed_requests, requests, write_job

from messcli.errors import EXIT_STATE_BUSY

HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "100"))  # of a job, in the slow suite
DONE = (0, 4)  # 4: some rows have `error`, as they should


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = HERE / "fault_shim.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shim: Path | None) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults") / "work"
    folder.mkdir()
    server = Server(folder, shim)
    yield server
    server.close()


@pytest.fixture
def needs_shim(shim: Path | None) -> None:
    if shim is None:
        pytest.skip("needs a C compiler")


class Case:
    """A job with an uninterrupted run to compare with."""

    def __init__(
        self,
        server: Server,
        name: str,
        lines: list[dict[str, object] | str],
        *,
        output: str,
        options: Sequence[str] = OPTIONS,
    ) -> None:
        self.server = server
        self.output = output
        # a job that has come to its end would ask again for what failed: tests/test_retry.py
        self.args = ["route", "in.jsonl", "-o", output, "--retry", "none", *options]
        self.clean = server.folder / f"{name}-clean"
        self.broken = server.folder / f"{name}-broken"
        shutil.rmtree(self.clean, ignore_errors=True)
        write_job(self.clean, lines)
        self.whole = self.run_in(self.clean)
        assert self.whole.status in DONE, self.whole.stderr
        self.start_anew()

    def run_in(self, folder: Path, **how: object) -> Ended:
        return self.server.run(self.args, folder, **how)

    def start_anew(self) -> None:
        shutil.rmtree(self.broken, ignore_errors=True)
        self.broken.mkdir()
        for name in ("in.jsonl", "zoo.toml", "joules.jsonl"):
            shutil.copy(self.clean / name, self.broken / name)

    def run(self, **how: object) -> Ended:
        return self.run_in(self.broken, **how)

    def go_on(self) -> None:
        """Run the same command to its end, and compare."""
        ended = self.run()
        assert ended.status in DONE, ended.stderr
        self.compare()

    def compare(self) -> None:
        assert (self.broken / self.output).read_bytes() == (self.clean / self.output).read_bytes()
        state = f"{self.output}.state"
        assert ledger(self.broken / state) == ledger(self.clean / state)
        left, expected = ({path.name for path in folder.iterdir()} for folder in (self.broken, self.clean))
        assert left == expected  # no lock, no log


WINDOWS = pytest.mark.parametrize("options", [OPTIONS, WIDE], ids=["8", "4096"])
both = pytest.fixture(scope="module", params=[slow(OPTIONS, name="8"), pytest.param(WIDE, id="4096")])


@both
def job(server: Server, request: pytest.FixtureRequest) -> Case:
    return Case(server, "mixed", mixed_requests(300), output="out.jsonl", options=request.param)


@pytest.fixture(scope="module", params=[pytest.param(OPTIONS, id="8"), slow(WIDE, name="4096")])
def short_job(server: Server, request: pytest.FixtureRequest) -> Case:
    return Case(server, "short", mixed_requests(60)[:48], output="out.jsonl", options=request.param)


@both
def gz_job(server: Server, request: pytest.FixtureRequest) -> Case:
    lines = mixed_requests(300) + [dict(line, id=f"more {line['id']}") for line in requests(300)]
    return Case(server, "gz", lines, output="out.jsonl.gz", options=request.param)


@pytest.fixture(scope="module")
def wide_job(server: Server) -> Case:
    return Case(server, "wide", mixed_requests(300), output="out.jsonl", options=WIDE)


def kill_at_random(case: Case, kills: int, seed: int) -> dict[str, int]:
    """Kill at random moments, going on each time, until so many kills; a finished job is compared."""
    rng = random.Random(seed)
    counts = {"kills": 0, "finished and compared": 0, "runs that ended first": 0}
    case.start_anew()
    while counts["kills"] < kills:
        ended = case.run(kill_after=rng.uniform(0.0, min(0.5, 0.8 * case.whole.seconds)))
        if ended.status == -signal.SIGKILL:
            counts["kills"] += 1
            continue
        assert ended.status in DONE, ended.stderr
        counts["runs that ended first"] += 1
        case.compare()
        counts["finished and compared"] += 1
        case.start_anew()
    case.go_on()
    counts["finished and compared"] += 1
    return counts


def test_killed_at_random_moments(job: Case) -> None:
    print(kill_at_random(job, 12, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("windows", ["narrow", "wide"])
def test_killed_at_many_random_moments(job: Case, wide_job: Case, windows: str) -> None:
    """`KILLS` sets how many."""
    print(kill_at_random(wide_job if windows == "wide" else job, KILLS, seed=2))


@pytest.mark.slow
def test_killed_at_random_moments_writing_gzip(gz_job: Case) -> None:
    print(kill_at_random(gz_job, 30, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize("predictor", ["ridge", "linear", "fasttext"])
def test_killed_at_random_moments_while_learning(server: Server, predictor: str) -> None:
    """Nothing that is learnt differs: predictors and the price of accuracy are found again from the state."""
    args = ["--predictor", predictor, "--window", "32", "--meter", "replay:joules.jsonl"]
    case = Case(server, predictor, [*requests(1300)], output="out.jsonl", options=args)
    print(predictor, kill_at_random(case, 8, seed=4))


@pytest.mark.usefixtures("needs_shim")
@pytest.mark.parametrize("torn", [slow(False), True])
@pytest.mark.slow
def test_killed_at_calls_that_change_a_file(short_job: Case, torn: bool) -> None:
    calls = short_job.whole.calls
    print(kill_at_calls(short_job, range(3 + torn, len(calls) + 1, 25), torn))


@pytest.mark.slow
@pytest.mark.usefixtures("needs_shim")
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_call_that_changes_a_file(short_job: Case, torn: bool) -> None:
    print(kill_at_calls(short_job, range(1, len(short_job.whole.calls) + 1), torn))


@pytest.mark.slow
@pytest.mark.usefixtures("needs_shim")
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_commit_boundary(job: Case, torn: bool) -> None:
    # what is written to the output right after a commit: killed between the two, or in the middle of the row
    calls = job.whole.calls
    boundaries = [n + 1 for n, kind in enumerate(calls) if kind == "o" and calls[n - 1] == "w"]
    assert len(boundaries) >= (2 if "4096" in job.args else 300 // 8)
    print(kill_at_calls(job, boundaries, torn))


def kill_at_calls(case: Case, calls: range | list[int], torn: bool) -> dict[str, int]:
    counts = {"kills": 0, "finished and compared": 0}
    for call in calls:
        case.start_anew()
        ended = case.run(kill_at=call, torn=torn)
        counts["kills"] += (
            ended.status == -signal.SIGKILL
        )  # the run with fewer syncs ends before its last calls
        case.go_on()
        counts["finished and compared"] += 1
    return counts


def cut_power(folder: Path, synced: Path, rng: random.Random) -> None:
    """Leave of each file what was synced, and of what was written since then any part, in any order."""
    for path in sorted(folder.iterdir()):
        if path.name in ("in.jsonl", "zoo.toml", "joules.jsonl"):
            continue
        kept = synced / path.name
        if path.name.endswith(("-shm", ".lock")) or not kept.exists():
            path.unlink()  # shared memory; or never synced, nor its name
            continue
        old, new = kept.read_bytes(), path.read_bytes()
        size = rng.choice((len(old), len(new), rng.randint(*sorted((len(old), len(new))))))
        sectors = []
        for start in range(0, size, 512):
            choice = rng.choice((old, new))[start : start + 512]
            sectors.append(choice.ljust(min(512, size - start), b"\0"))
        path.write_bytes(b"".join(sectors)[:size])


def cut_power_at_random(case: Case, cuts: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    synced = case.server.folder.parent / "synced"
    counts = {"power cuts": 0, "finished and compared": 0}

    def replug() -> None:
        shutil.rmtree(synced, ignore_errors=True)
        synced.mkdir()
        case.start_anew()

    replug()
    while counts["power cuts"] < cuts:
        call = rng.randint(1, max(2, len(case.whole.calls) // 2))
        ended = case.run(kill_at=call, torn=rng.random() < 0.5, synced=str(synced))
        if ended.status == -signal.SIGKILL:
            cut_power(case.broken, synced, rng)
            counts["power cuts"] += 1
            continue
        assert ended.status in DONE, ended.stderr
        case.compare()
        counts["finished and compared"] += 1
        replug()
    case.go_on()
    counts["finished and compared"] += 1
    return counts


@pytest.mark.usefixtures("needs_shim")
def test_power_cuts(short_job: Case) -> None:
    print(cut_power_at_random(short_job, 12, seed=5))


@pytest.mark.slow
@pytest.mark.usefixtures("needs_shim")
def test_many_power_cuts(short_job: Case, job: Case) -> None:
    print(cut_power_at_random(short_job, 150, seed=6))
    print(cut_power_at_random(job, 40, seed=7))


@WINDOWS
@pytest.mark.usefixtures("needs_shim")
@pytest.mark.parametrize("output", ["out.jsonl", slow("out.jsonl.gz")])
def test_a_full_disk(server: Server, output: str, options: Sequence[str]) -> None:
    case = Case(server, "full", mixed_requests(60), output=output, options=options)
    counts = {"full disks": 0, "errors told": 0}
    for room in (0, 100, 5_000, 20_000, 40_000, 77_777, 120_000, 200_000):
        case.start_anew()
        ended = case.run(room=room)
        counts["full disks"] += 1
        if ended.status not in DONE:
            counts["errors told"] += 1
            assert ended.status == 1, ended.stderr
            assert "Traceback" not in ended.stderr
            last = ended.stderr.strip().splitlines()[-1]
            assert last.startswith("Error: ")
            assert "full" in last or "No space left" in last
            assert "run the same command again" in last
        case.go_on()
    assert counts["errors told"] >= 6
    print(counts)


def test_a_full_file_system(server: Server, tmp_path: Path) -> None:
    """The same on a real one: a tmpfs of four megabytes."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        write_job(tmp_path, mixed_requests(300))
        output = mounted / "out.jsonl"
        args = ["route", "in.jsonl", "-o", str(output), *OPTIONS]
        (mounted / "ballast").write_bytes(bytes(3_900_000))
        ended = server.run(args, tmp_path)
        assert ended.status == 1, ended.stderr
        assert "run the same command again" in ended.stderr.strip().splitlines()[-1]
        (mounted / "ballast").unlink()
        ended = server.run(args, tmp_path)
        assert ended.status == 4, ended.stderr
        whole = tmp_path / "whole.jsonl"
        server.run(["route", "in.jsonl", "-o", str(whole), *OPTIONS], tmp_path)
        assert output.read_bytes() == whole.read_bytes()
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
@pytest.mark.slow
def test_a_signal_keeps_what_is_answered_and_asks_nothing_more(job: Case, number: int) -> None:
    rng = random.Random(8)
    code, stopped = 128 + number, 0
    job.start_anew()
    log = job.server.folder / "asked"
    log.unlink(missing_ok=True)
    slow = {"TOY_SECONDS": "0.05", "TOY_LOG": str(log)}
    for _ in range(3):
        ended = job.run(signals=[(rng.uniform(0.8, 1.2), number)], environment=slow)
        if ended.status in DONE:
            break
        assert ended.status == code, ended.stderr
        assert ended.seconds < 3
        assert "run the same command again to go on" in ended.stderr.strip().splitlines()[-1]
        stopped += 1
        assert not (job.broken / "out.jsonl.state-wal").exists()
    assert stopped
    assert job.run(environment=slow).status in DONE
    job.compare()
    asked = log.read_text().splitlines()
    assert len(asked) == len(set(asked)) > 300  # nothing that was answered was asked again


def test_killed_in_a_window_only_what_was_running_is_asked_again(wide_job: Case) -> None:
    rng = random.Random(12)
    wide_job.start_anew()
    log = wide_job.server.folder / "asked"
    log.unlink(missing_ok=True)
    slow = {"TOY_SECONDS": "0.05", "TOY_LOG": str(log)}
    kills, rows = 0, [0]
    while kills < 4:
        ended = wide_job.run(kill_after=rng.uniform(1.5, 2.5), environment=slow)
        if ended.status in DONE:
            break
        assert ended.status == -signal.SIGKILL
        kills += 1
        output = wide_job.broken / "out.jsonl"
        rows.append(output.read_bytes().count(b"\n") if output.exists() else 0)
    wide_job.go_on()
    asked = log.read_text().splitlines()
    again = len(asked) - len(set(asked))
    print(
        {"kills in one window": kills, "rows by then": rows[1:], "answers": len(asked), "asked again": again}
    )
    assert kills >= 2
    assert sorted(rows) == rows
    assert 0 < rows[-1] < 300  # the output moves within the window
    assert again <= kills * (64 + 5)  # what no transaction had carried yet


@pytest.mark.slow
def test_a_second_signal_stops_now_and_loses_nothing(job: Case) -> None:
    job.start_anew()
    slow = {"TOY_SECONDS": "10"}  # a batch: both signals come while one is waited for
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        ended = job.run(signals=[(1.5, number), (1.6, number)], environment=slow)
        assert ended.status == code, ended.stderr
        assert "stopped at once; run the same command again to go on" in ended.stderr
        assert "Traceback" not in ended.stderr
    job.go_on()


@pytest.mark.slow
def test_a_signal_while_waiting_for_input_or_for_the_lock(server: Server, tmp_path: Path) -> None:
    write_job(tmp_path, requests(20))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # never closed: the reader waits
    os.write(writer, (tmp_path / "in.jsonl").read_bytes())
    try:
        args = ["route", "-", "-o", "out.jsonl", *OPTIONS]
        ended = server.run(args, tmp_path, stdin=str(pipe), signals=[(2.0, signal.SIGTERM)])
    finally:
        os.close(writer)
    assert ended.status == 143, ended.stderr
    assert ended.seconds < 10
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 16  # whole windows only

    from messcli.state.state import State

    with State(tmp_path / "out.jsonl.state"):
        args = ["route", "in.jsonl", "-o", "out.jsonl", *OPTIONS, "--wait", "60"]
        ended = server.run(args, tmp_path, signals=[(1.0, signal.SIGINT)])
    assert ended.status == 130
    assert ended.seconds < 10


@pytest.mark.parametrize("where", ["TOY_CRASH", "METRIC_CRASH"])
@pytest.mark.parametrize("how", ["raise", slow("exit"), "segfault"])
@pytest.mark.slow
def test_a_crash_inside_a_model_or_a_metric(job: Case, where: str, how: str) -> None:
    rng = random.Random(9)
    job.start_anew()
    # an exception of the user's metric is that request's error, unless the run shall stop at one
    case, options = job, ["--on-error", "stop"] if (where, how) == ("METRIC_CRASH", "raise") else []
    if options:
        options += job.args[-2:]  # the window
        case = Case(job.server, "strict", [*requests(150)], output="out.jsonl", options=[*OPTIONS, *options])
    crashes = 0
    for _ in range(6):
        calls = rng.randint(
            *((5, 25) if "4096" in case.args else (10, 60))
        )  # a wide window makes full batches
        ended = case.run(environment={where: f"{how}:{calls}"})
        if ended.status in DONE:
            break
        crashes += 1
        expected = {"raise": 1, "exit": 9, "segfault": -signal.SIGSEGV}[how]
        assert ended.status == expected, ended.stderr
    # --on-error stop waits for what is running: of one window that is nearly all, and the next run has no more to score
    assert crashes >= (1 if options and "4096" in case.args else 3)
    case.go_on()


@pytest.mark.slow
def test_killed_while_a_model_is_away(job: Case) -> None:
    """What its requests went on to is known after a kill; it isn't asked for every row."""
    rng = random.Random(13)
    away = {"TOY_AWAY": "small"}
    job.start_anew()
    whole = job.run(environment=away)
    assert whole.status in DONE, whole.stderr
    rows = [json.loads(line) for line in (job.broken / job.output).read_text().splitlines()]
    assert {row["model"] for row in rows} == {"large", None}
    expected = job.broken / job.output, ledger(job.broken / f"{job.output}.state")
    expected = expected[0].read_bytes(), expected[1]
    for _ in range(3):
        job.start_anew()
        for _ in range(4):
            ended = job.run(environment=away, kill_after=rng.uniform(0.05, 0.9 * whole.seconds))
            if ended.status in DONE:
                break
        ended = job.run(environment=away)
        assert ended.status in DONE, ended.stderr
        assert (job.broken / job.output).read_bytes() == expected[0]
        assert ledger(job.broken / f"{job.output}.state") == expected[1]


@pytest.mark.parametrize("window", [slow("1"), slow("8"), "4096"])
def test_an_outage_stops_the_run_and_burns_nothing(server: Server, window: str) -> None:
    options = [*PLAIN, "--window", window, "--patience", "0.3"]
    case = Case(server, "outage", [*requests(60)], output="out.jsonl", options=options)
    case.start_anew()
    for limit, gone in (("20", "small large"), ("20", ""), ("60", "small large"), ("60", "large small")):
        args = [*case.args, "--limit", limit]
        ended = case.server.run(args, case.broken, environment={"TOY_AWAY": gone})
        assert ended.status == (69 if gone else 0), ended.stderr
        if gone:
            last = ended.stderr.strip().splitlines()[-1]
            assert "no model answers" in last
            assert "its server is gone" in last
            assert ended.stderr.count("trying again") == 1
        output = case.broken / "out.jsonl"
        rows = (
            output.read_bytes() if output.exists() else b""
        )  # a first run that comes to nothing leaves nothing
        assert rows.count(b"\n") in (0, 20)
        assert b'"error"' not in rows
    assert case.run().status == 0
    rows = [json.loads(line) for line in (case.broken / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [line["id"] for line in requests(60)]
    assert not any("error" in row or "failed" in row for row in rows)


@pytest.mark.slow
def test_a_model_that_comes_back_in_a_pause_goes_on(server: Server, tmp_path: Path) -> None:
    """Every request fails in one way or another for two seconds: the run waits, and then answers all."""
    import threading

    case = Case(server, "pause", [*requests(40)], output="out.jsonl", options=WIDE)
    case.start_anew()
    gone = case.broken / "gone"
    gone.touch()
    threading.Timer(2.0, gone.unlink).start()
    ended = case.run(environment={"TOY_AWAY_WHILE": str(gone)})
    assert ended.status == 0, ended.stderr
    assert "trying again in 1 s" in ended.stderr
    case.compare()


@pytest.mark.parametrize("window", ["1", "4096"])
def test_odd_answers_to_everything_burn_few_rows_and_end(server: Server, window: str) -> None:
    options = [*PLAIN, "--window", window, "--patience", "0.3"]
    case = Case(server, "odd", [*requests(100)], output="out.jsonl", options=options)
    case.start_anew()
    ended = case.run(environment={"TOY_STUMBLES": "1"})
    assert ended.status == 69, ended.stderr
    rows = (case.broken / "out.jsonl").read_bytes().count(b"\n")
    assert rows <= 32  # of 100


@pytest.mark.usefixtures("needs_shim")
@pytest.mark.parametrize(
    ("output", "part"), [("out.jsonl", 4), slow("out.jsonl", 1), slow("out.jsonl.gz", 1)]
)
@pytest.mark.slow
def test_killed_at_calls_that_change_a_file_while_error_rows_are_mended(
    server: Server, output: str, part: int
) -> None:
    lines = [
        {**line, "prompt": f"flaky {line['prompt']}"} if n % 4 == 1 else line
        for n, line in enumerate(requests(40))
    ]
    args = ["route", "in.jsonl", "-o", output, *OPTIONS]
    first, clean, broken = (server.folder / f"mend-{name}" for name in ("first", "clean", "broken"))
    for folder in (first, clean):
        shutil.rmtree(folder, ignore_errors=True)
    write_job(first, lines)
    assert server.run(args, first, environment={"TOY_STUMBLES_ON": "flaky"}).status == 4
    shutil.copytree(first, clean)
    whole = server.run(args, clean)
    assert whole.status == 0, whole.stderr
    calls = len(whole.calls)
    for kill_at in sorted({*range(1, calls, max(1, calls // 15)), *range(calls - 25, calls + 1)})[::part]:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(first, broken)
        assert server.run(args, broken, kill_at=kill_at).status == -signal.SIGKILL
        ended = server.run(args, broken)
        assert ended.status == 0, ended.stderr
        assert (broken / output).read_bytes() == (clean / output).read_bytes(), (kill_at, whole.calls)
        assert ledger(broken / f"{output}.state") == ledger(clean / f"{output}.state")
        assert {path.name for path in broken.iterdir()} == {path.name for path in clean.iterdir()}


@pytest.mark.parametrize("window", [slow("8"), "4096"])
@pytest.mark.slow
def test_a_signal_while_a_model_loads_is_obeyed_at_once(server: Server, window: str) -> None:
    options = [*PLAIN, "--window", window]
    case = Case(server, "loading", [*requests(30)], output="out.jsonl", options=options)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        case.start_anew()
        ended = case.run(environment={"TOY_LOAD_large": "30"}, signals=[(1.5, number)])
        assert ended.status == code, ended.stderr
        assert ended.seconds < 4
        assert "Traceback" not in ended.stderr
        assert "run the same command again to go on" in ended.stderr.strip().splitlines()[-1]
        case.go_on()


@pytest.mark.slow
def test_a_signal_ends_a_pause_at_once(server: Server) -> None:
    options = [*PLAIN, "--window", "8", "--patience", "60"]
    case = Case(server, "paused", [*requests(30)], output="out.jsonl", options=options)
    case.start_anew()
    ended = case.run(environment={"TOY_AWAY": "small large"}, signals=[(2.5, signal.SIGTERM)])
    assert ended.status == 143, ended.stderr
    assert ended.seconds < 3.5
    case.go_on()


def test_two_processes_for_one_state(server: Server, shim: Path | None, tmp_path: Path) -> None:
    print(race(server, shim, tmp_path, races=12))


@pytest.mark.slow
def test_two_processes_for_one_state_100_times(server: Server, shim: Path | None, tmp_path: Path) -> None:
    print(race(server, shim, tmp_path, races=100))


def race(server: Server, shim: Path | None, tmp_path: Path, races: int) -> dict[str, int]:
    """Two at once on one state: one routes, the other is told to come back (or comes when it is done)."""
    other = Server(server.folder, None)
    counts = {"races": 0, "busy": 0, "found it done": 0}
    folder = server.folder / "race"
    rng = random.Random(10)
    try:
        write_job(folder, requests(24))
        args = ["route", "in.jsonl", "-o", "out.jsonl", *OPTIONS]
        whole = server.run(args, folder)
        assert whole.status == 0, whole.stderr
        expected = (folder / "out.jsonl").read_bytes()
        for _ in range(races):
            for name in ("out.jsonl", "out.jsonl.state"):
                (folder / name).unlink()
            if rng.random() < 0.3:  # a stale lock of a process that died
                (folder / "out.jsonl.state.lock").write_text("process 1 on a machine that has gone\n")
            server.start(args, folder, stdout=str(tmp_path / "a"))
            other.start(args, folder, stdout=str(tmp_path / "b"))
            ended = (server.answer(), other.answer())
            counts["races"] += 1
            statuses = sorted(one.status for one in ended)
            assert statuses in ([0, 0], [0, EXIT_STATE_BUSY]), [one.stderr for one in ended]
            busy = [one.stderr for one in ended if one.status == EXIT_STATE_BUSY]
            assert all("in use by process" in text or "in use by another" in text for text in busy), busy
            counts["busy"] += len(busy)
            counts["found it done"] += any("nothing to do" in one.stderr for one in ended)
            assert (folder / "out.jsonl").read_bytes() == expected
            assert not (folder / "out.jsonl.state.lock").exists()
    finally:
        other.close()
    assert counts["busy"] + counts["found it done"] == races
    return counts


@pytest.mark.slow
def test_one_waits_for_the_other(server: Server, tmp_path: Path) -> None:
    write_job(tmp_path, requests(16))
    args = ["route", "in.jsonl", "-o", "out.jsonl", *OPTIONS]
    other = Server(server.folder, None)
    try:
        other.start(args, tmp_path, environment={"TOY_SECONDS": "0.3"})
        while not (tmp_path / "out.jsonl.state.lock").exists():
            pass
        busy = server.run(args, tmp_path)
        assert busy.status == EXIT_STATE_BUSY
        assert "in use by process" in busy.stderr
        assert "--wait" in busy.stderr
        assert busy.seconds < 5
        waited = server.run([*args, "--wait", "60"], tmp_path)
        assert waited.status == 0, waited.stderr
        assert "nothing to do" in waited.stderr
        assert other.answer().status == 0
    finally:
        other.close()


@pytest.mark.slow
def test_killed_with_real_models(tmp_path: Path) -> None:
    """The real backend on the bundled zoo: a few kills, one process each."""
    import sys

    bundled = HERE.parent / "messcli" / "bundled"
    if not (bundled / "small" / "model.safetensors").exists():
        pytest.skip("the bundled zoo isn't trained yet")
    samples = (HERE.parent / "samples" / "requests.jsonl").read_text(encoding="utf-8").splitlines()[:96]
    rows = [json.loads(line) for line in samples]
    with (tmp_path / "joules.jsonl").open("w") as table:
        for row in rows:
            models = {
                m: {"joules": 1.0 + n, "seconds": 0.1} for n, m in enumerate(("small", "medium", "large"))
            }
            table.write(json.dumps({"id": row["id"], "prompt": "", "models": models}) + "\n")
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in samples), encoding="utf-8")
    command = [sys.executable, "-c", "from messcli.cli import main; main()", "route", "in.jsonl"]
    command += ["--meter", "replay:joules.jsonl", "--window", "16", "--batch-size", "8"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "MESSCLI_ZOO": str(bundled / "zoo.toml")}

    def start(output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "-o", output], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
        )

    whole = start("whole.jsonl")
    assert whole.communicate()[1] is not None
    assert whole.returncode in DONE
    kills = 0
    for rows_before in (16, 48, 64):
        run = start("out.jsonl")
        output = tmp_path / "out.jsonl"
        while run.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < rows_before):
            pass
        run.kill()
        run.communicate()
        kills += run.returncode == -signal.SIGKILL
    last = start("out.jsonl")
    last.communicate()
    assert last.returncode in DONE
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    print({"kills": kills, "finished and compared": 1})


@pytest.mark.slow
def test_a_window_closes_with_what_has_come_on_a_slow_pipe(server: Server, tmp_path: Path) -> None:
    write_job(tmp_path, requests(9))
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines(keepends=True)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    args = ["route", "-", "-o", "out.jsonl", *WIDE, "--linger", "0.3"]
    try:
        server.start(args, tmp_path, stdin=str(pipe), environment={"TOY_SECONDS": "0.2"})
        output = tmp_path / "out.jsonl"
        for at in (0, 3):
            os.write(writer, b"".join(lines[at : at + 3]))
            deadline = time.monotonic() + 20
            while not output.exists() or output.read_bytes().count(b"\n") < at + 3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        os.write(writer, b"".join(lines[6:]))
    finally:
        os.close(writer)
    ended = server.answer()
    assert ended.status == 0, ended.stderr
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [f"r{n}" for n in range(9)]
    # one that is killed in a window that closed early takes up these lines, whatever has come since
    for name in ("out.jsonl", "out.jsonl.state"):
        (tmp_path / name).unlink()
    writer = os.open(pipe, os.O_RDWR)
    try:
        server.start(args, tmp_path, stdin=str(pipe), kill_after=2.5, environment={"TOY_SECONDS": "30"})
        os.write(writer, b"".join(lines[:3]))
        assert server.answer().status == -signal.SIGKILL
    finally:
        os.close(writer)
    with closing(sqlite3.connect(tmp_path / "out.jsonl.state")) as db:
        assert db.execute("SELECT lines, finished FROM window").fetchall() == [(3, 0)]
    ended = server.run(args, tmp_path, stdin=str(tmp_path / "in.jsonl"))
    assert ended.status == 0, ended.stderr
    assert "going on in a window of which 3 lines aren't finished" in ended.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9
