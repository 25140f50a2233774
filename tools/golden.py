"""Golden bytes: what the commands write, compared between two states of the code.

    python tools/golden.py REVISION          # the working tree's outputs beside those of a git revision
    python tools/golden.py --write FOLDER    # the working tree's outputs, to look at

A change of structure leaves every byte equal; a change of behaviour says in its commit which of these cases moved.
Joules are replayed from `samples/outcomes.jsonl`, so that outputs depend on the code alone. Digests aren't kept in the
repository: the last bits of a matrix product differ between processors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "golden"  # digests of committed revisions
REQUESTS = 150  # of the samples' 300: enough to leave the first windows, few enough for a minute in all

POLICIES = ("mess+", "smallest", "largest", "random")
PREDICTORS = ("ridge", "linear", "fasttext", "mean")
PAPER = ("--v", "0.1", "--c", "3", "--learn", "explored", "--predictor", "linear", "--window", "1")


@dataclass(frozen=True)
class Case:
    """Commands that run one after another in a folder of their own; what they print and `out.jsonl` are compared."""

    name: str
    commands: Sequence[Sequence[str]]


def cases(shared: Path) -> Iterator[Case]:
    """Everything that is compared. `shared` holds the inputs."""

    def route(*options: str, source: str = "requests.jsonl", zoo: str = "zoo.toml") -> list[str]:
        outcomes = f"replay:{shared / 'outcomes.jsonl'}"
        return ["route", str(shared / source), "-o", "out.jsonl", "--zoo", str(shared / zoo), "--meter", outcomes,
                "--no-calibration", "--quiet", *options]  # fmt: skip

    for window in ("1", "64"):
        for policy in POLICIES:
            yield Case(f"{policy}-{window}", [route("--policy", policy, "--window", window)])
        for predictor in PREDICTORS[1:]:
            yield Case(f"mess+-{predictor}-{window}", [route("--predictor", predictor, "--window", window)])
    yield Case("paper", [route(*PAPER)])
    yield Case("plans", [route("--plan", "gold", "--window", "16", source="plans.jsonl", zoo="plans.toml")])
    yield Case(
        "resumed",
        [
            route("--limit", "70", "--window", "16"),
            route("--window", "16", "--include-prompt"),
            ["rows", "out.jsonl.state", "-o", "out.jsonl"],
            ["report", "out.jsonl.state", "--json"],
        ],
    )
    yield Case(
        "best-answers",
        [route("--serve", "best", "--c", "1", "--seed", "5", "--period", "2026-12", "--horizon", "200")],
    )
    table = str(shared / "outcomes.jsonl")
    for window in ("1", "64"):
        asked = [
            "--alpha-at",
            "0.2,0.5,0.8",
            "--order-seeds",
            "2",
            "--window",
            window,
            "--complete-only",
            "--quiet",
        ]
        yield Case(f"simulate-{window}", [["simulate", table, "--out", "out.jsonl", *asked]])
    swept = ["--alpha", "0.9", "--v", "0.1,1", "--c", "1,3", "--predictor", "linear", "--learn", "explored"]
    yield Case(
        "simulate-v", [["simulate", table, "--out", "out.jsonl", "--complete-only", "--quiet", *swept]]
    )
    yield Case(
        "rouge",
        [
            [
                "simulate",
                table,
                "--out",
                "out.jsonl",
                "--alpha-at",
                "0.5",
                "--metric",
                "rouge1",
                "--complete-only",
                "--quiet",
            ]
        ],
    )


def prepare(shared: Path) -> None:
    """Inputs made of the samples: fewer requests, some with plans, a zoo file with plans."""
    samples = ROOT / "samples"
    lines = (samples / "requests.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:REQUESTS]
    (shared / "requests.jsonl").write_text("".join(lines), encoding="utf-8")
    named = []
    for number, line in enumerate(lines):
        row = json.loads(line)
        if number % 3:
            row["plan"] = ("gold", "bronze")[number % 2]
        named.append(json.dumps(row) + "\n")
    (shared / "plans.jsonl").write_text("".join(named), encoding="utf-8")
    (shared / "outcomes.jsonl").write_bytes((samples / "outcomes.jsonl").read_bytes())
    zoo = (ROOT / "messcli" / "bundled" / "zoo.toml").read_text(encoding="utf-8")
    zoo = zoo.replace('path = "./', f'path = "{ROOT / "messcli" / "bundled"}/')
    (shared / "zoo.toml").write_text(zoo, encoding="utf-8")
    (shared / "plans.toml").write_text("[plans]\ngold = 0.95\nbronze = 0.7\n\n" + zoo, encoding="utf-8")


def run(case: Case, code: Path, folder: Path) -> dict[str, str]:
    """Run the case with the code of `code`; digests of what it wrote, or what it said when it failed."""
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    digests: dict[str, str] = {}
    for command in case.commands:
        done = subprocess.run(
            [sys.executable, "-m", "messcli", *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return {case.name: f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
        digests[f"{command[0]} {len(digests)}"] = _digest(done.stdout.encode())
    return digests | {"out.jsonl": _digest((folder / "out.jsonl").read_bytes())}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def outputs(code: Path, folder: Path) -> dict[str, Mapping[str, str]]:
    """Digests of every case, run with the code that lies in `code`."""
    shared = folder / "shared"
    shared.mkdir(parents=True)
    prepare(shared)
    todo = list(cases(shared))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda case: run(case, code, folder / case.name), todo)
        return dict(zip((case.name for case in todo), done, strict=True))


def of_revision(revision: str) -> dict[str, Mapping[str, str]]:
    """Digests of a committed revision: run once, then remembered."""
    name = _git("rev-parse", "--short=12", f"{revision}^{{commit}}")
    kept = CACHE / f"{name}-{_digest(Path(__file__).read_bytes())}.json"
    if kept.exists():
        found: dict[str, Mapping[str, str]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        _git("worktree", "add", "--detach", str(code), name)
        try:
            found = outputs(code, Path(folder, "outputs"))
        finally:
            _git("worktree", "remove", "--force", str(code))
    CACHE.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", nargs="?", default="HEAD", help="compared with (default: HEAD)")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write the outputs there instead of comparing"
    )
    asked = parser.parse_args()
    if asked.write:
        print(json.dumps(outputs(ROOT, asked.write), indent=1))
        return 0
    before = of_revision(asked.revision)
    with tempfile.TemporaryDirectory() as folder:
        now = outputs(ROOT, Path(folder, "outputs"))
    moved = [name for name in now if now[name] != before.get(name)]
    for name in moved:
        print(f"{name}: {before.get(name)} -> {now[name]}")
    print(f"{len(now) - len(moved)} of {len(now)} cases equal to {asked.revision}, byte for byte")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
