"""Where accuracies come from without references: answers are compared with the largest model's, or judged by a model.

Knows metrics, judges, outcomes and what audits are; knows nothing of states or of how often is audited.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from messcli.errors import MetricError, UsageError
from messcli.jobs.config import Promise
from messcli.metrics import AUTO, DEFAULT_METRIC, Metric, load_metric
from messcli.metrics.reasoning import split_reasoning
from messcli.models.judge import REFERENCE, TEMPLATE, Scale, expected, question, score_of
from messcli.models.untrusted import template_of
from messcli.records import Decision, Judgement, Outcome, Rejected, Request
from messcli.routing.audit import JUDGE, Audits
from messcli.routing.exploration import coin
from messcli.routing.line import Finished, Line
from messcli.zoo import JudgeSpec, Zoo

REFERENCES, LARGEST = "references", "largest"  # what answers are compared with
AGAINST = (REFERENCES, LARGEST)


@dataclass(frozen=True, slots=True)
class Truth:
    """Where a run's accuracies come from.

    Attributes:
        metric: as the state's signature has it.
        scored: what a model's output is scored with as soon as it is there; the others need a second model's.
        audits: how answers are audited; None: each has a reference, or no accuracy.
        judge: the model that scores them, if one does.
    """

    metric: Metric
    scored: Metric
    audits: Audits | None = None
    judge: JudgeSpec | None = None

    def of(self, lines: Iterator[Line]) -> Iterator[Line]:
        """The input's lines, as what is promised has them."""
        return lines if self.audits is None else without_references(lines)

    def look(self, models: int) -> Agreement | None:
        """What scores finished requests of a zoo of so many models; None: they come scored."""
        return None if self.audits is None or self.judge is not None else Agreement(self.scored, models)

    def readers(self, models: int, seed: int) -> list[Judging]:
        """Who scores answers by reading them."""
        return [] if self.judge is None else [Judging(self.judge, models, seed)]


def truth_of(promise: Promise, zoo: Zoo, *, may_audit: bool) -> Truth:
    """What `promise` and the zoo file say. Raises UsageError where they contradict each other.

    Args:
        may_audit: without it, all there is are references.
    """
    name = promise.metric or zoo.metric or DEFAULT_METRIC
    if not may_audit:
        metric = load_metric(name, zoo.tokenizer or AUTO)
        return Truth(metric, metric)
    audits = audits_of(name, promise.against or zoo.against or REFERENCES, sure=promise.sure)
    if name == JUDGE:
        if zoo.judge is None:
            raise UsageError(
                "metric judge: the zoo file names none. Add a table [judge.model] with name and path"
            )
        judged = judge_metric(zoo.judge)
        return Truth(judged, judged, audits, zoo.judge)
    metric = load_metric(name, zoo.tokenizer or AUTO)
    return Truth(metric if audits is None else agreement_metric(metric), metric, audits)


def audits_of(metric: str, against: str, *, sure: bool) -> Audits | None:
    """How answers are audited that `metric` compares with `against`; None: they aren't."""
    if metric == JUDGE:
        if against == LARGEST:
            raise UsageError(
                "a judge compares with nothing. Leave out --against largest, or name another --metric"
            )
        return Audits(by=JUDGE, sure=sure)
    if against == LARGEST:
        return Audits(agreement=True, sure=sure)
    if sure:
        raise UsageError("--sure is of audits. Give --against largest too, or --metric judge")
    return None


def agreement_metric(metric: Metric) -> Metric:
    """The metric under a signature that says what outputs are compared with: a state isn't continued with another."""
    return replace(metric, signature=f"against:{LARGEST}|{metric.signature}", continues=())


class Agreement:
    """Looks at finished requests: where the largest model has answered, the others are scored against it.

    Args:
        models: the size of the zoo.
    """

    def __init__(self, metric: Metric, models: int) -> None:
        self._metric = metric
        self._largest = models - 1

    def __call__(self, finished: Sequence[Finished]) -> list[dict[int, Outcome]]:
        return [self._look(one.outcomes) for one in finished]

    def _look(self, outcomes: dict[int, Outcome]) -> dict[int, Outcome]:
        largest = outcomes.get(self._largest)
        theirs = None
        if largest is not None and largest.error is None and largest.output is not None:
            theirs, _ = split_reasoning(largest.output)
        return {m: self._scored(m, outcome, theirs) for m, outcome in outcomes.items()}

    def _scored(self, m: int, outcome: Outcome, theirs: str | None) -> Outcome:
        accuracy: float | None = None
        unscored: str | None = None
        if theirs is not None and outcome.output is not None and outcome.error is None:
            try:
                accuracy = 1.0 if m == self._largest else self._metric(outcome.output, (theirs,))
            except MetricError as failure:
                unscored = str(failure)
        return replace(outcome, accuracy=accuracy, unscored=unscored)


