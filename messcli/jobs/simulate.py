"""`messcli simulate`, whole: read the table, run what was asked for, write, draw, and say it in lines.

Wires tables, simulator, advice, plots and the paper's evidence together; prints nothing itself.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from messcli.errors import UsageError, shown
from messcli.files.sinks import write_text
from messcli.jobs.knowledge import Learner, knowledge_of
from messcli.metrics import DEFAULT_METRIC, load_metric
from messcli.routing.knowledge import Knowledge
from messcli.routing.tuning import TUNING
from messcli.simulation.advice import advice_lines, advise
from messcli.simulation.engines import Asked, Engines, at_full_load, engines_of, trace_text
from messcli.simulation.figures import figure_1, tradeoff, write_charts
from messcli.simulation.hindsight import ORACLE, static_mix
from messcli.simulation.results import Line, Result, line_of, lines
from messcli.simulation.runs import SimulateConfig, Task, in_full, simulate
from messcli.simulation.table import OutcomeTable, against_largest, read_table

PAPER_ALPHAS_AT = (0.2, 0.5, 0.8)  # silver, gold, platinum: how far from the smallest model to the best


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """What `messcli simulate` was asked to do. () and None: not given."""

    table: str
    simulation: SimulateConfig = field(default_factory=SimulateConfig)
    metric: str | None = None
    models: tuple[str, ...] = ()
    complete_only: bool = False
    out: str | None = None
    plot: str | None = None
    best: bool = False
    paper: str | None = None
    engines: str | None = None
    engine: tuple[str, ...] = ()  # MODEL=ENTRY of the engines file
    trace: str | None = None
    against: str | None = None  # "largest": accuracies are agreement with it
    learn_from: str | None = None  # what every run begins with: an earlier job's state, or another table


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
    simulation = config.simulation
    if config.against is not None:
        table = against_largest(table, load_metric(name or DEFAULT_METRIC))
        simulation = replace(simulation, agreement=True)
    if simulation.sure and not simulation.audit:
        raise UsageError("--sure is of audits: with all accuracies known the mean is known. Give --audit too")
    if simulation.audit and (config.best or config.paper is not None):
        raise UsageError("--best and --paper know all accuracies. Give --audit without them")
    engines = _engines(table, config)
    if engines is not None:
        table = at_full_load(table, engines)
    if config.learn_from is not None:
        if config.best or config.paper is not None:
            raise UsageError(
                "--best and --paper are of runs that begin with nothing. Give --learn-from without them"
            )
        simulation = replace(simulation, knowledge=_knowledge(config.learn_from, config, table, engines))
    asked = bool(simulation.alphas or simulation.alpha_at)
    if not asked and config.paper is None:
        means = table.accuracies.mean(axis=0)
        raise UsageError(
            "no target accuracy. Give --alpha, or --alpha-at 0.5 for half of the way between the smallest "
            f"model ({means[0]:.4f} here) and the best ({means.max():.4f})"
        )
    if config.trace is not None:
        if config.best or config.paper is not None:
            raise UsageError("--trace is of one run, and --best and --paper make many. Give one at a time")
        simulation = _one_run(simulation)
    simulation = in_full(table, simulation if asked else replace(simulation, alpha_at=PAPER_ALPHAS_AT))
    if config.paper is not None:
        return _evidence()(table, simulation, Path(config.paper), Path(config.table).name, on_progress)
    if config.best:
        advice = advise(table, simulation, on_progress, engines)
        said = [] if engines is None else list(engines.said)
        return [*said, *(line for one in advice for line in advice_lines(table, one))]
    read = (config.table, config.engines, config.learn_from)
    if config.out is not None:  # a place that can't be written is told before the work
        write_text(Path(config.out), "", "--out", read=read)
    on_trace = None
    if config.trace is not None:
        write_text(Path(config.trace), "", "--trace", read=(*read, config.out))
        on_trace = partial(_write_trace, Path(config.trace), table)
    results = simulate(table, simulation, on_progress, engines=engines, on_trace=on_trace)
    if config.out is not None:
        rows = "".join(f"{json.dumps(result.row())}\n" for result in results)
        write_text(Path(config.out), rows, "--out")
    text = table_lines(table, simulation, results, engines)
    if config.plot is not None:
        text += [f"drawn: {path}" for path in draw(table, results, Path(config.plot))]
    return text


def _knowledge(path: str, config: JudgeConfig, table: OutcomeTable, engines: Engines | None) -> Knowledge:
    name = config.metric or (None if config.against is None else DEFAULT_METRIC)
    learner = Learner(
        table.names,
        config.simulation.setup,
        scorer=None if name is None else load_metric(name),
        agreement=config.against is not None,
        reprice=None if engines is None else partial(at_full_load, engines=engines),
    )
    return knowledge_of(path, learner)


def _engines(table: OutcomeTable, config: JudgeConfig) -> Engines | None:
    if config.engines is None:
        if config.engine:
            raise UsageError(
                "--engine says which entry of an engines file a model is. Give --engines FILE too"
            )
        return None
    pairs = {}
    for text in config.engine:
        model, equals, entry = text.partition("=")
        if not equals or not model or not entry:
            raise UsageError(f"--engine: expected MODEL=ENTRY, found {shown(text)}. See --help")
        pairs[model] = entry
    return engines_of(table, Path(config.engines), pairs)


def _one_run(config: SimulateConfig) -> SimulateConfig:
    """The only run that a trace can be of: mess+, unless one other policy is named."""
    if not config.policies:
        config = replace(config, policies=("mess+",))
    swept = ((*config.alphas, *config.alpha_at), config.policies, config.v, config.c, config.seeds)
    if any(len(values) > 1 for values in swept) or config.policies == (ORACLE,):
        raise UsageError(
            "--trace is of one run. Give one alpha, one V and c, one --policy (not oracle) and at most one order"
        )
    return config


def _write_trace(path: Path, table: OutcomeTable, task: Task, trace: Sequence[Asked]) -> None:
    write_text(path, trace_text(trace, table), "--trace")


def _evidence() -> Callable[..., list[str]]:
    """`evidence` of tools/research/evidence.py, which lies beside the package in a checkout and in no wheel.

    Loaded by its path, never by name: a folder `tools` in the working folder is none of ours.
    """
    path = Path(__file__).parent.parent.parent / "tools" / "research" / "evidence.py"
    spec = spec_from_file_location("tools.research.evidence", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(
            "--paper runs from a checkout of messcli, not from an installed package. Clone the repository and "
            "run `python -m messcli simulate ... --paper DIR` in it"
        )
    module = module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # worker processes find its functions by this name
    spec.loader.exec_module(module)
    found: Callable[..., list[str]] = module.evidence
    return found


def draw(table: OutcomeTable, results: Sequence[Result], folder: Path) -> list[Path]:
    """Charts of a comparison: what accuracy costs, and where V was swept, Figure 1."""
    charts = {"tradeoff.svg": tradeoff(table, results)}
    summed = [line for line in lines(results) if line.policy == "mess+" and line.v is not None]
    if len({line.v for line in summed}) > 1:
        charts.update(figure_1(results))
    return write_charts(charts, folder, "--plot")


def table_lines(
    table: OutcomeTable, config: SimulateConfig, results: Sequence[Result], engines: Engines | None = None
) -> list[str]:
    """The comparison, for people: a block per alpha, yardsticks included."""
    means = table.accuracies.mean(axis=0)
    joules = table.joules.mean(axis=0)
    models = ", ".join(
        f"{name} {accuracy:.3f} at {cost:.4g} J"
        for name, accuracy, cost in zip(table.names, means.tolist(), joules.tolist(), strict=True)
    )
    orders = "its own order" if config.orders is None else f"{config.orders} orders"
    text = [
        f"{len(table.requests)} requests, {orders}, seed {config.setup.seed}; "
        f"predictor {config.setup.predictor}, learning from {config.setup.learn}, window {config.setup.window}",
        f"models: {models}",
    ]
    if engines is not None:
        text += engines.said
    if table.left_out:
        text.append(f"{table.left_out} incomplete requests left out")
    summed = lines(results)
    for alpha in dict.fromkeys(line.alpha for line in summed):
        static = line_of([static_mix(table, alpha)])
        block = [line for line in summed if line.alpha == alpha]
        rows = [_HEADER + [_short(name) for name in table.names]]
        rows += [_cells_of(line, static) for line in (*block, static)]
        text += ["", f"alpha {alpha:.4f}", *_aligned(rows)]
        if any(line.audited for line in block):
            text += ["", "audits:", *_aligned(_audit_rows(block))]
        if engines is not None:
            text += ["", "in load:", *_aligned(_load_rows(block, alpha, engines))]
    text += [
        "",
        "J billed: joules per request, every model of every exploration included; J paper: an exploration "
        "counts as its served model only.",
        "static: the cheapest request-blind mix in hindsight; oracle: the linear programme that knows every "
        "outcome. Both are bounds to compare with, not policies to run.",
    ]
    if config.audit:
        text.append(
            "audits: accuracies are known of audited requests alone. later: the part of the requests after the first "
            f"{TUNING.audits.beginning} that were audited; J audits: joules per request for audits alone, in J billed; "
            "holds: runs whose bound was never above the true mean at a window's end."
        )
    if engines is not None:
        text.append(
            "in load: joules per request of all engines until the last answer, idling included; a model's column: mean "
            "requests running while it had any. J billed: as if every engine were full all the time."
        )
    return text


def _audit_rows(block: Sequence[Line]) -> list[list[str]]:
    rows = [["policy", "V", "c", "accuracy", "estimate", "bound", "holds", "audited", "later", "J audits"]]
    rows += [
        [
            *_cells_of(line, line)[:3],
            f"{line.accuracy:.4f}",
            f"{found.estimate:.4f}",
            f"{found.bound:.4f}",
            f"{round(found.holds * line.orders)}/{line.orders}",
            f"{found.share:.1%}",
            f"{found.later:.1%}",
            f"{found.joules:.{_digits(line.billed_joules)}f}",
        ]
        for line in block
        if (found := line.audited) is not None
    ]
    return rows


def _load_rows(block: Sequence[Line], alpha: float, engines: Engines) -> list[list[str]]:
    names = engines.names
    rows = [
        ["", "J / request", "seconds", "of largest", "of smallest", "of blind mix"]
        + [_short(name) for name in names]
    ]
    in_one_go = {f"all {name}": played for name, played in zip(names, engines.alone, strict=True)}
    in_one_go["blind mix"] = engines.blind_mix(alpha)
    named = [(line.policy, line.in_load) for line in block]
    named += [(f"{name}, in one go", engines.compared(played, alpha)) for name, played in in_one_go.items()]
    for name, found in named:
        if found is None:  # the oracle is no run
            continue
        rows.append(
            [
                name,
                f"{found.joules:.{_digits(found.joules)}f}",
                f"{found.seconds:.1f}",
                f"{found.of_largest:.3f}",
                f"{found.of_smallest:.3f}",
                f"{found.of_blind_mix:.3f}",
                *(f"{running:.0f}" for running in found.running.values()),
            ]
        )
    return rows


_HEADER = ["policy", "V", "c", "accuracy", "J billed", "J paper", "of static", "meets", "explored"]


def _cells_of(line: Line, static: Line) -> list[str]:
    accuracy = f"{line.accuracy:.4f}" + (
        f" ± {line.accuracy_deviation:.4f}" if line.accuracy_deviation else ""
    )
    digits = _digits(static.billed_joules)
    billed = f"{line.billed_joules:.{digits}f}" + (
        f" ± {line.billed_deviation:.{digits}f}" if line.billed_deviation else ""
    )
    auto = "auto" if line.policy == "mess+" else ""
    return [
        line.policy,
        auto if line.v is None else f"{line.v:g}",
        auto if line.c is None else f"{line.c:g}",
        accuracy,
        billed,
        f"{line.paper_joules:.{digits}f}",
        f"{line.billed_joules / static.billed_joules:.2f}",
        f"{line.meets}/{line.orders}",
        f"{line.explorations:.0f}",
        *(f"{share:.1%}" for share in line.shares.values()),
    ]


def _digits(joules: float) -> int:
    """Decimals that show three digits of so many joules, and two at least."""
    return max(2, 2 - math.floor(math.log10(joules)))


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
