"""`record`: every model answers every request, and what came of it becomes an outcomes table.

`route`'s own loop, state and output with another controller (ask everyone, always) and another row: it is
batched, locked, stopped and resumed exactly as `route` is. `simulate` reads the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from messcli.jobs.config import RouteConfig
from messcli.jobs.run import Job, run_job
from messcli.jobs.summary import Summary
from messcli.jobs.tally import Progress
from messcli.predict.joules import JoulesPredictor
from messcli.predict.mean import MeanPredictor
from messcli.records import Decision, Rejected, Request, outcome_fields
from messcli.routing.controller import Controller
from messcli.routing.deciding import Settings
from messcli.routing.line import Settled
from messcli.routing.policy import Largest

_TABLE_FIELDS = ("id", "prompt", "messages", "reference", "models", "error")


@dataclass(frozen=True, slots=True)
class RecordSummary:
    """What a run recorded."""

    run: Summary
    incomplete: int  # requests of this run that lack an answer of at least one model
    accuracies: Mapping[str, float]  # model -> mean over this run's requests with a reference
    joules: Mapping[str, float]  # model -> mean over this run's requests whose joules are known
    cut: Mapping[str, int]  # model -> this run's answers that were cut at the limit of tokens

    def text(self) -> list[str]:
        """For people."""
        requests, energy = self.run.requests, self.run.energy
        done = f" ({requests.already_done} were done before)" if requests.already_done else ""
        lacking = f", {self.incomplete} lack an answer" if self.incomplete else ""
        bad = f", {requests.failed} with error" if requests.failed else ""
        lines = [f"recorded {requests.routed} requests{done}{lacking}{bad}"]
        for name, joules in self.joules.items():
            accuracy = self.accuracies.get(name)
            metric = self.run.promises.metric.split("|")[0]
            scored = "" if accuracy is None else f", accuracy {accuracy:.4f} ({metric})"
            cut = f", {self.cut[name]} answers cut at the limit of tokens" if self.cut.get(name) else ""
            lines.append(f"  {name}: {joules:.4g} J per request{scored}{cut}")
        meters = "/".join(energy.meters) or "no meter"
        lines.append(
            f"energy: {energy.billed_joules:.4g} J ({meters}), {energy.overhead_joules:.4g} J overhead"
        )
        return lines


class AskAll(Controller):
    """Puts every request to every model that can take its prompt; estimates nothing.

    Args:
        checks: the larger model that can reads every answer as well.
    """

    def __init__(
        self, models: int, alphas: Mapping[str, float], window: int | None, *, checks: bool = False
    ) -> None:
        self._checks = checks
        # a recording promises nothing
        settings = Settings(alphas=dict.fromkeys(alphas, 0.0), window=window)
        super().__init__(models, Largest(), MeanPredictor(models), JoulesPredictor(models), settings)

    @property
    def has_answers_read(self) -> bool:
        return self._checks

    def decide(
        self,
        requests: Sequence[Request],
        allowed: Sequence[Sequence[int]],
        checkers: Mapping[int, int] | None = None,
    ) -> list[Decision]:
        reader = max((checkers or {}).values(), default=None)
        return [
            Decision(t, can[-1], tuple(can), True, None, None, False, checked_by=reader)
            for t, can in enumerate(allowed, start=self.t + 1)
        ]


def record(
    config: RouteConfig,
    *,
    checks: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> RecordSummary:
    """Record `config.input` to `config.output`, going on where an earlier run stopped.

    Args:
        config: as of `route`; what concerns choosing is of no effect.
        checks: a larger model reads each answer of the smaller ones, and says how likely it is right.
        on_progress: called after every window.
        tell: takes lines for the user's eyes.

    Raises:
        MessError: with what the user can do; all finished windows are kept.
    """
    # The policy stands in the state's signature: a recording isn't continued by `route`, nor the reverse.
    config = replace(
        config,
        promise=replace(config.promise, alpha=0.0),
        setup=replace(config.setup, policy="record", v=None, c=None, predictor="mean"),
    )
    rows = _Rows()
    job = Job(lambda setup, models, alphas: AskAll(models, alphas, setup.window, checks=checks), rows.row)
    summary = run_job(config, job, on_progress, tell)
    return RecordSummary(summary, rows.incomplete, _means(rows.accuracies), _means(rows.joules), rows.cut)


class _Rows:
    """Makes the table's rows, and counts."""

    def __init__(self) -> None:
        self.incomplete = 0
        self.accuracies: dict[str, tuple[float, int]] = {}  # model -> sum, count
        self.joules: dict[str, tuple[float, int]] = {}
        self.cut: Counter[str] = Counter()

    def row(self, line: Settled | Rejected, names: Sequence[str]) -> dict[str, Any]:
        if isinstance(line, Rejected):
            return {"id": line.id, "error": line.error}
        models: dict[str, dict[str, Any]] = {}
        for m, name in enumerate(names):
            outcome = line.outcomes.get(m)
            if outcome is None:
                models[name] = {"error": "the prompt is longer than the model's context"}
            else:
                models[name] = outcome_fields(outcome)
                _add(self.joules, name, outcome.joules)
                self.cut[name] += outcome.finish == "length"
                _add(self.accuracies, name, outcome.accuracy if outcome.error is None else None)
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


def _add(sums: dict[str, tuple[float, int]], name: str, value: float | None) -> None:
    if value is not None:
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + value, count + 1)


def _means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items()}
