"""`report`: where the promise stands, what was saved and how far the estimates can be trusted.

Reads a state (everything, also while a run is writing it) or an output file (what it holds, and it says what is
missing). Knows numbers; the page is drawn by `page.py`.
"""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.errors import InputError, StateError
from messcli.inputs import STDIN, open_input
from messcli.state import APPLICATION_ID, SCHEMA_VERSION

Floats = NDArray[np.float64]

LEVEL = 0.95  # of all intervals
BATCHES = 20
BINS = 10  # of the reliability table, of equal counts
PARTS = 40  # of what is shown over time
MINIMUM = 30  # numbers behind a mean that stands for others


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where the long-run mean lies, at `LEVEL`."""

    mean: float
    low: float
    high: float
    count: int
    method: str


@dataclass(frozen=True, slots=True)
class Promise:
    """One plan in the open period: what was promised and what came of it."""

    plan: str
    alpha: float | None
    observed: Interval | None  # of requests with a reference
    estimated: float | None  # mean estimate of those without
    estimated_count: int
    queue: float | None

    @property
    def estimated_share(self) -> float:
        """The part of the plan's requests that rests on estimates."""
        observed = self.observed.count if self.observed else 0
        return self.estimated_count / max(1, observed + self.estimated_count)

    @property
    def verdict(self) -> str:
        """kept | missed | unknown, by the observed mean alone."""
        if self.alpha is None or self.observed is None:
            return "unknown"
        return "kept" if self.observed.mean >= self.alpha - 1e-9 else "missed"

    @property
    def certainty(self) -> str:
        """What the interval says of traffic like this going on."""
        if self.alpha is None or self.observed is None:
            return ""
        if self.observed.low >= self.alpha:
            return "the whole interval lies above alpha"
        if self.observed.high < self.alpha:
            return "the whole interval lies below alpha"
        return "alpha lies within the interval: the controller aims at alpha, so that is usual"


@dataclass(frozen=True, slots=True)
class Savings:
    """Against the largest model answering everything."""

    largest: str
    largest_joules: float  # its mean per request
    largest_error: float  # standard error of that mean
    basis: str
    billed_joules: float  # per request
    overhead_joules: float | None  # per request; None where it isn't known
    share: float  # saved part of what requests were billed; < 0: it cost more
    share_with_overhead: float | None  # the same with all overhead counted as ours


@dataclass(frozen=True, slots=True)
class Bin:
    """Requests with similar estimates."""

    estimated: float
    observed: float
    error: float  # standard error of `observed`
    count: int


@dataclass(frozen=True, slots=True)
class Reliability:
    """Estimates of served models against what was then observed."""

    count: int
    bias: float  # mean of observed - estimated
    rmse: float
    rmse_of_means: float  # of predicting each model's own mean instead
    calibration_error: float  # mean distance between estimated and observed, over the bins
    bins: list[Bin]
    drift: list[tuple[int, float]]  # (request, mean of observed - estimated) in consecutive parts


@dataclass(frozen=True, slots=True)
class Series:
    """What happened over time, in at most PARTS parts: the last request of each, and the values there."""

    requests: list[int]
    queue: list[float | None]
    accuracy: list[float | None]  # running mean of what was observed
    part_accuracy: list[float | None]  # mean within the part
    billed_joules: list[float | None]  # mean within the part
    mix: dict[str, list[float]]  # model -> share within the part


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `messcli report` knows."""

    source: str
    kind: str  # state | output
    requests: int
    failed: int
    explored: int
    promises: list[Promise]
    period: str
    periods: list[dict[str, Any]]  # ledger of every plan in every period
    mix: dict[str, int]
    energy: list[dict[str, Any]]  # model, kind, meter, joules, requests
    billed_joules: float
    unmetered: int
    savings: Savings | None
    reliability: Reliability | None
    series: Series
    settings: dict[str, Any]
    metric: str | None
    missing: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data; NaN never occurs."""
        plain = asdict(self)
        for promise, own in zip(self.promises, plain["promises"], strict=True):
            own.update(
                verdict=promise.verdict, certainty=promise.certainty, estimated_share=promise.estimated_share
            )
        return plain


