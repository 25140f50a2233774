"""English sentences with their German translations: agreement in gender and case, five levels, and a split.

Level 1 is a noun phrase, 2 adds an adjective, 3 is a clause, 4 a clause with one prepositional phrase, 5 a clause
with two. Everything is a pure function of the words and of the generator of random numbers it is given. Nothing
here knows of models.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tools.bundled_zoo.lexicon import (
    DETERMINERS,
    Adjective,
    Case,
    Determiner,
    Gender,
    Noun,
    Preposition,
    Verb,
    adjectives,
    nouns,
    prepositions,
    verbs,
)

LEVELS = (1, 2, 3, 4, 5)

# How often a noun of a clause has an adjective, by level.
_ADJECTIVE_SHARE = {3: 0.35, 4: 0.4, 5: 0.45}

# Endings of der, dieser, jeder and, after them, of the adjective.
_STRONG: dict[tuple[Case, Gender], tuple[str, str]] = {
    ("nom", "m"): ("er", "e"),
    ("nom", "f"): ("e", "e"),
    ("nom", "n"): ("es", "e"),
    ("acc", "m"): ("en", "en"),
    ("acc", "f"): ("e", "e"),
    ("acc", "n"): ("es", "e"),
    ("dat", "m"): ("em", "en"),
    ("dat", "f"): ("er", "en"),
    ("dat", "n"): ("em", "en"),
}
# Endings of ein, mein, unser and, after them, of the adjective.
_MIXED: dict[tuple[Case, Gender], tuple[str, str]] = {
    ("nom", "m"): ("", "er"),
    ("nom", "f"): ("e", "e"),
    ("nom", "n"): ("", "es"),
    ("acc", "m"): ("en", "en"),
    ("acc", "f"): ("e", "e"),
    ("acc", "n"): ("", "es"),
    ("dat", "m"): ("em", "en"),
    ("dat", "f"): ("er", "en"),
    ("dat", "n"): ("em", "en"),
}
# The definite article is not stem and ending; these are its forms by the ending of dieser.
_DEFINITE = {"er": "der", "e": "die", "es": "das", "en": "den", "em": "dem"}

# The contractions that written German prefers; "fürs" or "aufs" are left to speech.
_CONTRACTIONS = {
    ("in", "dem"): "im",
    ("in", "das"): "ins",
    ("bei", "dem"): "beim",
    ("von", "dem"): "vom",
    ("zu", "dem"): "zum",
    ("zu", "der"): "zur",
}

# "an" stands before a vowel sound, which these don't spell.
_SILENT_H = ("heir", "honest")
_SOUNDED_U = ("uni",)


@dataclass(frozen=True)
class NounPhrase:
    """A determiner, perhaps an adjective, and a noun."""

    determiner: Determiner
    adjective: Adjective | None
    noun: Noun

    def english(self) -> str:
        """The phrase in English."""
        rest = f"{self.adjective.english} {self.noun.english}" if self.adjective else self.noun.english
        article = self.determiner.english
        return f"{'an' if article == 'a' and _vowel_sound(rest) else article} {rest}"

    def german(self, case: Case) -> str:
        """The phrase in German, in that case."""
        noun = self.noun.german if case == "nom" else self.noun.oblique
        table = _STRONG if self.determiner.strong else _MIXED
        ending, adjective_ending = table[case, self.noun.gender]
        determiner = self.determiner.german + ending
        if self.determiner.german == "der":
            determiner = _DEFINITE[ending]
        if self.adjective is None:
            return f"{determiner} {noun}"
        return f"{determiner} {self.adjective.stem}{adjective_ending} {noun}"


@dataclass(frozen=True)
class Example:
    """A text with its translation. `phrases` are the English noun phrases in it, by which the split is made."""

    english: str
    german: str
    level: int
    phrases: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether this text is kept from training.

        It is if a hash picks the text, or any noun phrase in it: a held-out phrase such as "the dog" is not in
        training inside a longer sentence either. The hash does not depend on the lexicon's order or on Python.
        """
        return any(_picked(text) for text in (self.english, *self.phrases))


def _vowel_sound(text: str) -> bool:
    if text.startswith(_SILENT_H):
        return True
    return text[0] in "aeiou" and not text.startswith(_SOUNDED_U)


