"""Texts to numbers: hashed words, word pairs and character n-grams, many texts in a few vectorised passes.

Knows nothing of accuracy or models. The same text gives the same numbers, to the last bit, on every machine, in
every process and whatever texts it is encoded with: hashes are computed here, never with Python's salted `hash`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Places = NDArray[np.intp]
Floats = NDArray[np.float64]

CHARACTERS_READ = 8192  # a prompt's bytes beyond these don't count: the pass takes bounded time
RUN = 4  # bytes in a character n-gram
TOGETHER = 64  # texts in one pass: short ones share its cost, long ones stay in the processor's cache

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2^64
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)


def _powers(base: int, count: int) -> Hashes:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


_POWERS = _powers(_MULTIPLIER, CHARACTERS_READ + 1)
_INVERSE_POWERS = _powers(_INVERSE, CHARACTERS_READ + 1)
# Bytes to themselves in lower case; everything that is neither letter, digit nor part of UTF-8 becomes 0.
_FOLD = np.array(
    [code if code >= 128 else ord(chr(code).lower()) if chr(code).isalnum() else 0 for code in range(256)],
    np.uint8,
)


def _mix(hashes: Hashes) -> Hashes:
    """Spread the bits, so that `% buckets` is even (the finaliser of MurmurHash3)."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return hashes ^ (hashes >> np.uint64(33))


@dataclass(frozen=True, slots=True)
class _Hashed:
    """Hashes of one kind, in the order of the texts, and which text each belongs to."""

    hashes: Hashes
    owner: Places

    def counts(self, texts: int) -> Places:
        return np.bincount(self.owner, minlength=texts)


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:CHARACTERS_READ]


@lru_cache(maxsize=2)  # predictors of accuracy and of joules look at the same texts one after the other
def hash_texts(texts: tuple[str, ...]) -> tuple[_Hashed, _Hashed, _Hashed]:
    """Words, pairs of neighbouring words, and every run of `RUN` bytes, of all texts.

    Case and punctuation are folded away. A prefix sum of byte * multiplier^position makes the hash of any
    stretch one subtraction, whatever its length (Rabin and Karp's rolling hash). A zero byte ends each text.
    """
    parts = [_bytes_of(text) for text in texts]
    data = _FOLD[np.frombuffer(b"\0".join([*parts, b""]), np.uint8)]
    lengths = np.array([len(part) + 1 for part in parts])
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(parts)), lengths)
    place = np.arange(len(data)) - np.repeat(ends - lengths, lengths)  # within the text
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * _POWERS[place], out=prefix[1:])

    edges = np.diff(np.concatenate(([0], (data != 0).view(np.int8))))
    first, after = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    size = (after - first).astype(np.uint64)
    words = _mix((prefix[after] - prefix[first]) * _INVERSE_POWERS[place[first]] + size)
    owners = owner[first]
    neighbours = owners[:-1] == owners[1:]
    pairs = _mix(words[:-1] * np.uint64(31) + words[1:])[neighbours]

    # the last bytes of a text begin none: it would reach into the next one
    begins = np.flatnonzero(place + RUN < np.repeat(lengths, lengths))
    runs = _mix((prefix[begins + RUN] - prefix[begins]) * _INVERSE_POWERS[place[begins]] + np.uint64(RUN))
    return _Hashed(words, owners), _Hashed(pairs, owners[1:][neighbours]), _Hashed(runs, owner[begins])


Encoded = TypeVar("Encoded")


