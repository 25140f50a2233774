"""A small job for tests of runs: requests, a zoo of toy models, and recorded joules that make bytes comparable."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parent.parent / "samples" / "requests.jsonl"
MODELS = ("small", "large")

ZOO = """
[sla]
alpha = 0.7
metric = "fault_server:metric"

[plans]
silver = 0.6
gold = 0.8

[[models]]
name = "small"
path = "toy/small"
backend = "toy"
max_prompt_tokens = 40

[[models]]
name = "large"
path = "toy/large"
backend = "toy"
max_prompt_tokens = 40
"""

# A cheap loop: what is tested here is what becomes of files.
PLAIN = ("--predictor", "mean", "--v", "0.1", "--c", "3", "--meter", "replay:joules.jsonl")
OPTIONS = (*PLAIN, "--window", "8")
WIDE = (*PLAIN, "--window", "4096")  # all of a test's requests in one window


def requests(count: int) -> list[dict[str, Any]]:
    """`count` of the sample requests, over and over under new ids."""
    samples = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    rounds = (dict(samples[n % len(samples)], id=f"r{n}") for n in range(count))
    return list(rounds)


def write_job(folder: Path, lines: Iterable[dict[str, Any] | str]) -> None:
    """Write in.jsonl, zoo.toml and joules.jsonl. Joules and seconds are made up, the same for the same id."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, outcomes = [], {}
    for line in lines:
        texts.append(line if isinstance(line, str) else json.dumps(line))
        if isinstance(line, dict) and "id" in line:
            luck = sum(map(ord, str(line["id"]))) % 7
            outcomes[line["id"]] = {
                name: {"joules": (0.1 + luck / 70) * (5 * m + 1), "seconds": 0.01 * (m + 1)}
                for m, name in enumerate(MODELS)
            }
    (folder / "in.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    rows = (json.dumps({"id": key, "prompt": "", "models": models}) for key, models in outcomes.items())
    (folder / "joules.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (folder / "zoo.toml").write_text(ZOO, encoding="utf-8")


def mixed_requests(count: int) -> list[dict[str, Any] | str]:
    """Sample requests with what goes wrong in real files in between."""
    lines: list[dict[str, Any] | str] = list(requests(count))
    lines.insert(7, "{this is no JSON")
    lines.insert(20, {"id": "r3", "prompt": "an id that was there"})
    lines.insert(33, {"id": "long", "prompt": "word " * 50, "reference": "w"})
    lines.insert(40, {"id": "bad", "prompt": "this one fails", "reference": "w"})
    lines.insert(41, {"id": "silver one", "prompt": "a plan", "reference": "ein Plan", "plan": "silver"})
    lines.insert(50, {"id": "gold one", "prompt": "another plan", "reference": "ein Plan", "plan": "gold"})
    lines.insert(51, {"id": "refused 1", "prompt": "small refuses this one", "reference": "w"})
    lines.insert(52, {"id": "refused 2", "prompt": "large refuses this one", "reference": "w"})
    lines.insert(53, {"id": "stumbled", "prompt": "small stumbles and large refuses", "reference": "w"})
    lines.insert(55, {"id": "lead one", "prompt": "no such plan", "plan": "lead"})
    return lines


def ledger(state: Path) -> dict[str, list[Any]]:
    """All that a state knows of the job, but for times and for how it is stored; nothing of its last run alone."""
    queries = {
        "requests": "SELECT * FROM requests ORDER BY seq",
        "accounts": "SELECT * FROM accounts ORDER BY period, plan",
        "energy": "SELECT * FROM energy ORDER BY model, kind, meter",
        "periods": "SELECT name, horizon, requests FROM periods ORDER BY name",
        "settings": "SELECT t, value FROM settings ORDER BY rowid",
        "outputs": "SELECT * FROM outputs ORDER BY path",
        "rows": "SELECT * FROM rows ORDER BY seq",
        "meta": "SELECT * FROM meta WHERE name NOT IN ('alone', 'overhead') ORDER BY name",
    }
    db = sqlite3.connect(state)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {name: db.execute(query).fetchall() for name, query in queries.items()}
    finally:
        db.close()
