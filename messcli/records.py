"""The records that flow through messcli. The only place that knows the field names of its files.

Knows nothing of models, meters or the algorithm: a record is what was read, decided or measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import orjson

# Whose trouble an error is:
# request: this model can't take it, however often it is asked; another may (too long, bad messages, filtered)
# model:   it failed on it, and might not the next time (an odd answer, a crash, no answer in time)
# away:    the model isn't there now, whatever it is asked (its server is down or busy, its quota used up)
# run:     nothing more can be asked (a key, the zoo file)
Fault = Literal["request", "model", "away", "run"]

# Failures in a row, refusals aside, after which a model is taken to be away. One that fails a third of its requests by
# chance gets there once in 6,561 of them. Raising it puts more requests to a model that is gone.
IN_A_ROW = 8

# The columns of an output row, in order. An input's own extra fields follow the id.
ROW_FIELDS = (
    "model",
    "output",
    "estimated_accuracy",
    "accuracy",
    "joules",
    "joules_predicted",
    "billed_joules",
    "explored",
    "queue",
    "prompt_tokens",
    "output_tokens",
    "seconds",
    "meter",
    "finish",
)
# ... of some rows, behind them: of answers that were audited or looked at, that a model failed on, or with reasoning
STAGE_FIELDS = ("audited", "confidence", "asked", "checks", "failed", "reasoning")
_NO_RESULTS: Mapping[str, None] = dict.fromkeys(ROW_FIELDS)
_AS_THEY_ARE: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """An error row that stands in an output, and that another row may take the place of."""

    seq: int  # what the state knows it by
    output: str
    place: int  # among the output's rows, from 0
    fault: Fault
    tries: int
    is_old: bool  # of a run that has come to an end: one that is taken up again doesn't ask twice
    joules: float | None  # billed in its tries
    plan: str | None = None
    period: str | None = None  # in whose ledger it counts; None: in none


@dataclass(frozen=True, slots=True)
class Request:
    """One input line. `references` is empty when the line has none; `extra` passes through untouched."""

    id: str | int
    prompt: str  # the text that predictors see: the prompt, or the messages' contents joined by newlines
    messages: tuple[Mapping[str, str], ...] | None = None  # a chat, when the line has `messages`
    references: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(
        default_factory=dict
    )  # prompt, messages and reference as the line had them
    plan: str | None = None
    line: int = 0  # 1-based line of the input
    key: bytes = b""  # what the state knows the request by
    digest: bytes = b""  # of the prompt: a known key with another digest is a changed request
    source: str = ""  # the input's name, for messages
    mends: ErrorRow | None = None  # the row that this one's takes the place of
    has_own_id: bool = False  # the line names it; else it is made from its content
    options: tuple[str, ...] = ()  # one-token answers: how likely each is, is wanted in place of a text

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        where = f"{self.source}:{self.line}: " if self.source else ""
        return f"{where}{self.id!r}"

    def reject(self, why: str) -> Rejected:
        """This request as one that can't be routed. Known by its content, so that a mended line is new."""
        content = blake2b(self.key + self.digest, digest_size=16).digest()
        where = f"{self.source}:{self.line}: {self.id!r}: "
        return Rejected(
            self.id,
            where + why,
            self.extra,
            self.line,
            key=content,
            digest=content,
            mends=self.mends,
            has_own_id=self.has_own_id,
        )


@dataclass(frozen=True, slots=True)
class Rejected:
    """An input line that is no request. It becomes a row with `error`."""

    id: str | int | None
    error: str  # names file, line and field
    extra: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0
    key: bytes = b""
    digest: bytes = b""
    plan: str | None = None  # whose promise it counts in: it is a request, and no model can take it
    mends: ErrorRow | None = None  # as of `Request`
    has_own_id: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """What a backend made of one request. Token counts leave padding out.

    `fault` says whose trouble `error` is; without a word, the model's.
    `confidence` holds mean, least, p10 and p50 of the answer's token log-probabilities, and `tokens`, how many.
    """

    output: str | None
    prompt_tokens: int
    output_tokens: int
    error: str | None = None  # this request failed; the others of its batch did not
    fault: Fault | None = None  # None without an error
    finish: str | None = None  # stop, length, filtered, tool_calls; None where it isn't known
    # None where the backend can't tell. Compared to nothing: batches of other sizes sum in another order
    confidence: Mapping[str, float] | None = field(default=None, compare=False)
    # Probabilities of the request's options as the next token; None where the backend can't tell them
    weights: tuple[float, ...] | None = field(default=None, compare=False)
    reasoning: str | None = None  # what a server sends beside the output; in it, between tags, otherwise


