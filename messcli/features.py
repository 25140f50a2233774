"""Text to numbers: hashed words, word pairs and character n-grams, in a few vectorised passes.

Knows nothing of accuracy or models. The same text gives the same numbers on every machine and in every
process: hashes are computed here, never with Python's salted `hash`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

CHARACTERS_READ = 8192  # a prompt's bytes beyond these don't count: the pass takes bounded time

# A request is looked at when it is decided, when it is learnt from, and while it is among the recent ones.
REMEMBERED = 2048

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


AnyArray = TypeVar("AnyArray", bound=NDArray[np.generic])


def _frozen(array: AnyArray) -> AnyArray:
    array.setflags(write=False)  # it is shared between callers
    return array


@lru_cache(maxsize=8)  # predictors of accuracy and of joules look at the same request one after the other
def text_hashes(text: str, characters: int = 4) -> tuple[Hashes, Hashes, Hashes]:
    """Hashes of the words, of the pairs of neighbouring words, and of every run of `characters` bytes.

    Case and punctuation are folded away. A prefix sum of byte * multiplier^position makes the hash of any
    stretch one subtraction, whatever its length (Rabin and Karp's rolling hash).
    """
    data = _FOLD[np.frombuffer(text.encode("utf-8", "replace")[:CHARACTERS_READ], np.uint8)]
    length = len(data)
    prefix = np.zeros(length + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * _POWERS[:length], out=prefix[1:])
    edges = np.diff(np.concatenate(([0], (data != 0).view(np.int8), [0])))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    words = _mix(
        (prefix[ends] - prefix[starts]) * _INVERSE_POWERS[starts] + (ends - starts).astype(np.uint64)
    )
    pairs = _mix(words[:-1] * np.uint64(31) + words[1:])
    if length < characters:
        return _frozen(words), _frozen(pairs), _frozen(words[:0])
    runs = (prefix[characters:] - prefix[:-characters]) * _INVERSE_POWERS[: length + 1 - characters]
    return _frozen(words), _frozen(pairs), _frozen(_mix(runs + np.uint64(characters)))


@lru_cache(maxsize=REMEMBERED)
def sparse_features(text: str, buckets: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Bag of words, word pairs and 4-byte runs as (indices, values): unit length, plus a constant 1.

    A bucket's value is the square root of the share of the text that falls into it, so that neither long
    texts nor frequent words outweigh the rest.

    Returns:
        indices: distinct buckets (at most 65,536), ascending, in [0, buckets]; `buckets` itself is the constant's.
        values: their weights; each of the three kinds has the same share of the length.
    """
    kinds = [hashes for hashes in text_hashes(text) if len(hashes)]
    if not kinds:
        return _frozen(np.array([buckets])), _frozen(np.ones(1))
    # 16 bits, because numpy sorts these by radix: several times faster
    hashed = (np.concatenate(kinds) % np.uint64(buckets)).astype(np.uint16)
    shares = np.repeat([1.0 / (len(kinds) * len(hashes)) for hashes in kinds], [len(h) for h in kinds])
    order = np.argsort(hashed, kind="stable")
    hashed = hashed[order]
    starts = np.concatenate(([0], np.flatnonzero(hashed[1:] != hashed[:-1]) + 1))
    values = np.sqrt(np.add.reduceat(shares[order], starts))
    return _frozen(np.append(hashed[starts].astype(np.intp), buckets)), _frozen(np.append(values, 1.0))


SKETCH = 128  # numbers that a bag of words and 4-byte runs is folded into; a power of two
SHAPE = 8  # numbers that tell a text's size and kind
DENSE = SHAPE + SKETCH
LENGTH, CHARACTERS = 0, 1000  # the shape's first number is the text's length in units of so many characters


def shape_features(text: str) -> NDArray[np.float64]:
    """The size and kind of a text as `SHAPE` numbers of order 1: lengths, digits, lines, punctuation."""
    raw = np.frombuffer(text.encode("utf-8", "replace")[:CHARACTERS_READ], np.uint8)
    total, characters, words = max(len(raw), 1), len(text), text.count(" ") + 1
    return np.array(
        [
            characters / CHARACTERS,
            words / 100,
            math.log(characters + 1) - 6,
            math.log(words) - 4,
            5 * np.count_nonzero((raw >= 48) & (raw < 58)) / total,
            20 * np.count_nonzero(raw == 10) / total,
            5 * np.count_nonzero((raw > 32) & (raw < 48)) / total,
            characters / words / 10,
        ]
    )


@lru_cache(maxsize=REMEMBERED)
def dense_features(text: str) -> NDArray[np.float64]:
    """A text as `DENSE` numbers: its shape, then a signed hash sketch of its words and 4-byte runs.

    The sketch is a random projection of the bag of words (Weinberger et al. 2009, feature hashing): products
    of two sketches estimate products of the bags. Small enough for second-order learning.
    """
    dense = np.zeros(DENSE)
    dense[:SHAPE] = shape_features(text)
    words, _, runs = text_hashes(text)
    # one number each: the place, above it the sign (bit 59), above that the kind
    hashes = np.concatenate((words, runs))
    places = (hashes & np.uint64(SKETCH - 1)) | ((hashes >> np.uint64(59)) & np.uint64(1)) * np.uint64(SKETCH)
    places[len(words) :] += np.uint64(2 * SKETCH)
    minus, plus = (
        np.bincount(places.view(np.int64), minlength=4 * SKETCH).reshape(2, 2, SKETCH).swapaxes(0, 1)
    )
    counts = (plus - minus).astype(np.float64)
    counts = np.sign(counts) * np.sqrt(np.abs(counts))
    for kind in counts:
        norm = float(np.sqrt(kind @ kind))
        if norm > 0.0:
            dense[SHAPE:] += kind / norm
    return _frozen(dense)
