"""What routing takes on full engines, beside the largest model and a request-blind mix, both in one go.

    python tools/bench/engines.py --engines ENGINES TABLE... [--at 0.5] [--orders 5] [--copies 1] [--window N|auto]

Every run is played through engines as measured in load (docs/energy.md#in-load). Engines by the number of models,
smallest first, are ZOOS below; `--engine MODEL=ENTRY` says others. `--copies K` draws K times as many requests from the
table, with replacement. Alpha lies so far of the way from the smallest model's mean accuracy to the best one's. Prints
Markdown.

Expected: halfway on 12,026 rows of three models with long answers, at most 0.5 of the largest and 1.25 of the mix, with
alpha kept; on eight times as many at most 0.92 of the mix.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from messcli.energy.load import read_engines
from messcli.metrics import ROUNDING, load_metric
from messcli.routing.setup import Setup
from messcli.simulation import SimulateConfig, simulate
from messcli.simulation.engines import at_full_load, engines_of
from messcli.simulation.hindsight import static_mix
from messcli.simulation.runs import alphas_at, cores
from messcli.simulation.table import OutcomeTable, read_table

L8, L70, L405 = (
    f"meta-llama/Llama-3.1-{size},H100" for size in ("8B-Instruct", "70B-Instruct", "405B-Instruct-FP8")
)
Q8, Q14, Q32 = (f"Qwen/Qwen3-{size},H100,lm-arena-chat" for size in ("8B", "14B", "32B"))
ZOOS = {2: (L8, L70), 3: (L8, Q14, L70), 4: (Q8, Q14, Q32, L70), 5: (Q8, Q14, Q32, L70, L405)}


def window(text: str) -> int | None:
    return None if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--engine", action="append", default=[], metavar="MODEL=ENTRY")
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the first order")
    parser.add_argument("--window", type=window, default=None, help="a number, or auto (default)")
    parser.add_argument("--at", default="0.5")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--metric", default="rouge1", help="scores outputs that have no accuracy")
    parser.add_argument("--policy", default="mess+")
    parser.add_argument("--jobs", type=int, default=cores())
    options = parser.parse_args()
    said = dict(pair.split("=", 1) for pair in options.engine)
    print(
        "| table | rows | at | of largest in one go | of blind mix in one go | blind mix of largest | running "
        "| seconds, of largest's | billed / static | kept | accuracy - alpha: mean, min |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for path in options.tables:
        table = copied(read_table(path, scorer=lambda: load_metric(options.metric)), options.copies)
        engines = engines_of(table, options.engines, said or known_zoo(table, options.engines))
        print(f"{path}: {engines.said[0]}", file=sys.stderr)
        table = at_full_load(table, engines)
        for at in map(float, options.at.split(",")):
            started = time.perf_counter()
            (alpha,) = alphas_at(table, [at])
            config = SimulateConfig(
                alphas=(alpha,),
                policies=(options.policy,),
                orders=options.orders,
                setup=Setup(seed=options.seed, window=options.window),
                jobs=options.jobs,
            )
            results = simulate(table, config, engines=engines)
            loads = [result.in_load for result in results if result.in_load is not None]
            billed = np.mean([result.billed_joules for result in results])
            margins = np.array([result.accuracy for result in results]) - alpha
            kept = int((margins >= -ROUNDING).sum())
            running = np.mean([list(load.running.values()) for load in loads], axis=0)
            seconds = np.mean([load.seconds for load in loads]) / engines.alone[-1].seconds
            mix = engines.blind_mix(alpha).joules / engines.alone[-1].joules
            print(
                f"| {Path(path).name.split('.')[0]} | {len(table.requests)} | {at:g} "
                f"| {spread([load.of_largest for load in loads])} | {spread([load.of_blind_mix for load in loads])} "
                f"| {mix:.3f} | {', '.join(f'{mean:.0f}' for mean in running)} | {seconds:.2f} "
                f"| {billed / static_mix(table, alpha).billed_joules:.3f} | {kept}/{len(results)} "
                f"| {margins.mean():+.4f}, {margins.min():+.4f} |",
                flush=True,
            )
            spent = (time.perf_counter() - started) * options.jobs / (len(results) * len(table.requests))
            print(f"{path}: {spent * 1e6:.0f} us per request and core", file=sys.stderr)


def known_zoo(table: OutcomeTable, path: Path) -> Mapping[str, str]:
    """ZOOS where the file has them; {}: let it be guessed."""
    zoo = ZOOS.get(len(table.names), ())
    models = {engine.model for engine in read_engines(path)}
    there = bool(zoo) and all(entry.split(",")[0] in models for entry in zoo)
    return dict(zip(table.names, zoo, strict=True)) if there else {}


def copied(table: OutcomeTable, copies: int) -> OutcomeTable:
    """So many times as many requests, drawn with replacement; the table itself for 1."""
    if copies == 1:
        return table
    draw = random.Random(1)
    drawn = [draw.choice(table.requests) for _ in range(len(table.requests) * copies)]
    requests = tuple(replace(request, id=f"{request.id}/{n}") for n, request in enumerate(drawn))
    outcomes = {new.id: table.outcomes[old.id] for new, old in zip(requests, drawn, strict=True)}
    return replace(table, requests=requests, outcomes=outcomes)


def spread(values: list[float]) -> str:
    """Mean, and the least and most where there are several."""
    text = f"**{np.mean(values):.3f}**"
    return text if len(values) == 1 else f"{text} ({min(values):.3f}..{max(values):.3f})"


if __name__ == "__main__":
    main()
