"""A run played through engines in load: joules, seconds and requests running, by who was asked and when.

`route` asks in windows, and an engine that is half empty takes more joules per token than a full one. So what a run
costs depends on when its requests could start. The trace holds that; the player turns it into joules.

Knows traces, token counts and cost models; knows nothing of policies or of how a run was decided.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from messcli.calibration.file import FORMATS, load_calibration
from messcli.energy.load import CostModel, Engine, load_json, read_engines
from messcli.errors import EnginesError, OutcomesError, UsageError
from messcli.routing.policy import cheapest_mix
from messcli.simulation.lane import Lane
from messcli.simulation.table import OutcomeTable

Tokens = Sequence[tuple[int, int]]  # prompt and output tokens of a request, by model


@dataclass(frozen=True, slots=True)
class Asked:
    """Who was asked for a request, and from when on it could start: a line of a trace. Models are indices."""

    request: int  # its position in the table
    settled: int  # so many requests, in input order, had to be settled before this one was decided
    stages: tuple[tuple[int, ...], ...]  # an exploration is one stage with several models
    checks: tuple[int, ...] = ()  # models that only read the first answer: one prefill
    model: int | None = None  # served; None: every one that was asked failed


def trace_text(trace: Iterable[Asked], table: OutcomeTable) -> str:
    """A trace as JSON lines, in input order: what `--trace` writes."""
    names = table.names
    rows = (
        {
            "id": table.requests[asked.request].id,
            "settled": asked.settled,
            "stages": [[names[m] for m in stage] for stage in asked.stages],
            "checks": [names[m] for m in asked.checks],
            "model": None if asked.model is None else names[asked.model],
        }
        for asked in trace
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True, slots=True)
class Played:
    """What a run took."""

    joules: float  # of all engines until the last answer, idling included
    seconds: float  # until the last answer
    running: tuple[float, ...]  # requests, mean over the time in which a model had any; by model


# ---- the player ----------------------------------------------------------------------------------


def play(trace: Sequence[Asked], tokens: Sequence[Tokens], costs: Sequence[CostModel]) -> Played:
    """Play a run through engines. Event-driven: an event is the end of an answer.

    Args:
        trace: in input order.
        tokens: of every request of the table with every model.
        costs: one engine per model.

    Raises:
        ValueError: a trace in which a request waits for itself.
    """
    lanes = [Lane(cost) for cost in costs]
    left = [0] * len(trace)  # models of the present stage that haven't answered
    stage = [0] * len(trace)
    settled = admitted = 0
    touched: set[int] = set()
    now = 0.0

    def ask(place: int, models: Iterable[int]) -> None:
        lengths = tokens[trace[place].request]
        for m in models:
            lanes[m].waiting.append((place, *lengths[m]))
            touched.add(m)
            left[place] += 1

    def check(place: int) -> None:
        asked = trace[place]
        read = sum(tokens[asked.request][asked.stages[0][0]])  # the prompt and the first model's answer
        for m in asked.checks:
            lanes[m].joules += read * lanes[m].cost.joules_per_prompt_token

    ends = [math.inf] * len(lanes)
    while settled < len(trace):
        while admitted < len(trace) and trace[admitted].settled <= settled:
            asked = trace[admitted]
            ask(admitted, asked.stages[0])
            if len(asked.stages) == 1:
                check(admitted)
            admitted += 1
        for m in touched:
            lanes[m].advance(now)
            lanes[m].start()
            ends[m] = lanes[m].next_end
        touched.clear()
        now = min(ends)
        if now == math.inf:
            raise ValueError(f"line {settled} of the trace waits for itself: {trace[settled]}")
        m = ends.index(now)
        lanes[m].advance(now)
        touched.add(m)
        for place in lanes[m].ended():
            left[place] -= 1
            if left[place]:
                continue
            stage[place] += 1
            if stage[place] < len(trace[place].stages):
                ask(place, trace[place].stages[stage[place]])
                if stage[place] == 1:
                    check(place)
        while settled < admitted and stage[settled] == len(trace[settled].stages):
            settled += 1
    idle = sum(lane.cost.idle_watts * (now - lane.busy) for lane in lanes)
    return Played(
        joules=idle + sum(lane.joules for lane in lanes),
        seconds=now,
        running=tuple(lane.work / lane.busy if lane.busy else 0.0 for lane in lanes),
    )


# ---- beside what no router could beat or should ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class InLoad:
    """A run in load, beside runs in one go, without windows."""

    joules: float  # per request
    seconds: float  # of the whole run
    running: Mapping[str, float]  # model -> mean requests running while it had any
    of_largest: float  # joules / those of everything on the largest in one go
    of_smallest: float
    of_blind_mix: float  # ... of the cheapest request-blind mix that keeps alpha, in one go


@dataclass(frozen=True)
class Engines:
    """The engines of a table's models, and what the table takes on them."""

    names: tuple[str, ...]
    costs: tuple[CostModel, ...]
    tokens: Sequence[Tokens] = field(repr=False)  # in the table's order
    accuracies: Sequence[float] = field(repr=False)  # means
    alone: tuple[Played, ...] = field(repr=False)  # everything on one model, in one go; by model
    said: tuple[str, ...] = ()  # which engine stands for which model, for people
    _mixes: dict[float, Played] = field(default_factory=dict, repr=False)

    def play(self, trace: Sequence[Asked]) -> Played:
        """A run of the table."""
        return play(trace, self.tokens, self.costs)

    def blind_mix(self, alpha: float) -> Played:
        """The cheapest mix that doesn't look at requests and keeps alpha, drawn by coins, in one go."""
        if alpha not in self._mixes:
            low, high, share = cheapest_mix(self.accuracies, [played.joules for played in self.alone], alpha)
            draw = random.Random(0).random  # noqa: S311  # a coin that is the same for every run
            self._mixes[alpha] = self.play(in_one_go(high if draw() < share else low for _ in self.tokens))
        return self._mixes[alpha]

    def compared(self, played: Played, alpha: float) -> InLoad:
        """A run beside everything on one model and the blind mix."""
        return InLoad(
            joules=played.joules / len(self.tokens),
            seconds=played.seconds,
            running=dict(zip(self.names, played.running, strict=True)),
            of_largest=played.joules / self.alone[-1].joules,
            of_smallest=played.joules / self.alone[0].joules,
            of_blind_mix=played.joules / self.blind_mix(alpha).joules,
        )


