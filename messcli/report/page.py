"""A report as one self-contained page: no script, nothing loaded from elsewhere, light and dark.

The total and the promise come first, then what a manager asks, then what an engineer asks. What stands in
page.html.jinja is escaped by Jinja2; only charts are markup. Knows a Report; reads no other file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from messcli.report.bill import overhead_words
from messcli.report.numbers import LEVEL, Load, Promise, Reliability, Report, Savings
from messcli.report.svg import STYLE, Chart, Series, interval_picture
from messcli.report.text import joules_words

_TONES = {"kept": "good", "missed": "bad"}
_KINDS = ("served", "exploration", "look", "overhead")
_AS = {
    "audit": "exploration",
    "judged": "exploration",
    "failed": "exploration",
    "check": "look",
}  # others, asked as well
_WIDTH, _HEIGHT = 480, 300  # of a chart: small, so that letters can be read on a phone


def page(report: Report) -> str:
    """The whole page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("page.html.jinja")
    several = len({account["period"] for account in report.periods}) > 1
    return template.render(
        title=f"messcli report: {report.source.rsplit('/', 1)[-1]}",
        chart_style=Markup(STYLE),  # noqa: S704  # our own constant
        headline=_headline(report),
        promises=[_promise(promise) for promise in report.promises],
        short=list(_short(report)),
        cards=list(_cards(report)),
        charts=[_drawn(chart) for chart in _over_time(report)],
        settings=_settings(report),
        models=list(_models(report)),
        meters=_meters(report),
        energy=list(_energy(report)),
        load_charts=[_drawn(chart) for chart in _load(report)],
        promise_head=("plan", "promised", "observed mean", f"{LEVEL:.0%} interval", "requests", "on estimates",
                      "verdict"),
        promise_rows=[_promise_row(promise) for promise in report.promises],
        certainty=list(_certainty(report)),
        reliability=_reliability(report.reliability),
        period_head=("period", "plan", "promised", "observed mean", "observed", "estimated", "explored", "failed"),
        periods=[_period_row(account) for account in report.periods] if several else [],
        notes=list(_notes(report)),
    )  # fmt: skip


def _drawn(chart: Chart) -> Markup:
    return Markup(chart.svg(standalone=False))  # noqa: S704  # the chart escapes its labels


# ---- the first screen ----------------------------------------------------------------------------


def _headline(report: Report) -> dict[str, str]:
    what = "in total" if report.overhead_joules is not None else "billed"
    saved = report.savings
    found = {"total": f"{joules_words(report.total_joules)} {what}", "saved": "", "tone": "", "against": ""}
    requests = f"For {report.requests:,} request{'' if report.requests == 1 else 's'}"
    if saved is None:
        found["against"] = f"{requests}. What the largest model alone would have taken isn't known."
    else:
        share = saved.share
        found["saved"] = f"{_at_least(saved)}{abs(share):.0%} {'less' if share >= 0 else 'more'}"
        found["tone"] = "good" if share > 0 else "bad"
        alone = joules_words(saved.largest_joules * report.requests)
        found["against"] = f"{requests}, against {alone} with {saved.largest} alone: {saved.basis}."
    return found


def _at_least(saved: Savings) -> str:
    """Full batches of the largest take less than `largest_joules`: less is saved, or more is lost, than is said."""
    if not saved.at_most:
        return ""
    return "at most " if saved.share >= 0 else "at least "


def _promise(promise: Promise) -> dict[str, Any]:
    name = f"{promise.plan}: " if promise.plan else ""
    seen, audits = promise.observed, promise.audits
    if audits is not None:
        likely = min(1.0, audits.estimate + 2.0 * audits.standard_error)
        shown = interval_picture(audits.bound, audits.estimate, likely, promise.alpha)
        return {
            "name": name,
            "words": {"kept": "Promise kept", "missed": "Promise missed"}.get(audits.verdict, "no verdict"),
            "tone": _TONES.get(audits.verdict, ""),
            "mean": f": {audits.words()}.",
            "picture": Markup(shown),  # noqa: S704  # numbers alone
        }
    if seen is None:
        return {
            "name": name,
            "words": "no verdict",
            "tone": "",
            "mean": ": no request had a reference.",
            "picture": None,
        }
    words = {"kept": "Promise kept", "missed": "Promise missed", "unknown": "Nobody said what was promised"}
    target = "" if promise.alpha is None else f", promised {promise.alpha:g}"
    picture = Markup(interval_picture(seen.low, seen.mean, seen.high, promise.alpha))  # noqa: S704  # numbers alone
    return {
        "name": name,
        "words": words[promise.verdict],
        "tone": _TONES.get(promise.verdict, ""),
        "mean": f": mean accuracy {seen.mean:.4f} ({LEVEL:.0%} interval {seen.low:.4f} to {seen.high:.4f}){target}.",
        "picture": picture,
    }  # fmt: skip