@cache
def _picked(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 26  # one text in ten


def prepositional(preposition: Preposition, phrase: NounPhrase) -> tuple[str, str]:
    """The prepositional phrase in English and in German, contracted where written German contracts."""
    article, rest = phrase.german(preposition.case).split(" ", 1)
    joined = _CONTRACTIONS.get((preposition.german, article), f"{preposition.german} {article}")
    return f"{preposition.english} {phrase.english()}", f"{joined} {rest}"


def expanded(german: str) -> str:
    """The same German without contractions ("im Garten" becomes "in dem Garten"), which is correct too."""
    words = {contraction: " ".join(pair) for pair, contraction in _CONTRACTIONS.items()}
    return " ".join(words.get(word, word) for word in german.split(" "))


@cache
def _nouns_of(kinds: frozenset[str]) -> tuple[Noun, ...]:
    return tuple(noun for noun in nouns() if noun.kind in kinds)


@cache
def _adjectives_for(kind: str) -> tuple[Adjective, ...]:
    return tuple(adjective for adjective in adjectives() if kind in adjective.kinds)


@cache
def _prepositions_of(role: str) -> tuple[Preposition, ...]:
    return tuple(preposition for preposition in prepositions() if preposition.role == role)


@cache
def _determiner_weights() -> tuple[int, ...]:
    return tuple(determiner.weight for determiner in DETERMINERS)


def noun_phrase(rng: random.Random, kinds: frozenset[str], adjective_share: float) -> NounPhrase:
    """A random noun phrase whose noun is of one of `kinds`."""
    determiner = rng.choices(DETERMINERS, _determiner_weights())[0]
    noun = rng.choice(_nouns_of(kinds))
    adjective = rng.choice(_adjectives_for(noun.kind)) if rng.random() < adjective_share else None
    return NounPhrase(determiner, adjective, noun)


def _roles(rng: random.Random, verb: Verb, level: int) -> tuple[str, ...]:
    """The roles of the prepositional phrases of a clause, in the order in which they read well."""
    if level == 3:
        return ()
    last = "goal" if verb.motion else "place"
    if level == 4:
        return (rng.choice((last, last, "company")),)
    return (rng.choice(("source", "company")) if verb.motion else "company", last)


def example(rng: random.Random, level: int) -> Example:
    """A random text of that level with its translation, held out or not.

    Raises:
        ValueError: `level` is not one of `LEVELS`.
    """
    if level not in LEVELS:
        raise ValueError(f"level is one of {LEVELS}, not {level}")
    if level < 3:
        everything = frozenset(noun.kind for noun in nouns())
        phrase = noun_phrase(rng, everything, level - 1)
        return Example(phrase.english(), phrase.german("nom"), level, (phrase.english(),))
    share = _ADJECTIVE_SHARE[level]
    verb = rng.choice(verbs())
    subject = noun_phrase(rng, verb.subjects, share)
    target = noun_phrase(rng, verb.objects, share)
    phrases = [subject, target]
    english = [subject.english(), verb.english, target.english()]
    german = [subject.german("nom"), verb.german, target.german(verb.case)]
    for role in _roles(rng, verb, level):
        preposition = rng.choice(_prepositions_of(role))
        phrase = noun_phrase(rng, preposition.kinds, share)
        phrases.append(phrase)
        in_english, in_german = prepositional(preposition, phrase)
        english.append(in_english)
        german.append(in_german)
    return Example(" ".join(english), " ".join(german), level, tuple(phrase.english() for phrase in phrases))


def examples(
    rng: random.Random, weights: tuple[int, int, int, int, int], *, held_out: bool
) -> Iterator[Example]:
    """Endless random texts from one side of the split, with levels 1 to 5 drawn by `weights`."""
    while True:
        level = rng.choices(LEVELS, weights)[0]
        found = example(rng, level)
        while found.held_out != held_out:
            found = example(rng, level)
        yield found


def vocabulary() -> list[str]:
    """Every word of both languages that a text can hold, sorted."""
    words: set[str] = set()
    cases: tuple[Case, ...] = ("nom", "acc", "dat")
    genders: tuple[Gender, ...] = ("m", "f", "n")
    for noun in nouns():
        words |= {noun.english, noun.german, noun.oblique}
    for adjective in adjectives():
        words |= {adjective.english, *(adjective.stem + ending for ending in ("e", "er", "es", "en"))}
    for verb in verbs():
        words |= {verb.english, verb.german}
    for preposition in prepositions():
        words |= {*preposition.english.split(" "), preposition.german}
    for determiner in DETERMINERS:
        words.add(determiner.english)
        for case in cases:
            for gender in genders:
                probe = Noun("", "", gender, "", "")
                words.add(NounPhrase(determiner, None, probe).german(case).strip())
    return sorted(words | {"an", *_CONTRACTIONS.values()})