def in_one_go(choice: Iterable[int]) -> list[Asked]:
    """A run in which nothing waits for anything: the model of each request of the table."""
    return [Asked(request, 0, ((m,),), model=m) for request, m in enumerate(choice)]


def tokens_of(table: OutcomeTable) -> list[Tokens]:
    """Prompt and output tokens of every request and model. Raises OutcomesError where the table lacks them."""
    found: list[Tokens] = []
    for request in table.requests:
        row: list[tuple[int, int]] = []
        for name in table.names:
            outcome = table.outcomes[request.id][name]
            if outcome.prompt_tokens is None or outcome.output_tokens is None:
                raise OutcomesError(
                    f'--engines: the table has no "prompt_tokens" and "output_tokens" of model "{name}" for '
                    f"request {request.id!r}. Record it with messcli, or add them"
                )
            row.append((outcome.prompt_tokens, outcome.output_tokens))
        found.append(row)
    return found


def engines_of(table: OutcomeTable, path: Path, pairs: Mapping[str, str]) -> Engines:
    """The engine of each model of `table`, and what the table takes on them in one go.

    Args:
        path: an engines file, or a calibration.
        pairs: model -> entry of the file, where it is said; the others are found by name, or guessed.

    Raises:
        EnginesError, OutcomesError, UsageError: with the cure.
    """
    tokens = tokens_of(table)
    chosen, said = _chosen(table, tokens, _entries(path), path, pairs)
    costs = tuple(engine.cost for engine in chosen)
    alone = tuple(play(in_one_go([m] * len(tokens)), tokens, costs) for m in range(len(costs)))
    means = table.accuracies.mean(axis=0).tolist()
    return Engines(table.names, costs, tokens, means, alone, tuple(said))


def at_full_load(table: OutcomeTable, engines: Engines) -> OutcomeTable:
    """The table with the joules that its answers take on `engines` at full load, decided by those in load."""
    outcomes = {}
    for request, row in zip(table.requests, engines.tokens, strict=True):
        known = table.outcomes[request.id]
        outcomes[request.id] = {
            name: replace(known[name], joules=cost.joules_at_full_load(*lengths))
            for name, cost, lengths in zip(table.names, engines.costs, row, strict=True)
        }
    return replace(table, outcomes=outcomes, engines=engines.costs)


