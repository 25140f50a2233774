"""Going on where earlier runs stopped: the terms in force, and a controller that knows what a state knows.

Knows what decides and what is kept of it; knows nothing of models, rows or the loop.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from messcli.calibration.file import Calibration
from messcli.errors import InputError, StateError
from messcli.files.requests import STDIN, open_input
from messcli.metrics import Metric
from messcli.records import Decision, Outcome, dumps, loads
from messcli.routing import older
from messcli.routing.audit import Audits
from messcli.routing.bound import ServedMean
from messcli.routing.controller import Controller
from messcli.routing.event import Event
from messcli.routing.knowledge import Knowledge
from messcli.routing.line import Planned, Unfinished
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import Account, VirtualQueue
from messcli.state.earlier import Earlier
from messcli.state.state import State
from messcli.tariff import JOULES
from messcli.zoo import Zoo, signature_of_older

# (what decides, size of the zoo, plan -> alpha) -> a controller that has seen nothing yet
CreateController = Callable[[Setup, int, Mapping[str, float]], Controller]


@dataclass(frozen=True, slots=True)
class Terms:
    """What is in force for a run; every change is a line of the state's settings."""

    setup: Setup
    alphas: Mapping[str, float]  # plan -> target
    period: str  # contract period; "" until one is named
    horizon: int | None  # requests that the period will have, as somebody said
    counted_horizon: int | None  # the same from the input's length, where nobody did
    calibration: Calibration | None

    def settings(self) -> dict[str, Any]:
        """As the state keeps them."""
        return {
            "alphas": self.alphas,
            "v": self.setup.v,
            "c": self.setup.c,
            "learn": self.setup.learn,
            "serve": self.setup.serve,
            "no_look": self.setup.no_look,
            "period": self.period,
            "horizon": self.horizon,
            "counted_horizon": self.counted_horizon,
            "calibration": None if self.calibration is None else self.calibration.identity,
            "tuning": self.setup.tuning.digest,
            **({} if self.setup.audits is None else {"audits": asdict(self.setup.audits)}),
        }

    def setup_under(self, settings: Mapping[str, Any]) -> Setup:
        """The setup of a run under other settings that the state has kept."""
        return _under(self.setup, settings)


def _under(setup: Setup, settings: Mapping[str, Any]) -> Setup:
    then: dict[str, Any] = {name: settings.get(name) for name in ("v", "c", "learn", "serve")}
    then["no_look"] = settings.get("no_look", True)  # earlier versions looked at no answer
    audits = settings.get("audits")
    return replace(
        setup,
        **then,
        horizon=settings.get("horizon") or settings.get("counted_horizon"),
        audits=None if audits is None else Audits(**audits),
    )


def terms_in_force(
    state: State,
    setup: Setup,
    alphas: Mapping[str, float],
    *,
    period: str | None,
    calibration: Calibration | None,
    source: str,
    count: Callable[[], int | None],
) -> Terms:
    """What was asked for, with what earlier runs settled where it wasn't.

    Args:
        setup: its horizon is the one asked for.
        period: None: the one that is open.
        source: the input's name.
        count: how many lines of it are to be routed; called only where a policy asks for the horizon.
    """
    if period is None:
        period = (state.journal.settings() or {}).get("period", "")
    said, requests = state.journal.period(period) or (None, 0)
    horizon = said if setup.horizon is None else setup.horizon
    counted = None
    if horizon is None and setup.policy == "mess+" and setup.v is None and len(alphas) == 1:
        counted = _counted_horizon(state, source, count(), period, requests)
    setup = replace(setup, horizon=horizon or counted)
    return Terms(setup, alphas, period, horizon, counted, calibration)


