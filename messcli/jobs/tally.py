"""Counts what a run does while it goes on.

Knows settled requests and the controller's ledger; knows nothing of files, states or the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from messcli.calibration.file import Calibration
from messcli.jobs.summary import Energy, Looks, Period, PredictionError, Promises, Requests, Summary
from messcli.jobs.watch import Activity
from messcli.records import Rejected
from messcli.report.bill import Alone, Lengths, by_answers, by_cost_model
from messcli.routing.controller import Controller
from messcli.routing.line import Settled
from messcli.routing.sla import Account
from messcli.tariff import FREE, Tariff


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known while a run goes on, for whoever watches."""

    finished: int  # lines of this input, those of earlier runs included
    total: int | None  # None where the input can be read only once
    joules: float  # billed in this run
    accuracy: float | None  # mean of all plans: observed, or where answers are audited its estimate
    alpha: float | None  # None where there are several plans
    explorations_left: float | None  # expected
    activity: Activity  # what the engines are doing


class Tally:
    """Counts what a run does.

    Args:
        names: the zoo's models.
        controller: that decides the run; its ledger is read, never changed.
        calibration: whose predictions are compared with what is read; None: there is none.
        tariff: what joules and tokens cost.
        hour: of the local day, now.
    """

    def __init__(
        self,
        names: Sequence[str],
        controller: Controller,
        calibration: Calibration | None,
        tariff: Tariff = FREE,
        hour: Callable[[], int] = lambda: time.localtime().tm_hour,
    ) -> None:
        self._hour = hour
        self._names = names
        self._controller = controller
        self._calibration = calibration
        self._lines = 0
        self._requests = Requests()
        self._energy = Energy(tariff=tariff)
        self._looks = Looks()
        self._asked: set[int] = set()  # models
        self._lengths = Lengths()  # of the largest model's answers
        self._other_meter: str | None = None  # than the calibration's
        self._told_other_meter = False
        self._unreachable: set[str] = set()

    def add(self, line: Settled | Rejected) -> None:
        """Count a line that is finished."""
        self._lines += 1
        own = line if isinstance(line, Rejected) else line.request
        self._requests.retried += own.mends is not None
        if isinstance(line, Rejected):
            self._add_failure(line.error)
            return
        self._add_request(line)
        self._add_joules(line)

    def _add_request(self, line: Settled) -> None:
        requests = self._requests
        requests.routed += 1
        requests.explored += line.decision.explored
        requests.audited += line.decision.audited
        if line.decision.given is not None:
            self._looks.add(line)
        self._looks.checks += len(line.checks)
        self._asked.update(line.outcomes)
        if line.served is None:
            self._add_failure(f"{line.request.place}: {line.error}")
            return
        outcome, name = line.outcomes[line.served], self._names[line.served]
        requests.served[name] += 1
        requests.cut[name] += outcome.finish == "length"
        requests.passed_on.update(self._names[m] for m in line.errors)
        if outcome.unscored is not None:
            requests.unscored += 1
            requests.first_error = requests.first_error or f"{line.request.place}: {outcome.unscored}"

    def _add_failure(self, error: str | None) -> None:
        self._requests.failed += 1
        self._requests.first_error = self._requests.first_error or error

    def _add_joules(self, line: Settled) -> None:
        energy = self._energy
        if line.billed_joules is None:
            energy.unmetered += 1
        if line.decision.audited:
            energy.audit_joules += line.audit_joules
        for check in line.checks.values():
            energy.billed_joules += check.joules or 0.0
            reader = line.decision.checked_by
            self._spend("" if reader is None else self._names[reader], check.joules, check.tokens, 1)
        for m, outcome in line.outcomes.items():
            if outcome.meter:
                energy.meters[outcome.meter] = None
            if m == len(self._names) - 1 and outcome.prompt_tokens and outcome.output_tokens is not None:
                self._lengths.add(outcome.prompt_tokens, outcome.output_tokens)
            read, written = outcome.prompt_tokens or 0, outcome.output_tokens or 0
            self._spend(self._names[m], outcome.joules, read, written)
            energy.billed_joules += outcome.judged_joules
            for judgement in outcome.judgements:
                self._spend("", judgement.joules, judgement.tokens, 1)
            if outcome.joules:
                energy.billed_joules += outcome.joules
                if outcome.worth is None:
                    self._compare(line, m, outcome.joules, outcome.meter)

    def _spend(self, model: str, joules: float | None, read: int, written: int) -> None:
        """Count what a call costs: tokens that it read and wrote."""
        if joules is not None and self._energy.tariff:
            self._energy.spent.add(
                self._energy.tariff,
                joules,
                self._hour(),
                model=model,
                prompt_tokens=read,
                output_tokens=written,
            )

    def _compare(self, line: Settled, m: int, joules: float, meter: str | None) -> None:
        """Book how far the predictions were from what was read."""
        predicted = self._energy.predicted
        if line.decision.joules_predicted is not None:
            adapted = predicted.setdefault("adapted", PredictionError())
            adapted.add(line.decision.joules_predicted[m], joules)
        if self._calibration is not None:
            model = self._calibration.of(self._names[m])
            alone = predicted.setdefault("calibration", PredictionError())
            alone.add(model.joules(len(line.request.prompt)), joules)
            if meter not in (model.meter, "replay", None):
                self._other_meter = f"{meter}, and its calibration was by {model.meter}"

    def _alone(self, largest_joules: float | None) -> Alone | None:
        """What everything on the largest takes: by its cost model where readings and calibration are of one meter."""
        largest = self._names[-1]
        if self._asked == {len(self._names) - 1}:  # this run is it
            return None
        if self._calibration is not None and self._lengths.answers and self._other_meter is None:
            model = self._calibration.of(largest)
            if model.load is not None and set(self._energy.meters) == {model.meter}:
                return by_cost_model(largest, model.load, self._lengths)
        in_load = self._controller.learnt.joules_of_many(len(self._names) - 1, self._requests.routed)
        # else it says no more than that its answers here are no cheaper in fuller batches
        if in_load is not None and (not largest_joules or in_load[0] * (1.0 + in_load[1]) < largest_joules):
            joules, error = in_load
            basis = "a line through its answers here, by how many ran at a time"
            return Alone(largest, joules, error, False, basis)
        if not largest_joules:
            return None
        recorded = set(self._energy.meters) == {"replay"}
        basis = "the mean of its answers here" + (
            ""
            if recorded
            else ", in batches as they came; fuller ones take less, as `messcli calibrate` measures"
        )
        return by_answers(largest, largest_joules, None, basis, recorded=recorded)

    def add_overhead(self, joules: Mapping[str, float]) -> None:
        """Count joules that belong to no request, by meter."""
        self._energy.overhead.update(joules)
        if self._energy.tariff:
            self._energy.spent.add(self._energy.tariff, sum(joules.values()), self._hour())

    def take_warnings(self) -> list[str]:
        """What the user should know as soon as it is known, one line each; everything once."""
        warnings = []
        if self._other_meter is not None and not self._told_other_meter:
            self._told_other_meter = True
            warnings.append(
                f"this run is metered by {self._other_meter}: E_m(t) starts elsewhere, and adapts"
            )
        for plan, alpha in self._controller.settings.alphas.items():
            if plan not in self._unreachable and self._controller.unreachable(plan):
                self._unreachable.add(plan)
                name = f' of plan "{plan}"' if plan else ""
                warnings.append(
                    f"alpha {alpha}{name} is above what this zoo reaches, even with the best answer to every "
                    f"request. The SLA will be missed; {self._names[-1]} serves from here on"
                )
        return warnings

    def progress(self, already_done: int, total: int | None, activity: Activity) -> Progress:
        """Where the run stands, given what earlier runs had done of `total` lines."""
        accounts = self._controller.accounts.values()
        alphas = set(self._controller.settings.alphas.values())
        finished = already_done + self._lines
        left = None if total is None else self._controller.expected_explorations(total - finished)
        return Progress(
            finished=finished,
            total=total,
            joules=self._energy.billed_joules + activity.joules,
            accuracy=_mean_of(accounts),
            alpha=next(iter(alphas)) if len(alphas) == 1 else None,
            explorations_left=left,
            activity=activity,
        )

    def summary(
        self,
        *,
        already_done: int,
        largest_joules: float | None,  # mean over all its answers that were read, those of earlier runs too
        metric: str,
        period: Period,
        stopped_by: int | None,
        standing: int = 0,
        named_overhead: Mapping[str, float] | None = None,
    ) -> Summary:
        """The run, summed up. What only the state knows is given."""
        settings = self._controller.settings
        accounts = self._controller.accounts.items()
        return Summary(
            requests=replace(
                self._requests, already_done=already_done, standing=standing, cut=+self._requests.cut
            ),
            energy=replace(
                self._energy, named_overhead=dict(named_overhead or {}), alone=self._alone(largest_joules)
            ),
            promises=Promises(
                accounts={plan: account for plan, account in accounts if plan in settings.alphas},
                alphas=settings.alphas,
                unreachable=tuple(sorted(self._unreachable)),
                metric=metric,
                serve=settings.serve,
                audits=settings.audits,
            ),
            period=period,
            looks=self._looks,
            stopped_by=stopped_by,
        )


def _mean_of(accounts: Collection[Account]) -> float | None:
    """The mean accuracy over plans: of what was observed, or where answers are audited the estimate of all."""
    audited = [(one.mean.mean, one.mean.served) for one in accounts if one.mean is not None]
    if audited:
        known = [(mean, count) for mean, count in audited if mean is not None]
        return (
            sum(mean * count for mean, count in known) / sum(count for _, count in known) if known else None
        )
    observed = sum(one.observed for one in accounts)
    return sum(one.observed_sum for one in accounts) / observed if observed else None
