"""Puts a controller together from names and numbers: `route`, `record` and `simulate` get theirs here.

Knows which policies there are; knows nothing of files, models or the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from messcli.predict.answer import AnswerPredictor
from messcli.predict.base import create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.registry import POLICIES
from messcli.routing.audit import Audits
from messcli.routing.auto import Auto
from messcli.routing.controller import Controller
from messcli.routing.deciding import Settings
from messcli.routing.policy import Largest, MessPlus, Policy, RandomConstrained, Smallest
from messcli.routing.tuning import TUNING, Tuning


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
    window: int | None = 1  # requests decided together, at most; None: found by the policy
    no_look: bool = False  # at answers, where a policy can
    tuning: Tuning = TUNING
    audits: Audits | None = None  # how answers are looked at that have no reference; None: they aren't


# ---- the policies of the registry -----------------------------------------------------------------


def mess_plus(setup: Setup) -> Policy:
    """The paper's with --v; else the one that finds the price."""
    if setup.v is not None:
        return MessPlus(setup.v, 3.0 if setup.c is None else setup.c)
    return Auto(setup.horizon, setup.c, setup.tuning, setup.audits, setup.seed)


def smallest(setup: Setup) -> Policy:
    return Smallest()


def largest(setup: Setup) -> Policy:
    return Largest()


def random_constrained(setup: Setup) -> Policy:
    return RandomConstrained(setup.seed, setup.tuning.mix)


def create_controller(setup: Setup, models: int, alphas: Mapping[str, float]) -> Controller:
    """A controller that has seen nothing yet.

    Args:
        models: the size of the zoo.
        alphas: plan -> target mean accuracy.

    Raises:
        UsageError: an unknown policy or predictor.
    """
    policy: Policy = POLICIES.load(setup.policy)(setup)
    predictor = create_predictor("mean" if setup.policy == "random" else setup.predictor, models)
    settings = Settings(
        alphas=alphas,
        seed=setup.seed,
        # a mix that is blind to the request has nothing but means to learn, and needs them to be right
        learn_from="all" if setup.policy == "random" else setup.learn,
        serve=setup.serve,
        window=setup.window,
        horizon=setup.horizon,
        audits=setup.audits,
    )
    looks = not setup.no_look and policy.begins
    answers = AnswerPredictor(models) if looks else None
    return Controller(models, policy, predictor, JoulesPredictor(models), settings, setup.tuning, answers)
