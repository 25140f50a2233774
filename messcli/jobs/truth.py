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
from messcli.models.judge import REFERENCE, Scale, question, score_of, template_of
from messcli.records import Outcome, Rejected, Request
from messcli.routing.audit import JUDGE, Audits
from messcli.routing.exploration import coin
from messcli.routing.loop import Finished, Line
from messcli.routing.source import OutcomeSource
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

    def look(self, source: OutcomeSource, models: int, seed: int) -> Agreement | Judging | None:
        """What scores finished requests of a zoo of so many models; None: they come scored."""
        if self.judge is not None:
            return Judging(source, self.judge, models, seed)
        return None if self.audits is None else Agreement(self.scored, models)


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

    asks = False

    def __init__(self, metric: Metric, models: int) -> None:
        self._metric = metric
        self._largest = models - 1

    def notes(self) -> Sequence[str]:
        """Comparing tells nothing of itself."""
        return ()

    def __call__(self, finished: Sequence[Finished]) -> list[dict[int, Outcome]]:
        return [self._look(one.outcomes) for one in finished]

    def _look(self, outcomes: dict[int, Outcome]) -> dict[int, Outcome]:
        largest = outcomes.get(self._largest)
        theirs = None if largest is None or largest.error is not None else largest.output
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
    text = "\0".join([template_of(judge.template), REFERENCE])
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
    """Looks at audited requests: a judge scores their answers.

    Args:
        source: answers `judge` as its last model, after those of the zoo.
        models: the size of the zoo.
        seed: says which answers are judged twice.
    """

    asks = True

    def __init__(self, source: OutcomeSource, judge: JudgeSpec, models: int, seed: int) -> None:
        self._source = source
        self._judge = judge
        self._template = template_of(judge.template)
        self._scale = Scale(*judge.scale)
        self._index = models
        self._seed = seed
        self._did = _Judgements()

    def __call__(self, finished: Sequence[Finished]) -> list[dict[int, Outcome]] | None:
        asked: list[tuple[int, int, Request]] = []  # place in `finished`, model, question
        for place, one in enumerate(finished):
            if one.decision.audited:
                for m, outcome in one.outcomes.items():
                    if outcome.output is not None and outcome.error is None:
                        question = self._question(one.request, outcome.output)
                        again = coin(self._seed, one.decision.t, b"twice") < self._judge.twice
                        asked += [(place, m, question)] * (2 if again else 1)
        replies = self._replies([question for _, _, question in asked])
        if replies is None:
            return None
        found: dict[tuple[int, int], list[Outcome]] = {}
        for (place, m, _), reply in zip(asked, replies, strict=True):
            found.setdefault((place, m), []).append(reply)
        return [
            {m: self._scored(outcome, found.get((place, m), ())) for m, outcome in one.outcomes.items()}
            for place, one in enumerate(finished)
        ]

    def _question(self, request: Request, answer: str) -> Request:
        given = request.given.get("reference")
        references = () if given is None else (given,) if isinstance(given, str) else tuple(given)
        text = question(self._template, self._scale, request, answer, references)
        return Request(request.id, text, key=blake2b(text.encode("utf-8", "surrogatepass")).digest())

    def _replies(self, questions: Sequence[Request]) -> list[Outcome] | None:
        """What the judge said to each; None: the run was told to stop."""
        replies: dict[int, Outcome] = {}
        if questions:
            for group in self._source.answers([(one, (self._index,)) for one in questions]):
                replies.update((position, outcome) for position, _, outcome in group)
        if len(replies) < len(questions):
            return None
        return [replies[position] for position in range(len(questions))]

    def _scored(self, outcome: Outcome, replies: Sequence[Outcome]) -> Outcome:
        if not replies:
            return replace(outcome, accuracy=None, unscored=None)
        read = [self._read(reply) for reply in replies]
        scores = [score for score in read if isinstance(score, float)]
        failure = next((why for why in read if isinstance(why, str)), None)
        self._count(scores, failure, len(replies))
        return replace(
            outcome,
            accuracy=math.fsum(scores) / len(scores) if scores else None,
            unscored=None if scores else failure,
            judged_joules=math.fsum(reply.joules or 0.0 for reply in replies),
            judge_meter=replies[0].meter,
        )

    def _read(self, reply: Outcome) -> float | str:
        """The accuracy that a reply says, or why it says none."""
        try:
            if reply.error is None:
                return score_of(reply.output, self._scale)
            why = reply.error
        except ValueError as error:
            why = str(error)
        return f'judge "{self._judge.model.name}": {why}'

    def _count(self, scores: Sequence[float], failure: str | None, asked: int) -> None:
        did = self._did
        did.answers += 1
        if not scores:
            did.failed += 1
            did.first_failure = did.first_failure or failure or ""
        if asked > 1 and len(scores) == asked:
            did.twice += 1
            did.apart += abs(scores[0] - scores[1])
            did.same += abs(scores[0] - scores[1]) < 0.1

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
