"""Metrics: what one output is worth against its references, from 0 to 1.

Knows nothing of models or requests. Every metric carries a signature that names all that its numbers
depend on, as sacrebleu's do; scores with different signatures are not comparable.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import math
import numbers
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from messcli.errors import MetricError, first_line, shown
from messcli.registry import METRICS

ROUNDING = 1e-9  # how far a mean may be below alpha by summing floats in another order
_NOISE = 1e-6  # how far out of [0, 1] a user's score may be by rounding
_CACHED_LINES = 4096


def keeps(mean: float, alpha: float) -> bool:
    """Whether a mean accuracy keeps the promise of alpha."""
    return mean >= alpha - ROUNDING


@dataclass(frozen=True, slots=True)
class Metric:
    """A named score. `function(output, references)` is only called with at least one reference."""

    name: str
    signature: str  # "name|key:value|...": equal signatures mean equal scores
    function: Callable[[str, Sequence[str]], float]

    def __call__(self, output: str, references: Sequence[str]) -> float:
        """Accuracy of `output` in [0, 1]; 1 is best.

        Raises ValueError without references, MetricError when a user's function returns no score.
        """
        if not references:
            raise ValueError("a metric needs at least one reference")
        return min(1.0, max(0.0, self.function(output, references)))


def load_metric(name: str) -> Metric:
    """A metric of the table by name, or the user's own as "module:function".

    The user's function takes (output, references) and returns a number from 0 to 1.
    Raises MetricError when there is no such metric, module or function.
    """
    if ":" in name:
        return _own(name)
    if name not in METRICS:
        raise MetricError(f"{METRICS.unknown(name)}, or your own as module:function")
    metric: Metric = METRICS.load(name)()
    return metric


# --- sacrebleu: Post, "A Call for Clarity in Reporting BLEU Scores", WMT 2018 ---


def bleu1() -> Metric:
    """Clipped unigram precision times brevity penalty, per sentence; several references are merged."""
    from sacrebleu.metrics import BLEU

    # effective order: a sentence shorter than the order is not scored 0. With order 1 no smoothing acts.
    bleu = BLEU(max_ngram_order=1, effective_order=True)
    score = _forgetful(bleu)
    signature = f"bleu1|order:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:{version('sacrebleu')}"
    return Metric("bleu1", signature, score)


def chrf() -> Metric:
    """Character n-gram F2 (Popović 2015), per sentence; the best of several references."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    signature = f"chrf|case:mixed|eff:yes|nc:6|nw:0|space:no|beta:2|version:{version('sacrebleu')}"

    def score(output: str, references: Sequence[str]) -> float:
        return float(chrf.sentence_score(output, references).score) / 100

    return Metric("chrf", signature, score)


