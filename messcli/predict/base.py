"""Predictors: what accuracy each model will reach on a prompt, learnt from the accuracies that were seen.

Knows texts and numbers; knows nothing of queues, SLAs or which model was chosen why. All models of a zoo
share one predictor object, so that a prompt is turned into features once.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from messcli.predict.text import sparse_features
from messcli.registry import PREDICTORS

Accuracies = NDArray[np.float64]  # one per model, in zoo order; NaN where it wasn't observed
State = dict[str, NDArray[Any]]
Sparse = tuple[NDArray[np.intp], NDArray[np.float64]]  # distinct indices, and their values


class Predictor(Protocol):
    """Â_m for every model m of a zoo (section 2.3). Deterministic: same calls, same numbers."""

    name: str

    def encode(self, text: str) -> Any:
        """The features of a text, to be given to the methods below. Pure."""
        ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[Any]:
        """`encode` of each; faster together than one by one."""
        ...

    def predict_one(self, features: Any) -> Accuracies | None:
        """Â of every model, in [0, 1]; None while nothing is learnt. Pure."""
        ...

    def predict_many(self, features: Sequence[Any]) -> Accuracies | None:
        """`predict_one` of each: (requests, models); faster together than one by one."""
        ...

    def learn_one(self, features: Any, accuracies: Accuracies) -> None:
        """Take one learning step on the accuracies that were observed (NaN: that model wasn't)."""
        ...

    @property
    def samples(self) -> Accuracies:
        """How many accuracies each model's estimate rests on."""
        ...

    @property
    def version(self) -> int:
        """Changes when earlier estimates are worth making anew."""
        ...

    def state(self) -> State:
        """Everything learnt, as arrays: `load` of it continues exactly."""
        ...

    def load(self, state: Mapping[str, NDArray[Any]]) -> None: ...


class _OneByOne(ABC):
    """What predictors share that have no faster way to encode or predict many."""

    version = 0

    @abstractmethod
    def encode(self, text: str) -> Any: ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[Any]:
        return [self.encode(text) for text in texts]

    @abstractmethod
    def predict_one(self, features: Any) -> Accuracies | None: ...

    def predict_many(self, features: Sequence[Any]) -> Accuracies | None:
        rows = [row for one in features if (row := self.predict_one(one)) is not None]
        return np.array(rows) if rows else None


class MeanPredictor(_OneByOne):
    """The running mean of each model's accuracies: what can be said without looking at the request."""

    name = "mean"

    def __init__(self, models: int) -> None:
        self._sums = np.zeros(models)
        self._counts = np.zeros(models)

    def encode(self, text: str) -> None:
        return None

    def predict_one(self, features: None) -> Accuracies | None:
        if not self._counts.any():
            return None
        overall = self._sums.sum() / self._counts.sum()  # for a model not seen yet
        return np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1), overall)

    def learn_one(self, features: None, accuracies: Accuracies) -> None:
        observed = ~np.isnan(accuracies)
        self._sums[observed] += accuracies[observed]
        self._counts += observed

    @property
    def samples(self) -> Accuracies:
        return self._counts

    def state(self) -> State:
        return {"sums": self._sums.copy(), "counts": self._counts.copy()}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._sums = state["sums"].copy()
        self._counts = state["counts"].copy()


