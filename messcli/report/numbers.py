"""The numbers of a report: where the promise stands, what was saved, how far the estimates can be trusted.

Knows the ledger of finished requests; knows nothing of where it was read or how it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.metrics import failure_words, keeps, with_failures
from messcli.report.audits import Standing
from messcli.report.bill import Alone, by_answers, headline, of_largest
from messcli.tariff import Spent

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
    audits: Standing | None = None  # where answers are audited: then it is what the promise is judged by
    failed: int = 0  # requests that nobody answered: in no mean above

    @property
    def worst(self) -> float | None:
        """The mean that the promise is judged by, with accuracy 0 for failed requests; None where nothing is known."""
        if self.audits is not None:
            count = self.audits.known + self.audits.estimated
            return with_failures(self.audits.judged_by, count, self.failed)
        if self.observed is None:
            return 0.0 if self.failed and not self.estimated_count else None
        return with_failures(self.observed.mean, self.observed.count, self.failed)

    @property
    def failures(self) -> str:
        """What failed requests make of the promise, for people; "" where there are none."""
        if self.alpha is None or self.worst is None:
            return f"{self.failed} failed; in no mean above" if self.failed else ""
        if self.audits is not None:
            seen, count = self.audits.judged_by, self.audits.known + self.audits.estimated
        else:
            seen, count = (self.observed.mean, self.observed.count) if self.observed else (0.0, 0)
        return failure_words(seen, count, self.failed, self.alpha)

    @property
    def estimated_share(self) -> float:
        """The part of the plan's requests that rests on estimates."""
        observed = self.observed.count if self.observed else 0
        return self.estimated_count / max(1, observed + self.estimated_count)

    @property
    def verdict(self) -> str:
        """kept | missed | unknown: by what audits tell where there are any, else by the observed mean alone."""
        if self.audits is not None:
            return self.audits.verdict
        if self.alpha is None or self.observed is None:
            return "unknown"
        return "kept" if keeps(self.observed.mean, self.alpha) else "missed"

    @property
    def certainty(self) -> str:
        """What the interval says of traffic like this going on."""
        if self.audits is not None:
            return ""
        if self.alpha is None or self.observed is None:
            return ""
        if self.observed.low >= self.alpha:
            return "the whole interval lies above alpha"
        if self.observed.high < self.alpha:
            return "the whole interval lies below alpha"
        return "alpha lies within the interval: the controller aims at alpha, so that is usual"


@dataclass(frozen=True, slots=True)
class Savings:
    """The total beside the largest model answering everything. Joules are per request."""

    largest: str
    largest_joules: float  # everything on it
    largest_error: float  # of that, in joules: of the cost model, or the standard error of a mean
    at_most: bool  # `largest_joules` is no less than it would be: batches were smaller than full ones
    basis: str  # of `largest_joules`
    billed_joules: float
    overhead_joules: float | None  # None where it isn't known: the total is what was billed
    total_joules: float
    of_largest: float  # total / largest
    share: float  # 1 - of_largest: the saved part; < 0: it took more

    def words(self) -> str:
        """The one comparison, for people; `basis` belongs beside it."""
        error = self.largest_error / self.largest_joules
        alone = Alone(self.largest, self.largest_joules, error or None, self.at_most, self.basis)
        return headline(self.total_joules, alone, overhead_known=self.overhead_joules is not None)


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
    served_joules: dict[str, list[float | None]]  # model -> mean of the answers it served within the part
    mix: dict[str, list[float]]  # model -> share within the part


@dataclass(frozen=True, slots=True)
class Cost:
    """What all runs cost, by the prices of the zoo file."""

    joules: float  # that money and grams cover; less than the total after runs without prices
    money: float | None
    grams: float | None  # of CO2 equivalents
    currency: str
    basis: str

    def words(self, total_joules: float) -> str:
        """For people, with the part of the total that it covers where that isn't all of it."""
        covered = self.joules / total_joules if total_joules else 1.0
        part = "" if covered > 0.9995 else f" for {covered:.1%} of the total, the runs with prices"
        return Spent(self.joules, self.money, self.grams).words(self.currency) + part


@dataclass(frozen=True, slots=True)
class Load:
    """What a model took while it made about so many answers at a time."""

    model: str
    running: float  # mean over the tokens
    joules: float
    tokens: int  # written

    @property
    def joules_per_token(self) -> float:
        """Reading the prompts included."""
        return self.joules / self.tokens


def loads_of(kept: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]) -> list[Load]:
    """What a state keeps of the loads, by model in the zoo's order and by rising load."""
    return [
        Load(name, times / tokens, joules, int(tokens))
        for name in [*names, *(name for name in kept if name not in names)]
        for _, (joules, tokens, times) in sorted(
            (int(about), sums) for about, sums in kept.get(name, {}).items()
        )
        if tokens > 0
    ]


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
    overhead_joules: float | None  # None where only a state would know it
    overhead_parts: Mapping[str, float]  # by what it was for, as far as it is known
    unmetered: int
    savings: Savings | None
    reliability: Reliability | None
    series: Series
    settings: dict[str, Any]
    metric: str | None
    missing: list[str] = field(default_factory=list)
    cost: Cost | None = None  # None: the zoo file states no prices
    loads: list[Load] = field(default_factory=list)  # as far as runs that ended have read them

    @property
    def total_joules(self) -> float:
        """Billed and, where it is known, overhead: what the headline says."""
        return self.billed_joules + (self.overhead_joules or 0.0)

    def as_json(self) -> dict[str, Any]:
        """Plain data; NaN never occurs."""
        plain = {**asdict(self), "total_joules": self.total_joules}
        for promise, own in zip(self.promises, plain["promises"], strict=True):
            own.update(
                verdict=promise.verdict,
                certainty=promise.certainty,
                estimated_share=promise.estimated_share,
                with_failures=promise.worst,
            )
        return plain


