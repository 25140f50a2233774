"""The numbers that routing is tuned by: each with its unit, its role, what raising it does, and the evidence.

Nothing else in `messcli/routing` holds a tuned number. `Tuning` is what a policy is given; its digest is kept with
a state, so that no state goes on under other numbers unseen. Evidence: docs/evidence/routing.md, a section or a
table's row. A number without a link was set once, and no measurement says that another one is worse.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from messcli.predict import tuning as estimates


@dataclass(frozen=True, slots=True)
class Optimism:
    """What is added to the Â of a model that was seldom observed, so that it isn't written off after a bad start."""

    errors: float = 2.0
    """Standard errors of a model's level. Raised: seldom observed models are tried more often.
    docs/evidence/routing.md#what-each-idea-is-worth: 1 saves on one table what it costs on another."""
    errors_unreachable: float = 1.0
    """The same in choices while no price reaches the target: joules don't count then, and a trial is paid for with
    accuracy. Raised: a bad model is tried again and again while the promise is behind; lowered to 0: a good one
    that was unlucky isn't found again (docs/evidence/routing.md#what-each-idea-is-worth, "optimism is halved")."""
    known: float = 30.0
    """Observations at which a model's optimism has faded to 1/sqrt(2) of a standard error's. Raised: it fades
    later, which costs 0.02 of static on `mmlu_pro` (docs/evidence/routing.md#what-each-idea-is-worth, "not fading
    sooner")."""


@dataclass(frozen=True, slots=True)
class Price:
    """The search of the price. Prices are in joules; a unit is the mean predicted joules of the recent requests'
    answers."""

    recent: int = 1000
    """Requests that the price is solved on: the latest. Raised: less noise, later notice of other traffic, more
    time."""
    every: int = 16
    """Requests of a plan between two solutions, at the most. Raised: less time, later reaction."""
    left_per_solution: int = 8
    """Near the end a solution is due after 1/8 of the requests left, if that is sooner. Raised: solved more often
    there."""
    most: float = 1e6
    """Units: the highest price. At it, joules don't count any more, and the target counts as out of reach."""
    least: float = 1e-6
    """Units: below it no smaller price is looked for."""
    step: float = 1.2
    """The first factor by which a bracket around the price of before is widened."""
    step_growth: float = 1.5
    """That factor grows by this factor each time. Raised: fewer steps, a wider bracket to halve."""
    step_most: float = 8.0
    """... up to this."""
    halvings: int = 7
    """Of the bracket. 7 of a factor 1.2 leave 0.2 %, of a factor 8 they leave 2 %. Raised: exacter, more time."""


@dataclass(frozen=True, slots=True)
class Margin:
    """How far above alpha the choices aim. Accuracies are in [0, 1]; a deviation is that of A - Â of one request."""

    safety: float = 3.0
    """Deviations of chance that full effort must still recover from. Raised: alpha is kept more often, for more
    joules. docs/evidence/routing.md#what-each-idea-is-worth, "safety 2.2 instead of 3": alpha missed in 2 of 12
    orders."""
    end: float = 2.0
    """Deviations of one request that stay as margin until the last request. Raised: as `safety`, near the end."""
    payback: float = 0.6
    """The part of the requests left over which a debt is paid back and a surplus is spent. Raised: later. 1: no
    gain (docs/evidence/routing.md#what-each-idea-is-worth, "a margin over all that is left")."""
    gain_kept: float = 0.7
    """The part of the zoo's estimated reach above alpha that full effort is trusted to gain. Raised: a smaller
    margin."""
    least_gain: float = 0.005
    """Accuracy per request that full effort is taken to gain at the least. Raised: a smaller margin near the zoo's
    reach."""
    reach_of_best: float = 0.5
    """Weight of the best model of each request, beside the best single model, in the zoo's reach. Raised: the reach
    is taken to be higher, for a smaller margin."""
    reach_unknown: float = 0.1
    """Accuracy: the reach above alpha until the price was solved once."""
    variance: float = 0.15
    """Accuracy squared: the variance of A - Â until some are known. Raised: a larger margin at the start."""
    variance_weight: float = 10.0
    """Requests' worth of belief in it. Raised: it counts for longer."""
    variance_memory: float = 500.0
    """Requests over which the variance is averaged. Raised: less noise, later notice of other traffic."""
    drift_fading: float = 0.998
    """Weight of a residual, per request after it: a memory of 500 requests. Raised: less noise, later notice."""
    drift_deviation: float = 0.02
    """Accuracy: how far off the Â of chosen models are expected to be on average. Lowered: what was seen of it
    counts less; 0.01 and 0.005 gain nothing (docs/evidence/routing.md#what-each-idea-is-worth)."""
    audit: float = 1.65
    """Standard errors of margin for what isn't observed: 95 %, one-sided. Raised: alpha is kept more often without
    references, for more joules (docs/evidence/routing.md#hard-traffic)."""
    least_residuals: int = 10
    """Residuals that the correction of what isn't observed is divided by at the least. Raised: it counts less at
    the start."""
    audited_errors: float = 2.6
    """The same where answers are audited: standard errors of the mean that are kept. More than 1.65, because estimates
    of earlier requests were made by a predictor that knew less."""
    audited_deviation: float = 0.008
    """Accuracy: how far off the estimates are expected to be on average where they learn from all audits. Raised: what
    was seen of it counts more, and with it the chance of the last audits."""
    audited_later: float = 0.05
    """The part of the rate so far at which audits go on: most fall at the start."""
    sure_errors: float = 3.4
    """Standard errors of the unbiased estimate that lie between it and its bound: sqrt(2 log(1 / error) + 2 log(1 /
    share of a rate)), and what the mixture loses. Raised: the bound meets alpha more often, for more joules."""
    most_doubt: float = 0.6
    """The part of what full effort gains that is paid for doubt, at most. Raised: where little can be found out, the
    dearest model serves more."""
    least_left: float = 200.0
    """Requests that are taken to be left at the least where the horizon isn't known; else as many as were settled."""


