"""The numbers that routing is tuned by: each with its unit, its role, what raising it does, and the evidence.

Nothing else in `messcli/routing` holds a tuned number. `Tuning` is what a policy is given; its digest is kept with
a state, so that no state goes on under other numbers unseen. Evidence: docs/evidence/routing.md, a section or a
table's row. A number without a link was set once, and no measurement says that another one is worse.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from messcli.predict import tuning as estimates
from messcli.predict.tuning import LEVELS, Levels


@dataclass(frozen=True, slots=True)
class Optimism:
    """What is added to the Â of a model that was seldom observed, so that it isn't written off after a bad start."""

    errors: float = 1.5
    """Standard errors of a model's level. Raised: seldom observed models are tried more often
    (docs/evidence/routing.md#what-each-idea-is-worth)."""
    errors_unreachable: float = 2.0
    """The same in choices while no price buys what is missing; it doesn't fade then. Lowered to 0: a good model that
    was unlucky isn't found again."""
    known: float = 30.0
    """Observations at which a model's optimism has faded to 1/sqrt(2) of a standard error's. Raised: it fades
    later, which costs 0.02 of static on `mmlu_pro` (docs/evidence/routing.md#what-each-idea-is-worth, "not fading
    sooner")."""


@dataclass(frozen=True, slots=True)
class Price:
    """The search of the price. Prices are in joules per unit of accuracy."""

    recent: int = 1000
    """Requests that the price is solved on: the latest. Raised: less noise, later notice of other traffic, more
    time."""
    every: int = 16
    """Requests of a plan between two solutions, at the most. Raised: less time, later reaction."""
    part: int = 8
    """A solution is due after 1/8 of the requests settled, and near the end after 1/8 of those left, if that is sooner.
    Raised: solved more often there."""
    least: float = 0.03
    """The lowest price looked at, in joules of the cheapest model's mean answer."""
    most: float = 300.0
    """The highest, in joules of the dearest model's mean answer."""
    cells: int = 44
    """Prices looked at between these. Raised: exacter, more time."""
    looked: int = 24_000
    """Requests times typical answers times larger models that a price is solved on where answers are looked at: fewer
    requests than `recent` where that is more. Raised: less noise, more time."""
    fine: int = 9
    """Prices looked at between two of them, to share requests out."""
    flat: float = 0.02
    """Fall of the expected price from one of them to the next, above which requests are shared out."""
    steep: float = 2.0
    """Fall of the expected price from one of them to the next, as a factor, above which prices between are looked at,
    where a window is decided before the price reacts: there the best price may lie anywhere between."""
    closer: int = 3
    """Times that this is done at the most. Raised: exacter, more time."""
    nearly: float = 0.98
    """Part of the accuracy that can be bought beyond which a price buys the estimates' noise. Raised: full effort
    costs more."""
    miss: float = 4.0
    """A unit of accuracy that decides whether alpha is kept, in units of full effort's price. Raised: alpha is kept
    more often, for more joules (docs/evidence/routing.md#what-each-idea-is-worth)."""
    pivotal: float = 1.0
    """Deviations of chance below alpha, at full effort, within which it is taken to decide that. Raised: as `miss`."""
    end: float = 2.0
    """Deviations of one request that stay above alpha at the end. Raised: alpha is kept more often, for more joules."""
    chance_most: float = 3.5
    """Deviations of chance that are reckoned with."""
    chances: int = 15
    """Ways that chance can go which are looked at."""
    doubt_most: float = 1.5
    """Standard errors of the levels that are reckoned with. Raised: dearer at the start, alpha kept more often."""
    doubts: int = 5
    """Ways that levels can be off which are looked at."""


