"""Puts a controller together from names and numbers: `route`, `record` and `simulate` get theirs here.

Knows which policies there are; knows nothing of files, models or the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from messcli.errors import UsageError
from messcli.predict.base import create_predictor
from messcli.predict.ridge import JoulesPredictor
from messcli.routing.controller import Controller, Settings
from messcli.routing.policy import Largest, MessPlus, Policy, RandomConstrained, Smallest
from messcli.routing.price import Auto


@dataclass(frozen=True, slots=True)
class Setup:
    """What decides how a controller decides. None: the default, or found by the program."""

    policy: str = "mess+"
    v: float | None = None
    c: float | None = None
    learn: str = "all"
    predictor: str = "ridge"
    seed: int = 0
    serve: str = "largest"
    horizon: int | None = None  # requests to come, where it is known


POLICIES: Mapping[str, Callable[[Setup], Policy]] = {
    "mess+": lambda setup: _mess_plus(setup),
    "smallest": lambda setup: Smallest(),
    "largest": lambda setup: Largest(),
    "random": lambda setup: RandomConstrained(setup.seed),
}


def _mess_plus(setup: Setup) -> Policy:
    if setup.v is not None:
        return MessPlus(setup.v, 3.0 if setup.c is None else setup.c)
    return Auto(setup.horizon, setup.c)


def create_controller(setup: Setup, models: int, alphas: Mapping[str, float]) -> Controller:
    """A controller that has seen nothing yet.

    Args:
        models: the size of the zoo.
        alphas: plan -> target mean accuracy.

    Raises:
        UsageError: an unknown policy or predictor.
    """
    try:
        policy = POLICIES[setup.policy](setup)
    except KeyError:
        known = ", ".join(sorted(POLICIES))
        raise UsageError(f'unknown policy "{setup.policy}". Known are {known}') from None
    predictor = create_predictor("mean" if setup.policy == "random" else setup.predictor, models)
    settings = Settings(
        alphas=alphas,
        seed=setup.seed,
        # a mix that is blind to the request has nothing but means to learn, and needs them to be right
        learn_from="all" if setup.policy == "random" else setup.learn,
        serve=setup.serve,
    )
    return Controller(models, policy, predictor, JoulesPredictor(models), settings)
