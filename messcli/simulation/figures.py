"""Figures of simulations, and writing them. Knows results; knows nothing of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from messcli.files.sinks import write_text
from messcli.report.svg import Chart, Series
from messcli.simulation.hindsight import ORACLE, oracle, static_mix
from messcli.simulation.results import Result, lines
from messcli.simulation.table import OutcomeTable


def write_charts(charts: Mapping[str, Chart], folder: Path, option: str) -> list[Path]:
    """Each chart as NAME.svg; returns where they are."""
    for name, chart in charts.items():
        write_text(folder / name, chart.svg(), option)
    return [folder / name for name in charts]


def tradeoff(table: OutcomeTable, results: Sequence[Result]) -> Chart:
    """Accuracy against joules: every policy and setting, the static mixes and the oracle."""
    smallest, best = table.accuracies[:, 0].mean(), table.accuracies.mean(axis=0).max()
    grid = [float(smallest + (best - smallest) * step / 40) for step in range(41)]
    static = [static_mix(table, alpha) for alpha in grid]
    known = [oracle(table, alpha) for alpha in grid]
    series = [
        Series("static mix", [r.billed_joules for r in static], [r.accuracy for r in static], "dashed"),
        Series(ORACLE, [r.billed_joules for r in known], [r.accuracy for r in known]),
    ]
    summed = lines(results)
    for policy in dict.fromkeys(line.policy for line in summed if line.policy != ORACLE):
        points = [line for line in summed if line.policy == policy]
        series.append(
            Series(policy, [p.billed_joules for p in points], [p.accuracy for p in points], "points")
        )
    return Chart("What accuracy costs", "joules per request, all billed", "mean accuracy", series)


def figure_1(results: Sequence[Result]) -> dict[str, Chart]:
    """Accuracy and energy of mess+ against V, a line per alpha: the paper's Figure 1."""
    summed = [line for line in lines(results) if line.policy == "mess+" and line.v is not None]
    c = summed[0].c
    summed = [line for line in summed if line.c == c]
    accuracy, energy = [], []
    alphas = list(dict.fromkeys(line.alpha for line in summed))
    for alpha in alphas:
        own = sorted((line for line in summed if line.alpha == alpha), key=lambda line: line.v or 0.0)
        v = [line.v or 0.0 for line in own]
        mean, spread = [line.accuracy for line in own], [line.accuracy_deviation for line in own]
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        name = f"alpha {alpha:.3f}"
        accuracy.append(Series(name, v, mean, "both", low=low, high=high))
        joules, spread = [line.billed_joules for line in own], [line.billed_deviation for line in own]
        low = [m - s for m, s in zip(joules, spread, strict=True)]
        high = [m + s for m, s in zip(joules, spread, strict=True)]
        energy.append(Series(name, v, joules, "both", low=low, high=high))
    rules = [(alpha, f"alpha {alpha:.3f}") for alpha in alphas]
    return {
        "accuracy_by_v.svg": Chart(
            "Accuracy against V", "V", "mean accuracy", accuracy, log_x=True, rules=rules
        ),
        "energy_by_v.svg": Chart(
            "Energy against V", "V", "joules per request, all billed", energy, log_x=True
        ),
    }