@dataclass(frozen=True, slots=True)
class Check:
    """A larger model has read a question and an answer."""

    probability: float | None  # that the answer is right; None: it told none
    joules: float | None  # None where they couldn't be read
    meter: str | None = None  # that read them; None: of a table
    tokens: int = 0  # that it read; it writes one


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge has read a question and an answer."""

    accuracy: float | None  # in [0, 1]; None: it gave no score
    joules: float | None  # None where they couldn't be read
    meter: str | None = None  # that read them
    why: str | None = None  # there is no score
    tokens: int = 0  # that it read


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one model did with one request: measured, or read from a recorded table."""

    output: str | None
    accuracy: float | None  # in [0, 1]; None without a reference
    joules: float | None  # None where the meter gave no reading that can be trusted
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float | None = None
    meter: str | None = None  # nvml | rapl | estimate | replay | recorded
    error: str | None = None
    finish: str | None = None  # as of `Generation`
    running: float | None = (
        None  # requests that ran at a time, itself included: the harmonic mean over its tokens
    )
    # Joules that decisions take it for, where they save something else or know of other loads
    worth: float | None = None
    unscored: str | None = None  # why the metric gave no accuracy; the answer itself stands
    confidence: Mapping[str, float] | None = None  # as of `Generation`; a recorded one may hold `mean` alone
    checks: Mapping[str, Check] | None = None  # by the larger model's name: what it says, or would say
    judgements: tuple[Judgement, ...] = ()  # of a judge; their joules aren't in `joules`
    weights: tuple[float, ...] | None = None  # as of `Generation`
    fault: Fault | None = None  # whose trouble `error` is
    reasoning: str | None = None  # as of `Generation`

    @property
    def judged_joules(self) -> float:
        """Joules of judging this answer, as far as they are known."""
        return math.fsum(one.joules or 0.0 for one in self.judgements)

    def dumps(self) -> bytes:
        """As JSON. Floats come back exactly."""
        return dumps(self)

    @classmethod
    def loads(cls, data: bytes) -> Outcome:
        """What `dumps` gave. Raises ValueError or TypeError for anything else."""
        plain = loads(data)
        checks = plain.get("checks")
        if checks is not None:
            plain["checks"] = {name: Check(**check) for name, check in checks.items()}
        for name in ("judged_joules", "judge_meter"):  # of earlier versions, which kept no judgement
            plain.pop(name, None)
        plain["judgements"] = tuple(Judgement(**one) for one in plain.get("judgements", ()))
        return cls(**plain)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one request before any model ran. Models are indices into the zoo."""

    t: int  # 1-based count of requests decided with this state
    model: int  # the model whose output is served
    asked: tuple[int, ...]  # the models that run: the served one, or on exploration all that can
    explored: bool
    estimates: tuple[float, ...] | None  # Â_m(t) of every model; None while nothing is learnt
    joules_predicted: tuple[float, ...] | None  # E_m(t) of every model, joules; None while unknown
    owed: bool  # an exploration is still due, to the next request with a reference
    audited: bool = False  # a coin says that the answers are looked at
    audit_probability: float = 0.0  # of that coin; 0: none is thrown
    chosen: int | None = None  # the model that serves without an audit; None where none is possible
    larger: tuple[int, ...] = ()  # models that may be asked once `model` has answered
    checked_by: int | None = None  # the larger model that reads the answers of smaller ones
    counted_on: float | None = None  # expected accuracy of what is served in the end; None: that of `model`
    price: float | None = None  # joules a unit of accuracy is worth, where the answer is to be looked at
    given: tuple[float, ...] | None = None  # Â_m(t) of every model once the first one's answer is looked at
    first: int | None = None  # the model whose answer was looked at
    added: int | None = None  # the model that was asked because of it

    @property
    def looks_at(self) -> int:
        """The model whose answer is looked at: the one that was chosen, whether an audit asks others or not."""
        if self.first is not None:
            return self.first
        return self.model if self.chosen is None else self.chosen

    def checks(self, m: int) -> bool:
        """Whether `checked_by` reads the answer of model m: of the one looked at, and of all on an exploration."""
        if self.checked_by is None or m >= self.checked_by:
            return False
        return self.explored or m == self.looks_at

    def audits(self, m: int) -> bool:
        """Whether model m answers for an audit alone."""
        if not self.audited or self.explored or self.chosen is None:
            return False
        return m not in (self.chosen, self.looks_at)

    @property
    def is_one_stage(self) -> bool:
        """Whether nothing is asked because of an answer: no larger model, and nobody who reads it."""
        return not self.larger and self.checked_by is None and not self.audited

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Decision:
        """From the object that JSON makes of it. Raises TypeError for anything else."""
        rows = {
            name: None if plain.get(name) is None else tuple(plain[name])
            for name in ("asked", "estimates", "joules_predicted", "given")
        }
        if rows["given"] and rows["asked"] and "first" not in plain:  # of 0.2's first days
            added = rows["asked"][-1] if len(rows["asked"]) > 1 else None
            plain = {**plain, "first": rows["asked"][0], "added": added}
        return cls(**{**plain, **rows, "larger": tuple(plain.get("larger", ()))})


def check_id(request: str | int, of: str) -> str:
    """What messages, and a table of recorded joules, know a check by."""
    return f"{request} (check of {of})"


Asked = Sequence[tuple[Request, Sequence[int]]]  # the models that each request is put to
Answer = tuple[int, int, Outcome]  # position in what was asked, model, what came of it


def dumps(record: Any) -> bytes:
    """A record as JSON: what the state keeps."""
    try:
        return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY)  # a metric may give numpy's floats
    except TypeError:  # half a surrogate pair in a model's answer: orjson knows only whole characters
        return json.dumps(asdict(record), allow_nan=False).encode()


def loads(data: bytes) -> Any:
    """What `dumps` gave, as plain objects. Raises ValueError for what is no JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:  # half a surrogate pair
        return json.loads(data)