@dataclass(frozen=True, slots=True)
class Margin:
    """How estimates turn out. A deviation is that of A - Â of one request."""

    variance: float = 0.15
    """Accuracy squared: the variance of A - Â until some are known. Raised: dearer at the start."""
    variance_weight: float = 4.0
    """Requests' worth of belief in it. Raised: it counts for longer."""
    variance_memory: float = 500.0
    """Requests over which the variance is averaged. Raised: less noise, later notice of other traffic."""
    drift_fading: float = 0.998
    """Weight of a residual, per request after it: a memory of 500 requests. Raised: less noise, later notice."""
    drift_deviation: float = 0.02
    """Accuracy: how far off the Â of chosen models are expected to be on average. Lowered: what was seen of it
    counts less; 0.01 and 0.005 gain nothing (docs/evidence/routing.md#what-each-idea-is-worth)."""
    blind_deviation: float = 0.005
    """The same in windows whose size was found. There what is seen of it is largely what has been learnt since. Raised:
    alpha is exceeded by 0.01 on `mmlu_pro` where it was bad luck (docs/evidence/routing.md#windows)."""
    audit: float = 1.65
    """Standard errors of margin for what isn't observed: 95 %, one-sided. Raised: alpha is kept more often without
    references, for more joules (docs/evidence/routing.md#hard-traffic)."""
    least_residuals: int = 10
    """Residuals that the correction of what isn't observed is divided by at the least. Raised: it counts less at
    the start."""
    audited_errors: float = 2.0
    """The same where answers are audited: standard errors of the mean that are kept. More than 1.65, because estimates
    of earlier requests were made by a predictor that knew less: at 1.65 alpha was kept in 37 of 40 orders of `mmlu_two`
    (docs/evidence/audits.md)."""
    audited_deviation: float = 0.02
    """Accuracy: how far off the estimates are expected to be on average where they learn from all audits. Raised: what
    was seen of it counts more, and with it the chance of the last audits. Chosen models are overestimated by 0.02 on
    `mmlu_pro` and 0.01 on `mmlu_two`; at 0.008 alpha was kept in 16 of 20 orders of `mmlu_pro`
    (docs/evidence/audits.md)."""
    audited_later: float = 0.05
    """The part of the rate so far at which audits go on: most fall at the start."""
    sure_errors: float = 3.4
    """Standard errors of the unbiased estimate that lie between it and its bound: sqrt(2 log(1 / error) + 2 log(1 /
    share of a rate)), and what the mixture loses. Raised: the bound meets alpha more often, for more joules."""
    gain_kept: float = 0.7
    """The part of the zoo's estimated reach above alpha that full effort is trusted to gain, where a doubt is weighed
    against it. Raised: more doubt is allowed for."""
    least_gain: float = 0.005
    """Accuracy per request that full effort is taken to gain at the least. Raised: the same."""
    most_doubt: float = 0.6
    """The part of what full effort gains that is paid for doubt, at most. Raised: where little can be found out, the
    dearest model serves more."""
    least_left: float = 200.0
    """Requests that are taken to be left at the least where the horizon isn't known; else as many as were settled."""


@dataclass(frozen=True, slots=True)
class Exploration:
    """What is asked beside the served model, where the price is found by the program and no constant is given."""

    share: float = 0.02
    """Joules that the models cheaper than the served one are asked for, in joules of the served answer. Raised: the
    cheaper models are known better where a dearer one serves, for more joules
    (docs/evidence/routing.md#what-each-idea-is-worth)."""
    checks: float = 0.02
    """Joules of checks that are made to learn what they are worth, in joules of an answer of the model that reads.
    Raised: it is known sooner, for more joules."""
    checks_known: float = 32.0
    """Checks of a model's answers after which half as many are made to learn. Raised: the same."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How many requests are decided together (`--window auto`)."""

    first: int = 128
    """The first window, requests."""
    start: float = 0.05
    """... at most this part of the requests in all. Raised: short jobs decide more of them on nothing."""
    growth: float = 4.0
    """The next windows, in requests settled, on long jobs. Raised: engines are fuller, decisions rest on less."""
    few: float = 3000.0
    """Requests in all, of a job whose windows grow by as many as are settled; they grow in proportion on longer jobs.
    Raised: windows grow more slowly."""
    kept: float = 850.0
    """The part of the requests left that a window leaves for later, times the requests in all. Raised: more windows
    near the end, and more chance to repair what a window missed."""
    least_kept: float = 0.05
    """That part at the least."""
    most_kept: float = 0.5
    """... and at the most."""
    most: int = 16_384
    """Requests."""
    emptier: float = 0.03
    """The part of all requests that a window has on engines which stay so empty that each takes twice its joules in
    full load. What is bought after a window is dearer by what this says of the rest and of the window. Raised: a window
    before a short rest buys what is missing itself, so that the last ones need no dear model."""
    end: float = 0.005
    """The part of all requests that the last window takes where no more are left. Raised: fewer windows at the end, and
    alpha is met less exactly."""
    blind: float = 1.0
    """The most requests that the last window takes because two would take more for their steps, in those settled.
    Raised: short jobs decide more of them on little (docs/evidence/batches.md)."""
    spared: float = 1.0
    """Deviations of chance, times the root of the requests, that a last window is taken to lose. Raised: more windows
    near the end of jobs whose windows' steps cost something. 0.3 instead changes little, 3.0 takes 5 to 13 % more on
    1,000 rows (docs/evidence/batches.md)."""
    known: float = 0.1
    """Accuracy: the largest standard error of a model's level at which a window's price is solved on its own prompts.
    Raised: sooner. What is less known is tried by a part of a window, at the price of the last one's end."""
    own: int = 64
    """Requests of a plan in a window from which on its price is solved on their own prompts. Raised: smaller windows
    are decided at a price that was solved on the latest requests. Those were learnt from, so that their estimates are
    too good."""
    least: int = 8
    """The first windows where a size is given, requests; the next ones take as many as are settled."""


