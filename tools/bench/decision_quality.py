"""What routing without tuning flags costs against the best request-blind mix, on outcome tables of your own.

    python tools/bench/decision_quality.py TABLE... [--orders 20] [--window 1|auto] [--at 0.2,0.5,0.8] [--metric NAME]

Every joule is billed, explorations included, and learning starts from nothing in every run. `static` is the
cheapest mix that doesn't look at the request and knows the models' means beforehand. Alpha lies so far of the way
from the smallest model's mean accuracy to the best one's. Prints Markdown.

Expected: below 1 where requests carry a signal, near 1 where they don't, and alpha kept in every order.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from messcli.metrics import ROUNDING, load_metric
from messcli.routing.setup import Setup
from messcli.simulation import SimulateConfig, simulate
from messcli.simulation.hindsight import static_mix
from messcli.simulation.runs import alphas_at, cores
from messcli.simulation.table import read_table


def window(text: str) -> int | None:
    return None if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first order")
    parser.add_argument("--window", type=window, default=1, help="a number, or auto")
    parser.add_argument("--at", default="0.2,0.5,0.8")
    parser.add_argument("--metric", default="rouge1", help="scores outputs that have no accuracy")
    parser.add_argument("--predictor", default="ridge")
    parser.add_argument("--policy", default="mess+")
    parser.add_argument("--jobs", type=int, default=cores())
    options = parser.parse_args()
    print(
        "| table | at | alpha | static J | billed / static | min..max | kept | accuracy - alpha: mean, min |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for path in options.tables:
        table = read_table(path, scorer=lambda: load_metric(options.metric))
        started = time.perf_counter()
        runs = 0
        for at in map(float, options.at.split(",")):
            (alpha,) = alphas_at(table, [at])
            static = static_mix(table, alpha).billed_joules
            config = SimulateConfig(
                alphas=(alpha,),
                policies=(options.policy,),
                orders=options.orders,
                setup=Setup(seed=options.seed, predictor=options.predictor, window=options.window),
                jobs=options.jobs,
            )
            results = simulate(table, config)
            runs += len(results)
            ratios = np.array([result.billed_joules for result in results]) / static
            margins = np.array([result.accuracy for result in results]) - alpha
            kept = int((margins >= -ROUNDING).sum())
            print(
                f"| {Path(path).name.split('.')[0]} | {at:g} | {alpha:.4f} | {static:.2f} "
                f"| **{ratios.mean():.3f}** ± {ratios.std():.3f} | {ratios.min():.3f}..{ratios.max():.3f} "
                f"| {kept}/{len(results)} | {margins.mean():+.4f}, {margins.min():+.4f} |",
                flush=True,
            )
        spent = (time.perf_counter() - started) * options.jobs / (runs * len(table.requests))
        print(f"{path}: {spent * 1e6:.0f} us per request and core", file=sys.stderr)


if __name__ == "__main__":
    main()
