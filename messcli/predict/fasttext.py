"""fastText classifiers over accuracy bins, the paper's library."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from messcli.predict import tuning
from messcli.predict.base import Accuracies, OneByOne
from messcli.predict.mean import MeanPredictor
from messcli.predict.tuning import digest
from messcli.snapshots import Part


class FastTextPredictor(OneByOne):
    """fastText, the paper's library: one supervised classifier per LLM over accuracy bins.

    fastText can't continue a training, so each model is refitted from a buffer, on a schedule that thins out
    as the buffer grows. The estimate is the expectation over the bins' mean accuracies; the prompt's length
    is one more token. Below `tuning.minimum` samples the estimate is the mean: fastText is no better there.

    A classifier fitted to few samples departs too far from the mean. Its departure d is multiplied by the slope
    sum(d (A - mean)) / (sum(d^2) + doubt), in [0, 1], over the predictions made before learning. 0: the mean alone.
    """

    name = "fasttext"

    def __init__(self, models: int, tuning: tuning.FastText = tuning.FAST_TEXT) -> None:
        self._models = models
        self._tuning = tuning
        self._means = MeanPredictor(models)
        self._texts: list[str] = []
        self._accuracies: list[Accuracies] = []
        self._seen = 0
        self._next_fit = tuning.minimum
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
        slope = np.clip(self._skill[0] / (self._skill[1] + self._tuning.doubt), 0.0, 1.0)
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
        if len(self._texts) > self._tuning.capacity:
            del self._texts[0], self._accuracies[0]
        self._seen += 1
        if self._seen >= self._next_fit:
            self._next_fit = int(self._seen * self._tuning.growth) + 1
            self._fit(list(zip(self._texts, self._accuracies, strict=True)))

    @property
    def samples(self) -> Accuracies:
        return self._means.samples

    def _fit(self, samples: list[tuple[str, Accuracies]]) -> None:
        self.version += 1
        self._fitted_from = samples
        for m in range(self._models):
            own = [(text, float(row[m])) for text, row in samples if not np.isnan(row[m])]
            self._fits[m] = _Fit(own, self._tuning) if len(own) >= self._tuning.minimum else None

    def state(self) -> Part:
        # The fits aren't stored: with one thread and a seed, fitting the same samples gives the same model.
        values = {
            "buffer": [[text, _plain(row)] for text, row in zip(self._texts, self._accuracies, strict=True)],
            "fitted_from": [[text, _plain(row)] for text, row in self._fitted_from],
            "seen": self._seen,
            "next_fit": self._next_fit,
        }
        return Part(
            self.name,
            arrays={"skill": self._skill.copy()},
            values=values,
            parts={"means": self._means.state()},
            tuning=digest(self._tuning),
        )

    def load(self, part: Part) -> None:
        part.check(self.state())
        self._means.load(part.parts["means"])
        self._skill = part.arrays["skill"].copy()
        kept = part.values
        self._texts = [text for text, _ in kept["buffer"]]
        self._accuracies = [np.array(row, float) for _, row in kept["buffer"]]
        self._seen, self._next_fit = kept["seen"], kept["next_fit"]
        if kept["fitted_from"]:
            self._fit([(text, np.array(row, float)) for text, row in kept["fitted_from"]])


def _plain(row: Accuracies) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in row]


class _Fit:
    """One fastText classifier over accuracy bins, and the mean accuracy of each bin."""

    def __init__(self, samples: list[tuple[str, float]], tuning: tuning.FastText) -> None:
        import fasttext

        bins = tuning.bins

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
                dim=tuning.dimensions,
                lr=tuning.rate,
                epoch=tuning.epochs,
                wordNgrams=tuning.word_ngrams,
                minCount=tuning.least_count,
                bucket=tuning.ngram_buckets,
                loss="softmax",
                thread=1,  # more threads race, and no two fits would be alike
                seed=0,
                verbose=0,
            )

    def predict(self, text: str) -> float:
        labels, probabilities = self._model.predict(text, k=-1)
        weights = np.asarray(probabilities, float)
        means = [self._bin_means.get(label, 0.0) for label in labels]
        return float(weights @ means / weights.sum())  # they can sum to 1 + 1e-5
