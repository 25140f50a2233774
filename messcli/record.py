"""`record`: every model answers every request, and what came of it becomes an outcomes table.

`route`'s own loop, state and output with another controller (ask everyone, always) and another row: it is
batched, locked, stopped and resumed exactly as `route` is. `simulate` reads the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from messcli.controller import Controller, Settings
from messcli.inputs import InputFields
from messcli.loop import Settled
from messcli.policy import Largest
from messcli.predictors import MeanPredictor
from messcli.records import Decision, Outcome, Rejected, Request
from messcli.ridge import JoulesPredictor
from messcli.run import Job, Progress, RouteConfig, Summary, run_job
from messcli.zoo import Zoo

_TABLE_FIELDS = ("id", "prompt", "messages", "reference", "models", "error")


@dataclass(frozen=True, slots=True)
class RecordConfig:
    """What `messcli record` was asked to do. None means: as the zoo file says, or the default."""

    input: str
    output: str
    state: Path | None = None
    zoo: str | None = None
    metric: str | None = None
    window: int = 32
    limit: int | None = None
    on_error: str = "skip"
    meter: str = "auto"
    batch_size: int | None = None
    preload: bool = False
    wait_seconds: float = 0.0
    input_fields: InputFields = field(default_factory=InputFields)


@dataclass(frozen=True, slots=True)
class RecordSummary:
    """What a run recorded."""

    run: Summary
    incomplete: int  # requests of this run that lack an answer of at least one model
    accuracies: Mapping[str, float]  # model -> mean over this run's requests with a reference


class AskAll(Controller):
    """Puts every request to every model that can take its prompt; estimates nothing."""

    def __init__(self, models: int, alphas: Mapping[str, float]) -> None:
        settings = Settings(alphas=dict.fromkeys(alphas, 0.0))  # a recording promises nothing
        super().__init__(models, Largest(), MeanPredictor(models), JoulesPredictor(models), settings)

    def decide(self, requests: Sequence[Request], allowed: Sequence[Sequence[int]]) -> list[Decision]:
        return [
            Decision(t, can[-1], tuple(can), True, None, None, False)
            for t, can in enumerate(allowed, start=self.t + 1)
        ]


def record(
    config: RecordConfig,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> RecordSummary:
    """Record `config.input` to `config.output`, going on where an earlier run stopped.

    Raises:
        MessError: with what the user can do; all finished windows are kept.
    """
    route_config = RouteConfig(
        input=config.input,
        output=config.output,
        state=config.state,
        zoo=config.zoo,
        alpha=0.0,
        metric=config.metric,
        policy="record",  # in the state's signature: a recording isn't continued by `route`, nor the reverse
        predictor="mean",
        window=config.window,
        limit=config.limit,
        on_error=config.on_error,
        meter=config.meter,
        batch_size=config.batch_size,
        preload=config.preload,
        wait_seconds=config.wait_seconds,
        input_fields=config.input_fields,
    )
    rows = _Rows()
    summary = run_job(route_config, Job(_ask_all, rows.row), on_progress, tell)
    return RecordSummary(summary, rows.incomplete, rows.means())


def _ask_all(_: RouteConfig, zoo: Zoo, alphas: Mapping[str, float]) -> Controller:
    return AskAll(len(zoo.models), alphas)


class _Rows:
    """Makes the table's rows, and counts."""

    def __init__(self) -> None:
        self.incomplete = 0
        self._accuracies: dict[str, list[float]] = {}

    def row(self, line: Settled | Rejected, names: Sequence[str]) -> dict[str, Any]:
        if isinstance(line, Rejected):
            return {"id": line.id, "error": line.error}
        models: dict[str, dict[str, Any]] = {}
        for m, name in enumerate(names):
            outcome = line.outcomes.get(m)
            if outcome is None:
                models[name] = {"error": "the prompt is longer than the model's context"}
            else:
                models[name] = _outcome_fields(outcome)
                if outcome.accuracy is not None and outcome.error is None:
                    self._accuracies.setdefault(name, []).append(outcome.accuracy)
        self.incomplete += any("error" in outcome for outcome in models.values())
        request = line.request
        row: dict[str, Any] = {"id": request.id, "prompt": request.prompt}
        if request.messages is not None:
            row["messages"] = list(request.messages)
        if request.references:
            row["reference"] = (
                request.references[0] if len(request.references) == 1 else list(request.references)
            )
        row["models"] = models
        row.update((name, value) for name, value in request.extra.items() if name not in _TABLE_FIELDS)
        return row

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._accuracies.items()}


def _outcome_fields(outcome: Outcome) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "output": outcome.output,
        "accuracy": outcome.accuracy,
        "joules": outcome.joules,
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "seconds": outcome.seconds,
        "meter": outcome.meter,
        "error": outcome.error,
    }
    # joules always stand there: null says that they aren't known
    return {name: value for name, value in fields.items() if value is not None or name == "joules"}
