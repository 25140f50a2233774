"""What a job is to do, put together from its options and the zoo file, and refused where it can't be meant.

Knows options, zoos and what they may say; opens no state, loads no model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from messcli.calibration.file import Calibration, find_calibration
from messcli.energy.meter import check_choice
from messcli.errors import UsageError
from messcli.files.dialects import load_dialect
from messcli.files.sinks import STDOUT
from messcli.jobs.checks import Checks
from messcli.jobs.config import LOCAL, RouteConfig, Writing
from messcli.jobs.truth import Truth, truth_of
from messcli.records import ROW_FIELDS, STAGE_FIELDS
from messcli.routing.line import Reader
from messcli.routing.sla import DEFAULT_PLAN
from messcli.zoo import Zoo, load_zoo


@dataclass(frozen=True, slots=True)
class Brief:
    """What stands before anything is opened.

    Attributes:
        alphas: plan -> target.
    """

    zoo: Zoo
    truth: Truth
    alphas: Mapping[str, float]
    calibration: Calibration | None

    def readers(self, seed: int) -> list[Reader]:
        """Who reads answers: a larger model that checks them, a judge that scores them."""
        return [Checks(self.zoo), *self.truth.readers(len(self.zoo.models), seed)]


def brief_of(config: RouteConfig, *, may_audit: bool) -> Brief:
    """Raises MessError for what can't be meant, before anything is written.

    Args:
        may_audit: the job may do without references.
    """
    _check(config)
    zoo = load_zoo(config.zoo)
    truth = truth_of(config.promise, zoo, may_audit=may_audit)
    return Brief(zoo, truth, _alphas(config, zoo), _calibration(config, zoo))


def _check(config: RouteConfig) -> None:
    """Refuse what can't be meant, before anything is read, loaded or written."""
    if config.promise.alpha is not None:
        _check_alpha(config.promise.alpha)
    for name, value in (("--v", config.setup.v), ("--c", config.setup.c)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{name} {value:g}: must be a number of at least 0")
    check_choice(config.running.meter)
    if not all(config.writing.columns):
        raise UsageError(
            f"--fields {','.join(config.writing.columns)}: a name is empty. Columns are id, {', '.join(ROW_FIELDS)}"
        )
    written = config.reading.format is not None and load_dialect(config.reading.format).write is not None
    if written and config.writing != Writing():
        raise UsageError(
            f"--format {config.reading.format} writes rows of its own shape: leave out --fields, --rename and "
            "--include-prompt, or let the format be guessed"
        )
    columns = (*ROW_FIELDS, *STAGE_FIELDS, "error")
    for name, new in config.writing.rename.items():
        if name not in columns:
            raise UsageError(f"--rename {name}={new}: no column {name}. Columns are {', '.join(columns)}")
        others = {config.writing.rename.get(other, other) for other in columns if other != name}
        if new in {"id", *others}:
            raise UsageError(
                f"--rename {name}={new}: another column is called {new}. Give it a name of its own"
            )
    if config.output.endswith(os.sep) or Path(config.output).is_dir():
        raise UsageError(f"{config.output}: is a folder. Name a file in it")
    if config.output != STDOUT and os.path.realpath(config.input) == os.path.realpath(config.output):
        raise UsageError(
            f"{config.output}: is both the output and the input. Give the rows a file of their own"
        )


def _check_alpha(alpha: float) -> None:
    """Raise UsageError for what is no mean accuracy."""
    if not 0 <= alpha <= 1:  # false for NaN too
        hint = f"; did you mean {alpha / 100:g}?" if 1 < alpha <= 100 else ""
        raise UsageError(f"--alpha {alpha:g}: must be from 0 to 1{hint}")


def _alphas(config: RouteConfig, zoo: Zoo) -> dict[str, float]:
    """The target of each plan; requests without a plan belong to the promise's, else to the default one."""
    promise = config.promise
    alpha = zoo.alpha if promise.alpha is None else promise.alpha
    alphas = dict(zoo.plans)
    if promise.plan is not None and promise.plan not in alphas:
        known = ", ".join(sorted(alphas)) or "none"
        raise UsageError(f'unknown plan "{promise.plan}". Plans of the zoo file ([plans]): {known}')
    if alpha is None and config.setup.policy in ("mess+", "random"):
        if not alphas:
            raise UsageError("no target accuracy. Give --alpha, or alpha under [sla] in the zoo file")
        return alphas
    return {DEFAULT_PLAN: 0.0 if alpha is None else alpha, **alphas}


def _calibration(config: RouteConfig, zoo: Zoo) -> Calibration | None:
    """Before anything is opened: a calibration that doesn't fit leaves no trace."""
    running = config.running
    if running.no_calibration:
        return None
    if running.engine != LOCAL and running.calibration is None:  # one of this machine says nothing of others
        return None
    found = find_calibration(running.calibration, zoo, running.meter)
    window = config.setup.window or config.setup.tuning.windows.most  # auto: engines are to be full
    return None if found is None else found.at_window(window)