# ---- reading -------------------------------------------------------------------------------------


@dataclass
class _Ledger:
    """The finished requests, in order, as columns; NaN where a value is null."""

    models: list[str | None] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    numbers: list[tuple[float, ...]] = field(default_factory=list)

    COLUMNS = ("explored", "accuracy", "estimated_accuracy", "joules", "billed_joules", "queue")

    def add(self, model: str | None, plan: str | None, values: Sequence[Any]) -> None:
        self.models.append(model)
        self.plans.append(plan or "")
        self.numbers.append(tuple(math.nan if value is None else float(value) for value in values))

    def columns(self) -> dict[str, Floats]:
        table = np.array(self.numbers, float).reshape(-1, len(self.COLUMNS))
        return dict(zip(self.COLUMNS, table.T, strict=True))


def make_report(path: str, alpha: float | None = None) -> Report:
    """Read a state or an output file.

    Args:
        alpha: the target, for an output file: it doesn't hold it. A state knows its own.

    Raises:
        InputError, StateError: the file is missing or is neither.
    """
    return _from_state(path) if path != STDIN and _is_database(path) else _from_output(path, alpha)


def _is_database(path: str) -> bool:
    try:
        with Path(path).open("rb") as handle:
            return handle.read(16) == b"SQLite format 3\0"
    except OSError as error:
        raise InputError(
            f"{path}: can't be read: {error.strerror}. Name a state file or the output of `messcli route`"
        ) from None


def _from_state(path: str) -> Report:
    # Read-only, without the lock: a report can be had while a run goes on. With no writer there is no
    # write-ahead log either, and `immutable` keeps SQLite from leaving an empty one behind.
    file = Path(path).resolve()
    quiet = "" if file.with_name(file.name + "-wal").exists() else "&immutable=1"
    uri = f"{file.as_uri()}?mode=ro{quiet}"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            return _read_state(db, path)
    except sqlite3.DatabaseError as error:
        raise StateError(f"{path}: can't be read: {error}. Restore it from a copy") from None


def _read_state(db: sqlite3.Connection, path: str) -> Report:
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StateError(f"{path}: is a database of another program. Name a state of messcli")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StateError(f"{path}: was written by a newer messcli (schema {version}). Upgrade messcli")
    meta = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM meta")}
    signature = meta.get("signature", {})
    if signature.get("policy") == "record":
        raise InputError(f"{path}: is the state of a recording. Judge its table with `messcli simulate`")
    names = [model["name"] for model in signature.get("zoo", {}).get("models", [])]
    row = db.execute("SELECT value FROM settings ORDER BY rowid DESC LIMIT 1").fetchone()
    settings = {**(json.loads(row[0]) if row else {})}
    settings.update((name, signature.get(name)) for name in ("policy", "predictor", "window", "seed"))
    ledger = _Ledger()
    failed = 0
    query = (
        "SELECT t, model, plan, explored, accuracy, estimated_accuracy, joules, billed_joules, queue "
        "FROM requests ORDER BY seq"
    )
    for t, model, plan, *values in db.execute(query):
        failed += model is None
        if t is not None:
            ledger.add(model, plan, values)
    energy = [
        dict(zip(("model", "kind", "meter", "joules", "requests"), row, strict=True))
        for row in db.execute(_ENERGY)
    ]
    accounts = [
        dict(zip(_ACCOUNT_FIELDS, row, strict=True))
        for row in db.execute(f"SELECT {', '.join(_ACCOUNT_FIELDS)} FROM accounts ORDER BY period, plan")  # noqa: S608  # our own names
    ]
    period = str(meta.get("period") or settings.get("period") or "")
    of_period = len(ledger.models)
    if version >= 2:
        row = db.execute("SELECT requests FROM periods WHERE name = ?", (period,)).fetchone()
        of_period = row[0] if row else of_period
    alphas = {account["plan"]: account["alpha"] for account in accounts if account["period"] == period}
    return _report(
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
    )


