"""Words or characters that an output has in common with a reference: bleu1, rouge1, rougeL, chrf.

Scores are those of sacrebleu (Post, "A Call for Clarity in Reporting BLEU Scores", WMT 2018) and rouge_score
(Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version

from messcli.metrics.base import Metric
from messcli.metrics.words import AUTO, RougeWords, bleu_words, check_tokenizer, described


def bleu1(tokenizer: str = AUTO) -> Metric:
    """Clipped unigram precision times brevity penalty, per sentence; several references are merged."""
    from sacrebleu.metrics import BLEU

    check_tokenizer(tokenizer)
    # effective order: a sentence shorter than the order is not scored 0. With order 1 no smoothing acts.
    bleu = BLEU(max_ngram_order=1, effective_order=True)
    bleu.tokenizer = bleu_words(tokenizer)

    def score(output: str, references: Sequence[str]) -> float:
        return float(bleu.sentence_score(output, references).score) / 100

    def signature(tok: str) -> str:
        return f"bleu1|order:1|case:mixed|eff:yes|tok:{tok}|smooth:exp|version:{version('sacrebleu')}"

    earlier = (signature("13a"),) if tokenizer == AUTO else ()
    return Metric("bleu1", signature(described(tokenizer)), score, earlier)


def chrf() -> Metric:
    """Character n-gram F2 (Popović 2015), per sentence; the best of several references."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    signature = "chrf|case:mixed|eff:yes|nc:6|nw:0|space:no|beta:2|{}version:" + version("sacrebleu")

    def score(output: str, references: Sequence[str]) -> float:
        return float(chrf.sentence_score(_nfc(output), [_nfc(one) for one in references]).score) / 100

    return Metric("chrf", signature.format("norm:nfc|"), score, (signature.format(""),))


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def rouge1(tokenizer: str = AUTO) -> Metric:
    """F-measure of words in common; the best of several references."""
    from rouge_score.rouge_scorer import RougeScorer

    words = _rouge_words(tokenizer)
    scorer = RougeScorer(["rouge1"], tokenizer=words)

    def score(output: str, references: Sequence[str]) -> float:
        return max(float(scorer.score(reference, output)["rouge1"].fmeasure) for reference in references)

    return _rouge("rouge1", tokenizer, score)


def rouge_l(tokenizer: str = AUTO) -> Metric:
    """F-measure of the longest common subsequence of words; the best of several references."""
    from rouge_score.scoring import fmeasure

    words = _rouge_words(tokenizer)

    def score(output: str, references: Sequence[str]) -> float:
        said = words.tokenize(output)
        best = 0.0
        for reference in references:
            wanted = words.tokenize(reference)
            if said and wanted:
                common = longest_common_subsequence(said, wanted)
                best = max(best, float(fmeasure(common / len(said), common / len(wanted))))
        return best

    return _rouge("rougeL", tokenizer, score)


def _rouge_words(tokenizer: str) -> RougeWords:
    check_tokenizer(tokenizer)
    return RougeWords(tokenizer)


def _rouge(kind: str, tokenizer: str, score: Callable[[str, Sequence[str]], float]) -> Metric:
    versions = f"version:{version('rouge-score')}+nltk{version('nltk')}"  # nltk has the stemmer

    def signature(tok: str, case: str) -> str:
        return f"{kind}|f:1|stem:porter|tok:{tok}|case:{case}|refs:max|{versions}"

    tok = described(tokenizer)
    before = ("a-z0-9",) if tokenizer == AUTO else ()
    earlier = (signature(tok, "lc"), *(signature(one, case) for one in before for case in ("lc", "fold")))
    return Metric(kind, signature(tok, "fold"), score, earlier)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, in bit-parallel steps (Hyyrö 2004): O(len(a) · len(b) / 64) time, O(len(a) + len(b)) memory.

    rouge_score fills a table of len(a) · len(b) Python integers: for two outputs of 1 MB that is days.
    """
    if len(b) < len(a):
        a, b = b, a  # the shorter one becomes the bits
    places: dict[str, list[int]] = {}
    for place, word in enumerate(a):
        places.setdefault(word, []).append(place)

    @lru_cache(maxsize=256)  # masks of all words would take len(a)² / 8 bytes
    def mask(word: str) -> int:
        bits = bytearray(len(a) // 8 + 1)
        for place in places[word]:
            bits[place >> 3] |= 1 << (place & 7)
        return int.from_bytes(bits, "little")

    all_bits = (1 << len(a)) - 1
    row = all_bits  # a zero at i: the subsequence grows at a[i]
    for word in b:
        if word in places:
            matches = row & mask(word)
            row = (row + matches | row - matches) & all_bits
    return len(a) - row.bit_count()
