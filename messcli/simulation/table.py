"""Outcome tables: what every model did with every request, as `record` wrote it or the authors' simulator did.

Knows the two file formats and what a complete table is; knows nothing of policies. A missing outcome is an
error that names it: nothing is ever guessed.
"""

from __future__ import annotations

import csv
import io
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.amounts import MOST, is_amount
from messcli.energy.load import CostModel
from messcli.errors import InputError, OutcomesError, first_line, shown
from messcli.files.requests import STDIN, open_input
from messcli.jsonl import BadLine, TornFile, objects
from messcli.metrics import Metric
from messcli.records import Check, Outcome, Request
from messcli.routing.source import Recorded
from messcli.simulation.lane import OnEngines

# Weights of a prompt's token and of one that is written: the ratio of 1 to 25 that the modelled tables have
READ, WRITTEN = 0.002, 0.05

Scorer = Callable[[], Metric]


@dataclass(frozen=True)
class OutcomeTable:
    """Requests in the file's order, and the outcome of every model for each: complete, scored, billed."""

    names: tuple[str, ...]  # the zoo, smallest first
    requests: tuple[Request, ...]
    outcomes: Mapping[str | int, Mapping[str, Outcome]]  # request id -> model -> outcome
    left_out: int = 0  # incomplete requests that were asked to be left out
    engines: tuple[CostModel, ...] | None = None  # that the models run on; None: each request runs alone

    @property
    def source(self) -> Recorded:
        """The table in place of live models."""
        if self.engines is not None:
            return OnEngines(self.names, self.outcomes, self._checkers, self.engines)
        return Recorded(self.names, self.outcomes, self._checkers)

    @cached_property
    def _checkers(self) -> dict[int, int]:
        """Model -> the largest model whose checks of its answers were recorded."""
        found = {}
        for m, name in enumerate(self.names):
            readers = {
                reader
                for known in self.outcomes.values()
                for reader in known[name].checks or ()
                if reader in self.names
            }
            larger = [place for reader in readers if (place := self.names.index(reader)) > m]
            if larger:
                found[m] = max(larger)
        return found

    @cached_property
    def accuracies(self) -> NDArray[np.float64]:
        """Accuracy of request i with model m, shape (requests, models)."""
        return self._array("accuracy")

    @cached_property
    def joules(self) -> NDArray[np.float64]:
        """Joules of request i with model m, shape (requests, models)."""
        return self._array("joules")

    @cached_property
    def seconds(self) -> NDArray[np.float64] | None:
        """Seconds of request i with model m; None where the table doesn't hold them all."""
        seconds = self._array("seconds")
        return None if np.isnan(seconds).any() else seconds

    def _array(self, field: str) -> NDArray[np.float64]:
        return np.array(
            [
                [getattr(self.outcomes[request.id][name], field) for name in self.names]
                for request in self.requests
            ],
            float,
        )


def read_table(
    path: str, *, scorer: Scorer | None = None, models: Sequence[str] = (), complete_only: bool = False
) -> OutcomeTable:
    """Read an outcomes table: JSON lines (`record`'s), or the CSV of the authors' simulator; .gz, .zst too.

    Args:
        path: "-" is standard input.
        scorer: makes the metric for outputs that have no accuracy; called only when there are such.
        models: the zoo, smallest to largest; () takes the first row's order.
        complete_only: leave out requests that lack an outcome instead of raising.

    Raises:
        OutcomesError: naming line, request and model, when something is malformed or missing.
        InputError: the file can't be read.
    """
    name = "standard input" if path == STDIN else path
    rows = _read_csv(path, name) if _is_csv(path) else _read_jsonl(path, name)
    names = tuple(models)
    metric: Metric | None = None
    requests: list[Request] = []
    outcomes: dict[str | int, Mapping[str, Outcome]] = {}
    left_out = 0
    for row in rows:
        if not names:
            names = tuple(row.outcomes)
        try:
            if row.request is None:
                raise _Incomplete(row.error or "has an error")
            known = {model: _of(row, model, names) for model in names}
            for model, outcome in known.items():
                if outcome.accuracy is None:
                    if metric is None and scorer is not None and outcome.output is not None:
                        metric = scorer()
                    known[model] = _scored(outcome, row.request, model, metric)
        except _Incomplete as gap:
            if complete_only:
                left_out += 1
                continue
            raise OutcomesError(f"{row.where}: {gap}") from None
        if row.request.id in outcomes:
            raise OutcomesError(
                f"{row.where}: id {row.request.id!r} stands in the table twice. Ids must differ"
            )
        # Whoever recorded an accuracy had a reference: the loop explores, and learns from, such requests.
        requests.append(replace(row.request, references=row.request.references or ("recorded",)))
        outcomes[row.request.id] = known
    if not requests:
        what = f"none of its {left_out} requests is complete" if left_out else "is empty"
        raise OutcomesError(f"{name}: {what}. Make a table with `messcli record`")
    if not any(outcome.joules for known in outcomes.values() for outcome in known.values()):
        raise OutcomesError(
            f"{name}: every outcome took 0 J: nothing tells the models apart. Record it with a meter"
        )
    return OutcomeTable(names, tuple(requests), _with_joules_of_checks(outcomes, names), left_out)


