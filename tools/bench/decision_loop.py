"""Time of the decision loop per request, by number of models and by t. No model runs: outcomes are recorded.

    python tools/bench/decision_loop.py [--requests 4000]
    python tools/bench/decision_loop.py --table TABLE [--rounds 3]

Prints, per predictor and size of the zoo, microseconds per request: over all requests, over the first and the
last quarter (growth with t), with features counted and with features known beforehand. With a table, CPU seconds
that `simulate` takes for one run of it after loading (halfway between the models, window 1): the median of some rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from messcli.predict.latent import bags
from messcli.predict.text import remember, sparse_features
from messcli.predict.tuning import LINEAR
from messcli.records import Outcome, Request
from messcli.routing.loop import chunks
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.source import Recorded
from messcli.simulation.runs import Task, alphas_at, run_task
from messcli.simulation.table import read_table

SIZES = (2, 3, 10, 100)
SETUPS = {
    "mess+, V found, ridge": Setup("mess+", predictor="ridge"),
    "mess+, V = 0.1, linear": Setup("mess+", v=0.1, c=3.0, predictor="linear", learn="explored"),
    "mess+, V = 0.1, mean": Setup("mess+", v=0.1, c=3.0, predictor="mean", learn="explored"),
}


def make_table(count: int, models: int, seed: int) -> tuple[list[Request], Recorded]:
    """Prompts of about 100 words; the larger the model, the better and dearer."""
    draw = random.Random(f"{models} {seed}")
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    names = [f"model-{m}" for m in range(models)]
    requests, outcomes = [], {}
    for n in range(count):
        requests.append(Request(n, " ".join(draw.choices(words, k=100)), references=("yes",)))
        outcomes[n] = {
            name: Outcome(None, float(draw.random() < 0.3 + 0.6 * (m + 1) / models), 1.0 + m * draw.random())
            for m, name in enumerate(names)
        }
    return requests, Recorded(names, outcomes)


def measure(setup: Setup, requests: list[Request], source: Recorded) -> np.ndarray:
    """Seconds of every request."""
    controller = create_controller(setup, len(source.names), {DEFAULT_PLAN: 0.7})
    seconds = np.zeros(len(requests))
    before = time.perf_counter()
    windows = (chunk for chunk in chunks(requests, controller, source) if chunk.ends_window)
    for n, _ in enumerate(windows):
        now = time.perf_counter()
        seconds[n], before = now - before, now
    return seconds


def simulated(path: str, rounds: int) -> None:
    table = read_table(path)
    (alpha,) = alphas_at(table, [0.5])
    print(f"{len(table.requests)} requests, {len(table.names)} models: CPU seconds of a run\n")
    print(f"{'predictor':<12}{'with features':>15}{'without':>9}")
    for predictor in ("linear", "ridge"):
        task = Task(Setup("mess+", predictor=predictor), alpha, shuffled=True)
        cold, warm = [], []
        for _ in range(rounds):
            for encoder in (bags, sparse_features(LINEAR.buckets)):
                encoder._known.clear()  # as in a new process
            for seconds in (cold, warm):
                started = time.process_time()
                run_task(table, task)
                seconds.append(time.process_time() - started)
        print(f"{predictor:<12}{statistics.median(cold):>15.2f}{statistics.median(warm):>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--table")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.table:
        simulated(options.table, options.rounds)
        return
    count = options.requests
    remember(count)
    print("microseconds per request\n")
    print(
        f"{'setting':<24}{'models':>7}{'with features':>15}{'without':>9}{'1st quarter':>13}{'last quarter':>14}"
    )
    for models in SIZES:
        for seed, (name, setup) in enumerate(SETUPS.items()):
            requests, source = make_table(count, models, seed)  # texts that nobody has encoded yet
            cold = measure(setup, requests, source)
            warm = measure(setup, requests, source)
            quarter = count // 4
            # the first quarter explores more; medians leave solving anew and other processes out
            cells = (cold.mean(), warm.mean(), np.median(warm[:quarter]), np.median(warm[-quarter:]))
            shown = [f"{1e6 * value:.0f}" for value in cells]
            print(f"{name:<24}{models:>7}{shown[0]:>15}{shown[1]:>9}{shown[2]:>13}{shown[3]:>14}")


if __name__ == "__main__":
    main()
