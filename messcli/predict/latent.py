"""A text as a few dense numbers, along directions that are learnt from the first texts: latent semantic analysis.

The directions are those in which the bags of words of some texts differ most (Deerwester et al. 1990). Few of them
hold most of what differs, so that a regression on them needs few samples. No accuracy is needed to find them. Knows
nothing of accuracies or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messcli.predict import tuning
from messcli.predict.text import SHAPE, Encoder, Floats, encode_sparse, shape_of
from messcli.snapshots import Part

BUCKETS = tuning.LATENT.buckets
LATENT = tuning.LATENT.directions
SIZE = SHAPE + LATENT  # numbers of a placed text


@dataclass(frozen=True, slots=True)
class Bag:
    """A text before it is placed: its shape and its hashed words, sparse."""

    shape: list[float]  # `SHAPE` numbers
    indices: NDArray[np.uint16]
    values: NDArray[np.float32]


def _encode_bags(texts: tuple[str, ...]) -> Iterator[Bag]:
    for text, (indices, values) in zip(texts, encode_sparse(texts, BUCKETS), strict=True):
        # without the constant
        yield Bag(shape_of(text), indices[:-1].astype(np.uint16), values[:-1].astype(np.float32))


# A bag is needed when its text is placed, and again when the directions are learnt.
bags: Encoder[Bag] = Encoder(_encode_bags, remembers=256)


@dataclass(frozen=True, slots=True)
class Placed:
    """A text and its place in a space."""

    text: str
    at: Floats  # (SIZE,): its shape, then its place along the directions


class LatentSpace:
    """Where texts lie along the directions in which the texts that were fitted differ most; 0 before the first fit."""

    def __init__(self) -> None:
        self._directions = np.zeros((0, LATENT), np.float32)  # (BUCKETS, LATENT) once there are any
        self._middle = np.zeros(LATENT, np.float32)  # where the mean bag lies
        self.encode: Encoder[Placed] = Encoder(self._place)

    def fit(self, texts: Sequence[str]) -> None:
        """Learn the directions from `texts`. Along all of them together these have a variance of 1."""
        distinct = list(dict.fromkeys(texts))
        rows = np.zeros((len(distinct), BUCKETS))
        for row, bag in zip(rows, bags.many(distinct), strict=True):
            row[bag.indices] = bag.values
        mean = rows.mean(axis=0)
        rows -= mean
        # of as many numbers as there are texts, not as there are buckets
        values, vectors = np.linalg.eigh(rows @ rows.T)
        found = np.flatnonzero(values > tuning.LATENT.smallest_share * max(values[-1], 1e-6))[::-1][:LATENT]
        directions = rows.T @ (vectors[:, found] / np.sqrt(values[found]))
        directions /= np.sqrt(max(values[found].sum() / len(distinct), 1e-6))
        self._directions = np.zeros((BUCKETS, LATENT), np.float32)
        self._directions[:, : len(found)] = directions
        self._middle = (mean @ self._directions).astype(np.float32)
        self.encode = Encoder(self._place)

    def _place(self, texts: tuple[str, ...]) -> Iterator[Placed]:
        placed, far = np.zeros((len(texts), SIZE)), tuning.LATENT.far
        for row, bag in zip(placed, bags.many(texts), strict=True):
            row[:SHAPE] = bag.shape
            if len(self._directions):
                place = bag.values @ self._directions.take(bag.indices, 0) - self._middle
                squared = float(place @ place)
                row[SHAPE:] = place if squared <= far * far else place * (far / math.sqrt(squared))
        placed.setflags(write=False)
        return map(Placed, texts, placed)

    def state(self) -> Part:
        return Part("space", arrays={"directions": self._directions.copy(), "middle": self._middle.copy()})

    def load(self, part: Part) -> None:
        fitted = len(part.arrays.get("directions", ())) > 0
        empty = np.zeros((BUCKETS if fitted else 0, LATENT), np.float32)
        part.check(Part("space", arrays={"directions": empty, "middle": self._middle}))
        self._directions, self._middle = part.arrays["directions"].copy(), part.arrays["middle"].copy()
        self.encode = Encoder(self._place)


class Lessons:
    """What was learnt before the space was settled, to be learnt again in a better one.

    The space is fitted when so many lessons are there as `fits` says: soon, and again when more texts tell more.
    """

    def __init__(self, models: int, fits: tuple[int, ...] = tuning.LATENT.fits) -> None:
        self._models = models
        self._at = fits
        self._texts: list[str] = []
        self._values: list[Floats] = []
        self._fits = 0

    @property
    def open(self) -> bool:
        """Whether another fit is to come."""
        return self._fits < len(self._at)

    def add(self, text: str, values: Floats) -> bool:
        """Keep a lesson. Returns whether the space is to be fitted now."""
        self._texts.append(text)
        self._values.append(values)
        return len(self._texts) == self._at[self._fits]

    def fit(self, space: LatentSpace) -> list[tuple[str, Floats]]:
        """Fit the space. Returns the lessons, to be learnt anew; after the last fit they are forgotten."""
        space.fit(self._texts)
        self._fits += 1
        lessons = list(zip(self._texts, self._values, strict=True))
        if not self.open:
            self._texts, self._values = [], []
        return lessons

    def state(self) -> Part:
        return Part(
            "lessons",
            arrays={"observed": np.array(self._values, float).reshape(-1, self._models)},
            values={"texts": list(self._texts), "fits": self._fits},
        )

    def load(self, part: Part) -> None:
        part.check(self.state(), free=["observed"])
        self._texts = list(part.values["texts"])
        self._values = list(part.arrays["observed"].copy())
        self._fits = part.values["fits"]
