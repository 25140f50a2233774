"""What it is worth to begin with what an earlier job taught: half of a table's requests after the other half.

    python tools/bench/knowledge.py TABLE... [--orders 0:5] [--at 0.2,0.5,0.8] [--window 1|N|auto] [--no-look]
        [--rows N] [--answers N,M,...] [--before TABLE] [--models A,B] [--models C,D]

The second half of each order is routed in four ways: from nothing; with what a table of the first half taught, where
every model had answered (`--learn-from TABLE`); with what routing the first half to the same alpha taught
(`--learn-from STATE`); with the first half's state itself, in a new period (a shared state: what cron does). `--before`
takes the earlier half from another table: knowledge that is wrong. Ratios are billed joules in those of `static` on the
second half. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from messcli.metrics import load_metric
from messcli.routing.controller import Controller
from messcli.routing.knowledge import Knowledge
from messcli.routing.line import Settled
from messcli.routing.loop import chunks
from messcli.routing.policy import cheapest_mix
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.tuning import TUNING, Tuning
from messcli.simulation.runs import taught
from messcli.simulation.table import OutcomeTable, read_table

NOTHING, TABLE, STATE, SHARED = "nothing", "table", "state", "shared state"


@dataclass(frozen=True, slots=True)
class Half:
    """Some of a table's requests."""

    table: OutcomeTable
    places: Sequence[int]

    def as_table(self) -> OutcomeTable:
        """As if it were all."""
        requests = tuple(self.table.requests[k] for k in self.places)
        return OutcomeTable(self.table.names, requests, self.table.outcomes)


def routed(half: OutcomeTable, controller: Controller) -> tuple[float, float]:
    """(mean joules billed, mean accuracy) of routing it."""
    billed = accuracy = 0.0
    for chunk in chunks(half.requests, controller, half.source):
        for line in chunk.lines:
            if isinstance(line, Settled) and line.served is not None:
                billed += line.billed_joules or 0.0
                accuracy += line.outcomes[line.served].accuracy or 0.0
    return billed / len(half.requests), accuracy / len(half.requests)


def ways(
    first: OutcomeTable, second: OutcomeTable, at: float, setup: Setup, tunings: Sequence[Tuning]
) -> Iterator[tuple[str, float, float]]:
    """(way, billed / static, mean accuracy - alpha) of each."""
    accuracies, joules = second.accuracies.mean(axis=0), second.joules.mean(axis=0)
    alpha = float(accuracies[0] + at * (accuracies.max() - accuracies[0]))
    low, high, part = cheapest_mix(list(accuracies), list(joules), alpha)
    static = (1 - part) * joules[low] + part * joules[high]

    def new(table: OutcomeTable, tuning: Tuning = TUNING) -> Controller:
        own = replace(setup, horizon=len(table.requests), tuning=tuning)
        return create_controller(own, len(table.names), {DEFAULT_PLAN: alpha})

    before = new(first)
    routed(first, before)
    learnt = ((TABLE, taught(first, setup)), (STATE, before.state()))
    for tuning in tunings:
        for way, known in learnt:
            controller = new(second, tuning)
            controller.learnt.take_over(Knowledge.of(way, "", known))
            controller.begin()
            name = way if len(tunings) == 1 else f"{way}, {tuning.knowledge.answers:g} answers"
            yield name, *_result(second, controller, static, alpha)
    controller = new(second)
    yield NOTHING, *_result(second, controller, static, alpha)
    controller = new(second)
    controller.load(before.state())
    controller.open_period({})
    yield SHARED, *_result(second, controller, static, alpha)


def _result(half: OutcomeTable, controller: Controller, static: float, alpha: float) -> tuple[float, float]:
    billed, accuracy = routed(half, controller)
    return billed / static, accuracy - alpha


def halves(table: OutcomeTable, order: int, rows: int | None) -> tuple[OutcomeTable, OutcomeTable]:
    """Two halves of its requests, or of so many."""
    places = np.random.default_rng(order).permutation(len(table.requests))[:rows].tolist()
    middle = len(places) // 2
    return Half(table, places[:middle]).as_table(), Half(table, places[middle:]).as_table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--before", help="the table that the earlier half is of")
    parser.add_argument("--models", action="append", default=[], help="of TABLE, then of --before")
    parser.add_argument("--at", default="0.2,0.5,0.8")
    parser.add_argument("--orders", default="0:5", help="first:end")
    parser.add_argument("--rows", type=int, help="of each table, both halves together")
    parser.add_argument("--window", default="1", help="a number, or auto")
    parser.add_argument("--answers", help="that knowledge counts as at the most; several: each of them")
    parser.add_argument("--no-look", action="store_true", help="at answers")
    parser.add_argument("--metric", default="rouge1")
    options = parser.parse_args()
    first_order, end = map(int, options.orders.split(":"))
    chosen = [tuple(names.split(",")) for names in options.models] or [(), ()]

    def read(path: str, models: tuple[str, ...]) -> OutcomeTable:
        return read_table(path, scorer=lambda: load_metric(options.metric), models=models)

    tunings = [
        replace(TUNING, knowledge=replace(TUNING.knowledge, answers=float(answers)))
        for answers in (options.answers or str(TUNING.knowledge.answers)).split(",")
    ]
    window = None if options.window == "auto" else int(options.window)
    print("| table | at | way | billed / static | kept | accuracy - alpha: mean, least |")
    print("|---|---|---|---|---|---|")
    for path in options.tables:
        table = read(path, chosen[0])
        earlier = None if options.before is None else read(options.before, chosen[-1])
        for at in map(float, options.at.split(",")):
            found: dict[str, list[tuple[float, float]]] = {}
            for order in range(first_order, end):
                first, second = halves(table, order, options.rows)
                if earlier is not None:
                    first, _ = halves(earlier, order, options.rows)
                setup = Setup(seed=order, window=window, no_look=options.no_look)
                for way, ratio, over in ways(first, second, at, setup, tunings):
                    found.setdefault(way, []).append((ratio, over))
            for way, results in found.items():
                ratios, over = np.array(results).T
                print(
                    f"| {Path(path).name.split('.')[0]} | {at:g} | {way} | **{ratios.mean():.3f}** | "
                    f"{int((over >= -1e-9).sum())}/{len(over)} | {over.mean():+.4f}, {over.min():+.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