# ---- which engine stands for which model ---------------------------------------------------------


def _entries(path: Path) -> list[Engine]:
    document = load_json(path)
    if not isinstance(document, dict) or document.get("format") not in FORMATS:
        return read_engines(path)
    models = load_calibration(path).models
    for model in models:
        if model.load is None:
            raise EnginesError(
                f'{path}: model "{model.name}" wasn\'t measured at several loads. Run `messcli calibrate` again, with '
                "more --budget"
            )
    return [Engine(model.name, "", "", None, model.load) for model in models if model.load is not None]


def _chosen(
    table: OutcomeTable,
    tokens: Sequence[Tokens],
    entries: Sequence[Engine],
    path: Path,
    pairs: Mapping[str, str],
) -> tuple[list[Engine], list[str]]:
    """An entry for every model, and lines that say which."""
    for model in pairs:
        if model not in table.names:
            raise UsageError(f'--engine: no model "{model}" in the table. It has {", ".join(table.names)}')
    found = {model: _named(entry, entries, path) for model, entry in pairs.items()}
    for name in table.names:
        if name not in found and (entry := _same(name, entries)) is not None:
            found[name] = entry
    unknown = [name for name in table.names if name not in found]
    if unknown:
        if found:
            raise EnginesError(
                f'{path}: which entry is model "{unknown[0]}"? Say it with --engine "{unknown[0]}=ENTRY"; '
                f"entries are {_list(entries)}"
            )
        found = _guessed(table, tokens, entries, path)
    chosen = [found[name] for name in table.names]
    guess = " (guessed: say others with --engine MODEL=ENTRY)" * bool(unknown)
    text = ", ".join(f"{name} = {engine.label}" for name, engine in zip(table.names, chosen, strict=True))
    return chosen, [f"engines{guess}: {text}"]


def _list(entries: Sequence[Engine]) -> str:
    return "; ".join(engine.label for engine in entries)


def _named(text: str, entries: Sequence[Engine], path: Path) -> Engine:
    wanted = [part.strip() for part in text.split(",")]
    fitting = [
        engine
        for engine in entries
        if wanted[0] == engine.model and all(part in (engine.gpu, engine.task) for part in wanted[1:])
    ]
    if len(fitting) == 1:
        return fitting[0]
    what = f"{len(fitting)} entries are" if fitting else "no entry is"
    raise EnginesError(
        f'{path}: {what} "{text}". Write MODEL=ENTRY, with card and task after commas where a model has several; '
        f"entries are {_list(fitting or entries)}"
    )


def _same(name: str, entries: Sequence[Engine]) -> Engine | None:
    """The only entry of that name, with or without the owner before a slash."""
    fitting = [e for e in entries if name.lower() in (e.model.lower(), e.model.lower().rpartition("/")[2])]
    return fitting[0] if len(fitting) == 1 else None


def _guessed(
    table: OutcomeTable, tokens: Sequence[Tokens], entries: Sequence[Engine], path: Path
) -> dict[str, Engine]:
    """No name fits. As many entries as models: in the file's order. More: those whose joules differ most like the
    table's, of the first entry's card and task."""
    count = len(table.names)
    if len(entries) == count:
        return dict(zip(table.names, entries, strict=True))
    alike = [e for e in entries if (e.gpu, e.task) == (entries[0].gpu, entries[0].task)]
    if len(alike) < count:
        raise EnginesError(
            f"{path}: {len(alike)} entries alike for {count} models, and no name fits. Say which with --engine "
            f"MODEL=ENTRY; entries are {_list(entries)}"
        )
    lengths = np.array(tokens, float).mean(axis=0)  # (models, 2)
    joules = np.log(table.joules.mean(axis=0))

    def spread(chosen: Sequence[Engine]) -> float:
        at_full = [
            e.cost.joules_at_full_load(*pair) for e, pair in zip(chosen, lengths.tolist(), strict=True)
        ]
        return float(np.std(np.log(at_full) - joules))

    ordered = sorted(alike, key=lambda e: e.cost.joules_at_full_load(1.0, 1.0))
    best = min(combinations(ordered, count), key=spread)
    return dict(zip(table.names, best, strict=True))