def _counted_horizon(state: State, source: str, total: int | None, period: str, requests: int) -> int | None:
    """What the period had before this input, and the input's lines. The same when a run is taken up again."""
    if total is None:
        return None
    this = {"period": period}
    if (head := _head(source)) is not None:
        this |= {"path": os.path.realpath(source), "head": head}
    known = state.database.meta("input") or {}
    before = known.get("before", requests)
    if {**known, **this} != known or before + total < requests:  # another input, or another content of it
        before = requests
        state.database.set_meta("input", {**this, "before": before})
    return int(before) + total


def _head(source: str) -> str | None:
    """Digest of a file's first line, the same while it grows; None where it can't be read, which is told when routing
    gets there."""
    try:
        with open_input(source) as handle:
            return blake2b(handle.readline(1 << 16), digest_size=8).hexdigest()
    except (InputError, OSError, EOFError, zlib.error):
        return None


def read_ahead(
    state: State, controller: Controller, source: str, sample: Callable[[], Sequence[tuple[int, str]]]
) -> None:
    """Show the controller prompts of an input before any of it is routed: once, however often the run goes on.

    Args:
        sample: of a file, prompts with their places among its lines. A pipe can't be read twice.
    """
    if not controller.policy.begins:
        return
    this = _head(source) if source != STDIN and Path(source).is_file() else None  # wherever it lies
    if this == state.database.meta("ahead"):
        return
    controller.read_ahead(sample() if this is not None else ())
    state.journal.learn("ahead", this, controller.t, snapshot(controller))


def check_signature(
    state: State, zoo: Zoo, metric: Metric, setup: Setup, learnt_from: Mapping[str, str] | None = None
) -> None:
    """Refuse to mix decisions that were made in different ways. Alpha, V and c may change, and others may not.

    Args:
        learnt_from: name and digest of what the run begins with; None: nothing.

    Raises:
        StateError: naming the first thing that differs.
    """
    signature = {
        "zoo": zoo.signature(),
        "metric": metric.signature,
        "policy": setup.policy,
        "predictor": "mean" if setup.policy == "random" else setup.predictor,
        "window": setup.window,
        "seed": setup.seed,
        "minimize": zoo.tariff.minimize,
        "look": asdict(zoo.look),
        "learnt_from": learnt_from,
    }
    known = state.database.meta("signature")
    if known is not None:
        known.setdefault("minimize", JOULES)  # a state of 0.1
        known.setdefault("learnt_from", None)
    if known is not None and known["metric"] in metric.continues:
        known = {**known, "metric": metric.signature}
        state.database.set_meta("signature", known)
    if known is None:
        state.database.set_meta("signature", signature)
    elif (difference := _difference(known, signature)) and state.journal.is_empty:
        state.journal.start_anew()  # what an earlier run set and never came to use
        state.database.set_meta("signature", signature)
    elif difference:
        raise StateError(
            f"{state.name}: was made with {difference[0]}, and this run has {difference[1]}: their decisions "
            "don't mix. Run with what it was made with, or start anew with another --state and output"
        )


