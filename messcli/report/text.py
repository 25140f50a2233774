"""A report in lines, for the terminal. Knows a Report; reads no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from messcli.report.bill import overhead_words
from messcli.report.numbers import LEVEL, MINIMUM, Promise, Reliability, Report, Series


def report_lines(report: Report) -> list[str]:
    """The report, for people."""
    text = [f"{report.source} ({report.kind})"]
    failed = f", {report.failed} failed" if report.failed else ""
    share = report.explored / max(1, report.requests)
    text.append(f"{report.requests} requests routed, {report.explored} explored ({share:.1%}){failed}")
    if looked := [row for row in report.energy if row["kind"] in ("look", "check")]:
        joules = sum(row["joules"] for row in looked)
        text.append(
            f"second look: {joules:.4g} J in answers that were looked at and not served, and in checks"
        )
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
    """One plan's promise: verdict, interval, what rests on estimates."""
    name = f"plan {promise.plan}: " if promise.plan else ""
    target = "alpha unknown" if promise.alpha is None else f"alpha {promise.alpha:g}"
    text = []
    failures = [f"  {promise.failures}"] if promise.failures else []
    if promise.audits is not None:
        return [f"{name}{promise.audits.words()}", *failures]
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
    return text + failures


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
    """Who took what, and what the largest model alone would have taken."""
    text = []
    for row in report.energy:
        who = row["model"] or "(no model)"
        calls = f" over {row['requests']} requests" if row["requests"] else ""
        text.append(f"{who}, {row['kind']}: {row['joules']:.4g} J{calls} ({row['meter']})")
    text.append(f"billed to requests: {report.billed_joules:.4g} J")
    if report.overhead_joules:
        text.append(f"overhead: {report.overhead_joules:.4g} J")
        if parts := overhead_words(report.overhead_joules, report.overhead_parts):
            text.append(f"  {parts}")
    text.extend(
        f"{load.model}, {load.running:.3g} answers at a time: {load.joules_per_token:.4g} J per token written "
        f"({load.tokens:,} tokens)"
        for load in report.loads
    )
    if report.cost is not None:
        text.append(f"cost: {report.cost.words(report.total_joules)} ({report.cost.basis})")
    if report.unmetered:
        text.append(f"{report.unmetered} requests whose joules aren't known: in no sum")
    saved = report.savings
    if saved is None:
        text.append("savings: unknown, the largest model was never read")
        return text
    overhead = (
        "overhead (loading, learning, idle) isn't known and not counted"
        if saved.overhead_joules is None
        else f"{saved.billed_joules:.4g} J billed and {saved.overhead_joules:.4g} J overhead"
    )
    text.append(saved.words())
    text.append(f"  per request: {overhead}")
    text.append(f"  basis: {saved.basis}")
    return text


def joules_words(joules: float) -> str:
    """Joules with four digits: "97.31 J", "1.204 kJ", "35.2 MJ"."""
    for unit, size in (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3)):
        if abs(joules) >= size:
            return f"{joules / size:.4g} {unit}"
    return f"{joules:.4g} J"


def _queue_line(series: Series) -> str:
    known = [value for value in series.queue if value is not None]
    if not known:
        return "not known"
    return f"now {known[-1]:.3g}, most {max(known):.3g}: {_sparkline(known)}"


def _sparkline(values: Sequence[float]) -> str:
    top = max(values) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(value / top * 7.999))] for value in values)


def reliability_lines(reliability: Reliability | None) -> list[str]:
    """Estimates against what was observed."""
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
