"""How far routing is from a router that knew the table, and by what: joules in those of `static`.

    python tools/research/distance.py TABLE... [--orders 0:3] [--at 0.2,0.5,0.8] [--window auto|N] [--rows N]
        [--no-look] [--metric NAME] [--out FILE]

`informed` serves argmin e - price x Â at the prices, two at the most, that meet alpha, with Â and e of each request
from ridge regressions on the other half of the table, where every model had answered. The rest of a run's bill is
taken apart by running it again with something known that it had to learn:

levels         the models' mean accuracies
slopes         how accuracy and joules depend on prompts, as `informed` knows it
blind windows  requests decided together, in place of one at a time
explorations   what models took that didn't serve, in the run that knows all of that
overshoot      accuracy above alpha in it, at the price of `informed`
rest           chance, looks at answers, and the search of the price

A line of JSON per run; a summary in Markdown on standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.files.ahead import reservoir
from messcli.metrics import load_metric
from messcli.predict.joules import JoulesPredictor
from messcli.predict.latent import Placed
from messcli.predict.ridge import RidgePredictor
from messcli.routing.controller import Controller
from messcli.routing.line import Settled
from messcli.routing.loop import chunks
from messcli.routing.policy import cheapest_mix
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.simulation.hindsight import static_mix
from messcli.simulation.runs import alphas_at
from messcli.simulation.table import OutcomeTable, read_table

Array = NDArray[np.float64]
KNOWN = 1e6  # answers: nothing is doubted
PARTS = ("informed", "levels", "slopes", "blind windows", "explorations", "overshoot", "rest")


class TrueLevels(RidgePredictor):
    """Learns slopes, and is told the models' mean accuracies over the table."""

    def __init__(self, texts: Sequence[str], means: Array) -> None:
        super().__init__(len(means))
        self._texts = texts
        self._means = means

    def solve(self) -> None:
        super().solve()
        at = np.array([placed.at for placed in self.encode_many(self._texts)])
        self._weights[-1] += self._means - (at @ self._weights[:-1] + self._weights[-1]).mean(axis=0)

    @property
    def samples(self) -> Array:
        return np.full(len(self._means), KNOWN) if self.version else super().samples


class KnownAccuracies(RidgePredictor):
    """Is told everything, and learns nothing."""

    def __init__(self, rows: Mapping[str, Array], models: int) -> None:
        super().__init__(models)
        self._rows = rows
        self.version = 1

    def learn_one(self, features: Placed, observed: Array) -> None:
        pass

    def learn_again(self, texts: Sequence[str]) -> None:
        pass

    @property
    def samples(self) -> Array:
        return np.full(self._models, KNOWN)

    def predict_many(self, features: Sequence[Placed]) -> Array | None:
        return np.array([self._rows[one.text] for one in features])


class KnownJoules(JoulesPredictor):
    """The same of joules."""

    def __init__(self, rows: Mapping[str, Array], models: int) -> None:
        super().__init__(models)
        self._rows = rows
        self._mean = np.array(list(rows.values())).mean(axis=0)
        self.version = 1

    def learn_one(self, features: Placed, observed: Array) -> None:
        pass

    def learn_again(self, texts: Sequence[str]) -> None:
        pass

    @property
    def samples(self) -> Array:
        return np.full(self._models, KNOWN)

    @property
    def typical(self) -> Array:
        return self._mean

    def predict_many(self, features: Sequence[Placed]) -> Array | None:
        return np.array([self._rows[one.text] for one in features])


def informed_estimates(table: OutcomeTable) -> tuple[Array, Array]:
    """Accuracy and joules of every request, from what all models did with the other half: (requests, models) each."""
    count, models = table.accuracies.shape
    half = np.random.default_rng(0).permutation(count) < count // 2
    accuracies, joules = np.zeros((count, models)), np.zeros((count, models))
    texts = [request.prompt for request in table.requests]
    for own in (half, ~half):
        fitted = (
            (RidgePredictor(models), table.accuracies, accuracies),
            (JoulesPredictor(models), table.joules, joules),
        )
        for predictor, truth, said in fitted:
            for k in np.flatnonzero(~own).tolist():
                predictor.learn_one(predictor.encode(texts[k]), truth[k])
            predictor.solve()
            said[own] = predictor.predict_many([predictor.encode(texts[k]) for k in np.flatnonzero(own)])
    return accuracies, joules


def informed_bill(table: OutcomeTable, accuracies: Array, joules: Array, alpha: float) -> tuple[float, float]:
    """(mean joules, joules per unit of accuracy) of the cheapest mix of two prices whose choices truly reach alpha."""
    prices = np.geomspace(1e-3 * joules.mean(axis=0).min(), 1e4 * joules.mean(axis=0).max(), 300)
    rows = np.arange(len(joules))
    bought: dict[float, float] = {}  # mean accuracy -> mean joules
    for price in prices.tolist():
        chosen = np.argmin(joules - price * accuracies, axis=1)
        accuracy = float(table.accuracies[rows, chosen].mean())
        bill = float(table.joules[rows, chosen].mean())
        bought[accuracy] = min(bill, bought.get(accuracy, bill))
    found, bills = list(bought), list(bought.values())
    low, high, part = cheapest_mix(found, bills, alpha)
    gained = found[high] - found[low]
    return bills[low] + part * (bills[high] - bills[low]), (
        bills[high] - bills[low]
    ) / gained if gained else 0.0