def _difference(known: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first setting that differs, in words: (as it was, as it is). What `known` doesn't name is new in
    this version of messcli, and no difference."""
    for name, value in known.items():
        if name == "zoo":
            if difference := zoo_difference(value["models"], now["zoo"]["models"]):
                return difference
        elif name == "learnt_from":
            was, is_now = value, now.get(name)
            if (was and was["digest"]) != (is_now and is_now["digest"]):
                return _beginning(was), _beginning(is_now)
        elif name == "look":
            for field, was in value.items():
                if was != now["look"].get(field):
                    return f"[look] {field} {was!r}", repr(now["look"].get(field))
        elif value != now.get(name):
            return _setting(name, value), _setting(name, now.get(name))
    return None


def _setting(name: str, value: object) -> str:
    return f"{name} {'auto' if name == 'window' and value is None else value}"


def _beginning(learnt_from: Mapping[str, str] | None) -> str:
    return "nothing to begin with" if learnt_from is None else f"--learn-from {learnt_from['name']}"


def zoo_difference(
    models: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> tuple[str, str] | None:
    """The first thing that differs between the models of two zoos, in words; None: nothing."""
    names, other_names = ([model["name"] for model in zoo] for zoo in (models, others))
    if names != other_names:
        return f"the models {', '.join(names)}", f"the models {', '.join(other_names)}"
    for model, other in zip(models, others, strict=True):
        for field_name, was in signature_of_older(model).items():
            if was != other.get(field_name):
                what = f'{field_name} of model "{model["name"]}"'
                return f"{what} = {json.dumps(was)}", json.dumps(other.get(field_name))
    return None


def resume(
    state: State,
    terms: Terms,
    create: CreateController,
    names: Sequence[str],
    tell: Callable[[str], None],
    knowledge: Knowledge | None = None,
) -> Controller:
    """The controller of the models `names` as the last run left it, under this run's terms.

    Args:
        knowledge: what a run that begins here begins with.
        tell: takes a line where something of it begins anew, or goes on under other tuned numbers.

    Raises:
        StateError: what was learnt isn't known to this messcli.
    """
    controller = create(terms.setup, len(names), terms.alphas)
    settings, before = terms.settings(), state.journal.settings()
    # of a state that an earlier version wrote only the ledger may be left; every other one has a snapshot
    forgotten = before is not None and state.journal.snapshot() is None
    if before == settings and not forgotten:
        _replay(state, controller, terms.setup, before)
        return controller
    anew: list[str] = []
    if before is not None and not forgotten:
        # What came of earlier requests is folded in under the settings that were in force then.
        earlier = create(terms.setup_under(before), len(names), before["alphas"])
        anew = _replay(state, earlier, terms.setup, before)
        controller.load(earlier.state())
    if before is not None and before.get("tuning", older.ALL_TUNING) != settings["tuning"]:
        learns = _learns_anew("predictor" in anew or forgotten, "joules" in anew or forgotten)
        tell(
            f"warning: {state.name}: was made under other tuned numbers of messcli. What is finished, the queues and "
            f"the ledger stay; {learns}"
        )
    if before is None and knowledge is not None:
        controller.learnt.take_over(knowledge)
    if before is None or forgotten or "joules" in anew or before["calibration"] != settings["calibration"]:
        controller.learnt.joules.calibrate(
            None if terms.calibration is None else terms.calibration.prior(names)
        )
    if before is None:
        controller.begin()
    if forgotten:
        controller.t = state.journal.t
    if before is None or forgotten or before["period"] != terms.period:
        rows = state.journal.accounts(terms.period)
        if before is not None:
            keep_means(state, controller, before.get("period", ""))
        means = (state.database.meta(_MEANS) or {}).get(terms.period, {})
        controller.open_period(
            {row[1]: _account(row, terms.alphas, means.get(row[1])) for row in rows if row[1] in terms.alphas}
        )
    accounts = account_rows(controller, terms.period)
    state.journal.change(controller.t + 1, settings, snapshot(controller), accounts)
    return controller


def _learns_anew(accuracies: bool, joules: bool) -> str:
    if accuracies or joules:
        what = "accuracies and joules" if accuracies and joules else "accuracies" if accuracies else "joules"
        return f"{what} are learnt anew"
    return "what was learnt stays, and decisions from here on follow the new numbers"


def _replay(state: State, controller: Controller, setup: Setup, settings: Mapping[str, Any]) -> list[str]:
    """Fold in what the state knows. Returns what of it has to be learnt anew."""
    learnt = state.journal.snapshot()
    anew: list[str] = []
    if learnt is not None:
        try:
            anew = _load(controller, learnt, setup, settings)
        except StateError as error:
            raise StateError(f"{state.name}: {error}") from None
    _fold(controller, state.journal.events())
    for row in state.journal.accounts(settings.get("period", "")):
        if row[1] in controller.accounts:  # requests that no model can take are no events
            controller.accounts[row[1]].failed = row[9]
    return anew


def _load(controller: Controller, learnt: bytes, setup: Setup, settings: Mapping[str, Any]) -> list[str]:
    predictor = "mean" if setup.policy == "random" else setup.predictor
    return controller.load(older.read_snapshot(learnt, predictor, settings["alphas"]))


def _fold(controller: Controller, pieces: Iterable[tuple[Sequence[bytes], bool]]) -> None:
    for events, ends_window in pieces:
        controller.settle([Event.loads(event) for event in events])
        if ends_window:
            controller.close_window()


def earlier_controller(earlier: Earlier, setup: Setup, models: int) -> Controller | None:
    """The controller of a run that another state is of; None where it would have to learn anew.

    Args:
        setup: of the run that asks.

    Raises:
        StateError: what was learnt isn't known to this messcli.
    """
    setup = replace(_under(setup, earlier.settings), policy=earlier.signature["policy"])
    controller = create_controller(setup, models, earlier.settings["alphas"])
    if {"predictor", "joules"} & {*_load(controller, earlier.snapshot, setup, earlier.settings)}:
        return None
    _fold(controller, earlier.events)
    return controller


# ---- what the state keeps of a window ------------------------------------------------------------


def planned_line(planned: Planned) -> bytes:
    """A line of a window and its decision, as the state keeps them; `unfinished_window` reads it."""
    line = planned.line
    return dumps([line.key.hex(), line.digest.hex(), planned.decision])


def unfinished_window(state: State) -> Unfinished | None:
    """The window that the last run was stopped in; None where it was in none."""
    kept = state.journal.window()
    if kept is None:
        return None
    try:
        decisions: dict[tuple[bytes, bytes], Decision | None] = {}
        for text in kept[0]:
            key, digest, plain = loads(text)
            identity = (bytes.fromhex(key), bytes.fromhex(digest))
            decisions[identity] = None if plain is None else Decision.of(plain)
        keys = [key for key, _ in decisions]
        answers = {(keys[place], model): Outcome.loads(data) for place, model, data in kept[1]}
    except (ValueError, TypeError, LookupError) as error:
        raise state.database.damaged(f"its unfinished window: {error}") from error
    return Unfinished(decisions, answers)


# ---- what the state keeps of a controller --------------------------------------------------------


def snapshot(controller: Controller) -> bytes:
    """All that it has learnt, to be loaded again."""
    return controller.state().dumps()


def account_rows(controller: Controller, period: str) -> list[tuple[Any, ...]]:
    """Its accounts as rows of the state's table."""
    return [
        (
            period,
            plan,
            controller.settings.alphas[plan],
            account.queue.length,
            account.observed,
            account.observed_sum,
            account.estimated,
            account.estimated_sum,
            account.explored,
            account.failed,
        )
        for plan, account in controller.accounts.items()
        if plan in controller.settings.alphas
    ]


_MEANS = "audits"  # what audits tell of each period and plan, beside the accounts


def keep_means(state: State, controller: Controller, period: str) -> None:
    """Keep what audits tell of a period: for reports, and for when the period is taken up again."""
    means = {plan: asdict(one.mean) for plan, one in controller.accounts.items() if one.mean is not None}
    if means:
        state.database.set_meta(_MEANS, {**(state.database.meta(_MEANS) or {}), period: means})


def _account(
    row: Sequence[Any], alphas: Mapping[str, float], mean: Mapping[str, Any] | None = None
) -> Account:
    """The account that `account_rows` made a row of. Its surplus is what it is under the present alpha."""
    _, plan, _, queue, observed, observed_sum, estimated, estimated_sum, explored, failed = row
    return Account(
        VirtualQueue(queue),
        observed,
        observed_sum,
        estimated,
        estimated_sum,
        explored=explored,
        failed=failed,
        surplus=observed_sum + estimated_sum - alphas[plan] * (observed + estimated),
        mean=None if mean is None else ServedMean(**mean),
    )
