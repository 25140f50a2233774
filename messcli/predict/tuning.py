"""The numbers that estimates are tuned by: each with its unit, its role, what raising it does, and the evidence.

Nothing else in `messcli/predict` holds a tuned number. `digest` of those that a predictor uses is kept with what it
has learnt: under other numbers it learns anew. Evidence: docs/evidence/routing.md, a section or a table's row. A
number without a link was set once, and no measurement says that another one is worse.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, NamedTuple


def digest(*tunings: Any) -> str:
    """Of dataclasses of numbers: the same for the same names and values, on every machine."""
    plain = json.dumps([[type(tuning).__name__, asdict(tuning)] for tuning in tunings], sort_keys=True)
    return blake2b(plain.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class Text:
    """A text as numbers: its hashed words and runs of bytes, and its shape."""

    bytes_read: int = 8192
    """Bytes of a prompt that count: the pass takes bounded time. Raised: long prompts are told apart by more, for
    more time."""
    run: int = 4
    """Bytes in a run. The hash of a run is put together from two halves, so that only 4 is possible."""
    characters: float = 1000.0
    """Characters in a unit of the shape's length. Raised: the number, and its part of a distance, is smaller. The
    same for those below."""
    words: float = 100.0
    """Words in a unit."""
    log_characters: float = 6.0
    """Subtracted from log(characters + 1), to be near 0 for 400 characters."""
    log_words: float = 4.0
    """Subtracted from log(words), to be near 0 for 55 words."""
    digits: float = 5.0
    """Factor of the digits' share of the bytes."""
    lines: float = 20.0
    """Factor of the newlines' share of the bytes."""
    signs: float = 5.0
    """Factor of the punctuation's share of the bytes."""
    word_length: float = 10.0
    """Characters per word in a unit."""


@dataclass(frozen=True, slots=True)
class Latent:
    """The space that prompts are placed in: directions learnt from the first prompts."""

    buckets: int = 1 << 12
    """Of the hashed bags. Raised: fewer words share one, for more memory and time. 65,536: 0.01 of the variance
    more on one table (docs/evidence/routing.md#what-each-idea-is-worth, "How it was found")."""
    directions: int = 64
    """Raised: more of a bag is told, and regressions need more samples. 128 costs the same, 32 up to 0.02 of static
    more (the same)."""
    far: float = 3.0
    """Deviations from the middle that a prompt lies at the most. Raised: one unlike all others moves a regression
    more."""
    fits: tuple[int, ...] = (32, 128, 512)
    """Lessons at which the directions are learnt (again). One fit at 512: 0.005 of static dearer; one more at
    1,024: no gain (the same)."""
    smallest_share: float = 1e-6
    """Of the largest eigenvalue: directions with less are noise of the arithmetic, and are left out."""


@dataclass(frozen=True, slots=True)
class Regression:
    """What the regressions on accuracies and on joules share."""

    growth: float = 1.1
    """Factor of evidence at which the weights are solved for again. Raised: less time, later notice."""
    shape_evidence: float = 100.0
    """Samples' worth of belief in `shape_variance` of the shape's numbers before any was seen."""
    shape_variance: float = 0.1
    """Variance of each of the shape's numbers that is expected before any was seen."""
    shape_scaled: float = 0.08
    """Variance that each of the shape's numbers is scaled to; all directions together have 1. Raised: the shape
    counts for more."""


@dataclass(frozen=True, slots=True)
class Levels:
    """What is expected of a zoo before any answer, and while answers are few. Accuracies are in [0, 1]."""

    first: float = 0.5
    """Mean accuracy of the smallest model."""
    first_sd: float = 0.3
    """Its standard deviation. Raised: the first answers count for more."""
    step: float = 0.07
    """From one model's mean to the next one's. Raised: larger models are expected to be better until they are seen.
    The zoos of docs/evidence/routing.md have 0.11 on average, from -0.01 to 0.27."""
    step_sd: float = 0.1
    """Its standard deviation. Raised: one model's answers tell less of its neighbours."""
    variance: float = 0.15
    """Of one accuracy about its model's mean, until some are known."""
    belief: float = 4.0
    """Answers that this is worth."""


class Candidate(NamedTuple):
    """Penalties of one regression, in squared errors per squared weight; the larger, the less it follows the
    samples."""

    shared: float  # of the weights that all models share
    own: float  # of a model's own weights
    lengths: float  # of its own weights of the prompt's lengths
    handicap: float = 0.0  # squared errors to begin with: few samples would lead the boldest astray


@dataclass(frozen=True, slots=True)
class Ridge:
    """Accuracies."""

    candidates: tuple[Candidate, ...] = (
        Candidate(0.3, 3.0, 0.03, handicap=1.0),
        Candidate(3.0, 30.0, 0.3, handicap=0.5),
        Candidate(10.0, 300.0, 1.0, handicap=0.5),
        Candidate(1.0, 10.0, 10.0, handicap=1.0),
        Candidate(3.0, 30.0, 100.0, handicap=0.5),
        Candidate(10.0, 100.0, 300.0),
        Candidate(10.0, 300.0, 1e3),
        Candidate(30.0, 1e3, 3e3),
        Candidate(100.0, 3e3, 1e4),
        Candidate(30.0, math.inf, math.inf),
        Candidate(math.inf, math.inf, math.inf),
    )
    """From the boldest to the mean alone. No penalty fits every task: all run side by side, weighted by how well
    each predicted before learning. The first three are for tasks where a prompt's length tells which model is
    needed: without them the bundled requests cost 1.61 instead of 1.12 of static
    (docs/evidence/routing.md#what-each-idea-is-worth)."""
    temper: float = 1.5
    """Divides the losses in the candidates' weights: they err together, so their losses say less than independent
    ones. Raised: weights differ less. 3: 0.007 of static dearer (the same)."""
    most_loss: float = 50.0
    """Largest exponent of a weight: exp(-50) counts as nothing."""
    noise: float = 0.9
    """The part of the accuracies' variance that is taken to be noise. Raised: weights differ less."""
    least_noise: float = 1e-6
    """Accuracy squared: the noise at the least, where all accuracies are alike."""
    own_kind: float = 10.0
    """Factor of the penalty of a model's own weights of the numbers that tell a text's kind. 1: 0.945 instead of
    0.917 of static on `mmlu_pro` (the same)."""
    first: float = 8.0
    """Samples of all models that the weights are first solved for on."""


