"""What a run has done: counted while it goes on, summed up at its end, and said in lines for people.

Knows settled requests and the controller's ledger; knows nothing of files, states or the terminal.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from messcli.calibration.file import Calibration
from messcli.jobs.watch import Activity
from messcli.metrics import failure_words, keeps, with_failures
from messcli.records import Rejected
from messcli.report.audits import Standing
from messcli.report.bill import Alone, Lengths, by_answers, by_cost_model, headline, overhead_words
from messcli.routing.audit import Audits
from messcli.routing.controller import Controller
from messcli.routing.line import Settled
from messcli.routing.sla import Account
from messcli.tariff import FREE, Spent, Tariff


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


@dataclass(slots=True)
class PredictionError:
    """How far E_m(t) was from what was read then, over the calls of a run."""

    calls: int = 0
    relative_errors: float = 0.0  # sum of |predicted - read| / read
    predicted_joules: float = 0.0
    read_joules: float = 0.0

    def add(self, predicted: float, read: float) -> None:
        """Book one call. Joules; `read` above 0."""
        self.calls += 1
        self.relative_errors += abs(predicted - read) / read
        self.predicted_joules += predicted
        self.read_joules += read

    @property
    def mean(self) -> float:
        """Mean absolute percentage error, as a part of 1."""
        return self.relative_errors / self.calls

    @property
    def bias(self) -> float:
        """Of the sum: positive where too much was predicted."""
        return self.predicted_joules / self.read_joules - 1.0


@dataclass(slots=True)
class Looks:
    """Answers of a run that were looked at."""

    answers: int = 0
    escalated: int = 0  # a larger model was asked as well
    checks: int = 0  # answers that a larger model read, looked at or to learn
    joules: float = 0.0  # of answers that weren't served, and of checks
    estimated: float = 0.0  # sum of Â of what was served, given the answer; of observed ones
    accuracy: float = 0.0  # sum of what was observed
    observed: int = 0

    def add(self, line: Settled) -> None:
        """Count a request whose answer was looked at."""
        self.answers += 1
        self.escalated += line.decision.added is not None
        served = None if line.served is None else line.outcomes[line.served]
        if served is None or line.served is None or line.decision.given is None:
            return
        if line.billed_joules is not None and served.joules is not None:
            self.joules += line.billed_joules - served.joules
        if served.accuracy is not None:
            self.observed += 1
            self.accuracy += served.accuracy
            self.estimated += line.decision.given[line.served]

    def text(self) -> str:
        """For people; "" where there were none."""
        if not self.answers:
            return ""
        reliability = ""
        if self.observed:
            reliability = (
                f"; accuracy of those {self.estimated / self.observed:.3f} expected, "
                f"{self.accuracy / self.observed:.3f} observed"
            )
        read = f", {self.checks} read by a larger model" if self.checks else ""
        return (
            f"{self.answers} answers looked at{read}, {self.escalated} put to a larger model as well: "
            f"{self.joules:.4g} J in answers that weren't served and checks{reliability}"
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, and where the promise stands."""

    routed: int  # requests of this run
    already_done: int  # lines of the input that earlier runs had finished
    failed: int  # rows with `error` in this run
    served: Mapping[str, int]  # model -> requests of this run
    explored: int  # requests of this run
    billed_joules: float  # of this run, explorations included
    overhead: Mapping[str, float]  # joules of this run, by meter: loading, learning, idle
    named_overhead: Mapping[str, float]  # parts of it, by what it was for
    unmetered: int  # requests of this run whose joules aren't known
    meters: tuple[str, ...]
    accounts: Mapping[str, Account]  # plan -> ledger, all runs of the period
    alphas: Mapping[str, float]
    unreachable: tuple[str, ...]  # plans whose alpha is above what the zoo can reach
    alone: (
        Alone | None
    )  # what everything on the largest model takes; None: unknown, or nothing else was asked
    metric: str  # its signature
    serve: str  # what explorations served
    predicted: Mapping[str, PredictionError]  # by how: "calibration" alone, and "adapted" to what was read
    period: str  # "" until one is named
    horizon: int | None
    period_requests: int  # routed in this period, all runs
    spent: Spent  # of this run
    tariff: Tariff  # that `spent` goes by
    stopped_by: int | None = None  # signal number
    first_error: str | None = None  # of this run's rows with `error`
    passed_on: Mapping[str, int] = field(
        default_factory=dict
    )  # model -> what it failed to answer and another did
    retried: int = 0  # requests of this run whose row takes the place of an error row
    standing: int = 0  # error rows in the output, those of earlier runs too
    unscored: int = 0  # answers of this run that the metric failed on; their rows have `error` too
    audits: Audits | None = None  # how answers are looked at that have no reference; None: they aren't
    audited: int = 0  # requests of this run
    audit_joules: float = 0.0  # of answers that were asked for audits alone, in `billed_joules`
    looks: Looks | None = None

    @property
    def overhead_joules(self) -> float:
        """Of this run, by all meters."""
        return sum(self.overhead.values())

    @property
    def total_joules(self) -> float:
        """Of this run: what requests were billed, and all overhead."""
        return self.billed_joules + self.overhead_joules

    @property
    def sla_missed(self) -> bool:
        """Whether any plan's promise isn't kept, or wouldn't be with accuracy 0 for failed requests."""
        return bool(self.missed())

    def missed(self, *, failures: bool = True) -> list[str]:
        """One line for each plan whose promise isn't kept, for people.

        Args:
            failures: whether one counts that failed requests may hide: with accuracy 0 for them it isn't kept.
        """
        return [
            f"accuracy {plan}".strip() + f"  {self._accuracy_line(plan)}"
            for plan in self.accounts
            if self._is_missed(plan, failures=failures)
        ]

    def _is_missed(self, plan: str, *, failures: bool) -> bool:
        alpha, account = self.alphas[plan], self.accounts[plan]
        mean, count = self._judged_by(account)
        if mean is not None and not keeps(mean, alpha):
            return True
        if not failures or not account.failed or (mean is None and account.settled):
            return False
        return not keeps(with_failures(mean, count, account.failed), alpha)

    def failures(self) -> list[str]:
        """One line about the failed requests of this run, for people; none where none failed."""
        count = max(self.failed + self.unscored, self.standing)
        rows = "row has" if count == 1 else "rows have"
        if not count:
            return []
        first = "" if self.first_error is None else f"; the first: {self.first_error}"
        return [f"{count} {rows} `error`{first}"]

    def text(self) -> list[str]:
        """The summary, for people."""
        rows = [("requests", self._requests_line())]
        if self.first_error is not None:
            rows.append(("first error", self.first_error))
        if self.standing > self.failed + self.unscored:
            which = "row of the output has" if self.standing == 1 else "rows of the output have"
            rows.append(("errors", f"{self.standing} {which} `error`"))
        if self.first_error is None and not self.routed:
            why = (
                "every line of the input is finished"
                if self.already_done
                else "no line of the input is to be routed"
            )
            rows.append(("nothing to do", why))
        if self.passed_on:
            failed = ", ".join(f"{count} that {model}" for model, count in self.passed_on.items())
            rows.append(("passed on", f"{failed} failed to answer, to the next model that can"))
        shares = (f"{model} {n} ({n / max(self.routed, 1):.0%})" for model, n in self.served.items())
        rows.append(("served by", ", ".join(shares)))
        if self.period or self.horizon:
            of = f" of {self.horizon}" if self.horizon else ""
            rows.append(("period", f"{self.period or '(no name)'}: {self.period_requests}{of} requests"))
        rows.extend((f"accuracy {plan}".strip(), self._accuracy_line(plan)) for plan in self.accounts)
        if self.looks is not None:
            rows.append(("second look", self.looks.text()))
        rows.extend(self._energy_rows() if self.routed else ())
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows if value]

    def _requests_line(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        done = f" ({self.already_done} were done before)" if self.already_done else ""
        unscored = f", {self.unscored} not scored" if self.unscored else ""
        audited = "" if self.audits is None else f", {self.audited} audited"
        retried = f", {self.retried} in place of error rows" if self.retried else ""
        return f"{self.routed} routed{done}{retried}{failed}{unscored}, {self.explored} explored{audited}"

    def _judged_by(self, account: Account) -> tuple[float | None, int]:
        """The mean accuracy that the promise is judged by, and of how many requests; None where nothing is known."""
        if self.audits is None:
            return account.observed_mean, account.observed
        return (
            (None, 0) if account.mean is None else (self.audits.standing(account.mean), account.mean.served)
        )

    def _accuracy_line(self, plan: str) -> str:
        alpha, account = self.alphas[plan], self.accounts[plan]
        worst = failure_words(*self._judged_by(account), account.failed, alpha)
        if self.audits is not None and account.mean is not None:
            return "; ".join(
                part for part in (Standing.of(account.mean, self.audits, alpha).words(), worst) if part
            )
        mean = account.observed_mean
        parts = []
        if mean is not None:
            verdict = "kept" if keeps(mean, alpha) else "MISSED"
            parts.append(
                f"{mean:.4f} observed over {account.observed} requests, alpha {alpha:g}: SLA {verdict}"
            )
            if self.serve == "best":
                parts.append("explorations served the best answer, chosen by its reference (--serve best)")
        if account.estimated:
            parts.append(
                f"{account.estimated_sum / account.estimated:.4f} estimated over {account.estimated} "
                "without reference"
            )
        if worst:
            parts.append(worst)
        if plan in self.unreachable:
            parts.append("alpha is above what this zoo reaches")
        return "; ".join(parts)

    def _energy_rows(self) -> Iterator[tuple[str, str]]:
        by_meter = ", ".join(f"{joules:.4g} J {meter}" for meter, joules in self.overhead.items())
        meters = "/".join(self.meters) or "no meter"
        yield (
            "energy",
            f"{self.total_joules:.4g} J in all: {self.billed_joules:.4g} J billed ({meters}), explorations included, "
            f"and {self.overhead_joules:.4g} J overhead"
            + (f" ({by_meter})" if set(self.overhead) - set(self.meters) else ""),
        )
        if self.audited:
            yield "audits", f"{self.audit_joules:.4g} J of it, for answers that were asked for them alone"
        yield "overhead", overhead_words(self.overhead_joules, self.named_overhead)
        if cost := self.spent.words(self.tariff.currency):
            yield "cost", f"{cost} ({self.tariff.basis})"
        if self.alone is not None:
            yield "against", headline(self.total_joules / self.routed, self.alone)
            yield "basis", self.alone.basis
            most = self.alone.joules * (1.0 + (self.alone.error or 0.0)) * self.routed
            if not self.alone.at_most and self.billed_joules > most:
                yield (
                    "advice",
                    f"the answers took {self.billed_joules:.4g} J, more than all of them by {self.alone.model} would. "
                    "Take --policy largest for jobs of this size",
                )
        # readings of single small calls by an estimate scatter by their own size: the error would be the meter's
        for how, error in () if set(self.meters) <= {"estimate"} else self.predicted.items():
            what = "as calibrated" if how == "calibration" else "as adapted to readings"
            yield (
                "E_m(t)",
                f"{what}: {error.mean:.0%} off on average (MAPE of {error.calls} readings), {error.bias:+.0%} in sum",
            )
        if self.unmetered:
            yield "unmetered", f"{self.unmetered} requests whose joules aren't known"


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
        self.spent = Spent()
        self._tariff = tariff
        self._hour = hour
        self._names = names
        self._controller = controller
        self._calibration = calibration
        self._lines = self._routed = self._failed = self._explored = self._unmetered = self._unscored = 0
        self._served: Counter[str] = Counter()
        self._passed_on: Counter[str] = Counter()
        self._retried = 0
        self._audited = 0
        self._audit_joules = 0.0
        self._first_error: str | None = None
        self._billed = 0.0
        self._overhead: Counter[str] = Counter()
        self._meters: dict[str, None] = {}
        self._asked: set[int] = set()  # models
        self._lengths = Lengths()  # of the largest model's answers
        self._predicted: dict[str, PredictionError] = {}
        self._other_meter: str | None = None  # than the calibration's
        self._told_other_meter = False
        self._unreachable: set[str] = set()
        self._looks = Looks()

    def add(self, line: Settled | Rejected) -> None:
        """Count a line that is finished."""
        self._lines += 1
        own = line if isinstance(line, Rejected) else line.request
        self._retried += own.mends is not None
        if isinstance(line, Rejected):
            self._add_failure(line.error)
            return
        self._routed += 1
        self._explored += line.decision.explored
        if line.decision.audited:
            self._audited += 1
            self._audit_joules += line.audit_joules
        if line.decision.given is not None:
            self._looks.add(line)
        self._looks.checks += len(line.checks)
        for check in line.checks.values():
            self._billed += check.joules or 0.0
            reader = line.decision.checked_by
            self._spend("" if reader is None else self._names[reader], check.joules, check.tokens)
        if line.served is None:
            self._add_failure(f"{line.request.place}: {line.error}")
        else:
            self._served[self._names[line.served]] += 1
            self._passed_on.update(self._names[m] for m in line.errors)
            if (unscored := line.outcomes[line.served].unscored) is not None:
                self._unscored += 1
                self._first_error = self._first_error or f"{line.request.place}: {unscored}"
        if line.billed_joules is None:
            self._unmetered += 1
        self._asked.update(line.outcomes)
        for m, outcome in line.outcomes.items():
            if outcome.meter:
                self._meters[outcome.meter] = None
            if m == len(self._names) - 1 and outcome.prompt_tokens and outcome.output_tokens is not None:
                self._lengths.add(outcome.prompt_tokens, outcome.output_tokens)
            if outcome.joules is not None and self._tariff:
                self.spent.add(
                    self._tariff,
                    outcome.joules,
                    self._hour(),
                    model=self._names[m],
                    prompt_tokens=outcome.prompt_tokens or 0,
                    output_tokens=outcome.output_tokens or 0,
                )
            self._billed += outcome.judged_joules
            for judgement in outcome.judgements:
                self._spend("", judgement.joules, judgement.tokens)
            if outcome.joules:
                self._billed += outcome.joules
                if outcome.worth is None:
                    self._compare(line, m, outcome.joules, outcome.meter)

    def _spend(self, reader: str, joules: float | None, tokens: int) -> None:
        """Count what reading an answer costs: the reader writes one token."""
        if joules is not None and self._tariff:
            self.spent.add(
                self._tariff, joules, self._hour(), model=reader, prompt_tokens=tokens, output_tokens=1
            )

    def _add_failure(self, error: str | None) -> None:
        self._failed += 1
        self._first_error = self._first_error or error

    def _compare(self, line: Settled, m: int, joules: float, meter: str | None) -> None:
        """Book how far the predictions were from what was read."""
        if line.decision.joules_predicted is not None:
            adapted = self._predicted.setdefault("adapted", PredictionError())
            adapted.add(line.decision.joules_predicted[m], joules)
        if self._calibration is not None:
            model = self._calibration.of(self._names[m])
            alone = self._predicted.setdefault("calibration", PredictionError())
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
            if model.load is not None and set(self._meters) == {model.meter}:
                return by_cost_model(largest, model.load, self._lengths)
        in_load = self._controller.joules_of_many(len(self._names) - 1, self._routed)
        # else it says no more than that its answers here are no cheaper in fuller batches
        if in_load is not None and (not largest_joules or in_load[0] * (1.0 + in_load[1]) < largest_joules):
            joules, error = in_load
            basis = "a line through its answers here, by how many ran at a time"
            return Alone(largest, joules, error, False, basis)
        if not largest_joules:
            return None
        recorded = set(self._meters) == {"replay"}
        basis = "the mean of its answers here" + (
            ""
            if recorded
            else ", in batches as they came; fuller ones take less, as `messcli calibrate` measures"
        )
        return by_answers(largest, largest_joules, None, basis, recorded=recorded)

    def add_overhead(self, joules: Mapping[str, float]) -> None:
        """Count joules that belong to no request, by meter."""
        self._overhead.update(joules)
        if self._tariff:
            self.spent.add(self._tariff, sum(joules.values()), self._hour())

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
            joules=self._billed + activity.joules,
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
        period: str,
        horizon: int | None,
        period_requests: int,
        stopped_by: int | None,
        standing: int = 0,
        named_overhead: Mapping[str, float] | None = None,
    ) -> Summary:
        """The run, summed up. What only the state knows is given."""
        settings = self._controller.settings
        return Summary(
            routed=self._routed,
            already_done=already_done,
            failed=self._failed,
            served=dict(self._served),
            explored=self._explored,
            billed_joules=self._billed,
            overhead=dict(self._overhead),
            named_overhead=dict(named_overhead or {}),
            unmetered=self._unmetered,
            meters=tuple(self._meters),
            accounts={p: account for p, account in self._controller.accounts.items() if p in settings.alphas},
            alphas=settings.alphas,
            unreachable=tuple(sorted(self._unreachable)),
            alone=self._alone(largest_joules),
            metric=metric,
            serve=settings.serve,
            predicted=self._predicted,
            period=period,
            horizon=horizon,
            period_requests=period_requests,
            spent=self.spent,
            tariff=self._tariff,
            stopped_by=stopped_by,
            first_error=self._first_error,
            passed_on=dict(self._passed_on),
            retried=self._retried,
            standing=standing,
            unscored=self._unscored,
            audits=settings.audits,
            audited=self._audited,
            audit_joules=self._audit_joules,
            looks=self._looks,
        )