class Encoder(Generic[Encoded]):
    """Texts to features; remembers those of the latest texts. What it gives is shared: nobody may write to it."""

    remembers = (
        2048  # a request is looked at when it is decided, learnt from, and while it is among the recent ones
    )

    def __init__(self, encode: Callable[[tuple[str, ...]], Iterator[Encoded]]) -> None:
        self._encode = encode
        self._known: dict[str, Encoded] = {}

    def __call__(self, text: str) -> Encoded:
        known = self._known.get(text)
        return self.many((text,))[0] if known is None else known

    def many(self, texts: Sequence[str]) -> list[Encoded]:
        """The features of each; texts that aren't known are encoded together."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
        for first in range(0, len(unknown), TOGETHER):
            batch = tuple(unknown[first : first + TOGETHER])
            self._known.update(zip(batch, self._encode(batch), strict=True))
        encoded = [self._known[text] for text in texts]
        while len(self._known) > Encoder.remembers:
            del self._known[next(iter(self._known))]
        return encoded


MOST_REMEMBERED = 50_000  # texts; about a kilobyte each, several for `linear`


def remember(texts: int) -> bool:
    """Have the features of so many texts remembered: for a table that is gone through again and again.

    Returns:
        Whether there is room for so many; nothing changes where there isn't.
    """
    if texts > MOST_REMEMBERED:
        return False
    Encoder.remembers = max(Encoder.remembers, texts)
    return True


@cache
def sparse_features(buckets: int) -> Encoder[tuple[Places, Floats]]:
    """Bag of words, word pairs and 4-byte runs as (indices, values): unit length, plus a constant 1.

    A bucket's value is the square root of the share of the text that falls into it, so that neither long
    texts nor frequent words outweigh the rest.

    Returns:
        An encoder to `indices`, distinct buckets (at most 65,536) in [0, buckets], ascending, where `buckets` itself
        is the constant's, and to `values`, their weights; each of the three kinds has the same share of the length.
    """
    return Encoder(lambda texts: encode_sparse(texts, buckets))


def encode_sparse(texts: tuple[str, ...], buckets: int) -> Iterator[tuple[Places, Floats]]:
    kinds = hash_texts(texts)
    counts = np.array([kind.counts(len(texts)) for kind in kinds])
    present = np.maximum((counts > 0).sum(axis=0), 1)
    shares = 1.0 / (present * np.maximum(counts, 1))
    share = np.concatenate([shares[k][kind.owner] for k, kind in enumerate(kinds)])
    owner = np.concatenate([kind.owner for kind in kinds]).astype(np.uint16)
    # 16 bits, because numpy sorts these by radix: several times faster
    bucket = (np.concatenate([kind.hashes for kind in kinds]) % np.uint64(buckets)).astype(np.uint16)
    order = np.argsort(bucket, kind="stable")
    order = order[np.argsort(owner[order], kind="stable")]
    owner, bucket, share = owner[order], bucket[order], share[order]
    new = np.flatnonzero((bucket[1:] != bucket[:-1]) | (owner[1:] != owner[:-1])) + 1
    new = np.concatenate((np.zeros(min(len(bucket), 1), np.intp), new))
    # every text's distinct buckets, and behind them the constant
    distinct = np.bincount(owner[new], minlength=len(texts))
    ends = np.cumsum(distinct + 1)
    indices, values = np.full(ends[-1], buckets, np.intp), np.ones(ends[-1])
    places = np.arange(len(new)) + owner[new]
    indices[places] = bucket[new]
    if len(new):
        values[places] = np.sqrt(np.add.reduceat(share, new))
    indices.setflags(write=False)
    values.setflags(write=False)
    for first, end in zip((ends - distinct - 1).tolist(), ends.tolist(), strict=True):
        yield indices[first:end], values[first:end]


SKETCH = 128  # numbers that a bag of words and 4-byte runs is folded into; a power of two
SHAPE = 8  # numbers that tell a text's size and kind
DENSE = SHAPE + SKETCH
LENGTH, CHARACTERS = 0, 1000  # the shape's first number is the text's length in units of so many characters

_DIGIT, _LINE, _SIGN = 1, 2, 3
_CLASS = np.zeros(256, np.uint8)
_CLASS[48:58], _CLASS[10], _CLASS[33:48] = _DIGIT, _LINE, _SIGN


def _shape(text: str) -> list[float]:
    """The size and kind of a text as `SHAPE` numbers of order 1: lengths, digits, lines, punctuation."""
    raw = _bytes_of(text)
    seen = np.bincount(_CLASS[np.frombuffer(raw, np.uint8)], minlength=4).tolist()
    total, characters, words = max(len(raw), 1), len(text), text.count(" ") + 1
    return [
        characters / CHARACTERS,
        words / 100,
        math.log(characters + 1) - 6,
        math.log(words) - 4,
        5 * seen[_DIGIT] / total,
        20 * seen[_LINE] / total,
        5 * seen[_SIGN] / total,
        characters / words / 10,
    ]


def encode_dense(texts: tuple[str, ...]) -> Iterator[Floats]:
    words, _, runs = hash_texts(texts)
    dense = np.zeros((len(texts), DENSE))
    dense[:, :SHAPE] = [_shape(text) for text in texts]
    for kind in (words, runs):
        # one number for each: its text, then the sign (bit 59 of the hash), then its place in the sketch
        sign = ((kind.hashes >> np.uint64(59)) & np.uint64(1)).astype(np.intp)
        place = (kind.hashes & np.uint64(SKETCH - 1)).astype(np.intp)
        places = (2 * kind.owner + sign) * SKETCH + place
        minus_plus = np.bincount(places, minlength=len(texts) * 2 * SKETCH).reshape(len(texts), 2, SKETCH)
        counts = minus_plus[:, 1] - minus_plus[:, 0]
        size = np.abs(counts)
        norm = np.sqrt(np.maximum(size.sum(axis=1), 1))
        dense[:, SHAPE:] += np.sign(counts) * np.sqrt(size) / norm[:, None]
    dense.setflags(write=False)
    yield from dense


dense_features: Encoder[Floats] = Encoder(encode_dense)
"""A text as `DENSE` numbers: its shape, then a signed hash sketch of its words and 4-byte runs.

The sketch is a random projection of the bag of words (Weinberger et al. 2009, feature hashing): products of two
sketches estimate products of the bags. Small enough for second-order learning.
"""