def _with_joules_of_checks(
    outcomes: dict[str | int, Mapping[str, Outcome]], names: Sequence[str]
) -> dict[str | int, Mapping[str, Outcome]]:
    """Checks get the joules that the table doesn't state: what their reader takes per token that it reads.

    A model's joules are taken to be proportional to READ * prompt tokens + WRITTEN * output tokens. Where tokens
    aren't recorded, a check's joules can't be known, and there is none.
    """
    if not any(outcome.checks for known in outcomes.values() for outcome in known.values()):
        return outcomes
    per_weight = {}
    for name in names:
        of_model = [known[name] for known in outcomes.values()]
        weight = sum(READ * (o.prompt_tokens or 0) + WRITTEN * (o.output_tokens or 0) for o in of_model)
        per_weight[name] = sum(o.joules or 0.0 for o in of_model) / weight if weight else math.nan

    def priced(outcome: Outcome) -> Outcome:
        if outcome.checks is None:
            return outcome
        read = READ * ((outcome.prompt_tokens or 0) + (outcome.output_tokens or 0))
        known = {}
        for asked, check in outcome.checks.items():
            reader = asked or names[-1]
            joules = per_weight.get(reader, math.nan) * read if check.joules is None else check.joules
            if joules > 0.0:
                known[reader] = replace(check, joules=joules)
        return replace(outcome, checks=known or None)

    return {
        identity: {name: priced(outcome) for name, outcome in known.items()}
        for identity, known in outcomes.items()
    }


def against_largest(table: OutcomeTable, metric: Metric) -> OutcomeTable:
    """The table with agreement in place of accuracy: each output scored against the largest model's, whose own is 1.

    Raises:
        OutcomesError: an output isn't in the table.
    """
    largest = table.names[-1]
    outcomes = {}
    for request in table.requests:
        known = table.outcomes[request.id]
        agreed = {}
        for name, outcome in known.items():
            theirs = known[largest].output
            if outcome.output is None or theirs is None:
                raise OutcomesError(
                    f'--against largest compares outputs, and the table has none of "{name}" for request '
                    f"{request.id!r}. Record it with outputs, or give --audit alone: its accuracies count as found"
                )
            accuracy = 1.0 if name == largest else metric(outcome.output, (theirs,))
            agreed[name] = replace(outcome, accuracy=accuracy)
        outcomes[request.id] = agreed
    return replace(table, outcomes=outcomes)


class _Incomplete(Exception):  # never leaves this module: the request lacks an outcome
    pass


@dataclass(frozen=True, slots=True)
class _Row:
    where: str  # file and line
    request: Request | None  # None: a line that `record` couldn't take as a request
    outcomes: Mapping[str, Outcome]
    error: str | None = None


def _of(row: _Row, model: str, names: Sequence[str]) -> Outcome:
    outcome = row.outcomes.get(model)
    identity = row.request.id if row.request else None
    cure = "Record the input again, or leave incomplete requests out with --complete-only"
    if outcome is None:
        held = ", ".join(row.outcomes) or "none"
        raise _Incomplete(
            f'no outcome of model "{model}" for request {identity!r}; the line has {held}. {cure}'
        )
    if outcome.error is not None:
        raise _Incomplete(f'model "{model}" failed on request {identity!r}: {outcome.error}. {cure}')
    if outcome.joules is None:
        raise _Incomplete(f'the joules of model "{model}" for request {identity!r} aren\'t known. {cure}')
    return outcome