class LinearPredictor(_OneByOne):
    """One linear model per LLM on hashed n-grams, one SGD step on squared error per sample (equation 4).

    All weights start from one common random vector (line 1 of Algorithm 1); the constant's weight starts at
    the first accuracy seen, so that learning begins at the level of the data.

    Args:
        learning_rate: eta of Algorithm 1. Features have unit length, so a step of eta moves the estimate of
            the very request by about 2 * eta times its error.
    """

    name = "linear"
    BUCKETS = 1 << 14

    def __init__(self, models: int, learning_rate: float = 0.05, seed: int = 0) -> None:
        common = np.random.default_rng(seed).normal(0.0, 1e-3, self.BUCKETS + 1)
        self._weights = np.repeat(common[:, None], models, axis=1)
        self._learning_rate = learning_rate
        self._samples = np.zeros(models)

    def encode(self, text: str) -> Sparse:
        return sparse_features(self.BUCKETS)(text)

    def encode_many(self, texts: Sequence[str]) -> Sequence[Sparse]:
        return sparse_features(self.BUCKETS).many(texts)

    def predict_one(self, features: Sparse) -> Accuracies | None:
        predicted = self.predict_many([features])
        return None if predicted is None else predicted[0]

    def predict_many(self, features: Sequence[Sparse]) -> Accuracies | None:
        if not np.count_nonzero(self._samples) or not features:
            return None
        sums: Accuracies = np.array([values @ self._weights.take(indices, 0) for indices, values in features])
        return np.clip(sums, 0.0, 1.0)

    def learn_one(self, features: Sparse, accuracies: Accuracies) -> None:
        indices, values = features
        step = 2.0 * self._learning_rate * values
        for m, accuracy in enumerate(accuracies.tolist()):  # most requests teach one model only
            if math.isnan(accuracy):
                continue
            own = self._weights[:, m]
            if not self._samples[m]:
                own[self.BUCKETS] = accuracy
            weights = own[indices]
            own[indices] = weights + step * (accuracy - values @ weights)
            self._samples[m] += 1

    @property
    def samples(self) -> Accuracies:
        return self._samples

    def state(self) -> State:
        return {"weights": self._weights.copy(), "samples": self._samples.copy()}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._weights = state["weights"].copy()
        self._samples = state["samples"].copy()


class FastTextPredictor(_OneByOne):
    """fastText, the paper's library: one supervised classifier per LLM over accuracy bins.

    fastText can't continue a training, so each model is refitted from a buffer, on a schedule that thins out
    as the buffer grows. The estimate is the expectation over the bins' mean accuracies; the prompt's length
    is one more token. Below `MINIMUM` samples the estimate is the mean: fastText is no better there.

    A classifier fitted to few samples is far too sure of itself. So its distance from the mean is multiplied
    with the slope that would have been right for the predictions made before learning (0: no skill, the mean).
    """

    name = "fasttext"
    MINIMUM = 50  # samples before the first fit
    GROWTH = 1.3  # refit when the buffer has grown by this factor
    CAPACITY = 5000  # the newest samples kept; refitting these takes seconds
    BINS = 10
    DOUBT = 1.0  # squared accuracy's worth of belief in "no skill"

    def __init__(self, models: int, seed: int = 0) -> None:
        self._models = models
        self._seed = seed
        self._means = MeanPredictor(models)
        self._texts: list[str] = []
        self._accuracies: list[Accuracies] = []
        self._seen = 0
        self._next_fit = self.MINIMUM
        self._fitted_from: list[tuple[str, Accuracies]] = []
        self._fits: list[_Fit | None] = [None] * models
        # per model: the sums of d * (A - mean) and d * d, where d = fit - mean
        self._skill = np.zeros((2, models))

    def encode(self, text: str) -> str:
        words = text.split()  # also takes newlines out, which fastText refuses
        return " ".join([f"__words_{len(words).bit_length()}", *words]).lower()

    def predict_one(self, features: str) -> Accuracies | None:
        means = self._means.predict_one(None)
        if means is None:
            return None
        slope = np.clip(self._skill[0] / (self._skill[1] + self.DOUBT), 0.0, 1.0)
        estimates: Accuracies = np.clip(means + slope * self._departures(features, means), 0.0, 1.0)
        return estimates

    def _departures(self, features: str, means: Accuracies) -> Accuracies:
        pairs = zip(self._fits, means, strict=True)
        return np.array([fit.predict(features) - mean if fit else 0.0 for fit, mean in pairs])

    def learn_one(self, features: str, accuracies: Accuracies) -> None:
        means = self._means.predict_one(None)
        if means is not None:
            departures = self._departures(features, means)
            self._skill[0] += np.nan_to_num(departures * (accuracies - means))
            self._skill[1] += np.where(np.isnan(accuracies), 0.0, departures**2)
        self._means.learn_one(None, accuracies)
        self._texts.append(features)
        self._accuracies.append(accuracies.copy())
        if len(self._texts) > self.CAPACITY:
            del self._texts[0], self._accuracies[0]
        self._seen += 1
        if self._seen >= self._next_fit:
            self._next_fit = int(self._seen * self.GROWTH) + 1
            self._fit(list(zip(self._texts, self._accuracies, strict=True)))

    @property
    def samples(self) -> Accuracies:
        return self._means.samples

    def _fit(self, samples: list[tuple[str, Accuracies]]) -> None:
        self.version += 1
        self._fitted_from = samples
        for m in range(self._models):
            own = [(text, float(row[m])) for text, row in samples if not np.isnan(row[m])]
            self._fits[m] = _Fit(own, self.BINS, self._seed) if len(own) >= self.MINIMUM else None

    def state(self) -> State:
        # The fits aren't stored: with one thread and a seed, fitting the same samples gives the same model.
        kept = {
            "buffer": [[text, _plain(row)] for text, row in zip(self._texts, self._accuracies, strict=True)],
            "fitted_from": [[text, _plain(row)] for text, row in self._fitted_from],
            "seen": self._seen,
            "next_fit": self._next_fit,
        }
        plain = np.frombuffer(json.dumps(kept).encode(), np.uint8)
        return {"json": plain, "skill": self._skill.copy(), **self._means.state()}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._means.load(state)
        self._skill = state["skill"].copy()
        kept = json.loads(state["json"].tobytes())
        self._texts = [text for text, _ in kept["buffer"]]
        self._accuracies = [np.array(row, float) for _, row in kept["buffer"]]
        self._seen, self._next_fit = kept["seen"], kept["next_fit"]
        if kept["fitted_from"]:
            self._fit([(text, np.array(row, float)) for text, row in kept["fitted_from"]])


