"""What the state costs: `python tools/bench/state.py commit` and `python tools/bench/state.py size --rows N`.

commit: the share of a run on the bundled zoo that goes into the state, and whole runs with and without one.
size:   how long a state of N finished requests takes to open, to look ids up in and to commit to.
memory: how much a run over N lines needs, with a model that answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]


@contextmanager
def timed(owner: Any, names: list[str], spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that calls of `owner`'s methods take. Calls of one within another count once."""
    before = {name: getattr(owner, name) for name in names}
    depth = 0

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

        return wrapped

    for name, function in before.items():
        setattr(owner, name, wrap(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def commit(count: int, rounds: int) -> None:
    from toy_job import requests

    from messcli.jobs.route import RouteConfig, route
    from messcli.state.journal import Journal
    from messcli.state.output import Output
    from messcli.state.state import State
    from messcli.zoo import BUNDLED_ZOO

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (json.dumps(request) + "\n" for request in requests(count))
        (folder / "in.jsonl").write_text("".join(lines), encoding="utf-8")
        os.environ["SQLITE_TMPDIR"] = name

        def run(output: str, number: int) -> tuple[float, dict[str, float]]:
            spent: dict[str, float] = {}
            started = time.perf_counter()
            config = RouteConfig.of(
                str(folder / "in.jsonl"), output, state=Path(f"{output}.{number}.state"), zoo=str(BUNDLED_ZOO)
            )
            with (
                timed(State, ["commit", "__init__", "close"], spent),
                timed(Journal, ["known", "change"], spent),
                timed(Output, ["open", "finish"], spent),
            ):
                route(config)
            return time.perf_counter() - started, spent

        run(str(folder / "warm.jsonl"), 0)
        for number in range(rounds):
            seconds, spent = run(str(folder / f"out{number}.jsonl"), number)
            total = sum(spent.values())
            parts = ", ".join(f"{part} {value:.3f}" for part, value in sorted(spent.items()))
            rest = seconds - total
            print(
                f"{count} requests: {seconds:.2f} s, of which the state {total:.3f} s ({parts}): "
                f"+{total / rest:.2%} on the {rest:.2f} s of everything else"
            )


def fill(path: Path, rows: int) -> None:
    """A state with so many finished requests, as if they had been routed."""
    from messcli.state.state import State

    with State(path) as state:
        state.journal.change(1, {"period": "", "horizon": None}, b"", [])
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA cache_size = -1000000")
    db.executescript(
        """
        BEGIN;
        CREATE TABLE filled AS
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ROWS)
            SELECT i FROM n;
        INSERT INTO requests SELECT i, key, key, i, NULL, 'small', 0, 0.5, 0.5, 1.0, 1.0, 0.1
            FROM (SELECT i, randomblob(16) AS key FROM filled) ORDER BY i;
        DROP TABLE filled;
        COMMIT;
        """.replace("ROWS", str(rows))
    )
    db.close()


def size(rows: int, where: str | None) -> None:
    from messcli.state.journal import Done, Work
    from messcli.state.state import State

    with tempfile.TemporaryDirectory(dir=where) as name:
        path = Path(name) / "big.state"
        started = time.perf_counter()
        fill(path, rows)
        print(
            f"{rows} rows: {path.stat().st_size / 1e6:.0f} MB, made in {time.perf_counter() - started:.0f} s"
        )
        db = sqlite3.connect(path)
        step = max(1, rows // 5000)
        known = [key for (key,) in db.execute("SELECT key FROM requests WHERE seq % ? = 0", (step,))]
        db.close()
        for attempt in ("first", "second"):
            started = time.perf_counter()
            state = State(path)
            state.output.open(str(Path(name) / "out.jsonl"))
            opened = time.perf_counter() - started
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            assert all(state.journal.known(key) for key in known)
            hit = (time.perf_counter() - started) / len(known)
            started = time.perf_counter()
            assert not any(state.journal.known(os.urandom(16)) for _ in known)
            miss = (time.perf_counter() - started) / len(known)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            started = time.perf_counter()
            commits = 20
            for _ in range(commits):
                done = [Done(os.urandom(16), b"", "{}", t=rows + 1) for _ in range(32)]
                state.commit(Work(done, [b"{}"], snapshot=b""))
            commit_seconds = (time.perf_counter() - started) / commits
            state.output.finish()
            state.close()
            (Path(name) / "out.jsonl").unlink()
            db = sqlite3.connect(path)
            db.execute("DELETE FROM outputs")
            db.commit()
            db.close()
            print(
                f"{attempt} time: opens in {opened * 1e3:.1f} ms, a known id {hit * 1e6:.0f} us, a new one "
                f"{miss * 1e6:.0f} us, memory grew {grown / 1024:.1f} MB over {2 * len(known)} look-ups, "
                f"a window of 32 commits in {commit_seconds * 1e3:.1f} ms"
            )


def memory(lines: int) -> None:
    """Peak memory of a whole run over so many lines, in a process of its own."""
    from toy_job import ZOO

    code = (
        "import sys, resource, fault_server; from messcli.registry import BACKENDS\n"
        'BACKENDS["toy"] = "fault_server:ToyBackend"\n'
        "from messcli.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "zoo.toml").write_text(ZOO, encoding="utf-8")
        with (folder / "in.jsonl").open("w") as file:
            file.writelines(
                f'{{"id": {n}, "prompt": "word {n} of many", "reference": "w"}}\n' for n in range(lines)
            )
        options = ["--policy", "smallest", "--meter", "estimate", "-q", "--window", "256"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
        for again in (False, True):
            started = time.perf_counter()
            command = [sys.executable, "-c", code, "route", "in.jsonl", "-o", "out.jsonl", *options]
            done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE)
            seconds = time.perf_counter() - started
            what = "again, all done" if again else "routed"
            print(f"{lines} lines {what}: {seconds:.1f} s, peak memory {int(done.stdout)} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["commit", "size", "memory"])
    parser.add_argument("--rows", type=int, default=10_000_000, help="of size and memory")
    parser.add_argument("--requests", type=int, default=1000, help="of commit")
    parser.add_argument("--rounds", type=int, default=3, help="of commit")
    parser.add_argument("--folder", help="where size puts its files")
    options = parser.parse_args()
    if options.what == "commit":
        commit(options.requests, options.rounds)
    elif options.what == "size":
        size(options.rows, options.folder)
    else:
        memory(options.rows)


if __name__ == "__main__":
    main()
