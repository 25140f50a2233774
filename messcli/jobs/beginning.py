"""How a job begins: its state, a controller that knows what the state and earlier jobs know, its output.

Knows what has to fit together before the first request; knows nothing of models or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from messcli.files.sinks import STDOUT
from messcli.jobs.brief import Brief
from messcli.jobs.config import RouteConfig
from messcli.jobs.input import Input
from messcli.jobs.knowledge import Learner, knowledge_of, learnt_from
from messcli.jobs.resume import (
    CreateController,
    Terms,
    check_signature,
    read_ahead,
    resume,
    terms_in_force,
)
from messcli.routing.controller import Controller
from messcli.state.state import State


@contextmanager
def open_state(config: RouteConfig, tell: Callable[[str], None]) -> Iterator[State]:
    """The job's state, locked. Raises StateError where another run holds it, or it can't be read."""
    with State(_state_path(config), wait_seconds=config.keeping.wait_seconds) as state:
        for note in state.database.notes:
            tell(f"warning: {note}")
        yield state


def begin(
    state: State,
    config: RouteConfig,
    brief: Brief,
    source: Input,
    create: CreateController,
    tell: Callable[[str], None],
) -> tuple[Terms, Controller]:
    """The terms in force and the controller, as the last run left them; the output is open.

    Raises:
        MessError: the state is of a job that doesn't mix with this one, or what it learns from doesn't.
    """
    zoo, truth = brief.zoo, brief.truth
    terms = terms_in_force(
        state,
        replace(config.setup, horizon=config.promise.horizon, audits=truth.audits),
        brief.alphas,
        period=config.promise.period,
        calibration=brief.calibration,
        source=source.name,
        count=lambda: source.total,
    )
    learner = Learner(
        zoo.names, terms.setup, zoo, truth.metric, truth.scored, agreement=truth.audits is not None
    )
    begins_with, knowledge = learnt_from(
        state, config.keeping.learn_from, lambda path: knowledge_of(path, learner, tell)
    )
    check_signature(state, zoo, truth.metric, terms.setup, begins_with)
    controller = resume(state, terms, create, zoo.names, tell, knowledge)
    setup = config.setup
    read_ahead(state, controller, source.name, lambda: source.sample(setup.tuning.ahead.prompts, setup.seed))
    _open_output(state, config.output, tell)
    return terms, controller


def _open_output(state: State, output: str, tell: Callable[[str], None]) -> None:
    state.output.open(output)
    for name, rows in state.output.unfinished():
        tell(f"warning: {name}: lacks {rows} finished rows. Run the command that wrote it again")


def _state_path(config: RouteConfig) -> Path | None:
    if config.keeping.state is not None:
        return config.keeping.state
    return None if config.output == STDOUT else Path(config.output + ".state")