@dataclass(frozen=True, slots=True)
class Joules:
    """Joules, each model's in units of its mean."""

    shared_shape: float = 1.0
    """Penalty of the shared weights of a text's shape. Raised: the less they follow the samples. The same for those
    below."""
    shared_directions: float = 20.0
    """Penalty of the shared weights of the directions. Without directions joules cost 0.023 of static more on
    `mmlu_pro` (docs/evidence/routing.md#what-each-idea-is-worth)."""
    own: float = 30.0
    """Factor of both for a model's own weights. Raised: more is pooled. Not pooled at all: 0.009 of static dearer
    (the same)."""
    belief: float = 2.0
    """Readings that a calibration is worth: single readings scatter, but it was made elsewhere. Raised: it counts
    for longer."""
    floor: float = 0.1
    """The part of a model's mean that is predicted at the least: a line may cross 0, a model never costs nothing."""
    ratio: float = 4.0
    """Joules of a model's answer in those of the model before it, while it is neither calibrated nor read. Raised:
    larger models are tried later. The zoos of docs/evidence/routing.md have 2.4 to 11."""
    unit_settles: float = 10.0
    """Readings of every model after which the unit of V stands still. Raised: exacter, later."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Accuracies given a model's answer. Signals enter by their ranks, from -1/2 to 1/2."""

    remembered: int = 256
    """A model's latest answers: ranks are taken among them. Raised: finer ranks, later notice of other traffic."""
    typical: int = 12
    """Typical answers that the worth of a look is averaged over. Raised: less noise, more time."""
    slope: float = 0.6
    """Accuracy: expected size of a weight. Raised: few answers are followed more boldly (docs/evidence/look.md)."""
    slope_larger: float = 0.2
    """Accuracy: how far a larger model's weights are expected to be from what is carried over. Raised: the same."""
    offset: float = 0.2
    """Accuracy: expected size of a constant difference to the prompts' estimates, which is no part of what is said."""
    carried: float = 0.7
    """The part of a shift of log odds that a larger model shares, while little is known of that. Raised: fewer larger
    models are asked. On four tables it is 0.6 to 1.1, but for confidences that tell nothing."""
    variance: float = 0.2
    """Accuracy squared: of A - Â(x), until some are known. Lowered: bolder."""
    variance_weight: float = 10.0
    """Answers' worth of belief in it."""
    least: int = 8
    """Answers of a model before they say anything."""
    growth: float = 0.05
    """Part of the answers seen that must be new before they change what is said. Raised: less time, later notice."""


@dataclass(frozen=True, slots=True)
class Linear:
    """The paper's linear predictors."""

    buckets: int = 1 << 14
    """Of the hashed bags: at most 65,536. Raised: fewer words share one, for more memory."""
    learning_rate: float = 0.05
    """eta of Algorithm 1. Features have unit length, so a step moves the estimate of the very request by 2 eta
    times its error."""
    start: float = 1e-3
    """Standard deviation of the common random vector that all weights start from (line 1 of Algorithm 1)."""


@dataclass(frozen=True, slots=True)
class FastText:
    """fastText classifiers over accuracy bins."""

    minimum: int = 50
    """Samples before the first fit; below, the mean is as good."""
    growth: float = 1.3
    """Factor of the buffer at which is fitted again. Raised: less time, later notice."""
    capacity: int = 5000
    """The newest samples kept. Raised: later notice of other traffic; fitting 5,000 takes seconds."""
    bins: int = 10
    """Of accuracy. Raised: finer, with fewer samples in each."""
    doubt: float = 1.0
    """Squared accuracy's worth of belief in no skill. Raised: estimates stay near the mean for longer."""
    dimensions: int = 16
    """Of fastText's vectors. The defaults of the library are for millions of texts: a vector of 100, 5 epochs."""
    rate: float = 0.5
    """Its learning rate."""
    epochs: int = 25
    """Passes over the samples."""
    word_ngrams: int = 2
    """Words in a feature, at the most."""
    least_count: int = 2
    """Occurrences below which a word doesn't count."""
    ngram_buckets: int = 20_000
    """Of hashed pairs of words. The library's 2 million would make 800 MB per model."""


TEXT = Text()
LATENT = Latent()
REGRESSION = Regression()
LEVELS = Levels()
RIDGE = Ridge()
JOULES = Joules()
ANSWER = Answer()
LINEAR = Linear()
FAST_TEXT = FastText()
ALL = (TEXT, LATENT, REGRESSION, LEVELS, RIDGE, JOULES, ANSWER, LINEAR, FAST_TEXT)
