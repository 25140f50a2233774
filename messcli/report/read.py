"""What a report is made from: a state (everything, also while a run writes it) or an output file (what it holds,
and it says what is missing)."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from messcli.amounts import is_amount
from messcli.errors import InputError, shown
from messcli.files.dialects import row_in
from messcli.files.requests import STDIN, open_input
from messcli.jsonl import BadLine, TornFile, objects
from messcli.report.audits import Standing
from messcli.report.bill import Alone
from messcli.report.numbers import Cost, Ledger, Report, compared, loads_of, summed_up
from messcli.routing.audit import Audits
from messcli.routing.bound import ServedMean
from messcli.state.database import is_database, looking_into


def make_report(path: str, alpha: float | None = None, beside: str | None = None) -> Report:
    """Read a state or an output file.

    Args:
        alpha: the target, for an output file: it doesn't hold it. A state knows its own.
        beside: the state of a run in which the largest model answered the same requests: compared with what it took.

    Raises:
        InputError, StateError: the file is missing or is neither.
    """
    report = _from_state(path) if path != STDIN and _is_database(path) else _from_output(path, alpha)
    return report if beside is None else compared(report, _measured(beside))


def _measured(path: str) -> Alone:
    """What a run with nothing but the largest model took, its overhead included."""
    if not _is_database(path):
        raise InputError(f"--beside {path}: is no state. Name the state of a run with --policy largest")
    run = _from_state(path)
    policy = run.settings.get("policy")
    if policy != "largest":
        raise InputError(
            f"--beside {path}: its policy is {policy}. Name the state of a run with --policy largest"
        )
    if run.unmetered or not run.requests:
        raise InputError(
            f"--beside {path}: not all of its joules are known. Run it again with a meter that works"
        )
    joules = sum(row["joules"] for row in run.energy) / run.requests
    return Alone(
        list(run.mix)[-1], joules, None, False, f"measured over {run.requests} requests, overhead included"
    )


def _is_database(path: str) -> bool:
    try:
        return is_database(Path(path))
    except OSError as error:
        raise InputError(
            f"{path}: can't be read: {error.strerror}. Name a state file or the output of `messcli route`"
        ) from None


def _from_state(path: str) -> Report:
    with looking_into(Path(path)) as db:
        return _read_state(db, path)


def _read_state(db: sqlite3.Connection, path: str) -> Report:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    meta = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM meta")}
    signature = meta.get("signature", {})
    if signature.get("policy") == "record":
        raise InputError(f"{path}: is the state of a recording. Judge its table with `messcli simulate`")
    names = [model["name"] for model in signature.get("zoo", {}).get("models", [])]
    row = db.execute("SELECT value FROM settings ORDER BY rowid DESC LIMIT 1").fetchone()
    settings = json.loads(row[0]) if row else {}
    settings.update((name, signature.get(name)) for name in ("policy", "predictor", "window", "seed"))
    ledger = Ledger()
    failed = 0
    query = (
        "SELECT t, model, plan, explored, accuracy, estimated_accuracy, joules, billed_joules, queue "
        "FROM requests ORDER BY seq"
    )
    for t, model, plan, *values in db.execute(query):
        failed += model is None
        if t is not None:
            ledger.add(model, plan, values)
    energy = _records(db, "SELECT model, kind, meter, joules, requests FROM energy ORDER BY kind, model")
    accounts = _records(db, "SELECT * FROM accounts ORDER BY period, plan")
    period = str(meta.get("period") or settings.get("period") or "")
    of_period = len(ledger.models)
    if version >= 2:
        row = db.execute("SELECT requests FROM periods WHERE name = ?", (period,)).fetchone()
        of_period = row[0] if row else of_period
    alphas = {account["plan"]: account["alpha"] for account in accounts if account["period"] == period}
    return summed_up(
        path,
        "state",
        ledger,
        failed=failed,
        alphas=alphas,
        of_period=of_period,
        names=names,
        energy=energy,
        period=period,
        periods=accounts,
        settings=settings,
        metric=signature.get("metric"),
        missing=[],
        alone=Alone(**meta["alone"]) if meta.get("alone") else None,
        overhead_parts=meta.get("overhead"),
        cost=_cost(meta.get("spent")),
        loads=loads_of(meta.get("loads") or {}, names),
        lost={account["plan"]: account["failed"] for account in accounts if account["period"] == period},
        audits=_audits(settings.get("audits"), (meta.get("audits") or {}).get(period, {}), alphas),
    )


def _audits(
    kept: Mapping[str, Any] | None, means: Mapping[str, Any], alphas: Mapping[str, float]
) -> dict[str, Standing]:
    """By plan; as of the state's last snapshot while a run goes on."""
    if kept is None:
        return {}
    audits = Audits(**kept)
    return {
        plan: Standing.of(ServedMean(**means[plan]), audits, alpha)
        for plan, alpha in alphas.items()
        if plan in means
    }