def without_references(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines as they are where nobody has references."""
    return (line if isinstance(line, Rejected) else _bare(line) for line in lines)


def _bare(request: Request) -> Request:
    return replace(request, references=()) if request.references else request


# ---- a judge -------------------------------------------------------------------------------------


def judge_metric(judge: JudgeSpec) -> Metric:
    """What stands for the judge where a metric is named: its signature says all that scores depend on."""
    text = "\0".join([template_of(judge.template, TEMPLATE), REFERENCE])
    digest = blake2b(text.encode(), digest_size=8).hexdigest()
    low, high = judge.scale
    model = f"{judge.model.name}:{judge.model.path}:{judge.model.backend}"
    return Metric(JUDGE, f"judge|model:{model}|scale:{low}-{high}|template:{digest}", _never)


def _never(output: str, references: Sequence[str]) -> float:
    raise NotImplementedError  # nobody has references here: `without_references`


@dataclass(slots=True)
class _Judgements:
    """What a judge did in a run."""

    answers: int = 0
    failed: int = 0
    first_failure: str = ""
    twice: int = 0  # answers judged twice
    same: int = 0  # of these, with the same score to a tenth of the scale
    apart: float = 0.0  # sum of differences between the two accuracies


class Judging:
    """Has audited answers judged. A `messcli.routing.line.Reader`.

    Args:
        place: of the judge among the source's models: after those of the zoo.
        seed: says which answers are judged twice.
    """

    decides = False

    def __init__(self, judge: JudgeSpec, place: int, seed: int) -> None:
        self._judge = judge
        self._template = template_of(judge.template, TEMPLATE)
        self._scale = Scale(*judge.scale)
        self._place = place
        self._seed = seed
        self._did = _Judgements()

    def questions(
        self, request: Request, decision: Decision, m: int, outcome: Outcome
    ) -> Sequence[tuple[Request, int]]:
        if not decision.audited or outcome.output is None or outcome.error is not None:
            return ()
        again = coin(self._seed, decision.t, b"twice") < self._judge.twice
        left = (2 if again else 1) - len(outcome.judgements)
        return [(self._question(request, outcome.output), self._place)] * left

    def _question(self, request: Request, answer: str) -> Request:
        given = request.given.get("reference")
        references = () if given is None else (given,) if isinstance(given, str) else tuple(given)
        answer, _ = split_reasoning(answer)
        text = question(self._template, self._scale, request, answer, references)
        key = blake2b(text.encode("utf-8", "surrogatepass")).digest()
        return Request(request.id, text, key=key, options=self._scale.options)

    def read(self, outcome: Outcome, reader: int, reply: Outcome) -> Outcome:
        read = self._score(reply)
        judgement = (
            Judgement(None, reply.joules, reply.meter, read, reply.prompt_tokens or 0)
            if isinstance(read, str)
            else Judgement(read, reply.joules, reply.meter, tokens=reply.prompt_tokens or 0)
        )
        judgements = (*outcome.judgements, judgement)
        scores = [one.accuracy for one in judgements if one.accuracy is not None]
        self._count(judgements)
        return replace(
            outcome,
            judgements=judgements,
            accuracy=math.fsum(scores) / len(scores) if scores else None,
            unscored=None if scores else judgements[0].why,
        )

    def _score(self, reply: Outcome) -> float | str:
        """The accuracy that a reply says, or why it says none."""
        try:
            if reply.error is not None:
                why = reply.error
            elif reply.weights is None:
                return score_of(reply.output, self._scale)
            elif (score := expected(reply.weights, self._scale)) is not None:
                return self._scale.accuracy(score)
            else:
                why = f"none of {', '.join(self._scale.options)} is likely"
        except ValueError as error:
            why = str(error)
        return f'judge "{self._judge.model.name}": {why}'

    def _count(self, judgements: Sequence[Judgement]) -> None:
        did = self._did
        if len(judgements) == 1:
            did.answers += 1
            did.failed += judgements[0].accuracy is None
            did.first_failure = did.first_failure or judgements[0].why or ""
            return
        one, other = (judgement.accuracy for judgement in judgements)
        if one is not None and other is not None:
            did.twice += 1
            did.apart += abs(one - other)
            did.same += abs(one - other) < 0.1

    def notes(self) -> list[str]:
        """What the judge did in this run, a line each, for people."""
        did, name = self._did, self._judge.model.name
        lines = []
        if did.failed:
            lines.append(
                f"warning: judge {name}: no score for {did.failed} of {did.answers} answers; they count 0 in the "
                f"bound. The first: {did.first_failure}"
            )
        if did.twice:
            lines.append(
                f"judge {name}: asked twice for {did.twice} answers, the same score for {did.same / did.twice:.0%}, "
                f"{did.apart / did.twice:.3f} apart on average (of 1)"
            )
        return lines
