"""The MESS+ paper's tables and figures, regenerated on an outcomes table: `simulate TABLE --paper DIR`.

Runs the paper's loop (V = 0.1, c = 3, linear predictors that learn from explorations only), counts energy as
the paper does and with everything billed, and says of each claim whether it holds on this table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from messcli import __version__
from messcli.files.sinks import write_text
from messcli.report.svg import Chart, Series
from messcli.simulation.figures import figure_1, tradeoff, write_charts
from messcli.simulation.hindsight import static_mix
from messcli.simulation.results import Line, Result, lines
from messcli.simulation.runs import SimulateConfig, Task, each, replay, simulate
from messcli.simulation.table import OutcomeTable

ORDERS = 10
V, C = 0.1, 3.0
SWEPT_V = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SWEPT_C = tuple(float(c) for c in range(1, 11))
TABLE_2_C = (1.0, 3.0, 5.0, 10.0)
BINS = 24  # points of a loss curve
RELIABLE = 0.95  # part of the orders that must meet alpha

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Learning:
    """How well predictors did along one run, and how long requests took. One run of the loop."""

    c: float
    seed: int
    explorations: list[float]  # so far, at the middle of each bin of requests
    losses: list[float]  # mean squared error (equation 4) over each bin's requests and all models
    final_loss: float  # over the last half of the requests
    time: float  # mean per request, all asked models one after another; in units of the largest model's mean
    seconds: float | None  # the same in seconds, where the table has them
    explored: float  # part of all requests


def evidence(
    table: OutcomeTable, asked: SimulateConfig, folder: Path, source: str, on_progress: Progress
) -> list[str]:
    """Run everything, write figures, numbers.json and results.md to `folder`; return lines to be shown."""
    ours_predictor = asked.setup.predictor
    predictor = ours_predictor if ours_predictor in ("linear", "fasttext") else "linear"
    paper = replace(
        asked,
        orders=asked.orders or ORDERS,
        setup=replace(asked.setup, predictor=predictor, learn="explored", window=1),
        v=SWEPT_V,
        c=(C,),
        policies=("smallest", "largest", "random", "mess+", "oracle"),
    )
    swept = simulate(table, paper, on_progress)
    # what this program does when it isn't told V, on the same orders
    ours_config = replace(
        paper,
        policies=("mess+",),
        v=(None,),
        c=(None,),
        setup=replace(paper.setup, learn="all", predictor=ours_predictor),
    )
    ours = simulate(table, ours_config, on_progress)
    middle = paper.alphas[len(paper.alphas) // 2]
    learning = _learning(table, paper, middle, on_progress)
    charts = {
        **{f"figure_1_{name}": chart for name, chart in figure_1(swept).items()},
        "figure_2_loss.svg": _figure_2(table, learning),
        "tradeoff.svg": tradeoff(table, [r for r in swept if r.alpha == middle] + _named(ours, middle)),
    }
    write_charts(charts, folder, "--paper")
    text = _results(table, paper, swept, ours, learning, source, ours_predictor)
    write_text(folder / "results.md", "\n".join(text) + "\n", "--paper")
    numbers = {
        "source": source,
        "messcli": __version__,
        "requests": len(table.requests),
        "models": list(table.names),
        "seeds": [paper.seeds.start, paper.seeds.stop - 1],
        "predictor": predictor,
        "default_predictor": ours_predictor,
        "lines": [asdict(line) for line in lines(swept)],
        "default": [asdict(line) for line in lines(ours)],
        "static": [static_mix(table, alpha).row() for alpha in paper.alphas],
        "learning": [asdict(run) for run in learning],
    }
    write_text(
        folder / "numbers.json", json.dumps(_rounded(numbers), separators=(",", ":")) + "\n", "--paper"
    )
    return [*text, "", f"written: {folder}/results.md, numbers.json, {', '.join(charts)}"]


def _named(results: Sequence[Result], alpha: float) -> list[Result]:
    return [replace(r, policy="mess+ without V") for r in results if r.alpha == alpha]


def _rounded(value: object) -> object:
    """Numbers to six digits: what is kept in a repository shouldn't differ by the last bit."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


# ---- figure 2 and table 2 ------------------------------------------------------------------------


def _learning(
    table: OutcomeTable, paper: SimulateConfig, alpha: float, on_progress: Progress
) -> list[Learning]:
    tasks = [
        Task(replace(paper.setup, v=V, c=c, seed=seed), alpha, shuffled=True)
        for c in SWEPT_C
        for seed in paper.seeds
    ]
    return each(learning_task, tasks, table, paper.jobs, on_progress)