# ---- for a manager -------------------------------------------------------------------------------


def _short(report: Report) -> Iterator[str]:
    """What happened, in sentences."""
    if report.requests:
        busiest = max(report.mix, key=lambda name: report.mix[name])
        share = report.mix[busiest] / report.requests
        yield (
            f"{busiest} answered {share:.0%} of the requests. {report.explored:,} requests "
            f"({report.explored / report.requests:.1%}) were put to every model, to learn which model is good enough."
        )
    saved = report.savings
    if saved is not None:
        yield (
            f"A request took {joules_words(report.total_joules / max(1, report.requests))}; with {saved.largest} alone "
            f"it would have been about {joules_words(saved.largest_joules)}."
        )
    yield from _full_engines(report)
    unseen = sum(promise.estimated_count for promise in report.promises)
    if unseen:
        yield f"{unseen:,} requests had no reference: their accuracy is an estimate, and in no mean above."
    if report.failed:
        yield f"{report.failed:,} requests failed. They are no part of the mean accuracy."
        for promise in report.promises:
            if promise.failures:
                yield f"{promise.plan}: {promise.failures}.".removeprefix(": ")
    if any("estimate" in row["meter"] for row in report.energy):
        yield "Joules are an estimate here (processor seconds times watts): no meter was read."


def _cards(report: Report) -> Iterator[dict[str, str]]:
    overhead = report.overhead_joules
    yield {
        "title": "Energy",
        "big": joules_words(report.total_joules),
        "tone": "",
        "note": "overhead isn't known: only the state has it"
        if overhead is None
        else f"{joules_words(report.billed_joules)} billed to requests, {joules_words(overhead)} overhead",
    }
    saved = report.savings
    if saved is not None:
        share = saved.share
        yield {
            "title": "Saved" if share >= 0 else "Spent more",
            "big": f"{_at_least(saved)}{abs(share):.0%}",
            "tone": "good" if share > 0 else "bad",
            "note": saved.words(),
        }
    cost = report.cost
    if cost is not None:
        yield {"title": "Cost", "big": cost.words(report.total_joules), "tone": "", "note": cost.basis}
    yield {
        "title": "Requests",
        "big": f"{report.requests:,}",
        "tone": "bad" if report.failed else "",
        "note": f"{report.failed:,} failed" if report.failed else "none failed",
    }
    yield {
        "title": "Explored",
        "big": f"{report.explored / max(1, report.requests):.1%}",
        "tone": "",
        "note": f"{report.explored:,} requests were put to every model",
    }


def _over_time(report: Report) -> Iterator[Chart]:
    series = report.series
    at = [float(number) for number in series.requests]
    alphas = {promise.alpha for promise in report.promises if promise.alpha is not None}
    if any(value is not None for value in series.accuracy):
        yield Chart(
            "Accuracy",
            "request",
            "observed accuracy",
            [
                Series("mean so far", at, _numbers(series.accuracy)),
                Series("recent stretch", at, _numbers(series.part_accuracy), "dashed", colour=7),
            ],
            rules=[(alpha, f"promised {alpha:g}") for alpha in sorted(alphas)],
            width=_WIDTH,
            height=_HEIGHT,
        )
    if any(value is not None for value in series.billed_joules):
        saved = report.savings
        yield Chart(
            "Energy",
            "request",
            "joules per request, all billed",
            [Series("billed", at, _numbers(series.billed_joules))],
            rules=[(saved.largest_joules, f"{saved.largest} alone")] if saved else [],
            width=_WIDTH,
            height=_HEIGHT,
        )
    if len(at) > 1:
        low = [0.0] * len(at)
        areas = []
        for name, shares in series.mix.items():
            top = [a + b for a, b in zip(low, shares, strict=True)]
            areas.append(Series(name, at, top, "area", low=low))
            low = top
        yield Chart(
            "Which model served",
            "request",
            "share of requests",
            areas,
            y_range=(0.0, 1.0),
            width=_WIDTH,
            height=_HEIGHT,
        )
    if any(value is not None for value in series.queue):
        yield Chart(
            "Queue: accuracy owed",
            "request",
            "queue length",
            [Series("queue", at, _numbers(series.queue))],
            width=_WIDTH,
            height=_HEIGHT,
        )


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