@dataclass
class Ledger:
    """The finished requests, in order, as columns; NaN where a value is null."""

    models: list[str | None] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    numbers: list[tuple[float, ...]] = field(default_factory=list)

    COLUMNS = ("explored", "accuracy", "estimated_accuracy", "joules", "billed_joules", "queue")

    def add(self, model: str | None, plan: str | None, values: Sequence[Any]) -> None:
        """The next request; `values` in the order of COLUMNS. `model` None: it failed."""
        self.models.append(model)
        self.plans.append(plan or "")
        self.numbers.append(tuple(math.nan if value is None else float(value) for value in values))

    def columns(self) -> dict[str, Floats]:
        """By name, each of shape (requests,)."""
        table = np.array(self.numbers, float).reshape(-1, len(self.COLUMNS))
        return dict(zip(self.COLUMNS, table.T, strict=True))


def summed_up(
    source: str,
    kind: str,
    ledger: Ledger,
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
    alone: Alone | None = None,
    overhead_parts: Mapping[str, float] | None = None,
    cost: Cost | None = None,
    audits: Mapping[str, Standing] | None = None,
    loads: list[Load] | None = None,
    lost: Mapping[str, int] | None = None,
) -> Report:
    """The report on `ledger`.

    Args:
        alphas: plan -> target, of the open period; None: nobody knows it.
        of_period: how many of the last requests belong to the open period.
        names: the models, smallest first, as far as they are known.
        energy, periods, settings, metric, missing: as `Report` has them.
        alone: what everything on the largest takes, where a run has found it out.
        overhead_parts: of the overhead, by what it was for.
        cost: what all runs cost, where prices were stated.
        audits: plan -> what audits tell, where there are any.
        loads: what models took in load.
        lost: plan -> requests of the open period that nobody answered.
    """
    columns = ledger.columns()
    models = np.array([model or "" for model in ledger.models], dtype=object)
    plans = np.array(ledger.plans, dtype=object)
    served = models != ""
    recent = np.arange(len(models)) >= len(models) - of_period
    promises = [
        _promise(
            plan,
            alpha,
            (audits or {}).get(plan),
            (lost or {}).get(plan, 0),
            {name: column[recent & served & (plans == plan)] for name, column in columns.items()},
        )
        for plan, alpha in alphas.items()
    ]
    billed = columns["billed_joules"]
    overhead = sum(row["joules"] for row in energy if row["kind"] == "overhead") if kind == "state" else None
    kinds = ("served", "exploration", "look", "check", "audit", "judged", "failed", "overhead")
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
        overhead_joules=overhead,
        overhead_parts=overhead_parts or {},
        unmetered=int(np.isnan(billed[served]).sum()),
        savings=_savings(columns, models, order[-1] if order else None, overhead, alone),
        reliability=_reliability(columns, models),
        series=_series(columns, models, order),
        settings=settings,
        metric=metric,
        missing=missing,
        cost=cost,
        loads=loads or [],
    )


def _promise(
    plan: str, alpha: float | None, audits: Standing | None, failed: int, columns: Mapping[str, Floats]
) -> Promise:
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
        audits=audits,
        failed=failed,
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
    columns: Mapping[str, Floats],
    models: NDArray[Any],
    largest: str | None,
    overhead: float | None,
    alone: Alone | None,
) -> Savings | None:
    billed = columns["billed_joules"]
    paid = ~np.isnan(billed)
    if alone is None and largest is not None:
        alone = _by_its_answers(columns, models, largest)
    if alone is None or not paid.any() or not alone.joules:
        return None
    extra = None if overhead is None else overhead / int(paid.sum())
    return _beside(float(billed[paid].mean()), extra, alone)


def compared(report: Report, alone: Alone) -> Report:
    """The report with its total beside another figure for everything on the largest."""
    saved = report.savings
    if saved is None:
        return report
    return replace(report, savings=_beside(saved.billed_joules, saved.overhead_joules, alone))


def _beside(billed: float, overhead: float | None, alone: Alone) -> Savings:
    total = billed + (overhead or 0.0)
    return Savings(
        largest=alone.model,
        largest_joules=alone.joules,
        largest_error=(alone.error or 0.0) * alone.joules,
        at_most=alone.at_most,
        basis=alone.basis,
        billed_joules=billed,
        overhead_joules=overhead,
        total_joules=total,
        of_largest=of_largest(total, alone),
        share=1.0 - of_largest(total, alone),
    )


def _by_its_answers(columns: Mapping[str, Floats], models: NDArray[Any], largest: str) -> Alone | None:
    joules = columns["joules"]
    own = (models == largest) & ~np.isnan(joules)
    if not own.any():
        return None
    by_chance = own & (columns["explored"] == 1.0)
    if by_chance.sum() >= MINIMUM:
        chosen, which = by_chance, "explorations, which a coin picked, not difficulty"
    else:
        chosen, which = own, "requests it served, with few explorations among them: harder ones may weigh in"
    values = joules[chosen]
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    basis = f"its mean over {len(values)} {which}; in batches as they came"
    return by_answers(largest, mean, error / mean if mean else None, basis, recorded=False)


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
        served_joules={
            name: [mean(columns["joules"][part][models[part] == name]) for part in parts] for name in order
        },
        mix={name: [float((models[part] == name).mean()) for part in parts] for name in order},
    )
