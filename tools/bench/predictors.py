"""Squared error of each predictor against the running mean's, by number of explorations (the paper's Figure 2).

    python tools/bench/predictors.py TABLE... [--requests 2000] [--orders 3] [--metric NAME]

Every model answers every request, as in an exploration; the estimate is taken before learning. Expected: all end
below 1 where there is a signal; none stays far above it. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from messcli.metrics import load_metric
from messcli.predict.base import create_predictor
from messcli.registry import PREDICTORS
from messcli.simulation.table import OutcomeTable, read_table

BANDS = ((0, 50), (50, 100), (100, 250), (250, 500), (500, 1000), (1000, 2000))


def losses(table: OutcomeTable, name: str, requests: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Squared errors per request (mean over models) of the predictor and of the mean; seconds per request."""
    order = np.random.default_rng(seed).permutation(len(table.requests))[:requests]
    predictor, mean = create_predictor(name, len(table.names)), create_predictor("mean", len(table.names))
    own, dull = [], []
    started = time.process_time()
    for position in order:
        truth = table.accuracies[position]
        features = predictor.encode(table.requests[position].prompt)
        blind = mean.predict_one(None)
        guess = predictor.predict_one(features)
        if blind is not None:
            own.append((((blind if guess is None else guess) - truth) ** 2).mean())
            dull.append(((blind - truth) ** 2).mean())
        predictor.learn_one(features, truth)
        mean.learn_one(None, truth)
    return np.array(own), np.array(dull), (time.process_time() - started) / len(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--metric", default="rouge1", help="scores outputs that have no accuracy")
    options = parser.parse_args()
    bands = [band for band in BANDS if band[1] <= options.requests]
    print(
        "| table | predictor | " + " | ".join(f"{low}..{high}" for low, high in bands) + " | us per request |"
    )
    print("|---|---|" + "---|" * len(bands) + "---|")
    for path in options.tables:
        table = read_table(path, scorer=lambda: load_metric(options.metric))
        for name in sorted(set(PREDICTORS) - {"mean"}):
            runs = [losses(table, name, options.requests, seed) for seed in range(options.orders)]
            cells = []
            for low, high in bands:
                own, dull = (np.mean([run[part][low:high].mean() for run in runs]) for part in (0, 1))
                cells.append(f"{own / dull:.3f}")
            micros = np.mean([run[2] for run in runs]) * 1e6
            name_of_table = Path(path).name.split(".")[0]
            print(f"| {name_of_table} | {name} | " + " | ".join(cells) + f" | {micros:.0f} |", flush=True)


if __name__ == "__main__":
    main()