# ---- for an engineer -----------------------------------------------------------------------------


def _settings(report: Report) -> str:
    shown = ("policy", "predictor", "window", "seed", "v", "c", "learn")
    parts = [f"{name} {report.settings[name]}" for name in shown if report.settings.get(name) is not None]
    if report.metric:
        parts.append(f"metric {report.metric}")
    if report.period:
        parts.append(f"period {report.period}")
    return "; ".join(parts)


def _models(report: Report) -> Iterator[dict[str, Any]]:
    """A row per model, what belongs to no model, and the sum."""
    joules: dict[str, dict[str, float]] = {}
    for row in report.energy:
        own = joules.setdefault(row["model"] or "(no model)", dict.fromkeys(_KINDS, 0.0))
        kind = _AS.get(row["kind"], row["kind"])
        own[kind] = own.get(kind, 0.0) + row["joules"]
    total = sum(sum(own.values()) for own in joules.values())
    most = max((sum(own.values()) for own in joules.values()), default=0.0) or 1.0
    for name, own in joules.items():
        requests = report.mix.get(name, 0)
        yield {
            "name": name,
            "sum": False,
            "requests": f"{requests:,}" if requests else "",
            "each": f"{own['served'] / requests:.4g} J" if requests and own["served"] else "",
            "together": joules_words(sum(own.values())),
            "share": f"{sum(own.values()) / total:.1%}" if total else "",
            "bar": [(kind, f"{100 * value / most:.1f}") for kind, value in own.items() if value > 0],
            **{kind: joules_words(own[kind]) if own[kind] else "" for kind in _KINDS},
        }
    sums = {kind: sum(own[kind] for own in joules.values()) for kind in _KINDS}
    requests = sum(report.mix.values())
    yield {
        "name": "total",
        "sum": True,
        "requests": f"{requests:,}",
        "each": f"{total / requests:.4g} J" if requests else "",
        "together": joules_words(total),
        "share": "",
        "bar": [],
        **{kind: joules_words(value) if value else "" for kind, value in sums.items()},
    }


def _meters(report: Report) -> str:
    meters = ", ".join(dict.fromkeys(row["meter"] for row in report.energy))
    return f"Meters: {meters}." if meters else ""


def _energy(report: Report) -> Iterator[str]:
    saved = report.savings
    if saved is not None:
        overhead = (
            "overhead isn't known and not counted"
            if saved.overhead_joules is None
            else f"{saved.overhead_joules:.4g} J overhead"
        )
        yield (
            f"{saved.words()}. Per request: {saved.billed_joules:.4g} J billed, explorations included, and {overhead}. "
            f"Basis: {saved.basis}."
        )
    if parts := overhead_words(report.overhead_joules or 0.0, report.overhead_parts):
        yield f"Overhead: {parts}."
    if report.unmetered:
        yield f"{report.unmetered:,} requests whose joules aren't known are in no sum."


def _load(report: Report) -> Iterator[Chart]:
    by_model = _by_model(report.loads)
    if any(len(loads) > 1 for loads in by_model.values()):
        yield Chart(
            "Joules per token written",
            "answers being made at a time",
            "joules, prompts included",
            [
                Series(
                    name, [load.running for load in loads], [load.joules_per_token for load in loads], "both"
                )
                for name, loads in by_model.items()
            ],
            log_x=True,
            width=_WIDTH,
            height=_HEIGHT,
        )
    series = report.series
    at = [float(number) for number in series.requests]
    lines = [
        Series(name, at, _numbers(values))
        for name, values in series.served_joules.items()
        if any(value is not None for value in values)
    ]
    if lines and len(at) > 1:
        yield Chart(
            "Joules per served answer",
            "request",
            "joules; windows grow with requests",
            lines,
            width=_WIDTH,
            height=_HEIGHT,
        )


def _by_model(loads: Sequence[Load]) -> dict[str, list[Load]]:
    found: dict[str, list[Load]] = {}
    for load in loads:
        found.setdefault(load.model, []).append(load)
    return found


def _full_engines(report: Report) -> Iterator[str]:
    """What filling an engine saved, of the model that took the most."""
    several = [loads for loads in _by_model(report.loads).values() if len(loads) > 1]
    if several:
        loads = max(several, key=lambda loads: math.fsum(load.joules for load in loads))
        few, many = loads[0], loads[-1]
        mean = math.fsum(load.running * load.tokens for load in loads) / sum(load.tokens for load in loads)
        yield (
            f"{few.model} made {mean:.3g} answers at a time on average. A token took "
            f"{joules_words(many.joules_per_token)} with {many.running:.3g} at a time, and "
            f"{joules_words(few.joules_per_token)} with {few.running:.3g}."
        )


