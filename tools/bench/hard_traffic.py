"""Traffic that is hard on an SLA: few references, and requests that change half-way.

    python tools/bench/hard_traffic.py sparse TABLE [--share 0.1] [--at 0.5] [--orders 3]
    python tools/bench/hard_traffic.py drift TABLE TABLE [--models A,B] [--models C,D] [--at 0.5] [--orders 3] [--pipe]

A file is read ahead; with --pipe it is not. Accuracies are the true ones, also of requests whose reference the program
didn't see. `drift` routes the first table's requests, then the second's; models are paired by their place. Expected:
alpha kept on the true accuracies, dearer than with references and steady traffic. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from messcli.files.ahead import reservoir
from messcli.metrics import load_metric
from messcli.records import Outcome, Request
from messcli.routing.line import Settled
from messcli.routing.loop import chunks
from messcli.routing.policy import cheapest_mix
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.source import Recorded
from messcli.simulation.table import OutcomeTable, read_table


class Traffic:
    """Requests with every model's true accuracy and joules, in the order in which they come."""

    def __init__(self, parts: Sequence[OutcomeTable], seed: int, share: float) -> None:
        draw = np.random.default_rng(seed)
        self.models = len(parts[0].names)
        self.requests: list[Request] = []
        outcomes: dict[str | int, dict[str, Outcome]] = {}
        rows = []
        for part, table in enumerate(parts):
            for position in draw.permutation(len(table.requests)):
                identity = f"{part}/{position}"
                seen = draw.random() < share
                request = table.requests[position]
                references = (request.references or ("?",)) if seen else ()
                self.requests.append(replace(request, id=identity, references=references))
                row = list(zip(table.accuracies[position], table.joules[position], strict=True))
                outcomes[identity] = {
                    str(m): Outcome("", float(a) if seen else None, float(e), meter="recorded")
                    for m, (a, e) in enumerate(row)
                }
                rows.append(row)
        self.truth = np.array(rows)  # (requests, models, [accuracy, joules])
        self.source = Recorded([str(m) for m in range(self.models)], outcomes)

    def run(self, at: float, seed: int, window: int | None, *, pipe: bool) -> tuple[float, float, float]:
        """(billed / static, mean true accuracy - alpha, alpha)."""
        accuracy, joules = self.truth.mean(axis=0).T
        alpha = float(accuracy[0] + at * (accuracy.max() - accuracy[0]))
        low, high, part = cheapest_mix(list(accuracy), list(joules), alpha)
        static = (1 - part) * joules[low] + part * joules[high]
        setup = Setup(seed=seed, horizon=len(self.requests), window=window)
        controller = create_controller(setup, self.models, {DEFAULT_PLAN: alpha})
        if not pipe:
            prompts = [request.prompt for request in self.requests]
            controller.read_ahead(reservoir(prompts, setup.tuning.ahead.prompts, seed))
        billed = served = 0.0
        position = 0
        for chunk in chunks(self.requests, controller, self.source):
            for line in chunk.lines:
                if isinstance(line, Settled) and line.served is not None:
                    billed += line.billed_joules or 0.0
                    served += self.truth[position, line.served, 0]
                    position += 1
        return billed / len(self.requests) / static, served / len(self.requests) - alpha, alpha


def window(text: str) -> int | None:
    return None if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["sparse", "drift"])
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--share", type=float, default=None, help="of requests with a reference")
    parser.add_argument("--models", action="append", default=[], help="of each table, smallest to largest")
    parser.add_argument("--at", default="0.2,0.5,0.8")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="order")
    parser.add_argument("--pipe", action="store_true", help="nothing is read ahead")
    parser.add_argument("--window", type=window, default=1, help="a number, or auto")
    parser.add_argument("--metric", default="rouge1")
    options = parser.parse_args()
    if options.share is None:
        options.share = 0.1 if options.kind == "sparse" else 1.0
    chosen = [tuple(names.split(",")) for names in options.models] or [()] * len(options.tables)
    tables = [
        read_table(path, scorer=lambda: load_metric(options.metric), models=names)
        for path, names in zip(options.tables, chosen, strict=True)
    ]
    runs = [tables] if options.kind == "drift" else [[table] for table in tables]
    print("| traffic | at | alpha | billed / static | true accuracy - alpha: mean, min | kept |")
    print("|---|---|---|---|---|---|")
    for parts, names in zip(
        runs, [options.tables] if options.kind == "drift" else [[p] for p in options.tables], strict=True
    ):
        label = ", then ".join(Path(name).name.split(".")[0] for name in names)
        label += f", {options.share:.0%} with references" if options.share < 1 else ""
        for at in map(float, options.at.split(",")):
            results = [
                Traffic(parts, seed, options.share).run(at, seed, options.window, pipe=options.pipe)
                for seed in range(options.first, options.first + options.orders)
            ]
            ratios, margins, alphas = np.array(results).T
            print(
                f"| {label} | {at:g} | {alphas[0]:.4f} | **{ratios.mean():.3f}** | {margins.mean():+.4f}, "
                f"{margins.min():+.4f} | {int((margins >= -1e-9).sum())}/{len(results)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