_ENERGY = "SELECT model, kind, meter, joules, requests FROM energy ORDER BY kind, model"
_ACCOUNT_FIELDS = (
    "period", "plan", "alpha", "queue", "observed", "observed_sum", "estimated", "estimated_sum",
    "explored", "failed",
)  # fmt: skip


def _from_output(path: str, alpha: float | None) -> Report:
    ledger = _Ledger()
    failed = 0
    energy: dict[tuple[str, str, str], tuple[float, int]] = {}
    seen: set[str] = set()
    for number, row in _rows(path):
        if "models" in row and "model" not in row:
            raise InputError(
                f"{path}:{number}: is an outcomes table. `messcli simulate` reads it; `report` takes a state or "
                "the output of `messcli route`"
            )
        if "model" not in row and "error" not in row:
            raise InputError(
                f'{path}:{number}: has no "model": no row of `messcli route`. Name its output, or a state'
            )
        seen.update(row)
        model = row.get("model")
        if model is None:
            failed += 1
            continue
        ledger.add(model, row.get("plan"), [row.get(name) for name in _Ledger.COLUMNS])
        meter = row.get("meter") or "?"
        parts = [(model, "served", row.get("joules"))]
        if row.get("explored") and row.get("joules") is not None and row.get("billed_joules") is not None:
            parts.append(("other models", "exploration", row["billed_joules"] - row["joules"]))
        for name, kind, joules in parts:
            if joules is not None:
                known, count = energy.get((name, kind, meter), (0.0, 0))
                energy[name, kind, meter] = (known + joules, count + 1)
    missing = [
        "overhead joules (loading, learning, idle): only the state has them",
        "which models an exploration's further joules went to",
        "earlier periods and settings",
    ]
    missing += [f'the column "{name}"' for name in _Ledger.COLUMNS if name not in seen]
    if alpha is None:
        missing.append("alpha: give it with --alpha")
    beside = Path(f"{path}.state")
    if path != STDIN and beside.is_file():
        missing.append(f"all of which stand in {beside}: messcli report {beside}")
    return _report(
        path,
        "output",
        ledger,
        failed=failed,
        alphas=dict.fromkeys(ledger.plans, alpha),
        of_period=len(ledger.models),
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
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("expected an object")
                yield number, row
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: neither a state nor JSON lines: {error}. Name the output of `messcli route`"
            ) from None
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: can't be read on: {error}. Repair the file") from None


def _order_of(ledger: _Ledger) -> list[str]:
    """Models by their mean joules, cheapest first, what explorations serve last: a file doesn't tell the zoo."""
    sums: dict[str, list[float]] = {}
    explored: dict[str, int] = {}
    for model, row in zip(ledger.models, ledger.numbers, strict=True):
        if model is not None:
            sums.setdefault(model, []).append(row[3])
            if row[0] == 1.0:
                explored[model] = explored.get(model, 0) + 1
    last = max(explored, key=lambda name: explored[name], default=None)

    def key(name: str) -> tuple[bool, float]:
        mean = float(np.nanmean(sums[name])) if not np.isnan(sums[name]).all() else math.inf
        return name == last, mean

    return sorted(sums, key=key)


# ---- computing -----------------------------------------------------------------------------------


def _report(
    source: str,
    kind: str,
    ledger: _Ledger,
    *,
    failed: int,
    alphas: Mapping[str, float | None],
    of_period: int,
    names: Sequence[str],
    energy: list[dict[str, Any]],
    period: str,
    periods: list[dict[str, Any]],
    settings: dict[str, Any],
    metric: str | None,
    missing: list[str],
) -> Report:
    columns = ledger.columns()
    models = np.array([model or "" for model in ledger.models], dtype=object)
    plans = np.array(ledger.plans, dtype=object)
    served = models != ""
    recent = np.arange(len(models)) >= len(models) - of_period
    promises = [
        _promise(
            plan, alpha, {name: column[recent & served & (plans == plan)] for name, column in columns.items()}
        )
        for plan, alpha in alphas.items()
    ]
    billed = columns["billed_joules"]
    overhead = sum(row["joules"] for row in energy if row["kind"] == "overhead") if kind == "state" else None
    kinds = ("served", "exploration", "overhead")
    order = [*names, *(name for name in dict.fromkeys(models[served].tolist()) if name not in names)]
    return Report(
        source=source,
        kind=kind,
        requests=len(models),
        failed=failed,
        explored=int(np.nansum(columns["explored"])),
        promises=promises,
        period=period,
        periods=periods,
        mix={name: int((models == name).sum()) for name in order},
        energy=sorted(
            energy,
            key=lambda row: (
                kinds.index(row["kind"]),
                order.index(row["model"]) if row["model"] in order else len(order),
            ),
        ),
        billed_joules=float(np.nansum(billed)),
        unmetered=int(np.isnan(billed[served]).sum()),
        savings=_savings(columns, models, order[-1] if order else None, overhead),
        reliability=_reliability(columns, models),
        series=_series(columns, models, order),
        settings=settings,
        metric=metric,
        missing=missing,
    )