def _scored(outcome: Outcome, request: Request, model: str, metric: Metric | None) -> Outcome:
    where = f'model "{model}" for request {request.id!r}'
    if outcome.output is None:
        raise _Incomplete(f"{where} has neither accuracy nor output. Record the input again")
    if not request.references:
        raise _Incomplete(
            f"{where} has no accuracy, and the request no reference to score its output with. Add references, "
            "or leave such requests out with --complete-only"
        )
    if metric is None:
        raise OutcomesError(
            f"{where} has an output but no accuracy. Score the outputs with --metric, for example --metric bleu1"
        )
    return replace(outcome, accuracy=metric(outcome.output, request.references))


# ---- JSON lines ----------------------------------------------------------------------------------


def _read_jsonl(path: str, name: str) -> Iterator[_Row]:
    with open_input(path) as handle:
        try:
            for number, row in objects(handle):
                yield _parsed(row, f"{name}:{number}")
        except TornFile as error:
            raise InputError(f"{name}: can't be read: {error}. Record it again, or repair the file") from None
        except BadLine as error:
            raise OutcomesError(f"{name}:{error.number}: {error}. Is this an outcomes table?") from None


def _parsed(row: dict[str, Any], where: str) -> _Row:
    models = row.get("models")
    if models is None and isinstance(row.get("error"), str):
        why = f"{row['error']} Such lines are left out with --complete-only"
        return _Row(where, None, {}, why)
    if not isinstance(models, dict) or not models:
        hint = " A file that `route` wrote has one model per line; `record` asks them all." * ("model" in row)
        raise OutcomesError(f'{where}: no "models": no line of an outcomes table.{hint} See `messcli record`')
    identity, prompt, reference = row.get("id"), row.get("prompt"), row.get("reference")
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise OutcomesError(f'{where}: field "id": expected a string or an integer, found {identity!r}')
    if not isinstance(prompt, str):
        raise OutcomesError(f'{where}: field "prompt": expected a string, found {prompt!r}')
    references = () if reference is None else (reference,) if isinstance(reference, str) else reference
    if not isinstance(references, tuple | list) or not all(isinstance(text, str) for text in references):
        raise OutcomesError(
            f'{where}: field "reference": expected a string or a list of strings, found {shown(reference)}'
        )
    outcomes = {model: _parse_outcome(found, model, where) for model, found in models.items()}
    return _Row(where, _request(identity, prompt, tuple(references)), outcomes)


def _parse_outcome(found: Any, model: str, where: str) -> Outcome:
    if not isinstance(found, dict):
        raise OutcomesError(f'{where}: model "{model}": expected an object, found {found!r}')

    def number(field: str, most: float = MOST) -> float | None:
        value = found.get(field)
        if value is None:
            return None
        if not is_amount(value, most):
            raise OutcomesError(
                f'{where}: model "{model}": "{field}" is {shown(value)}, no number that it can be'
            )
        return float(value)

    def text(field: str, default: str | None = None) -> str | None:
        value = found.get(field, default)
        if value is not None and not isinstance(value, str):
            raise OutcomesError(f'{where}: model "{model}": "{field}" is {shown(value)}, no text')
        return value

    tokens = [number("prompt_tokens"), number("output_tokens")]
    return Outcome(
        output=text("output"),
        accuracy=number("accuracy", 1.0),
        joules=number("joules"),
        prompt_tokens=None if tokens[0] is None else int(tokens[0]),
        output_tokens=None if tokens[1] is None else int(tokens[1]),
        seconds=number("seconds"),
        meter=text("meter", "recorded"),
        finish=text("finish"),
        error=text("error"),
        confidence=_confidence(found.get("confidence"), model, where),
        checks=_parse_checks(found, model, where),
    )