def learning_task(table: OutcomeTable, task: Task) -> Learning:
    """One run, looked at for its predictors' errors and its requests' time."""
    count = len(table.requests)
    place = {request.id: position for position, request in enumerate(table.requests)}
    # Without recorded seconds a model's time is taken as proportional to its joules: the same watts for all.
    cost = table.joules if table.seconds is None else table.seconds
    # Less noise, same expectation: the loss beyond that of each model's mean, on the very same requests.
    means = table.accuracies.mean(axis=0)
    by_mean = ((table.accuracies - means) ** 2).mean(axis=1)
    errors = np.full(count, np.nan)
    explored = np.zeros(count)
    spent = 0.0
    for t, line in enumerate(replay(table, task)):
        row = place[line.request.id]
        if line.decision.estimates is not None:
            squares = (np.array(line.decision.estimates) - table.accuracies[row]) ** 2
            errors[t] = squares.mean() - by_mean[row] + by_mean.mean()
        explored[t] = line.decision.explored
        spent += float(cost[row, list(line.decision.asked)].sum())
    so_far = np.cumsum(explored)
    # bins that grow with t: much happens early
    edges = np.unique(np.geomspace(min(20, count // 4), count, BINS).astype(int))
    bins = [slice(start, stop) for start, stop in pairwise(edges)]
    mean_cost = spent / count
    return Learning(
        c=task.setup.c or 0.0,
        seed=task.setup.seed,
        explorations=[float(so_far[part].mean()) for part in bins],
        losses=[float(np.nanmean(errors[part])) for part in bins],
        final_loss=float(np.nanmean(errors[count // 2 :])),
        time=mean_cost / float(cost[:, -1].mean()),
        seconds=None if table.seconds is None else mean_cost,
        explored=float(explored.mean()),
    )


def _mean_loss(table: OutcomeTable) -> float:
    """The loss of predicting each model's mean accuracy: what looking at the request has to beat."""
    return float(table.accuracies.var(axis=0).mean())


def _figure_2(table: OutcomeTable, learning: Sequence[Learning]) -> Chart:
    series = []
    for c in SWEPT_C:
        runs = [run for run in learning if run.c == c]
        series.append(
            Series(
                f"c={c:g}",
                np.mean([run.explorations for run in runs], axis=0).tolist(),
                np.mean([run.losses for run in runs], axis=0).tolist(),
            )
        )
    level = _mean_loss(table)
    highest = max(max(s.y) for s in series)
    lowest = min(level, min(min(s.y) for s in series))
    return Chart(
        "Loss of the predictors over explorations",
        "explorations so far",
        "mean squared error",
        series,
        log_x=True,
        y_range=(lowest - 0.05 * (highest - lowest), highest),
        rules=[(level, "predicting each model's mean")],
    )


# ---- what it comes to ----------------------------------------------------------------------------


def _results(
    table: OutcomeTable,
    paper: SimulateConfig,
    swept: Sequence[Result],
    ours: Sequence[Result],
    learning: Sequence[Learning],
    source: str,
    default_predictor: str,
) -> list[str]:
    summed, default = lines(swept), lines(ours)
    means, joules = table.accuracies.mean(axis=0), table.joules.mean(axis=0)
    text = [
        f"# The paper's evidence on {source}",
        "",
        f"{len(table.requests)} requests; "
        + ", ".join(f"{n} {a:.3f} at {j:.4g} J" for n, a, j in zip(table.names, means, joules, strict=True))
        + f". {paper.orders} request orders, seeds {paper.seeds.start} to {paper.seeds.stop - 1}; the paper's "
        f"loop: V = {V:g}, c = {C:g}, {paper.setup.predictor} predictors that learn from explorations only, window 1.",
        "",
        "## Table 1",
        "",
        "Joules per request. *Paper*: an exploration counts as its served model only. *Billed*: every model that "
        "ran is paid for.",
    ]
    for alpha in paper.alphas:
        text += ["", f"alpha = {alpha:.4f}", "", *_table_1(table, summed, default, alpha, default_predictor)]
    text += [
        "",
        "## Figure 1",
        "",
        "![Accuracy against V](figure_1_accuracy_by_v.svg)",
        "![Energy against V](figure_1_energy_by_v.svg)",
        "",
        *_figure_1_table(summed, paper.alphas),
        "",
        "## Figure 2",
        "",
        "![Loss](figure_2_loss.svg)",
        "",
        "Mean squared error of the estimates (equation 4) over all models, on every request, before it is "
        f"learnt from. Predicting each model's mean would give {_mean_loss(table):.4f}; losses are measured against "
        "that on the same requests, which leaves their expectation as it is and takes most noise out.",
        "",
        *_figure_2_table(learning),
        "",
        "## Table 2",
        "",
        *_table_2(table, learning),
        "",
        "## Claims",
        "",
        *_claims(table, paper, summed, default, learning),
    ]
    return text


def _pick(summed: Iterable[Line], policy: str, alpha: float, v: float | None = None) -> Line:
    return next(line for line in summed if (line.policy, line.alpha, line.v) == (policy, alpha, v))


def _table_1(
    table: OutcomeTable, summed: Sequence[Line], default: Sequence[Line], alpha: float, predictor: str
) -> list[str]:
    largest = float(table.joules[:, -1].mean())
    static = lines([static_mix(table, alpha)])[0]
    rows = [
        (f"{table.names[0]} (smallest)", _pick(summed, "smallest", alpha)),
        (f"{table.names[-1]} (largest)", _pick(summed, "largest", alpha)),
        ("Random with constraint", _pick(summed, "random", alpha)),
        (f"MESS+ (V = {V:g}, c = {C:g})", _pick(summed, "mess+", alpha, V)),
        (f"messcli without V ({predictor}, learning from all)", _pick(default, "mess+", alpha)),
        ("*static mix, in hindsight*", static),
        ("*oracle, in hindsight*", _pick(summed, "oracle", alpha)),
    ]
    text = [
        "| | accuracy | J paper | J billed | largest / paper | largest / billed | meets alpha |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, line in rows:
        spread = f" ± {line.accuracy_deviation:.4f}" if line.accuracy_deviation else ""
        deviation = f" ± {line.billed_deviation:.2f}" if line.billed_deviation else ""
        text.append(
            f"| {name} | {line.accuracy:.4f}{spread} | {line.paper_joules:.2f} | "
            f"{line.billed_joules:.2f}{deviation} | {largest / line.paper_joules:.2f} | "
            f"{largest / line.billed_joules:.2f} | {line.meets}/{line.orders} |"
        )
    return text


def _figure_1_table(summed: Sequence[Line], alphas: Sequence[float]) -> list[str]:
    head = "".join(f" accuracy | J billed | meets {alpha:.3f} |" for alpha in alphas)
    text = [f"| V |{head}", "|---|" + "---|---|---|" * len(alphas)]
    for v in SWEPT_V:
        cells = [_pick(summed, "mess+", alpha, v) for alpha in alphas]
        row = "".join(f" {x.accuracy:.4f} | {x.billed_joules:.2f} | {x.meets}/{x.orders} |" for x in cells)
        text.append(f"| {v:g} |{row}")
    return text


def _by_c(learning: Sequence[Learning], c: float) -> list[Learning]:
    return [run for run in learning if run.c == c]


def _final_loss(learning: Sequence[Learning], c: float) -> tuple[float, float]:
    """Mean over orders, and its standard error."""
    values = np.array([run.final_loss for run in _by_c(learning, c)])
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), error


def _figure_2_table(learning: Sequence[Learning]) -> list[str]:
    text = ["| c | explored | loss over the last half |", "|---|---|---|"]
    for c in SWEPT_C:
        loss, error = _final_loss(learning, c)
        explored = np.mean([run.explored for run in _by_c(learning, c)])
        text.append(f"| {c:g} | {explored:.1%} | {loss:.5f} ± {error:.5f} |")
    return text


def _table_2(table: OutcomeTable, learning: Sequence[Learning]) -> list[str]:
    if table.seconds is None:
        text = [
            "The table holds no seconds, so time is modelled: every model draws the same power (time in "
            "proportion to joules), and an exploration asks the models one after another. 1 is the largest "
            "model's mean time.",
            "",
            "| c | mean time per request |",
            "|---|---|",
        ]
    else:
        text = [
            "Mean recorded time per request; an exploration asks the models one after another.",
            "",
            "| c | seconds | of the largest model's |",
            "|---|---|---|",
        ]
    for c in TABLE_2_C:
        runs = _by_c(learning, c)
        seconds = [run.seconds for run in runs if run.seconds is not None]
        middle = f" {np.mean(seconds):.3f} |" if seconds else ""
        text.append(f"| {c:g} |{middle} {np.mean([run.time for run in runs]):.3f} |")
    return text


def _claims(
    table: OutcomeTable,
    paper: SimulateConfig,
    summed: Sequence[Line],
    default: Sequence[Line],
    learning: Sequence[Learning],
) -> list[str]:
    text = ["A factor is the other's joules over those of MESS+: above 1, MESS+ needs less.", ""]
    for alpha in paper.alphas:
        mess, random = _pick(summed, "mess+", alpha, V), _pick(summed, "random", alpha)
        largest, static = _pick(summed, "largest", alpha), static_mix(table, alpha)
        reliable = [
            v for v in SWEPT_V if (x := _pick(summed, "mess+", alpha, v)).meets >= RELIABLE * x.orders
        ]
        top = f"V = {max(reliable):g}" if reliable else "no V that was tried"
        own = _pick(default, "mess+", alpha)
        text += [
            f"alpha = {alpha:.4f}:",
            "",
            f"- MESS+ with V = {V:g} meets alpha: **{_verdict(mess.meets >= RELIABLE * mess.orders)}** "
            f"({mess.meets}/{mess.orders} orders). The largest V that does so in {RELIABLE:.0%}: {top}.",
            f"- It needs less energy than the largest model: **{_verdict(mess.paper_joules < largest.billed_joules)}"
            f"** as the paper counts (factor {largest.billed_joules / mess.paper_joules:.2f}), "
            f"**{_verdict(mess.billed_joules < largest.billed_joules)}** billed "
            f"(factor {largest.billed_joules / mess.billed_joules:.2f}).",
            f"- It needs less than random with constraint: **{_verdict(mess.paper_joules < random.paper_joules)}** as "
            f"the paper counts (factor {random.paper_joules / mess.paper_joules:.2f}), "
            f"**{_verdict(mess.billed_joules < random.billed_joules)}** billed "
            f"(factor {random.billed_joules / mess.billed_joules:.2f}).",
            f"- It needs less than the best static mix: **{_verdict(mess.paper_joules < static.billed_joules)}** as "
            f"the paper counts ({mess.paper_joules / static.billed_joules:.2f} of it), "
            f"**{_verdict(mess.billed_joules < static.billed_joules)}** billed "
            f"({mess.billed_joules / static.billed_joules:.2f} of it). Without V messcli needs "
            f"{own.billed_joules / static.billed_joules:.2f} of it, billed, and meets alpha in "
            f"{own.meets}/{own.orders}.",
            "",
        ]
    losses = {c: _final_loss(learning, c) for c in SWEPT_C}
    best = min(losses, key=lambda c: losses[c][0])
    times = [float(np.mean([run.time for run in _by_c(learning, c)])) for c in TABLE_2_C]
    grows = all(a < b for a, b in pairwise(times))
    better = losses[best][0] < _mean_loss(table)
    text += [
        "All alphas:",
        "",
        f"- c = 3 gives the lowest loss: **{_verdict(best == C)}**. Lowest is c = {best:g} with "
        f"{losses[best][0]:.5f}; c = 3 has {losses[C][0]:.5f} (standard errors {losses[best][1]:.5f} and "
        f"{losses[C][1]:.5f}). The estimates are {'' if better else 'NOT '}better than each model's mean "
        f"({_mean_loss(table):.5f}).",
        f"- The predictors have converged after 250 explorations: {_converged(learning)}.",
        f"- More exploration makes requests slower: **{_verdict(grows)}** ({times[-1] / times[0]:.2f} times from c = 1 "
        "to c = 10).",
    ]
    return text


def _converged(learning: Sequence[Learning]) -> str:
    """The loss at c = 3 around 250 explorations against that at the end."""
    runs = _by_c(learning, C)
    at = np.mean([run.explorations for run in runs], axis=0)
    losses = np.mean([run.losses for run in runs], axis=0)
    if at[-1] < 300:
        return f"not to be told, there were only {at[-1]:.0f}"
    near = float(np.interp(250, at, losses))
    change = losses[-1] / near - 1
    return (
        f"**{_verdict(abs(change) < 0.02)}** ({near:.5f} there, {losses[-1]:.5f} at the end, {change:+.1%})"
    )


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"