def _promise(plan: str, alpha: float | None, columns: Mapping[str, Floats]) -> Promise:
    accuracy, estimate = columns["accuracy"], columns["estimated_accuracy"]
    observed = ~np.isnan(accuracy)
    estimated = estimate[~observed & ~np.isnan(estimate)]
    queue = columns["queue"]
    return Promise(
        plan=plan,
        alpha=alpha,
        observed=mean_interval(accuracy[observed]) if observed.any() else None,
        estimated=float(estimated.mean()) if len(estimated) else None,
        estimated_count=len(estimated),
        queue=float(queue[-1]) if len(queue) and not math.isnan(queue[-1]) else None,
    )


def mean_interval(values: Floats) -> Interval:
    """The mean of a sequence and a confidence interval for its long-run mean, by batch means.

    Served accuracies depend on each other: the queue answers a bad stretch with better models. The values
    are cut into BATCHES stretches in order, whose means depend on each other far less; Student's t over
    them gives the interval (Law and Kelton, Simulation Modeling and Analysis, section 9.5.3). With fewer
    than ten values per batch, single values take the batches' place.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped,unused-ignore]

    count, mean = len(values), float(values.mean())
    batched = count >= 10 * BATCHES
    parts = [part.mean() for part in np.array_split(values, BATCHES)] if batched else values.tolist()
    method = (
        f"batch means ({BATCHES} stretches in order), Student's t"
        if batched
        else "Student's t over single requests"
    )
    if len(parts) < 2:
        return Interval(mean, 0.0, 1.0, count, "one value: nothing is known of the spread")
    error = float(np.std(parts, ddof=1)) / math.sqrt(len(parts))
    reach = float(stdtrit(len(parts) - 1, 0.5 + LEVEL / 2)) * error
    return Interval(mean, max(0.0, mean - reach), min(1.0, mean + reach), count, method)


def _savings(
    columns: Mapping[str, Floats], models: NDArray[Any], largest: str | None, overhead: float | None
) -> Savings | None:
    billed, joules = columns["billed_joules"], columns["joules"]
    paid = ~np.isnan(billed)
    own = (models == largest) & ~np.isnan(joules)
    by_chance = own & (columns["explored"] == 1.0)
    if largest is None or not own.any() or not paid.any():
        return None
    if by_chance.sum() >= MINIMUM:
        chosen, basis = by_chance, "explorations, which a coin picked, not difficulty"
    else:
        chosen, basis = own, "requests it served, with few explorations among them: harder ones may weigh in"
    values = joules[chosen]
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    per_request = float(billed[paid].mean())
    extra = None if overhead is None else overhead / int(paid.sum())
    return Savings(
        largest=largest,
        largest_joules=mean,
        largest_error=error if math.isfinite(error) else 0.0,
        basis=f"its mean over {len(values)} {basis}",
        billed_joules=per_request,
        overhead_joules=extra,
        share=1.0 - per_request / mean if mean else 0.0,
        share_with_overhead=None if extra is None or not mean else 1.0 - (per_request + extra) / mean,
    )


def _reliability(columns: Mapping[str, Floats], models: NDArray[Any]) -> Reliability | None:
    both = ~np.isnan(columns["accuracy"]) & ~np.isnan(columns["estimated_accuracy"])
    count = int(both.sum())
    if count < MINIMUM:
        return None
    observed, estimated = columns["accuracy"][both], columns["estimated_accuracy"][both]
    residuals = observed - estimated
    own_mean = np.empty(count)
    for name in set(models[both].tolist()):
        own = models[both] == name
        own_mean[own] = observed[own].mean()
    order = np.argsort(estimated, kind="stable")
    bins = []
    for part in np.array_split(order, min(BINS, count // 10)):
        spread = float(observed[part].std(ddof=1)) / math.sqrt(len(part))
        bins.append(Bin(float(estimated[part].mean()), float(observed[part].mean()), spread, len(part)))
    at = np.flatnonzero(both)
    drift = [
        (int(at[part[-1]]) + 1, float(residuals[part].mean()))
        for part in np.array_split(np.arange(count), min(10, count // 10))
    ]
    return Reliability(
        count=count,
        bias=float(residuals.mean()),
        rmse=math.sqrt(float((residuals**2).mean())),
        rmse_of_means=math.sqrt(float(((observed - own_mean) ** 2).mean())),
        calibration_error=sum(abs(b.estimated - b.observed) * b.count for b in bins) / count,
        bins=bins,
        drift=drift,
    )


def _series(columns: Mapping[str, Floats], models: NDArray[Any], order: Sequence[str]) -> Series:
    count = len(models)
    parts = [part for part in np.array_split(np.arange(count), min(PARTS, max(1, count))) if len(part)]
    accuracy = columns["accuracy"]
    observed = ~np.isnan(accuracy)
    sums, counts = np.cumsum(np.where(observed, accuracy, 0.0)), np.cumsum(observed)

    def known(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    def mean(values: Floats) -> float | None:
        inside = values[~np.isnan(values)]
        return float(inside.mean()) if len(inside) else None

    return Series(
        requests=[int(part[-1]) + 1 for part in parts],
        queue=[known(columns["queue"][part[-1]]) for part in parts],
        accuracy=[float(sums[p[-1]] / counts[p[-1]]) if counts[p[-1]] else None for p in parts],
        part_accuracy=[mean(accuracy[part]) for part in parts],
        billed_joules=[mean(columns["billed_joules"][part]) for part in parts],
        mix={name: [float((models[part] == name).mean()) for part in parts] for name in order},
    )


# ---- saying it -----------------------------------------------------------------------------------


def report_lines(report: Report) -> list[str]:
    """The report, for people."""
    text = [f"{report.source} ({report.kind})"]
    failed = f", {report.failed} failed" if report.failed else ""
    share = report.explored / max(1, report.requests)
    text.append(f"{report.requests} requests routed, {report.explored} explored ({share:.1%}){failed}")
    if report.settings.get("policy"):
        shown = ("policy", "predictor", "window", "seed", "v", "c", "learn")
        known = [f"{n} {report.settings[n]}" for n in shown if report.settings.get(n) is not None]
        text.append(", ".join(known))
    if report.metric:
        text.append(f"metric {report.metric}")
    text += ["", "Promise" + (f", period {report.period}" if report.period else "")]
    for promise in report.promises:
        text += [f"  {line}" for line in promise_lines(promise)]
    if len({account["period"] for account in report.periods}) > 1:
        text += ["", "Periods", *_period_lines(report.periods)]
    text += ["", "Served by"]
    for name, count in report.mix.items():
        text.append(f"  {name}: {count} ({count / max(1, report.requests):.1%})")
    text += ["", "Energy", *(f"  {line}" for line in energy_lines(report))]
    text += ["", "Queue", f"  {_queue_line(report.series)}"]
    text += ["", "Estimates", *(f"  {line}" for line in reliability_lines(report.reliability))]
    if report.missing:
        text += ["", f"Not in this {report.kind}", *(f"  {what}" for what in report.missing)]
    return text


def promise_lines(promise: Promise) -> list[str]:
    name = f"plan {promise.plan}: " if promise.plan else ""
    target = "alpha unknown" if promise.alpha is None else f"alpha {promise.alpha:g}"
    text = []
    if promise.observed is not None:
        seen = promise.observed
        verdict = {"kept": "SLA kept", "missed": "SLA MISSED", "unknown": "no verdict"}[promise.verdict]
        text.append(f"{name}{seen.mean:.4f} observed over {seen.count} requests, {target}: {verdict}")
        text.append(
            f"  {LEVEL:.0%} interval of the long-run mean: {seen.low:.4f} to {seen.high:.4f} ({seen.method})"
        )
        if promise.certainty:
            text.append(f"  {promise.certainty}")
    else:
        text.append(f"{name}nothing observed (no references), {target}")
    if promise.estimated is not None:
        text.append(
            f"  {promise.estimated_share:.1%} rests on estimates: {promise.estimated_count} requests without "
            f"reference, estimated {promise.estimated:.4f}; not part of the mean above"
        )
    else:
        text.append("  nothing rests on estimates")
    return text


def _period_lines(periods: Sequence[Mapping[str, Any]]) -> list[str]:
    text = []
    for account in periods:
        observed = account["observed"]
        mean = f"{account['observed_sum'] / observed:.4f}" if observed else "nothing"
        where = " ".join(part for part in (account["period"] or "(first)", account["plan"]) if part)
        text.append(
            f"  {where}: {mean} observed over {observed}, alpha {account['alpha']:g}, {account['estimated']} "
            f"estimated, {account['explored']} explored, {account['failed']} failed"
        )
    return text


def energy_lines(report: Report) -> list[str]:
    text = []
    for row in report.energy:
        who = row["model"] or "(no model)"
        calls = f" over {row['requests']} requests" if row["requests"] else ""
        text.append(f"{who}, {row['kind']}: {row['joules']:.4g} J{calls} ({row['meter']})")
    text.append(f"billed to requests: {report.billed_joules:.4g} J")
    if report.unmetered:
        text.append(f"{report.unmetered} requests whose joules aren't known: in no sum")
    saved = report.savings
    if saved is None:
        text.append("savings: unknown, the largest model was never read")
        return text
    text.append(
        f"against {saved.largest} for everything: {saved.billed_joules:.4g} J billed per request against "
        f"{saved.largest_joules:.4g} ± {saved.largest_error:.2g} J: {saved_words(saved.share)}"
    )
    if saved.share_with_overhead is None:
        text.append("  overhead (loading, learning, idle) isn't known and not counted")
    else:
        text.append(
            f"  with all overhead ({saved.overhead_joules:.4g} J per request: loading, learning, idle) counted as "
            f"ours: {saved_words(saved.share_with_overhead)}"
        )
    text.append(f"  basis: {saved.basis}")
    return text


def saved_words(share: float) -> str:
    return f"{share:.1%} saved" if share >= 0 else f"{-share:.1%} MORE"


def _queue_line(series: Series) -> str:
    known = [value for value in series.queue if value is not None]
    if not known:
        return "not known"
    return f"now {known[-1]:.3g}, most {max(known):.3g}: {_sparkline(known)}"


def _sparkline(values: Sequence[float]) -> str:
    top = max(values) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(value / top * 7.999))] for value in values)


def reliability_lines(reliability: Reliability | None) -> list[str]:
    if reliability is None:
        return [f"fewer than {MINIMUM} requests have both an estimate and an accuracy"]
    better = reliability.rmse < reliability.rmse_of_means
    text = [
        f"over {reliability.count} served requests: observed - estimated {reliability.bias:+.4f} on average; "
        f"calibration error {reliability.calibration_error:.4f}",
        f"root mean square error {reliability.rmse:.4f}, {'better' if better else 'NO better'} than each model's "
        f"mean in hindsight ({reliability.rmse_of_means:.4f})",
        "estimated  observed        requests",
    ]
    text += [
        f"   {b.estimated:.3f}    {b.observed:.3f} ± {b.error:.3f}  {b.count:6d}" for b in reliability.bins
    ]
    drift = ", ".join(f"{value:+.3f}" for _, value in reliability.drift)
    text.append(f"observed - estimated over time: {drift}")
    return text