def row_of(
    request: Request,
    model: str | None,
    values: Mapping[str, Any],
    *,
    error: str | None = None,
    include_prompt: bool = False,
    names: Mapping[str, str] = _AS_THEY_ARE,
) -> dict[str, Any]:
    """One output row: the id, the input's own fields, then ROW_FIELDS (null where not in `values`).

    `names` calls columns otherwise. An input field that has the name of a column keeps its value as `input_<name>`,
    with so many `input_` as make it a name of its own. A request under a plan has a column `plan`.
    """
    given = request.given if include_prompt else {}
    own = {**given, **request.extra}
    if request.plan is not None:
        own.setdefault("plan", request.plan)  # `--plan` named it
    return _row(request.id, own, {**_NO_RESULTS, "model": model, **values}, error, names)


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a table of `record` has it; `messcli/simulation/table.py` reads it."""
    told = {name: check for name, check in (outcome.checks or {}).items() if check.probability is not None}
    fields: dict[str, Any] = {
        "output": outcome.output,
        "reasoning": outcome.reasoning,
        "accuracy": outcome.accuracy,
        "joules": outcome.joules,
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "seconds": outcome.seconds,
        "meter": outcome.meter,
        "finish": outcome.finish,
        "error": outcome.error,
        "confidence": outcome.confidence,
        "checks": told and {name: check.probability for name, check in told.items()},
        "check_joules": told and {name: check.joules for name, check in told.items()},
    }
    # joules always stand there: null says that they aren't known
    return {name: value for name, value in fields.items() if value not in (None, {}) or name == "joules"}


def rejected_row(rejected: Rejected, names: Mapping[str, str] = _AS_THEY_ARE) -> dict[str, Any]:
    """The output row of a line that is no request: null results and `error`."""
    return _row(rejected.id, rejected.extra, _NO_RESULTS, rejected.error, names)


def _row(
    identity: str | int | None,
    own: Mapping[str, Any],
    values: Mapping[str, Any],
    error: str | None,
    names: Mapping[str, str],
) -> dict[str, Any]:
    ours = {names.get(name, name): value for name, value in values.items()} if names else values
    row: dict[str, Any] = {"id": identity}
    # also those that only some rows have: a field of the input has one name in all rows
    taken = {"id", *ours, *(names.get(name, name) for name in ("error", *STAGE_FIELDS))} if own else ()
    for name, value in own.items():
        free = name
        while free in taken or (free != name and free in own):
            free = f"input_{free}"
        row[free] = value
    row.update(ours)
    if error is not None:
        row[names.get("error", "error")] = error
    return row