def _cost(kept: Mapping[str, Any] | None) -> Cost | None:
    return None if kept is None else Cost(**kept["sum"], currency=kept["currency"], basis=kept["basis"])


def _records(db: sqlite3.Connection, query: str) -> list[dict[str, Any]]:
    cursor = db.execute(query)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _from_output(path: str, alpha: float | None) -> Report:
    ledger = Ledger()
    failed = 0
    lost: Counter[str] = Counter()  # by plan
    energy: dict[tuple[str, str, str], tuple[float, int]] = {}
    seen: set[str] = set()
    for number, line in _rows(path):
        row = line if "model" in line else row_in(line)
        if "models" in row and "model" not in row:
            raise InputError(
                f"{path}:{number}: is an outcomes table. `messcli simulate` reads it; `report` takes a state or "
                "the output of `messcli route`"
            )
        if "model" not in row and row.get("error") is None:
            raise InputError(
                f'{path}:{number}: has no "model": no row of `messcli route`. Name its output, or a state'
            )
        seen.update(row)
        model = row.get("model")
        if model is None:
            failed += 1
            if row.get("explored") is not None and isinstance(row.get("plan", ""), str):
                lost[row.get("plan") or ""] += 1
            continue
        for name in Ledger.COLUMNS:
            value = row.get(name)
            if not (value is None or isinstance(value, bool) or is_amount(value)):
                raise InputError(
                    f'{path}:{number}: "{name}" is {shown(value)}, no number that it can be. Name the output of '
                    "`messcli route`"
                )
        if not all(isinstance(name, str) for name in (model, row.get("plan", ""), row.get("meter") or "")):
            raise InputError(
                f"{path}:{number}: model, plan and meter are texts. Name the output of `messcli route`"
            )
        ledger.add(model, row.get("plan"), [row.get(name) for name in Ledger.COLUMNS])
        meter = row.get("meter") or "?"
        parts = [(model, "served", row.get("joules"))]
        if row.get("explored") and row.get("joules") is not None and row.get("billed_joules") is not None:
            parts.append(("other models", "exploration", row["billed_joules"] - row["joules"]))
        elif row.get("asked") and row.get("joules") is not None and row.get("billed_joules") is not None:
            kind = "failed" if row.get("failed") else "look"
            parts.append(("other models", kind, row["billed_joules"] - row["joules"]))
        for name, kind, joules in parts:
            if joules is not None:
                known, count = energy.get((name, kind, meter), (0.0, 0))
                energy[name, kind, meter] = (known + joules, count + 1)
    missing = [
        "overhead joules (loading, learning, idle): only the state has them",
        "which models an exploration's further joules went to",
        "earlier periods and settings",
    ]
    missing += [f'the column "{name}"' for name in Ledger.COLUMNS if name not in seen]
    if "audited" in seen:
        alpha = None  # audited answers are no random sample of what was served: their mean judges nothing
        missing.append("what audits tell of the mean accuracy: only the state has it")
    elif alpha is None:
        missing.append("alpha: give it with --alpha")
    beside = Path(f"{path}.state")
    if path != STDIN and beside.is_file():
        missing.append(f"all of which stand in {beside}: messcli report {beside}")
    return summed_up(
        path,
        "output",
        ledger,
        failed=failed,
        alphas=dict.fromkeys(ledger.plans, alpha),
        of_period=len(ledger.models),
        lost=lost,
        names=_order_of(ledger),
        energy=[
            {"model": model, "kind": kind, "meter": meter, "joules": joules, "requests": count}
            for (model, kind, meter), (joules, count) in energy.items()
        ],
        period="",
        periods=[],
        settings={},
        metric=None,
        missing=missing,
    )


def _rows(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_input(path) as handle:
        try:
            yield from objects(handle)
        except TornFile as error:
            raise InputError(f"{path}: can't be read on: {error}. Repair the file") from None
        except BadLine as error:
            raise InputError(
                f"{path}:{error.number}: neither a state nor JSON lines: {error}. Name the output of `messcli route`"
            ) from None


def _order_of(ledger: Ledger) -> list[str]:
    """Models by their mean joules, cheapest first, what explorations serve last: a file doesn't tell the zoo."""
    columns = ledger.columns()
    models = np.array(ledger.models, dtype=object)
    explored = Counter(models[columns["explored"] == 1.0].tolist())
    last = max(explored, key=lambda name: explored[name], default=None)

    def key(name: str) -> tuple[bool, float]:
        joules = columns["joules"][models == name]
        return name == last, math.inf if np.isnan(joules).all() else float(np.nanmean(joules))

    return sorted(dict.fromkeys(models.tolist()), key=key)