def _plain(row: Accuracies) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in row]


class _Fit:
    """One fastText classifier over accuracy bins, and the mean accuracy of each bin."""

    def __init__(self, samples: list[tuple[str, float]], bins: int, seed: int) -> None:
        import fasttext

        numbers = [min(int(accuracy * bins), bins - 1) for _, accuracy in samples]
        self._bin_means = {
            f"__label__{number}": float(
                np.mean([a for (_, a), n in zip(samples, numbers, strict=True) if n == number])
            )
            for number in sorted(set(numbers))
        }
        with TemporaryDirectory(prefix="messcli-") as folder:
            file = Path(folder, "train.txt")  # fastText reads its samples from a file only
            lines = (f"__label__{n} {text}\n" for n, (text, _) in zip(numbers, samples, strict=True))
            file.write_text("".join(lines), encoding="utf-8")
            self._model = fasttext.train_supervised(
                str(file),
                dim=16,
                lr=0.5,
                epoch=25,
                wordNgrams=2,
                minCount=2,
                bucket=20_000,  # the default would make 800 MB per model
                loss="softmax",
                thread=1,  # more threads race, and no two fits would be alike
                seed=seed,
                verbose=0,
            )

    def predict(self, text: str) -> float:
        labels, probabilities = self._model.predict(text, k=-1)
        weights = np.asarray(probabilities, float)
        means = [self._bin_means.get(label, 0.0) for label in labels]
        return float(weights @ means / weights.sum())  # they can sum to 1 + 1e-5


def create_predictor(name: str, models: int) -> Predictor:
    """The predictor called `name` for a zoo of so many models. It takes no seed: it is a function of what it is taught.

    Raises:
        UsageError: no predictor has that name.
    """
    predictor: Predictor = PREDICTORS.load(name)(models)
    return predictor
