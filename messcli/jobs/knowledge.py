"""`--learn-from`: what an earlier job taught, from its state or from an outcomes table.

Knows states, tables and what must be the same in both jobs; knows nothing of what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from messcli.errors import InputError, MessError, OutcomesError, StateError
from messcli.files.requests import STDIN
from messcli.jobs.resume import earlier_controller, zoo_difference
from messcli.metrics import Metric
from messcli.registry import POLICIES
from messcli.routing.audit import JUDGE
from messcli.routing.knowledge import Knowledge
from messcli.routing.setup import Setup
from messcli.simulation.runs import taught
from messcli.simulation.table import OutcomeTable, against_largest, read_table
from messcli.state.database import is_database
from messcli.state.earlier import Earlier, read_earlier
from messcli.state.state import State
from messcli.tariff import JOULES
from messcli.zoo import Zoo

_OTHERWISE = "or begin without --learn-from"
_LOOKED_AT = (
    20  # outputs of a table that are scored again, to see whether its accuracies are by this run's metric
)
_ROUNDING = 1e-6  # of accuracies that were written and read


@dataclass(frozen=True, slots=True)
class Learner:
    """The run that is to begin with it."""

    names: Sequence[str]  # of the zoo, smallest first
    setup: Setup
    zoo: Zoo | None = None  # None: nothing is known of the models but their names
    metric: Metric | None = (
        None  # under the signature that its state has; None: its accuracies stand in a table
    )
    scorer: Metric | None = None  # of outputs
    agreement: bool = False  # accuracies are agreement with the largest model
    reprice: Callable[[OutcomeTable], OutcomeTable] | None = None  # a table's joules into those of this run

    @property
    def predictor(self) -> str:
        return "mean" if self.setup.policy == "random" else self.setup.predictor


def knowledge_of(path: str, learner: Learner, tell: Callable[[str], None] = lambda _: None) -> Knowledge:
    """What the job taught whose state or table lies at `path`.

    Args:
        tell: takes a line for the user's eyes.

    Raises:
        MessError: in one line, what it is of that isn't as in this run, or why it can't be read.
    """
    try:
        if path == STDIN:
            raise InputError("standard input can't be read again. Name a file")
        try:
            from_state = is_database(Path(path))
        except OSError as error:
            raise InputError(
                f"{path}: can't be read: {error.strerror}. Name a state of `messcli route` or a table of "
                f"`messcli record`, {_OTHERWISE}"
            ) from None
        return _of_state(path, learner) if from_state else _of_table(path, learner, tell)
    except MessError as error:
        raise type(error)(f"--learn-from: {error}") from None


def learnt_from(
    state: State, path: str | None, load: Callable[[str], Knowledge]
) -> tuple[Mapping[str, str] | None, Knowledge | None]:
    """What stands in the state's signature of it, and the knowledge itself where the run begins with it.

    A run that goes on knows it already: the file isn't needed again.
    """
    known = (state.database.meta("signature") or {}).get("learnt_from")
    begun = not state.journal.is_empty
    if begun and (path is None or (known is not None and known["name"] == path)):
        return known, None
    if path is None:
        return None, None
    knowledge = load(path)
    return {"name": knowledge.name, "digest": knowledge.digest}, knowledge


# ---- a state -------------------------------------------------------------------------------------


def _of_state(path: str, learner: Learner) -> Knowledge:
    if learner.reprice is not None:
        raise StateError(
            f"{path}: what was learnt of joules is as they were read, and --engines has those of full engines. Name a "
            f"table, {_OTHERWISE}"
        )
    earlier = read_earlier(Path(path))
    try:
        _check(path, earlier, learner)
        controller = earlier_controller(earlier, learner.setup, len(learner.names))
    except StateError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise StateError(f"{path}: is damaged: {error}. Restore it from a copy, {_OTHERWISE}") from None
    if controller is None:
        raise StateError(
            f"{path}: was learnt under other tuned numbers of messcli. Learn from a table of `messcli record`, "
            f"{_OTHERWISE}"
        )
    if not controller.t:
        raise StateError(f"{path}: nothing was learnt in it yet. Name the state of a run that has routed")
    return Knowledge.of(path, earlier.digest, controller.state())


def _check(path: str, earlier: Earlier, learner: Learner) -> None:
    signature: Mapping[str, Any] = earlier.signature
    if signature["policy"] not in POLICIES:
        recording = signature["policy"] == "record"
        cure = "Name the table that it wrote" if recording else "Install the package that has it"
        raise StateError(f'{path}: is of policy "{signature["policy"]}". {cure}, {_OTHERWISE}')
    models = signature["zoo"]["models"]
    if learner.zoo is not None:
        difference = zoo_difference(models, learner.zoo.signature()["models"])
    else:
        names = [model["name"] for model in models]
        difference = zoo_difference(
            [{"name": name} for name in names], [{"name": name} for name in learner.names]
        )
    if difference is None and learner.metric is not None:
        was, now = signature["metric"], learner.metric
        if was != now.signature and was not in now.continues:
            difference = (f"metric {was}", f"metric {now.signature}")
        minimized = (signature.get("minimize", JOULES), JOULES)
        if learner.zoo is not None:
            minimized = (minimized[0], learner.zoo.tariff.minimize)
        if difference is None and minimized[0] != minimized[1]:
            difference = (f"minimize = {minimized[0]}", f"minimize = {minimized[1]}")
    if difference is None and signature["predictor"] != learner.predictor:
        difference = (f"predictor {signature['predictor']}", f"predictor {learner.predictor}")
    if difference is not None:
        raise StateError(
            f"{path}: was learnt with {difference[0]}, and this run has {difference[1]}. Learn from a job with the "
            f"same, {_OTHERWISE}"
        )


# ---- a table -------------------------------------------------------------------------------------


def _of_table(path: str, learner: Learner, tell: Callable[[str], None]) -> Knowledge:
    metric = learner.scorer
    if metric is not None and metric.name == JUDGE:
        raise OutcomesError(f"{path}: a table has no judge's scores. Name a state, {_OTHERWISE}")
    if learner.zoo is not None and learner.zoo.tariff.minimize != JOULES:
        raise OutcomesError(
            f"{path}: a table tells joules, and this run minimizes {learner.zoo.tariff.minimize}. Name a state, "
            f"{_OTHERWISE}"
        )
    table = read_table(path, scorer=None if metric is None else lambda: metric, complete_only=True)
    if lacking := [name for name in learner.names if name not in table.names]:
        raise OutcomesError(
            f"{path}: has no outcomes of {', '.join(lacking)}, but of {', '.join(table.names)}. Learn from a table of "
            f"the same models, {_OTHERWISE}"
        )
    table = replace(table, names=tuple(learner.names))
    if learner.agreement and metric is not None:
        table = against_largest(table, metric)
    elif metric is not None:
        _check_scores(path, table, metric)
    if learner.reprice is not None:
        table = learner.reprice(table)
    if table.left_out:
        tell(f"--learn-from: {path}: {table.left_out} incomplete requests are left out")
    digest = blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    return Knowledge.of(path, digest, taught(table, learner.setup))


def _check_scores(path: str, table: OutcomeTable, metric: Metric) -> None:
    """Score some outputs again: a table doesn't name the metric that its accuracies are by."""
    looked = 0
    for request in table.requests:
        for name in table.names:
            outcome = table.outcomes[request.id][name]
            if outcome.output is None or outcome.accuracy is None or request.references == ("recorded",):
                continue
            score = metric(outcome.output, request.references)
            if abs(score - outcome.accuracy) > _ROUNDING:
                raise OutcomesError(
                    f'{path}: its accuracies are of another metric: of model "{name}" and request {request.id!r} it '
                    f"says {outcome.accuracy:.4g}, and {metric.signature} {score:.4g}. Record it with this metric, "
                    f"{_OTHERWISE}"
                )
            looked += 1
            if looked >= _LOOKED_AT:
                return