@dataclass(frozen=True, slots=True)
class Loads:
    """What a run concludes of its models' loads (docs/evidence/batches.md)."""

    few: float = 16.0
    """Requests of a model, below which a line through what was read says little. Lowered: a dear model's one short
    answer makes it look like the cheapest; alpha was missed by 0.034."""
    refit: float = 1.1
    """Requests read of all models, in those at the last fit, from which on lines are fitted anew within a window.
    Raised: readings of the first windows are taken for those of full engines later."""
    spread: float = 2.0
    """The largest load that a model was read at, in units of the smallest, from which on a line is fitted. Raised:
    later, and better founded."""
    full: float = 1.5
    """Requests given in one window, in units of the most that ran at a time, from which on an engine counts as full.
    Lowered: a model that was never given much counts as one that can't run more at a time."""
    slack: float = 1.0
    """Accuracy, summed over a window, that may be lost where a model sleeps: what one request decides. Raised: models
    sleep more often, and alpha is met less exactly."""


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
    least_price: float = 7.0
    """Audits' joules that a unit of accuracy is worth at the least: about 2 T^(2/3) audits. A lucky start says that the
    cheapest model is good enough; then the price is 0, and nothing would be looked at that tells otherwise."""
    first: int = 16
    """Audits in a row at the start, and of the n-th request first / n, until prices and costs are known."""
    errors: float = 2.0
    """Standard errors of the mean that are kept above alpha; more audits make them smaller. `Margin.audited_errors`."""
    share: float = 0.5
    """The part of the expected bill that audits may take, net of what the answers served by them are worth. Lowered:
    after a lucky start too few are made to notice it. At 0.25 alpha was missed in 2 of 20 orders of `mmlu_two`
    (docs/evidence/audits.md)."""
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
class Ahead:
    """What is read of an input before anything of it is routed, where that is a file."""

    prompts: int = 1000
    """A sample of so many is taken. Raised: less noise, more time; 0: nothing is read ahead."""
    after: int = 500
    """Settled requests from which prices are solved on prompts to come; before, on the latest. What is known of few
    requests fits these better than others, and prices are tuned to that: solved on others from the start, jobs of
    300 requests cost 0.1 to 0.2 more at 0.2 (docs/evidence/routing.md#hard-traffic). Raised: later notice of what is
    to come."""
    least: int = 200
    """Prompts that a price is solved on at the least: the latest ones make up what is lacking near the end."""


@dataclass(frozen=True, slots=True)
class Drift:
    """When directions are fitted anew, because prompts differ along others."""

    looked: int = 256
    """The latest prompts that are looked at."""
    every: int = 512
    """Requests from one look to the next, at the least. Raised: less time, later notice."""
    part: float = 0.125
    """... or this part of those settled, if that is more."""
    share: float = 0.8
    """The part of the variance that lies along the directions, in units of what it was at the first look, below which
    they are fitted anew. Raised: more often, and each time something of what was learnt is lost. 0: never. Of four
    tables in shuffled orders it never fell below 0.95, from one to another it was 0.33 to 0.67
    (docs/evidence/routing.md#hard-traffic)."""
    fitted: int = 512
    """The latest prompts that they are fitted on."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What an earlier job taught, where one begins with it (`--learn-from`)."""

    answers: float = 500.0
    """Answers of each model that it counts as, at the most. Raised: it fades later, for the better where the traffic is
    the same, and for the worse where it isn't (docs/evidence/routing.md#knowledge-brought-along)."""


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
    windows: Windows = field(default_factory=Windows)
    loads: Loads = field(default_factory=Loads)
    levels: Levels = LEVELS
    ahead: Ahead = field(default_factory=Ahead)
    drift: Drift = field(default_factory=Drift)
    knowledge: Knowledge = field(default_factory=Knowledge)
    mix: Mix = field(default_factory=Mix)
    reach: Reach = field(default_factory=Reach)

    @property
    def digest(self) -> str:
        """Of these numbers and those of the estimates: kept with a state, and part of what it was made with."""
        return estimates.digest(self, *estimates.ALL)


TUNING = Tuning()
