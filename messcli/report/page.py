"""A report as one self-contained page: no script, nothing loaded from elsewhere, light and dark.

Written for whoever pays: the verdict first, the numbers behind it below. Knows a Report; reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from messcli.report.numbers import LEVEL, Promise, Reliability, Report
from messcli.report.svg import STYLE, Chart, Series
from messcli.report.text import saved_words

_PAGE_STYLE = """
:root{color-scheme:light dark;--bg:#f5f6f7;--card:#fff;--ink:#1c2126;--soft:#5b6670;--line:#dfe3e7;
--good:#00795c;--bad:#b3261e;--bar0:#0b63b0;--bar1:#c45500;--bar2:#8a949d}
@media(prefers-color-scheme:dark){:root{--bg:#0f1215;--card:#171b1f;--ink:#e6eaee;--soft:#9aa7b2;--line:#2c343b;
--good:#3fcfa6;--bad:#ff8a80;--bar0:#69b1f5;--bar1:#ff9d4d;--bar2:#77838d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:34px 0 12px}p{margin:6px 0}
.soft{color:var(--soft)}small{color:var(--soft);font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(225px,1fr));gap:14px;margin-top:22px}
.card,.chart-box{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px}
.card .big{font-size:29px;font-weight:650;line-height:1.2;margin:2px 0}
.good{color:var(--good)}.bad{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:14px}
@media(max-width:520px){.charts{grid-template-columns:1fr}}
.chart-box{padding:8px}.chart-box svg{width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line);border-radius:10px;
border-spacing:0;overflow:hidden}
th,td{padding:7px 12px;text-align:right;border-top:1px solid var(--line);font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600;font-size:13px;border-top:0}th:first-child,td:first-child,td:has(.bar){text-align:left}
.bar{display:inline-block;height:10px;border-radius:3px;vertical-align:middle;min-width:1px}
.scroll{overflow-x:auto}td{white-space:nowrap}
.served{background:var(--bar0)}.exploration{background:var(--bar1)}.overhead{background:var(--bar2)}
"""


def page(report: Report) -> str:
    """The whole page."""
    title = f"messcli report: {report.source.rsplit('/', 1)[-1]}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_lead(report))}</p>',
        f'<div class="cards">{"".join(_cards(report))}</div>',
        "<h2>The promise</h2>",
        _promises(report),
        "<h2>Over time</h2>",
        f'<div class="charts">{"".join(_over_time(report))}</div>',
        "<h2>Energy</h2>",
        _energy(report),
        "<h2>How far the estimates can be trusted</h2>",
        _reliability(report.reliability),
    ]
    if len({account["period"] for account in report.periods}) > 1:
        body += ["<h2>Periods</h2>", _periods(report)]
    body += ["<h2>How to read this</h2>", *_notes(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_PAGE_STYLE}{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _lead(report: Report) -> str:
    parts = [f"{report.requests:,} requests over {len(report.mix)} models"]
    if report.settings.get("policy"):
        parts.append(f"policy {report.settings['policy']}")
    if report.metric:
        parts.append(f"metric {report.metric.split('|')[0]}")
    if report.period:
        parts.append(f"period {report.period}")
    return "; ".join(parts)


def _card(title: str, big: str, tone: str, note: str) -> str:
    return (
        f'<div class="card"><div class="soft">{escape(title)}</div><div class="big {tone}">{escape(big)}</div>'
        f"<small>{escape(note)}</small></div>"
    )


def _cards(report: Report) -> list[str]:
    cards = []
    for promise in report.promises[:4]:
        name = f"SLA, {promise.plan}" if promise.plan else "SLA"
        word, tone = {
            "kept": ("kept", "good"),
            "missed": ("missed", "bad"),
            "unknown": ("no verdict", ""),
        }[promise.verdict]
        if promise.observed is None:
            note = "no request had a reference"
        else:
            target = "" if promise.alpha is None else f", promised {promise.alpha:g}"
            note = f"mean accuracy {promise.observed.mean:.4f}{target}"
        cards.append(_card(name, word, tone, note))
    saved = report.savings
    if saved is not None:
        word = f"{saved.share:.0%}" if saved.share >= 0 else f"{-saved.share:.0%} more"
        title = "Energy saved" if saved.share >= 0 else "Energy spent"
        tone = "good" if saved.share > 0 else "bad"
        note = (
            f"{saved.billed_joules:.4g} J per request; {saved.largest} alone about "
            f"{saved.largest_joules:.4g} J (estimated)"
        )
        if saved.share_with_overhead is not None:
            note += f". With loading and idle counted as ours: {saved_words(saved.share_with_overhead)}"
        cards.append(_card(title, word, tone, note))
    explored = report.explored / max(1, report.requests)
    cards.append(
        _card(
            "Explored",
            f"{explored:.1%}",
            "",
            f"{report.explored:,} requests were put to every model to learn",
        )
    )
    failed = "none failed" if not report.failed else f"{report.failed:,} failed"
    cards.append(_card("Requests", f"{report.requests:,}", "bad" if report.failed else "", failed))
    return cards


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def _promises(report: Report) -> str:
    return _table(
        ["plan", "promised", "observed mean", f"{LEVEL:.0%} interval", "requests", "on estimates", "verdict"],
        [_promise_row(promise) for promise in report.promises],
    ) + "".join(
        f"<p><small>{escape(promise.plan + ': ' if promise.plan else '')}{escape(promise.certainty)}. "
        f"Interval: {escape(promise.observed.method)}.</small></p>"
        for promise in report.promises
        if promise.observed is not None and promise.certainty
    )


def _promise_row(promise: Promise) -> list[str]:
    seen = promise.observed
    tone = {"kept": "good", "missed": "bad"}.get(promise.verdict, "")
    estimated = f"{promise.estimated_share:.1%}"
    if promise.estimated is not None:
        estimated += f" (mean {promise.estimated:.4f})"
    return [
        escape(promise.plan or "(all)"),
        "?" if promise.alpha is None else f"{promise.alpha:g}",
        "none" if seen is None else f"{seen.mean:.4f}",
        "" if seen is None else f"{seen.low:.4f} to {seen.high:.4f}",
        "0" if seen is None else f"{seen.count:,}",
        estimated,
        f'<span class="{tone}">{promise.verdict}</span>',
    ]


def _box(chart: Chart) -> str:
    return f'<div class="chart-box">{chart.svg(standalone=False)}</div>'


def _over_time(report: Report) -> list[str]:
    series = report.series
    at = [float(number) for number in series.requests]
    nan = float("nan")

    def numbers(values: Sequence[float | None]) -> list[float]:
        return [nan if value is None else value for value in values]

    charts = []
    alphas = {promise.alpha for promise in report.promises if promise.alpha is not None}
    if any(value is not None for value in series.accuracy):
        charts.append(
            Chart(
                "Accuracy",
                "request",
                "observed accuracy",
                [
                    Series("mean so far", at, numbers(series.accuracy)),
                    Series("recent stretch", at, numbers(series.part_accuracy), "dashed", colour=7),
                ],
                rules=[(alpha, f"promised {alpha:g}") for alpha in sorted(alphas)],
            )
        )
    if any(value is not None for value in series.queue):
        charts.append(
            Chart(
                "Queue: accuracy owed",
                "request",
                "queue length",
                [Series("queue", at, numbers(series.queue))],
            )
        )
    if any(value is not None for value in series.billed_joules):
        charts.append(
            Chart(
                "Energy",
                "request",
                "joules per request, all billed",
                [Series("billed", at, numbers(series.billed_joules))],
                rules=[(report.savings.largest_joules, f"{report.savings.largest} alone")]
                if report.savings
                else [],
            )
        )
    if len(at) > 1:
        low = [0.0] * len(at)
        areas = []
        for name, shares in series.mix.items():
            top = [a + b for a, b in zip(low, shares, strict=True)]
            areas.append(Series(name, at, top, "area", low=low))
            low = top
        charts.append(Chart("Which model served", "request", "share of requests", areas, y_range=(0.0, 1.0)))
    return [_box(chart) for chart in charts]


def _energy(report: Report) -> str:
    most = max((row["joules"] for row in report.energy), default=0.0) or 1.0
    rows = [
        [
            escape(row["model"] or "(no model)"),
            escape(row["kind"]),
            f"{row['requests']:,}" if row["requests"] else "",
            f"{row['joules']:,.4g}",
            escape(row["meter"]),
            f'<span class="bar {escape(row["kind"])}" style="width:{220 * row["joules"] / most:.0f}px"></span>',
        ]
        for row in report.energy
    ]
    text = _table(["model", "kind", "requests", "joules", "meter", ""], rows)
    saved = report.savings
    if saved is not None:
        overhead = (
            "Overhead isn't known"
            if saved.share_with_overhead is None
            else f"With {saved.overhead_joules:.4g} J of overhead per request (loading, learning, idle) counted as "
            f"ours: {saved_words(saved.share_with_overhead)}"
        )
        text += (
            f"<p>{saved.billed_joules:.4g} J billed per request, explorations included; {escape(saved.largest)} "
            f"alone would have taken about {saved.largest_joules:.4g} ± {saved.largest_error:.2g} J: "
            f"<b>{escape(saved_words(saved.share))}</b>. {escape(overhead)}.</p>"
            f"<p><small>Basis: {escape(saved.basis)}.</small></p>"
        )
    if any("estimate" in row["meter"] for row in report.energy):
        text += (
            "<p><small>Meter <i>estimate</i>: CPU seconds times configured watts, not a reading.</small></p>"
        )
    return text


def _reliability(reliability: Reliability | None) -> str:
    if reliability is None:
        return '<p class="soft">Too few requests have both an estimate and an observed accuracy.</p>'
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
        "Reliability: on the dashed line, estimates are right",
        "estimated accuracy",
        "observed accuracy",
        [points],
        x_range=span,
        y_range=span,
        diagonal=True,
    )
    drift = Chart(
        "Drift: observed minus estimated",
        "request",
        "mean difference",
        [
            Series(
                "difference",
                [float(at) for at, _ in reliability.drift],
                [v for _, v in reliability.drift],
                "both",
            )
        ],
        rules=[(0.0, "no bias")],
    )
    better = reliability.rmse < reliability.rmse_of_means
    return (
        f'<div class="charts">{_box(calibration)}{_box(drift)}</div>'
        f"<p>Over {reliability.count:,} served requests, what was observed lies {reliability.bias:+.4f} from the "
        f"estimate on average (calibration error {reliability.calibration_error:.4f}). The estimates' root mean "
        f"square error is {reliability.rmse:.4f}, {'better' if better else '<b>no better</b>'} than each model's "
        f"mean in hindsight ({reliability.rmse_of_means:.4f}).</p>"
    )


def _periods(report: Report) -> str:
    rows = [
        [
            escape(account["period"] or "(first)"),
            escape(account["plan"] or "(all)"),
            f"{account['alpha']:g}",
            f"{account['observed_sum'] / account['observed']:.4f}" if account["observed"] else "",
            f"{account['observed']:,}",
            f"{account['estimated']:,}",
            f"{account['explored']:,}",
            f"{account['failed']:,}",
        ]
        for account in report.periods
    ]
    head = ["period", "plan", "promised", "observed mean", "observed", "estimated", "explored", "failed"]
    return _table(head, rows)


def _notes(report: Report) -> list[str]:
    notes = [
        "Accuracy is observed where a request had a reference, else estimated; the two are never averaged together. "
        "The interval says where the mean would settle if such traffic went on; what was served is the observed "
        "mean itself.",
        "Billed energy counts every model that ran. The queue is the accuracy still owed: while it stays bounded, "
        "the promise is kept in the long run.",
        "The reliability is that of the models that were chosen; choosing favours estimates that are too high.",
    ]
    if report.missing:
        notes.append(f"Not in this {report.kind}: {'; '.join(report.missing)}.")
    return [f"<p><small>{escape(note)}</small></p>" for note in notes]
