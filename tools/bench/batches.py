"""What `route` itself takes on models that run batches: a recorded table, answered by engines as measured on a card.

    python tools/bench/batches.py TABLE... [--engines docs/evidence/gpu/engines.json] [--rows 4096] [--at 0.5]

The real `route` (windows, journal, ledger) over doubles for the models. A double answers with the table's accuracy, and
tells no confidence: nothing is looked at. A batch of it takes as many steps as its longest answer has tokens, each at
the joules that were measured with so many requests running; nothing is waited for. So this shows what becomes of a
job's batches, which `simulate --engines` doesn't: that plays engines which take requests in and out of running steps.

Prints Markdown: joules of mess+ beside everything on the largest in one go and beside a request-blind mix in one go.

Expected: halfway on 4,096 rows, at most 1.5 of the mix; on 600 rows at most what the largest takes.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from messcli.energy.counter import MeterKind
from messcli.energy.load import Engine, read_engines
from messcli.jobs.config import RouteConfig
from messcli.jobs.route import route
from messcli.metrics import ROUNDING, load_metric
from messcli.models.backend import InBatches
from messcli.records import Generation, Request
from messcli.registry import BACKENDS, METERS
from messcli.routing.policy import cheapest_mix
from messcli.simulation.table import OutcomeTable, read_table
from messcli.zoo import ModelSpec

NAME = "measured-batches"  # of the doubles' backend, meter and metric
ENGINES = Path("docs/evidence/gpu/engines.json")
BATCH = 256


@dataclass
class Card:
    """What stands behind the doubles: the table, the engines, and a counter."""

    rows: Mapping[str, Sequence[tuple[float, int]]]  # request -> by model: accuracy, output tokens
    engines: Mapping[str, tuple[int, Engine]]  # model -> its place in the zoo, its engine
    joules: float = 0.0
    batches: int = 0

    def run(self, model: str, prompts: Sequence[int], outputs: Sequence[int]) -> None:
        """One batch, with the lengths of its requests in tokens."""
        cost = self.engines[model][1].cost
        self.joules += sum(prompts) * cost.joules_per_prompt_token
        self.joules += max(outputs) * cost.step_joules(len(outputs))
        self.batches += 1


CARD = Card({}, {})


class Double(InBatches):
    """A model of the table."""

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        self.spec = spec
        self.devices = ("cpu",)
        self.loaded = False
        self.occupies_memory = True
        self.context_length = None
        self._size = batch_size or BATCH

    def load(self) -> None:
        self.loaded = True

    def unload(self) -> None:
        self.loaded = False

    def prompt_tokens(self, request: Request) -> int:
        return 1 + len(request.prompt) // 4

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
        return [order[start : start + self._size] for start in range(0, len(order), self._size)]

    def cannot_weigh(self, options: Sequence[str]) -> str | None:
        return "a table knows no checks"

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        place, _ = CARD.engines[self.spec.name]
        found = [CARD.rows[str(request.id)][place] for request in batch]
        prompts = [self.prompt_tokens(request) for request in batch]
        CARD.run(self.spec.name, prompts, [tokens for _, tokens in found])
        return [
            Generation(repr(accuracy), prompt, tokens, finish="stop")
            for prompt, (accuracy, tokens) in zip(prompts, found, strict=True)
        ]


class CardCounter:
    """The card's joules: up to date at every reading."""

    kind = NAME
    provenance = "engines as measured, no card"
    period = 0.0
    partitioned = False

    def read(self) -> float:
        return CARD.joules

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


METER = MeterKind(lambda device, options: CardCounter(), devices=("cpu",))


def told(output: str, references: Sequence[str]) -> float:
    """The metric: a double's answer is its accuracy."""
    return float(output)


def length(tokens: int, rng: random.Random) -> int:
    """Output tokens of one request, with any model: of a third of them as many as there may be."""
    return tokens if rng.random() < 1 / 3 else rng.randint(1, tokens)


def prepare(table: OutcomeTable, rows: int, order: int, tokens: int, engines: Sequence[Engine]) -> list[str]:
    """Puts a sample of the table behind the doubles; the requests' lines."""
    rng = random.Random(order)
    chosen = rng.sample(range(len(table.requests)), min(rows, len(table.requests)))
    CARD.engines = {name: (place, engines[place]) for place, name in enumerate(table.names)}
    CARD.rows = {}
    lines = []
    for number, index in enumerate(chosen):
        name = f"r{number}"
        output_tokens = length(tokens, rng)
        CARD.rows[name] = [(float(accuracy), output_tokens) for accuracy in table.accuracies[index]]
        lines.append(json.dumps({"id": name, "prompt": table.requests[index].prompt, "reference": "known"}))
    return lines