def _forgetful(bleu: Any) -> Callable[[str, Sequence[str]], float]:
    """BLEU from 0 to 1, without keeping every line ever seen.

    sacrebleu's tokenizer caches 65,536 lines, twice; over a long input of news articles that is gigabytes.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    seen = 0

    def score(output: str, references: Sequence[str]) -> float:
        nonlocal seen
        seen += 1 + len(references)
        if seen > _CACHED_LINES:
            Tokenizer13a.__call__.cache_clear()
            TokenizerRegexp.__call__.cache_clear()
            seen = 0
        return float(bleu.sentence_score(output, references).score) / 100

    return score


# --- ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004 ---


def _rouge(kind: str) -> Callable[[], Metric]:
    """F-measure on stemmed words; the best of several references."""

    def factory() -> Metric:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        versions = f"version:{version('rouge-score')}+nltk{version('nltk')}"  # nltk has the stemmer

        def score(output: str, references: Sequence[str]) -> float:
            return max(float(scorer.score(reference, output)[kind].fmeasure) for reference in references)

        return Metric(kind, f"{kind}|f:1|stem:porter|tok:a-z0-9|case:lc|refs:max|{versions}", score)

    return factory


rouge1, rouge_l = _rouge("rouge1"), _rouge("rougeL")


# --- exact match ---


def exact() -> Metric:
    """1 when the output equals a reference in Unicode NFC with runs of white space as one space."""

    def score(output: str, references: Sequence[str]) -> float:
        return float(_normalised(output) in {_normalised(reference) for reference in references})

    return Metric("exact", "exact|norm:nfc|space:collapse|case:mixed|refs:any|version:1", score)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


# --- multiple choice ---

# A letter as an option: upper case where it ends a word, lower case only where punctuation says that it is
# no word ("answer: a" but not "the answer is a dog"). "A" and "I" are English words, so they need it too,
# or one of the words that follow a letter and never a noun.
_AFTER_WORD = (
    r"(?=\s*(?:$|[\n.,;:!?)\]}>|/&]|[-–—]\s)|\s+(?:because|since|as|for|with|which|due|based|or|and)\b)"
)
_LETTER = rf"(?:[(\[{{<]\s*([A-Ja-j])\s*[)\]}}>]|([B-HJ])(?![\w'’])|([AIa-j]){_AFTER_WORD})"
_CUE = (
    r"(?:\b(?:final\s+|correct\s+|right\s+|best\s+|my\s+)*(?:answer|option|choice|solution|letter)"
    r"(?:\s+(?:would|should|must|will)\s+be|\s+is|\s+was)?"
    r"(?:\s+(?:clearly|therefore|thus|option|choice|letter))*\s*[:=]?\s*(?:(?:option|choice|letter)\s+)?"
    r"|\b(?:choose|pick|select|chose|go\s+with)\s+(?:(?:option|choice|letter|answer)\s+)?)"
)
_CUED = re.compile(rf"(?i:{_CUE}){_LETTER}((?:\s*(?:,|/|&|\bor\b|\band\b)+\s*{_LETTER})*)")
_LINE_START = re.compile(
    r"^[^\S\n]*(?:[(\[]\s*([A-Ja-j])\s*[)\]]|([A-Ja-j])\s*[.):](?!\w)|([A-Ja-j])[^\S\n]*$|([A-J])\s+[-–—]\s)",
    re.MULTILINE,
)
_BRACKETED = re.compile(r"[(\[]\s*([A-J])\s*[)\]]")
_LABELLED = re.compile(r"\s*(?:\(([A-J])\)|([A-J])(?:[.):]|\s+[-–—]|$))\s*(.*)", re.DOTALL)
_ANSWER_IS = re.compile(r"(?i:^.*?\b(?:answer|option|choice)\s*(?:is\b|:)\s*)(.*)$", re.DOTALL)


def choice() -> Metric:
    """1 when the one option that the output names is a reference's: its letter, A to J, or its text.

    A reference is "B", "(B)", "B. text" or an option's bare text. An output that names several options, or
    none, scores 0. What an answer sentence names ("the answer is B") wins over letters elsewhere, and a
    letter over a text.
    """

    def score(output: str, references: Sequence[str]) -> float:
        answer = _plain(output)
        letters = chosen_letters(output)
        for reference in references:
            letter, text = _option(_plain(reference))
            if letter is not None and letters:
                if letters == {letter}:
                    return 1.0
            elif text and _says(answer, text):
                return 1.0
        return 0.0

    return Metric("choice", "choice|options:A-J|ambiguous:0|norm:nfkc|refs:any|version:1", score)


def chosen_letters(output: str) -> set[str]:
    """The option letters that an answer names, upper case: one when it is clear, several when it is not."""
    text = _plain(output)
    cued = {
        letter.upper()
        for match in _CUED.finditer(text)
        for letter in [
            *filter(None, match.groups()[:3]),
            *(found for groups in re.findall(_LETTER, match[4]) for found in groups if found),
        ]
    }
    if cued:
        return cued
    first = _LINE_START.match(text)
    if first:
        # every labelled line counts: an output that lists the options has chosen none
        labels = {letter.upper() for groups in _LINE_START.findall(text) for letter in groups if letter}
        return labels | set(_BRACKETED.findall(text))
    return set(_BRACKETED.findall(text))


def _plain(text: str) -> str:
    """Without the marks that models put around letters: Markdown, LaTeX boxes, full-width forms."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\(?:boxed|text|mathbf|textbf|mathrm)\s*\{([^{}]*)\}", r"(\1)", text)
    text = re.sub(r"\\(?:boxed|text|mathbf|textbf|mathrm)\s*\{([^{}]*)\}", r"\1", text)  # one inside another
    return re.sub(r"[*_`$\"“”]|^#+\s*|</?\w+>", "", text, flags=re.MULTILINE).strip()


def _option(reference: str) -> tuple[str | None, str]:
    """A reference's letter, if it has one, and its text."""
    if re.fullmatch("[a-j]", reference):
        return reference.upper(), ""
    match = _LABELLED.fullmatch(reference)
    if match is None:
        return None, reference
    return match[1] or match[2], match[3]


def _says(answer: str, text: str) -> bool:
    """Whether the answer is the option's text: alone, after its letter, or after "the answer is"."""
    said = _ANSWER_IS.match(answer)
    forms = {answer, _option(answer)[1]}
    if said:
        forms |= {said[1], _option(said[1])[1]}
    return _folded(text) in {_folded(form) for form in forms}


def _folded(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s.+-]", " ", text.casefold()).split()).strip(" .")


# --- the user's own ---


def _own(name: str) -> Metric:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise MetricError(f'metric "{name}": write it as module:function')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise MetricError(
                f'metric "{name}": Python finds no module "{error.name}". Add its folder to PYTHONPATH'
            ) from None
        raise MetricError(f'metric "{name}": importing it failed: {first_line(error)}') from error
    except Exception as error:  # the user's module may raise anything
        raise MetricError(f'metric "{name}": importing it failed: {first_line(error)}') from error
    function = getattr(module, function_name, None)
    if not callable(function):
        close = difflib.get_close_matches(function_name, vars(module), n=1)
        hint = f'. Did you mean "{close[0]}"?' if close else ""
        raise MetricError(f'metric "{name}": the module has no function "{function_name}"{hint}')

    def score(output: str, references: Sequence[str]) -> float:
        try:
            value = function(output, list(references))
        except Exception as error:  # the user's function may raise anything
            raise MetricError(f'metric "{name}" failed on {shown(output)}: {first_line(error)}') from error
        if not isinstance(value, numbers.Real):
            kind = type(value).__name__
            raise MetricError(
                f'metric "{name}" returned {kind} {shown(value)} for {shown(output)}. Return a float'
            )
        number = float(value)
        if not math.isfinite(number) or not -_NOISE <= number <= 1 + _NOISE:
            raise MetricError(
                f'metric "{name}" returned {number:g} for {shown(output)}. Return a number from 0 to 1'
            )
        return number

    return Metric(name, f"{name}|source:{_source_digest(module)}", score)


def _source_digest(module: Any) -> str:
    """A changed function is another metric, whatever its name."""
    file = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "unknown"