def _promise_row(promise: Promise) -> dict[str, Any]:
    seen, audits = promise.observed, promise.audits
    if audits is not None:
        return {
            "cells": [
                promise.plan or "(all)",
                "?" if promise.alpha is None else f"{promise.alpha:g}",
                f"{audits.estimate:.4f} (estimate)",
                f"at least {audits.bound:.4f}",
                f"{audits.known:,}, {audits.audited:,} of them by a coin",
                f"{audits.estimated:,}",
            ],
            "verdict": promise.verdict,
            "tone": _TONES.get(promise.verdict, ""),
        }
    estimated = f"{promise.estimated_share:.1%}"
    if promise.estimated is not None:
        estimated += f" (mean {promise.estimated:.4f})"
    return {
        "cells": [
            promise.plan or "(all)",
            "?" if promise.alpha is None else f"{promise.alpha:g}",
            "none" if seen is None else f"{seen.mean:.4f}",
            "" if seen is None else f"{seen.low:.4f} to {seen.high:.4f}",
            "0" if seen is None else f"{seen.count:,}",
            estimated,
        ],
        "verdict": promise.verdict,
        "tone": _TONES.get(promise.verdict, ""),
    }


def _certainty(report: Report) -> Iterator[str]:
    for promise in report.promises:
        if promise.observed is not None and promise.certainty:
            plan = f"{promise.plan}: " if promise.plan else ""
            yield f"{plan}{promise.certainty}. Interval: {promise.observed.method}."


def _reliability(reliability: Reliability | None) -> dict[str, Any] | None:
    if reliability is None:
        return None
    bins = reliability.bins
    points = Series(
        "estimated against observed",
        [b.estimated for b in bins],
        [b.observed for b in bins],
        "both",
        low=[b.observed - 1.96 * b.error for b in bins],
        high=[b.observed + 1.96 * b.error for b in bins],
    )
    low = min(min(points.x), min(points.low))
    high = max(max(points.x), max(points.high))
    span = (max(0.0, low - 0.02), min(1.0, high + 0.02))
    calibration = Chart(
        "Reliability: right is on the dashed line",
        "estimated accuracy",
        "observed accuracy",
        [points],
        x_range=span,
        y_range=span,
        diagonal=True,
        width=_WIDTH,
        height=_HEIGHT,
    )
    drift = Chart(
        "Drift: observed minus estimated",
        "request",
        "mean difference",
        [
            Series(
                "difference",
                [float(at) for at, _ in reliability.drift],
                [value for _, value in reliability.drift],
                "both",
            )
        ],
        rules=[(0.0, "no bias")],
        width=_WIDTH,
        height=_HEIGHT,
    )
    better = "better" if reliability.rmse < reliability.rmse_of_means else "no better"
    return {
        "charts": [_drawn(calibration), _drawn(drift)],
        "text": f"Over {reliability.count:,} served requests, what was observed lies {reliability.bias:+.4f} from the "
        f"estimate on average (calibration error {reliability.calibration_error:.4f}). The estimates' root mean "
        f"square error is {reliability.rmse:.4f}, {better} than each model's mean in hindsight "
        f"({reliability.rmse_of_means:.4f}).",
    }


def _period_row(account: Mapping[str, Any]) -> list[str]:
    return [
        account["period"] or "(first)",
        account["plan"] or "(all)",
        f"{account['alpha']:g}",
        f"{account['observed_sum'] / account['observed']:.4f}" if account["observed"] else "",
        *(f"{account[name]:,}" for name in ("observed", "estimated", "explored", "failed")),
    ]


def _notes(report: Report) -> Iterator[str]:
    yield (
        "Accuracy is observed where a request had a reference, else estimated; the two are never averaged together. "
        "The interval says where the mean would settle if such traffic went on; what was served is the observed "
        "mean itself."
    )
    yield (
        "The total is what requests were billed, by every model that ran, and the overhead: loading, learning, idle. "
        "The queue is the accuracy still owed: while it stays bounded, the promise is kept in the long run."
    )
    yield "The reliability is that of the models that were chosen; choosing favours estimates that are too high."
    if report.missing:
        yield f"Not in this {report.kind}: {'; '.join(report.missing)}."
