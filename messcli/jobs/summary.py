"""What a run has done, summed up, and said in lines for people.

Knows counts, joules and ledgers; knows nothing of how they came about, of files or of the terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from messcli.metrics import failure_words, keeps, with_failures
from messcli.report.audits import Standing
from messcli.report.bill import Alone, headline, overhead_words
from messcli.routing.audit import Audits
from messcli.routing.line import Settled
from messcli.routing.sla import Account
from messcli.tariff import FREE, Spent, Tariff

Row = tuple[str, str]  # of the summary: what it is about, what it says


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


@dataclass(slots=True)
class Requests:
    """Requests of a run, by what came of them."""

    routed: int = 0
    already_done: int = 0  # lines of the input that earlier runs had finished
    explored: int = 0
    audited: int = 0
    retried: int = 0  # whose row takes the place of an error row
    failed: int = 0  # rows with `error`
    unscored: int = 0  # answers that the metric failed on; their rows have `error` too
    standing: int = 0  # error rows in the output, those of earlier runs too
    first_error: str | None = None
    served: Counter[str] = field(default_factory=Counter)  # by model
    passed_on: Counter[str] = field(
        default_factory=Counter
    )  # model -> what it failed to answer and another did
    cut: Counter[str] = field(
        default_factory=Counter
    )  # served answers that didn't end by themselves, by model

    def failures(self) -> list[str]:
        """One line about the failed requests, for people; none where none failed."""
        count = max(self.failed + self.unscored, self.standing)
        rows = "row has" if count == 1 else "rows have"
        if not count:
            return []
        first = "" if self.first_error is None else f"; the first: {self.first_error}"
        return [f"{count} {rows} `error`{first}"]

    def rows(self, *, audits: bool) -> Iterator[Row]:
        """For people. `audits`: whether answers are audited at all."""
        yield "requests", self._counts(audits=audits)
        if self.first_error is not None:
            yield "first error", self.first_error
        if self.standing > self.failed + self.unscored:
            which = "row of the output has" if self.standing == 1 else "rows of the output have"
            yield "errors", f"{self.standing} {which} `error`"
        if self.first_error is None and not self.routed:
            why = (
                "every line of the input is finished"
                if self.already_done
                else "no line of the input is to be routed"
            )
            yield "nothing to do", why
        if self.passed_on:
            failed = ", ".join(f"{count} that {model}" for model, count in self.passed_on.items())
            yield "passed on", f"{failed} failed to answer, to the next model that can"
        shares = (f"{model} {n} ({n / max(self.routed, 1):.0%})" for model, n in self.served.items())
        yield "served by", ", ".join(shares)
        if self.cut:
            models = ", ".join(f"{model} {count}" for model, count in self.cut.items())
            yield (
                "cut off",
                f"{self.cut.total()} answers, at the limit of tokens ({models}). Raise max_new_tokens to get all",
            )

    def _counts(self, *, audits: bool) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        done = f" ({self.already_done} were done before)" if self.already_done else ""
        unscored = f", {self.unscored} not scored" if self.unscored else ""
        audited = f", {self.audited} audited" if audits else ""
        retried = f", {self.retried} in place of error rows" if self.retried else ""
        return f"{self.routed} routed{done}{retried}{failed}{unscored}, {self.explored} explored{audited}"


@dataclass(slots=True)
class Energy:
    """What a run took, and what it is compared with."""

    billed_joules: float = 0.0  # explorations included
    audit_joules: float = 0.0  # of answers that were asked for audits alone, in `billed_joules`
    overhead: Counter[str] = field(default_factory=Counter)  # joules by meter: loading, learning, idle
    named_overhead: Mapping[str, float] = field(default_factory=dict)  # parts of it, by what it was for
    meters: dict[str, None] = field(default_factory=dict)  # that read requests, in the order of coming
    unmetered: int = 0  # requests whose joules aren't known
    predicted: dict[str, PredictionError] = field(
        default_factory=dict
    )  # by how: "calibration" alone, and "adapted" to what was read
    spent: Spent = field(default_factory=Spent)
    tariff: Tariff = FREE  # that `spent` goes by
    # What everything on the largest model takes; None: unknown, or nothing else was asked
    alone: Alone | None = None

    @property
    def overhead_joules(self) -> float:
        """By all meters."""
        return sum(self.overhead.values())

    @property
    def total_joules(self) -> float:
        """What requests were billed, and all overhead."""
        return self.billed_joules + self.overhead_joules

    def rows(self, requests: Requests) -> Iterator[Row]:
        """For people."""
        by_meter = ", ".join(f"{joules:.4g} J {meter}" for meter, joules in self.overhead.items())
        meters = "/".join(self.meters) or "no meter"
        yield (
            "energy",
            f"{self.total_joules:.4g} J in all: {self.billed_joules:.4g} J billed ({meters}), explorations included, "
            f"and {self.overhead_joules:.4g} J overhead"
            + (f" ({by_meter})" if set(self.overhead) - set(self.meters) else ""),
        )
        if requests.audited:
            yield "audits", f"{self.audit_joules:.4g} J of it, for answers that were asked for them alone"
        yield "overhead", overhead_words(self.overhead_joules, self.named_overhead)
        if cost := self.spent.words(self.tariff.currency):
            yield "cost", f"{cost} ({self.tariff.basis})"
        if self.alone is not None:
            yield "against", headline(self.total_joules / requests.routed, self.alone)
            yield "basis", self.alone.basis
            most = self.alone.joules * (1.0 + (self.alone.error or 0.0)) * requests.routed
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


@dataclass(frozen=True, slots=True)
class Promises:
    """Where the promises of all plans stand, over all runs of the period."""

    accounts: Mapping[str, Account]  # by plan
    alphas: Mapping[str, float]
    unreachable: tuple[str, ...]  # plans whose alpha is above what the zoo can reach
    metric: str  # its signature
    serve: str  # what explorations served
    audits: Audits | None = None  # how answers are looked at that have no reference; None: they aren't

    def missed(self, *, failures: bool = True) -> list[str]:
        """One line for each plan whose promise isn't kept, for people.

        Args:
            failures: whether one counts that failed requests may hide: with accuracy 0 for them it isn't kept.
        """
        return [
            f"accuracy {plan}".strip() + f"  {self._line(plan)}"
            for plan in self.accounts
            if self._is_missed(plan, failures=failures)
        ]

    def rows(self) -> Iterator[Row]:
        """For people."""
        return ((f"accuracy {plan}".strip(), self._line(plan)) for plan in self.accounts)

    def _is_missed(self, plan: str, *, failures: bool) -> bool:
        alpha, account = self.alphas[plan], self.accounts[plan]
        mean, count = self._judged_by(account)
        if mean is not None and not keeps(mean, alpha):
            return True
        if not failures or not account.failed or (mean is None and account.settled):
            return False
        return not keeps(with_failures(mean, count, account.failed), alpha)

    def _judged_by(self, account: Account) -> tuple[float | None, int]:
        """The mean accuracy that the promise is judged by, and of how many requests; None where nothing is known."""
        if self.audits is None:
            return account.observed_mean, account.observed
        return (
            (None, 0) if account.mean is None else (self.audits.standing(account.mean), account.mean.served)
        )

    def _line(self, plan: str) -> str:
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


@dataclass(frozen=True, slots=True)
class Period:
    """A contract period."""

    name: str = ""  # until one is named
    requests: int = 0  # routed in it, all runs
    horizon: int | None = None  # of its requests; None where that isn't known

    def rows(self) -> Iterator[Row]:
        """For people."""
        if self.name or self.horizon:
            of = f" of {self.horizon}" if self.horizon else ""
            yield "period", f"{self.name or '(no name)'}: {self.requests}{of} requests"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, and where the promise stands."""

    requests: Requests
    energy: Energy
    promises: Promises
    period: Period
    looks: Looks
    stopped_by: int | None = None  # signal number

    def text(self) -> list[str]:
        """The summary, for people."""
        rows = [
            *self.requests.rows(audits=self.promises.audits is not None),
            *self.period.rows(),
            *self.promises.rows(),
            ("second look", self.looks.text()),
            *(self.energy.rows(self.requests) if self.requests.routed else ()),
        ]
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows if value]