def in_one_go(lines: Sequence[str], models: Sequence[str]) -> float:
    """Joules of every request on its model of `models`, each model given its whole share at once."""
    joules = CARD.joules
    for name in CARD.engines:
        requests = [
            Request(**{key: row[key] for key in ("id", "prompt")})
            for row, model in zip(map(json.loads, lines), models, strict=True)
            if model == name
        ]
        double = Double(ModelSpec(name, "", NAME), batch_size=BATCH)
        for batch in double.plan(requests):
            double.generate([requests[n] for n in batch])
    joules, CARD.joules = CARD.joules - joules, 0.0
    return joules


def routed(
    folder: Path, lines: Sequence[str], names: Sequence[str], alpha: float, window: str
) -> tuple[float, float]:
    """Joules of `route` over the doubles, all of them, and its mean accuracy."""
    models = "".join(
        f'[[models]]\nname = "{n}"\npath = "./{n}"\nbackend = "{NAME}"\ndevice = "cpu"\n' for n in names
    )
    (folder / "zoo.toml").write_text(models)
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    for old in folder.glob("out.jsonl*"):
        old.unlink()
    CARD.joules, CARD.batches = 0.0, 0
    config = RouteConfig.of(
        str(folder / "in.jsonl"),
        str(folder / "out.jsonl"),
        zoo=str(folder / "zoo.toml"),
        alpha=alpha,
        metric=f"{__name__}:told",
        meter=NAME,
        window=None if window == "auto" else int(window),
        no_calibration=True,
    )
    route(config)
    rows = [json.loads(line) for line in (folder / "out.jsonl").open()]
    return CARD.joules, sum(row["accuracy"] for row in rows) / len(rows)


def measured(
    table: OutcomeTable, rows: int, order: int, engines: Sequence[Engine], options: argparse.Namespace
) -> tuple[float, float, int, float]:
    """Of one order: joules, of the largest's and of a blind mix's; batches; accuracy - alpha."""
    lines = prepare(table, rows, order, options.tokens, engines)
    names, count = list(table.names), len(lines)
    accuracies = np.array([[one for one, _ in row] for row in CARD.rows.values()])
    means = accuracies.mean(axis=0)
    alpha = float(means[0] + options.at * (means.max() - means[0]))
    alone = [in_one_go(lines, [name] * count) for name in names]
    low, high, share = cheapest_mix(means.tolist(), alone, alpha)
    rng = random.Random(order)
    mix = in_one_go(lines, [names[high if rng.random() < share else low] for _ in lines])
    with tempfile.TemporaryDirectory() as folder:
        joules, accuracy = routed(Path(folder), lines, names, alpha, options.window)
    return joules / alone[-1], joules / mix, CARD.batches, accuracy - alpha


def spread(values: Sequence[float]) -> str:
    """Mean, and the least and most where there are several."""
    text = f"**{sum(values) / len(values):.3f}**"
    return text if len(values) == 1 else f"{text} ({min(values):.3f}..{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--engines", type=Path, default=ENGINES, help="smallest model first")
    parser.add_argument("--rows", default="4096,600")
    parser.add_argument("--at", type=float, default=0.5)
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the first order")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answers")
    parser.add_argument("--window", default="auto")
    parser.add_argument("--metric", default="rouge1", help="scores outputs that have no accuracy")
    options = parser.parse_args()
    BACKENDS[NAME], METERS[NAME] = f"{__name__}:Double", f"{__name__}:METER"
    known = read_engines(options.engines)
    print(
        "| table | rows | of largest in one go | of blind mix in one go | batches | kept | accuracy - alpha |"
    )
    print("|---|---|---|---|---|---|---|")
    for path in options.tables:
        table = read_table(path, scorer=lambda: load_metric(options.metric))
        count = len(table.names)
        # two models: the first and the last engine
        engines = [known[round(place * (len(known) - 1) / max(1, count - 1))] for place in range(count)]
        for rows in map(int, options.rows.split(",")):
            orders = range(options.seed, options.seed + options.orders)
            results = [measured(table, rows, order, engines, options) for order in orders]
            largest, mix, batches, margins = zip(*results, strict=True)
            print(
                f"| {Path(path).name.split('.')[0]} | {len(CARD.rows)} | {spread(largest)} | {spread(mix)} "
                f"| {sum(batches) / len(batches):.0f} | {sum(m >= -ROUNDING for m in margins)}/{len(margins)} "
                f"| {sum(margins) / len(margins):+.4f}, {min(margins):+.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