def _is_number(value: Any, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= most


def _confidence(value: Any, model: str, where: str) -> Mapping[str, float] | None:
    """One number is the mean's."""
    if value is None:
        return None
    numbers = value if isinstance(value, dict) else {"mean": value}
    if not all(_is_number(number, sys.float_info.max) for number in numbers.values()):
        raise OutcomesError(
            f'{where}: model "{model}": "confidence": expected a number, or an object of numbers, found {value!r}'
        )
    return {name: float(number) for name, number in numbers.items()}


def _parse_checks(found: Mapping[str, Any], model: str, where: str) -> Mapping[str, Check] | None:
    """By the larger model's name, "" for the zoo's largest; no joules where the table doesn't state them."""
    checks, joules = found.get("checks"), found.get("check_joules")
    if checks is None:
        by_largest = found.get("confidence_by_large")
        checks = None if by_largest is None else {"": by_largest}
    if checks is None:
        return None
    known = {}
    for reader, probability in checks.items() if isinstance(checks, dict) else [("", math.nan)]:
        stated = joules.get(reader) if isinstance(joules, dict) else joules
        if (
            not _is_number(probability, 1.0)
            or not probability >= 0
            or not (stated is None or _is_number(stated))
        ):
            raise OutcomesError(
                f'{where}: model "{model}": "checks": expected {{"LARGER": probability}}, found {checks!r} '
                f'(and "check_joules": {joules!r})'
            )
        known[reader] = Check(float(probability), None if stated is None else float(stated))
    return known or None


def _request(identity: str | int, prompt: str, references: tuple[str, ...]) -> Request:
    return Request(identity, prompt, references=references)


# ---- the authors' CSV ----------------------------------------------------------------------------

_CSV_FIELDS = ("label_", "acc_norm_", "energy_consumption_", "inference_time_")


def _is_csv(path: str) -> bool:
    return any(suffix == ".csv" for suffix in Path(path).suffixes)


def _read_csv(path: str, name: str) -> Iterator[_Row]:
    """`doc_id,input_text,benchmark_name` and per model X `acc_norm_X,energy_consumption_X,inference_time_X`.

    `label_X` is the accuracy as a whole number, 0 or 1; it serves where there is no acc_norm_X.
    """
    csv.field_size_limit(1 << 30)  # prompts are longer than the module's default of 128 kB
    with open_input(path) as handle:
        reader = csv.DictReader(io.TextIOWrapper(handle, "utf-8-sig", newline=""))
        try:
            columns = reader.fieldnames or []
            models = [
                column.removeprefix("energy_consumption_")
                for column in columns
                if column.startswith("energy_consumption_")
            ]
            if not models or "input_text" not in columns:
                found = shown(", ".join(columns)) if columns else "none"
                raise OutcomesError(
                    f"{name}: expected the columns doc_id, input_text and, per model X, "
                    f"{', '.join(f'{field}X' for field in _CSV_FIELDS)}; found {found}"
                )
            seen: dict[str, int] = {}
            for row in reader:
                where = f"{name}:{reader.line_num}"
                yield _csv_row(row, models, where, seen)
        except (UnicodeDecodeError, csv.Error, OSError, EOFError, zlib.error) as error:
            raise InputError(f"{name}: can't be read as CSV: {first_line(error)}. Save it as UTF-8") from None


def _csv_row(row: Mapping[str, Any], models: Sequence[str], where: str, seen: dict[str, int]) -> _Row:
    benchmark = row.get("benchmark_name")
    identity = f"{benchmark}/{row.get('doc_id')}" if benchmark else str(row.get("doc_id"))
    # benchmarks with several subjects count from 0 in each
    seen[identity] = seen.get(identity, 0) + 1
    if seen[identity] > 1:
        identity = f"{identity}-{seen[identity]}"

    def number(column: str, most: float = MOST) -> float | None:
        text = row.get(column)
        if text is None or not text.strip():
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= most:
            raise OutcomesError(f"{where}: column {column}: {text!r} is no number that it can be")
        return value

    outcomes = {}
    for model in models:
        accuracy = number(f"acc_norm_{model}", 1.0)
        outcomes[model] = Outcome(
            output=None,
            accuracy=number(f"label_{model}", 1.0) if accuracy is None else accuracy,
            joules=number(f"energy_consumption_{model}"),
            seconds=number(f"inference_time_{model}"),
            meter="recorded",
        )
    return _Row(where, _request(identity, str(row["input_text"]), ()), outcomes)
