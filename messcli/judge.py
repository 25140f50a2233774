"""`messcli simulate`, whole: read the table, run what was asked for, write, draw, and say it in lines.

Wires tables, simulator, advice, plots and the paper's evidence together; prints nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from messcli.advice import advice_lines, advise
from messcli.errors import UsageError
from messcli.evidence import ALPHAS_AT, evidence
from messcli.figures import figure_1, tradeoff, write_charts, write_text
from messcli.metrics import load_metric
from messcli.simulate import (
    ALL_POLICIES,
    Result,
    SimulateConfig,
    alphas_at,
    cores,
    lines,
    simulate,
    table_lines,
)
from messcli.tables import OutcomeTable, read_table


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """What `messcli simulate` was asked to do. () and None: not given."""

    table: str
    alphas: tuple[float, ...] | None = None
    alpha_at: tuple[float, ...] | None = None
    v: tuple[float, ...] | None = None
    c: tuple[float, ...] | None = None
    policies: tuple[str, ...] = ()
    orders: int | None = None
    seed: int = 0
    learn: str = "all"
    predictor: str = "ridge"
    window: int = 1
    metric: str | None = None
    models: tuple[str, ...] = ()
    complete_only: bool = False
    jobs: int | None = None
    out: str | None = None
    plot: str | None = None
    best: bool = False
    paper: str | None = None


def judge(
    config: JudgeConfig, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Do it; return the lines to be shown.

    Raises:
        MessError: with what the user can do.
    """
    name = config.metric
    scorer = None if name is None else lambda: load_metric(name)
    table = read_table(config.table, scorer=scorer, models=config.models, complete_only=config.complete_only)
    asked = (*(config.alphas or ()), *alphas_at(table, config.alpha_at or ()))
    if not asked and config.paper is None:
        means = table.accuracies.mean(axis=0)
        raise UsageError(
            "no target accuracy. Give --alpha, or --alpha-at 0.5 for half of the way between the smallest "
            f"model ({means[0]:.4f} here) and the best ({means.max():.4f})"
        )
    simulation = SimulateConfig(
        alphas=asked or alphas_at(table, ALPHAS_AT),
        policies=config.policies or ALL_POLICIES,
        v=config.v or (None,),
        c=config.c or (None,),
        orders=config.orders,
        seed=config.seed,
        learn=config.learn,
        predictor=config.predictor,
        window=config.window,
        jobs=config.jobs or cores(),
    )
    if config.paper is not None:
        return evidence(table, simulation, Path(config.paper), Path(config.table).name, on_progress)
    if config.best:
        advice = advise(table, simulation, on_progress)
        return [line for one in advice for line in advice_lines(table, one)]
    if config.out is not None:
        write_text(Path(config.out), "", "--out")  # a place that can't be written is told before the work
    results = simulate(table, simulation, on_progress)
    if config.out is not None:
        rows = "".join(f"{json.dumps(result.row())}\n" for result in results)
        write_text(Path(config.out), rows, "--out")
    text = table_lines(table, simulation, results)
    if config.plot is not None:
        text += [f"drawn: {path}" for path in draw(table, results, Path(config.plot))]
    return text


def draw(table: OutcomeTable, results: Sequence[Result], folder: Path) -> list[Path]:
    """Charts of a comparison: what accuracy costs, and where V was swept, Figure 1."""
    charts = {"tradeoff.svg": tradeoff(table, results)}
    summed = [line for line in lines(results) if line.policy == "mess+" and line.v is not None]
    if len({line.v for line in summed}) > 1:
        charts.update(figure_1(results))
    return write_charts(charts, folder, "--plot")
