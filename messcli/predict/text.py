"""Texts to numbers: hashed words, word pairs and character n-grams, many texts in a few vectorised passes.

Knows nothing of accuracy or models. The same text gives the same numbers, to the last bit, on every machine, in
every process and whatever texts it is encoded with: hashes are computed here, never with Python's salted `hash`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from messcli.predict.tuning import TEXT

Hashes = NDArray[np.uint64]
Places = NDArray[np.intp]
Floats = NDArray[np.float64]

CHARACTERS_READ = TEXT.bytes_read
RUN = TEXT.run
# Texts in a pass. More: short texts share its cost. Fewer: long ones stay in the processor's cache.
TOGETHER = 64

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2^64
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)


def _powers(base: int, count: int) -> Hashes:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


_POWERS = _powers(_MULTIPLIER, CHARACTERS_READ + 1)
_INVERSE_POWERS = _powers(_INVERSE, CHARACTERS_READ + 1)
# Bytes to themselves in lower case; everything that is neither letter, digit nor part of UTF-8 becomes 0.
_FOLD = bytes(
    code if code >= 128 else ord(chr(code).lower()) if chr(code).isalnum() else 0 for code in range(256)
)


def _mix(hashes: Hashes) -> Hashes:
    """Spread the bits, so that `% buckets` is even (the finaliser of MurmurHash3). In place."""
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    return hashes


@dataclass(frozen=True, slots=True)
class Hashed:
    """The hashes of all texts' words, then of all their pairs of words, then of all their runs of bytes."""

    hashes: Hashes
    counts: Places  # (3, texts): how many of each

    def spread(self, labels: NDArray[Any]) -> NDArray[Any]:
        """For every hash, the label of its kind and text; `labels` is shaped as `counts`."""
        return np.repeat(labels.ravel(), self.counts.ravel())


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:CHARACTERS_READ]


@lru_cache(maxsize=2)  # predictors of accuracy and of joules look at the same texts one after the other
def hash_texts(texts: tuple[str, ...]) -> Hashed:
    """Words, pairs of neighbouring words, and every run of `RUN` bytes, of all texts.

    Case and punctuation are folded away. The hash of a stretch is the sum of (byte + 1) * multiplier^place, places
    counted from its start, and its length. A zero byte ends each text.
    """
    parts = [_bytes_of(text) for text in texts]
    data = np.frombuffer(b"\0".join([*parts, b""]).translate(_FOLD), np.uint8)
    sizes = [len(part) for part in parts]
    ends = np.cumsum(sizes) + np.arange(1, len(parts) + 1)
    starts = ends - sizes - 1
    values = data.astype(np.uint64) + np.uint64(1)

    # A prefix sum makes the hash of a word one subtraction, whatever its length (Rabin and Karp's rolling hash).
    powers = np.concatenate([_POWERS[: size + 1] for size in sizes])
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(values * powers, out=prefix[1:])
    letters = np.zeros(len(data) + 1, np.bool_)
    np.not_equal(data, 0, out=letters[1:])
    edges = np.flatnonzero(letters[1:] != letters[:-1])  # where words begin and end, by turns
    first, after = edges[::2], edges[1::2]
    owners = np.searchsorted(ends, first, side="right")
    words = (prefix[after] - prefix[first]) * _INVERSE_POWERS[first - starts[owners]]
    words = _mix(words + (after - first).astype(np.uint64))

    twos = values[:-1] + values[1:] * _POWERS[1]  # a run of RUN bytes is two of these
    fours = twos[:-2] + twos[2:] * _POWERS[2] + np.uint64(RUN)
    # the last word of a text begins no pair, and its last bytes no run: they would reach into the next text
    pairs = (words[:-1] * np.uint64(31) + words[1:])[owners[:-1] == owners[1:]]
    starting = [max(size - RUN + 1, 0) for size in sizes]
    runs = [fours[start : start + count] for start, count in zip(starts.tolist(), starting, strict=True)]
    hashes = np.concatenate((words, _mix(np.concatenate((pairs, *runs)))))
    found = np.bincount(owners, minlength=len(texts))
    return Hashed(hashes, np.array((found, np.maximum(found - 1, 0), starting)))


Encoded = TypeVar("Encoded")
LATEST = 2048  # texts whose features are remembered where nobody asks for more


