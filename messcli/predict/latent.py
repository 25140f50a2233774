"""A text as a few dense numbers, along directions that are learnt from the first texts: latent semantic analysis.

The directions are those in which the bags of words of some texts differ most (Deerwester et al. 1990). Few of them
hold most of what differs, so that a regression on them needs few samples. No accuracy is needed to find them. Knows
nothing of accuracies or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Move:
    """About where texts lie after a fit that lay at z before it: z @ turn + shift."""

    turn: Floats  # (LATENT, LATENT)
    shift: Floats  # (LATENT,)


class LatentSpace:
    """Where texts lie along the directions in which the texts that were fitted differ most; 0 before the first fit.

    It is fitted when so many texts were seen as `fits` says: soon, and again when more texts tell more. Whoever has
    learnt in it learns anew then. After the last fit it is settled.
    """

    def __init__(self, fits: tuple[int, ...] = tuning.LATENT.fits) -> None:
        self._directions = np.zeros((0, LATENT), np.float32)  # (BUCKETS, LATENT) once there are any
        self._middle = np.zeros(LATENT, np.float32)  # where the mean bag lies
        self._at = fits
        self._fits = 0
        self._seen: list[str] = []  # until it is settled
        self.encode: Encoder[Placed] = Encoder(self._place)

    @property
    def settled(self) -> bool:
        """Whether no other fit is to come."""
        return self._fits >= len(self._at)

    @property
    def seen(self) -> int:
        """How many texts were seen while it isn't settled."""
        return len(self._seen)

    def see(self, text: str) -> Sequence[str] | None:
        """Take note of a text that has come.

        Returns:
            The texts seen so far, in order, where the directions were fitted on them just now; else None.
        """
        if self.settled:
            return None
        self._seen.append(text)
        if len(self._seen) < self._at[self._fits]:
            return None
        self.fit(self._seen)
        self._fits += 1
        seen = self._seen
        self._seen = seen.copy() if self._fits < len(self._at) else []
        return seen

    def settle(self, texts: Sequence[str]) -> Sequence[str] | None:
        """Fit the directions once and for all, on texts that are known to come; nothing happens where that was done.

        Returns:
            The texts seen so far, as `see` does.
        """
        if self.settled or not texts:
            return None
        self.fit([*self._seen, *texts])
        self._fits = len(self._at)
        seen, self._seen = self._seen, []
        return seen

    def share(self, texts: Sequence[str]) -> float:
        """The part of the variance of the texts' bags that lies along the directions."""
        lengths = np.sqrt((self._directions.astype(float) ** 2).sum(axis=0))
        along = self._directions / np.where(lengths > 0.0, lengths, 1.0)
        places, mean, squares = [], np.zeros(BUCKETS), 0.0
        for bag in bags.many(texts):
            places.append(bag.values @ along.take(bag.indices, 0))
            mean[bag.indices] += bag.values / len(texts)
            squares += float(bag.values @ bag.values) / len(texts)
        variance = squares - float(mean @ mean)
        return float(np.var(places, axis=0).sum()) / variance if variance > 1e-6 else 1.0

    def fit_anew(self, texts: Sequence[str]) -> Move:
        """Fit a settled space again. Returns how what was learnt in it can be carried over.

        A bag is taken to lie where its place along the old directions says: their pseudo-inverse takes a place back to
        a bag, and the new directions take that to its new place.
        """
        before, middle = self._directions.astype(float), self._middle.astype(float)
        self.fit(texts)
        squares = (before**2).sum(axis=0)  # directions are at right angles
        turn = (before / np.where(squares > 0.0, squares, 1.0)).T @ self._directions
        return Move(turn, middle @ turn - self._middle)

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
        return Part(
            "space",
            version=2,
            arrays={"directions": self._directions.copy(), "middle": self._middle.copy()},
            values={"seen": list(self._seen), "fits": self._fits},
            tuning=tuning.digest(tuning.TEXT, tuning.LATENT),
        )

    def load(self, part: Part) -> None:
        fitted = len(part.arrays.get("directions", ())) > 0
        own = self.state()
        empty = np.zeros((BUCKETS if fitted else 0, LATENT), np.float32)
        part.check(replace(own, arrays={**own.arrays, "directions": empty}))
        self._directions, self._middle = part.arrays["directions"].copy(), part.arrays["middle"].copy()
        self._seen, self._fits = list(part.values["seen"]), part.values["fits"]
        self.encode = Encoder(self._place)