@dataclass(frozen=True, slots=True)
class Exploration:
    """How often the whole zoo is asked, where the price is found by the program."""

    share: float = 0.02
    """The part of the expected bill that the first explorations may take, and the later ones as well. Raised:
    levels are known sooner, for more joules (docs/evidence/routing.md#what-each-idea-is-worth: 3 % gains nothing,
    1.5 % missed alpha in 3 of 198)."""
    least: int = 8
    """Explorations at the start, whatever they cost. 12: no gain
    (docs/evidence/routing.md#what-each-idea-is-worth)."""
    first: int = 24
    """Explorations at the start where the horizon isn't known."""
    first_by_root: float = 0.45
    """Explorations at the start per sqrt(requests in all), where that is known."""
    c: float = 0.05
    """Of the later ones: p_t = c * t^(-1/3). Raised: more explorations for good."""


@dataclass(frozen=True, slots=True)
class Audits:
    """Which served requests are audited, where no references tell what answers are worth."""

    beginning: int = 1000
    """The first requests, of which any number may be audited."""
    most: float = 0.05
    """The part of the later ones that may be audited."""
    aim: float = 0.9
    """The part of it that is aimed at: coins scatter. Raised: more audits, and now and then more than `most`."""
    least: float = 0.005
    """The part of the requests that is audited at any time: traffic may change. Raised: changes are seen sooner."""
    least_audits: int = 200
    """Audits in all, as far as they are affordable, whatever they seem to be worth: a lucky start would say that the
    cheapest model is good enough, and then nothing would be looked at any more. 200 tell a mean to 0.06 (2 errors)."""
    first: int = 16
    """Audits in a row at the start, and of the n-th request first / n, until prices and costs are known."""
    errors: float = 2.0
    """Standard errors of the mean that are kept above alpha; more audits make them smaller. `Margin.audited_errors`."""
    share: float = 0.25
    """The part of the expected bill that audits may take, net of what the answers served by them are worth."""
    least_cost: float = 0.1
    """The part of an audit's joules that it is taken to cost at the least, whatever its answer is worth."""
    least_gain: float = 0.02
    """Accuracy that the largest model is taken to gain at the least, in the price assumed until one is known."""
    companions: float = 0.3
    """Joules of cheaper models that are asked along, as a part of the largest one's: they learn from it as well."""
    tilt: float = 2.0
    """A request is audited so many times as often as the mean one at the most, and at the least its inverse. Raised:
    fewer audits for the same error while Â is right, more error where it isn't."""
    spread: float = 0.4
    """Accuracy: the standard deviation of A - Â until audits tell."""
    spread_weight: float = 10.0
    """Audits' worth of belief in it."""
    unsure: float = 0.1
    """Accuracy squared: what is added to the variance of A - Â of a model with one sample; falls as 1 / samples."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The yardstick `random`: a coin between two models, blind to the request."""

    first: int = 24
    """Explorations in a row at the start, until the models' means are known."""
    c: float = 0.05
    """Of the later ones: p_t = c * t^(-1/3)."""
    payback: float = 100.0
    """Requests over which Q is paid back. Raised: more slowly."""


@dataclass(frozen=True, slots=True)
class Reach:
    """When alpha counts as above what the zoo can reach. Then the largest serves."""

    explorations: int = 30
    """That must be known before it is said. Raised: said later."""
    errors: float = 3.0
    """Standard errors that the mean best answer must stay below alpha. Raised: said later, and less often in error."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """All of them."""

    optimism: Optimism = field(default_factory=Optimism)
    price: Price = field(default_factory=Price)
    margin: Margin = field(default_factory=Margin)
    exploration: Exploration = field(default_factory=Exploration)
    audits: Audits = field(default_factory=Audits)
    mix: Mix = field(default_factory=Mix)
    reach: Reach = field(default_factory=Reach)

    @property
    def digest(self) -> str:
        """Of these numbers and those of the estimates: kept with a state, and part of what it was made with."""
        return estimates.digest(self, *estimates.ALL)


TUNING = Tuning()