class Encoder(Generic[Encoded]):
    """Texts to features; remembers those of the latest texts. What it gives is shared: nobody may write to it.

    Args:
        remembers: how many texts. A request is looked at when it is decided, when it is learnt from, and while it is
            among the recent ones.
    """

    at_least = 0  # texts that all encoders remember

    def __init__(
        self, encode: Callable[[tuple[str, ...]], Iterator[Encoded]], remembers: int = LATEST
    ) -> None:
        self._encode = encode
        self._remembers = remembers
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
        # All at once: a dictionary finds its oldest key by walking over the deleted ones before it.
        too_many = len(self._known) - max(self._remembers, Encoder.at_least)
        for text in list(islice(self._known, max(too_many, 0))):
            del self._known[text]
        return encoded


MOST_REMEMBERED = 25_000  # texts; some five kilobytes each, for `linear` twice that


def remember(texts: int) -> bool:
    """Have the features of so many texts remembered: for a table that is gone through again and again.

    Returns:
        Whether there is room for so many; nothing changes where there isn't.
    """
    if texts > MOST_REMEMBERED:
        return False
    Encoder.at_least = max(Encoder.at_least, texts)
    return True


@cache
def sparse_features(buckets: int) -> Encoder[tuple[Places, Floats]]:
    """Bag of words, word pairs and 4-byte runs as (indices, values): unit length, plus a constant 1.

    A bucket's value is the square root of the share of the text that falls into it, so that neither long
    texts nor frequent words outweigh the rest.

    Returns:
        An encoder to `indices`, distinct buckets in [0, buckets], ascending, where `buckets` itself (a power of two,
        at most 65,536) is the constant's, and to `values`, their weights; each of the three kinds has the same share
        of the length.
    """
    return Encoder(lambda texts: encode_sparse(texts, buckets))


def encode_sparse(texts: tuple[str, ...], buckets: int) -> Iterator[tuple[Places, Floats]]:
    hashed = hash_texts(texts)
    counts = hashed.counts
    present = np.maximum((counts > 0).sum(axis=0), 1)
    shares = 1.0 / (present * np.maximum(counts, 1))
    # One number for each: its text, then 16 bits of its bucket, then its kind. Sorted, a bucket's are side by side.
    labels = (np.arange(len(texts)) << 18) + np.arange(3)[:, None]
    keys = (hashed.hashes.astype(np.uint32) & np.uint32(buckets - 1)) << 2
    keys += hashed.spread(labels.astype(np.uint32))
    keys.sort()
    # as shares[keys & 3, keys >> 18], ten times faster
    share = shares.ravel().take((keys & 3) * len(texts) + (keys >> 18))
    is_new = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:] >> 2, keys[:-1] >> 2, out=is_new[1:])
    new = np.flatnonzero(is_new)
    owner, bucket = keys[new] >> 18, keys[new] >> 2 & 0xFFFF
    # every text's distinct buckets, and behind them the constant
    distinct = np.bincount(owner, minlength=len(texts))
    ends = np.cumsum(distinct + 1)
    indices, values = np.full(ends[-1], buckets, np.intp), np.ones(ends[-1])
    places = np.arange(len(new)) + owner
    indices[places] = bucket
    if len(new):
        values[places] = np.sqrt(np.add.reduceat(share, new))
    indices.setflags(write=False)
    values.setflags(write=False)
    for first, end in zip((ends - distinct - 1).tolist(), ends.tolist(), strict=True):
        yield indices[first:end], values[first:end]


SHAPE = 8  # numbers that tell a text's size and kind
KIND = 4  # the first so many of them are lengths, the others tell the kind of text
LENGTH, CHARACTERS = 0, TEXT.characters  # the first is the text's length in units of so many characters

_DIGITS = b"0123456789"
_SIGNS = bytes(range(33, 48))


def shape_of(text: str) -> list[float]:
    """The size and kind of a text as `SHAPE` numbers of order 1: lengths, digits, lines, punctuation."""
    raw = _bytes_of(text)
    total, characters, words = max(len(raw), 1), len(text), text.count(" ") + 1
    return [
        characters / CHARACTERS,
        words / TEXT.words,
        math.log(characters + 1) - TEXT.log_characters,
        math.log(words) - TEXT.log_words,
        TEXT.digits * (len(raw) - len(raw.translate(None, _DIGITS))) / total,
        TEXT.lines * raw.count(b"\n") / total,
        TEXT.signs * (len(raw) - len(raw.translate(None, _SIGNS))) / total,
        characters / words / TEXT.word_length,
    ]
