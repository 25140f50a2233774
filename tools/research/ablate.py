"""What routing costs on outcome tables, and what each of its ideas is worth there: one JSON line per run.

    python tools/research/ablate.py TABLE... [--orders 0:20] [--at 0.2,0.5,0.8] [--window 1|N|auto] [--rows N]
        [--set NAME=VALUE[,NAME=VALUE...]]... [--off IDEA]... [--engines FILE] [--jobs N] [--out FILE]

Every joule is billed and every run learns from nothing. `ratio` is billed joules in those of `static`, the cheapest mix
that doesn't look at the request and knows the models' means beforehand. Alpha lies so far (`at`) of the way from the
smallest model's mean accuracy to the best one's.

--set    a variant: numbers of the tuning by their names, such as price.miss=3 (one --set, several numbers: together)
--off    a variant: the tuning with an idea switched off, by its name in IDEAS
--rows   so many rows of the table, other ones in each order
--engines  the table's joules replaced by those of full batches on measured engines, one per model, smallest first
           (the form of `simulate --engines`: joules per output token, and a prompt's by the model's parameters)

The tuning as it is runs beside the variants, on the same orders. Choose on orders 0 to 19, confirm on 100 to 119.
A summary is printed to standard error. What the distance to a router that knew the table is made of: distance.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from messcli.metrics import load_metric
from messcli.predict.tuning import digest
from messcli.routing.setup import Setup
from messcli.routing.tuning import TUNING, Tuning
from messcli.simulation.hindsight import static_mix
from messcli.simulation.runs import Task, alphas_at, each, run_task
from messcli.simulation.table import OutcomeTable, read_table

IDEAS: Mapping[str, Sequence[str]] = {
    "optimism": ("optimism.errors=0", "optimism.errors_unreachable=0"),
    "companions": ("exploration.share=0",),
    "order": ("levels.step=0", "levels.step_sd=0.3"),  # levels aren't expected to rise along the zoo
    "doubt": ("price.doubt_most=0.000001",),  # levels are taken to be right when the price is looked for
    "chance": ("price.chance_most=0.000001",),  # what is to come is taken to turn out as estimated
    "miss": ("price.miss=1",),  # accuracy that decides whether alpha is kept is worth no more than other
    "end": ("price.end=0",),
    "drift": ("margin.drift_deviation=0.000001",),
    "ahead": ("ahead.prompts=0",),  # nothing is read ahead: a pipe
    "follow": ("drift.share=0",),  # directions stay as they are when traffic changes
    "look": (),  # no answer is looked at
}

PREFILL_JOULES_PER_FLOP = 600 / 4e14  # 600 W at 400 TFLOP/s
ZOOS = {  # by the number of models: (model, card) of the engines file
    2: (("meta-llama/Llama-3.1-8B-Instruct", "H100"), ("meta-llama/Llama-3.1-70B-Instruct", "H100")),
    3: (
        ("meta-llama/Llama-3.1-8B-Instruct", "H100"),
        ("Qwen/Qwen3-14B", "H100"),
        ("meta-llama/Llama-3.1-70B-Instruct", "H100"),
    ),
    4: (
        ("Qwen/Qwen3-8B", "H100"),
        ("Qwen/Qwen3-14B", "H100"),
        ("Qwen/Qwen3-32B", "H100"),
        ("meta-llama/Llama-3.1-70B-Instruct", "H100"),
    ),
    5: (
        ("Qwen/Qwen3-8B", "H100"),
        ("Qwen/Qwen3-14B", "H100"),
        ("Qwen/Qwen3-32B", "H100"),
        ("meta-llama/Llama-3.1-70B-Instruct", "H100"),
        ("meta-llama/Llama-3.1-405B-Instruct-FP8", "H100"),
    ),
}
MOST_RUNNING = 512  # requests


@dataclass(frozen=True)
class Run:
    """One order of one table, at one alpha under one tuning."""

    name: str
    at: float
    order: int
    variant: str
    tuning: Tuning
    window: int | None
    rows: int | None
    policy: str
    look: bool


def variants(settings: Sequence[str], ideas: Sequence[str]) -> Iterator[tuple[str, Tuning]]:
    """(name, tuning): as it is first."""
    yield "as it is", TUNING
    for names in settings:
        yield names, _changed(names.split(","))
    for idea in ideas:
        yield f"without {idea}", _changed(IDEAS[idea])


def _changed(settings: Sequence[str]) -> Tuning:
    tuning = TUNING
    for setting in settings:
        path, _, value = setting.partition("=")
        group, _, name = path.partition(".")
        numbers = getattr(tuning, group)
        kind = type(getattr(numbers, name))
        tuning = replace(tuning, **{group: replace(numbers, **{name: kind(float(value))})})
    return tuning


def repriced(table: OutcomeTable, engines: Path) -> OutcomeTable:
    """The table with the joules of full batches."""
    known = json.loads(engines.read_text(encoding="utf-8"))["engines"]
    costs = {}
    for name, place in zip(table.names, ZOOS[len(table.names)], strict=True):
        entry = next(e for e in known if (e["model"], e["gpu"], e["task"]) == (*place, "lm-arena-chat"))
        points = [point for point in entry["points"] if point["max_running"] <= MOST_RUNNING]
        written = min(point["joules_per_output_token"] for point in points)
        costs[name] = (2e9 * entry["active_parameters_billions"] * PREFILL_JOULES_PER_FLOP, written)

    def joules(name: str, outcome: Any) -> float:
        read, written = costs[name]
        return float((outcome.prompt_tokens or 0) * read + (outcome.output_tokens or 0) * written)

    def checks(outcome: Any) -> Any:  # the reader reads prompt and answer
        tokens = (outcome.prompt_tokens or 0) + (outcome.output_tokens or 0)
        known = (outcome.checks or {}).items()
        return {reader: replace(check, joules=tokens * costs[reader][0]) for reader, check in known} or None

    outcomes = {
        identity: {
            name: replace(one, joules=joules(name, one), checks=checks(one)) for name, one in answers.items()
        }
        for identity, answers in table.outcomes.items()
    }
    return OutcomeTable(table.names, table.requests, outcomes)


def play(table: OutcomeTable, run: Run) -> dict[str, Any]:
    """Run it; say what it took."""
    started = time.perf_counter()
    if run.rows is not None:
        kept = np.random.default_rng([run.order, 1]).permutation(len(table.requests))[: run.rows]
        table = OutcomeTable(table.names, tuple(table.requests[k] for k in kept), table.outcomes)
    (alpha,) = alphas_at(table, [run.at])
    setup = Setup(run.policy, seed=run.order, window=run.window, tuning=run.tuning, no_look=not run.look)
    result = run_task(table, Task(setup, alpha, shuffled=True))
    static = static_mix(table, alpha).billed_joules
    return {
        "table": run.name,
        "at": run.at,
        "alpha": alpha,
        "order": run.order,
        "rows": len(table.requests),
        "window": "auto" if run.window is None else run.window,
        "policy": run.policy,
        "variant": run.variant,
        "tuning": digest(run.tuning),
        "ratio": result.billed_joules / static,
        "beside": (result.billed_joules - result.paper_joules) / static,
        "over": result.accuracy - alpha,
        "kept": result.meets_alpha,
        "explorations": result.explorations,
        "served": list(result.served.values()),
        "seconds": round(time.perf_counter() - started, 2),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines for people: per table and variant the mean ratio, at each place the mean and the largest."""
    yield "| table | variant | ratio | by place: mean (largest) | kept | accuracy - alpha: mean, least | beside |"
    yield "|---|---|---|---|---|---|---|"
    means: dict[str, list[float]] = {}
    for table, variant in dict.fromkeys((row["table"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["table"], row["variant"]) == (table, variant)]
        places: dict[float, list[float]] = {}
        for row in own:
            places.setdefault(row["at"], []).append(row["ratio"])
        ratio = float(np.mean([np.mean(ratios) for ratios in places.values()]))
        means.setdefault(variant, []).append(ratio)
        by_place = ", ".join(f"{np.mean(ratios):.2f} ({max(ratios):.2f})" for ratios in places.values())
        over = [row["over"] for row in own]
        yield (
            f"| {table} | {variant} | **{ratio:.3f}** | {by_place} | {sum(row['kept'] for row in own)}/{len(own)} "
            f"| {np.mean(over):+.4f}, {min(over):+.4f} | {np.mean([row['beside'] for row in own]):.3f} |"
        )
    for variant, ratios in means.items():
        yield f"| all {len(ratios)} | {variant} | **{np.mean(ratios):.3f}** | | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--orders", default="0:20", help="first:end")
    parser.add_argument("--at", default="0.2,0.5,0.8")
    parser.add_argument("--window", default="1")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--policy", default="mess+")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="NAME=VALUE,...")
    parser.add_argument("--off", action="append", default=[], choices=list(IDEAS))
    parser.add_argument("--engines", type=Path)
    parser.add_argument("--metric", default="rouge1", help="scores outputs that have no accuracy")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the JSON lines go, instead of standard output")
    options = parser.parse_args()
    first, end = map(int, options.orders.split(":"))
    window = None if options.window == "auto" else int(options.window)
    tried = list(variants(options.settings, options.off))
    rows: list[dict[str, Any]] = []
    with options.out.open("a", encoding="utf-8") if options.out else sys.stdout as out:
        for path in options.tables:
            table = read_table(path, scorer=lambda: load_metric(options.metric))
            if options.engines is not None:
                table = repriced(table, options.engines)
            name = Path(path).name.split(".")[0]
            runs = [
                Run(
                    name,
                    at,
                    order,
                    variant,
                    tuning,
                    window,
                    options.rows,
                    options.policy,
                    variant != "without look",
                )
                for at in map(float, options.at.split(","))
                for variant, tuning in tried
                for order in range(first, end)
            ]
            for row in each(play, runs, table, options.jobs):
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
    print("\n".join(summary(rows)), file=sys.stderr)


if __name__ == "__main__":
    main()