@dataclass(frozen=True, slots=True)
class Taken:
    """What a run took, per request."""

    billed: float  # joules
    beside: float  # joules of models that didn't serve
    over: float  # mean accuracy - alpha


def run(
    table: OutcomeTable, order: Sequence[int], controller: Controller, setup: Setup, alpha: float
) -> Taken:
    """Route the table's requests in that order."""
    requests = [table.requests[k] for k in order]
    prompts = [request.prompt for request in requests]
    controller.read_ahead(reservoir(prompts, setup.tuning.ahead.prompts, setup.seed))
    billed = served = accuracy = 0.0
    for chunk in chunks(requests, controller, table.source):
        for line in chunk.lines:
            if isinstance(line, Settled) and line.served is not None:
                outcome = line.outcomes[line.served]
                billed += line.billed_joules or 0.0
                served += outcome.joules or 0.0
                accuracy += outcome.accuracy or 0.0
    count = len(requests)
    return Taken(billed / count, (billed - served) / count, accuracy / count - alpha)


def taken_apart(
    table: OutcomeTable, estimates: tuple[Array, Array], at: float, setup: Setup
) -> dict[str, float]:
    """The parts of one run's bill, in joules of `static`, and how it ended."""
    (alpha,) = alphas_at(table, [at])
    static = static_mix(table, alpha).billed_joules
    models = len(table.names)
    texts = [request.prompt for request in table.requests]
    accuracies, joules = (dict(zip(texts, said, strict=True)) for said in estimates)
    order = np.random.default_rng(setup.seed).permutation(len(texts)).tolist()

    def of(window: int | None, predictor: RidgePredictor | None, known: bool) -> Taken:
        own = Setup(seed=setup.seed, window=window, horizon=len(texts), no_look=setup.no_look)
        whole = create_controller(own, models, {DEFAULT_PLAN: alpha})
        controller = Controller(
            models,
            whole.policy,
            whole.learnt.predictor if predictor is None else predictor,
            KnownJoules(joules, models) if known else JoulesPredictor(models),
            whole.settings,
            own.tuning,
            whole.learnt.answers,
        )
        return run(table, order, controller, own, alpha)

    as_it_is = of(setup.window, None, known=False)
    levels = of(setup.window, TrueLevels(texts, table.accuracies.mean(axis=0)), known=False)
    both = of(setup.window, KnownAccuracies(accuracies, models), known=True)
    alone = of(1, KnownAccuracies(accuracies, models), known=True)
    least, price = informed_bill(table, *estimates, alpha)
    parts = {
        "informed": least,
        "levels": as_it_is.billed - levels.billed,
        "slopes": levels.billed - both.billed,
        "blind windows": both.billed - alone.billed,
        "explorations": alone.beside,
        "overshoot": price * alone.over,
    }
    parts["rest"] = as_it_is.billed - sum(parts.values())
    found = {name: parts[name] / static for name in PARTS}
    return {"ratio": as_it_is.billed / static, "over": as_it_is.over, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--orders", default="0:3", help="first:end")
    parser.add_argument("--at", default="0.2,0.5,0.8")
    parser.add_argument("--window", default="auto")
    parser.add_argument("--rows", type=int, help="so many of the table, the first ones of a shuffle")
    parser.add_argument("--no-look", action="store_true")
    parser.add_argument("--metric", default="rouge1")
    parser.add_argument("--out", type=Path, help="where the JSON lines go, instead of standard output")
    options = parser.parse_args()
    first, end = map(int, options.orders.split(":"))
    window = None if options.window == "auto" else int(options.window)
    print("| table | billed | " + " | ".join(PARTS) + " |", file=sys.stderr)
    print("|---|---|" + "---|" * len(PARTS), file=sys.stderr)
    with options.out.open("a", encoding="utf-8") if options.out else sys.stdout as out:
        for path in options.tables:
            table = read_table(path, scorer=lambda: load_metric(options.metric))
            kept = np.random.default_rng(0).permutation(len(table.requests))[: options.rows]
            table = OutcomeTable(table.names, tuple(table.requests[k] for k in kept), table.outcomes)
            estimates = informed_estimates(table)
            name = Path(path).name.split(".")[0]
            rows: list[dict[str, Any]] = []
            for at in map(float, options.at.split(",")):
                for order in range(first, end):
                    setup = Setup(seed=order, window=window, no_look=options.no_look)
                    found = taken_apart(table, estimates, at, setup)
                    rows.append({"table": name, "at": at, "order": order, **found})
                    out.write(json.dumps(rows[-1]) + "\n")
                    out.flush()
            means = [float(np.mean([row[part] for row in rows])) for part in ("ratio", *PARTS)]
            print(f"| {name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |", file=sys.stderr)


if __name__ == "__main__":
    main()
