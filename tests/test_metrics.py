"""Metrics against tables of cases and against references computed here, independently."""

from __future__ import annotations

import math
import re
import string
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from messcli.errors import MetricError
from messcli.metrics import load_metric
from messcli.metrics.choice import chosen_letters
from messcli.metrics.overlap import longest_common_subsequence
from messcli.metrics.reasoning import split_reasoning
from messcli.registry import METRICS

VOCABULARY = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran", "runs", "running", ".", ",", "7")
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=12)
SENTENCES = WORDS.map(" ".join)
ANY = {name: load_metric(name) for name in METRICS}


def unigram_bleu(output: str, references: Sequence[str]) -> float:
    """Papineni et al. 2002 with order 1, on text that is already tokenized by spaces."""
    words, targets = output.split(), [reference.split() for reference in references]
    if not words:
        return 0.0
    most: Counter[str] = Counter()
    for target in targets:
        most |= Counter(target)
    matched = sum((Counter(words) & most).values())
    closest = min((abs(len(target) - len(words)), len(target)) for target in targets)[1]
    penalty = 1.0 if len(words) >= closest else math.exp(1 - closest / len(words))
    return penalty * matched / len(words)


def f_measure(overlap: int, produced: int, wanted: int) -> float:
    return 2 * overlap / (produced + wanted) if overlap else 0.0


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


def stems(text: str) -> list[str]:
    # the only words above that Porter's stemmer changes
    known = {"runs": "run", "running": "run"}
    return [known.get(word, word) for word in re.findall(r"[a-z0-9]+", text.lower())]


@given(SENTENCES, st.lists(SENTENCES, min_size=1, max_size=3))
def test_bleu1_is_clipped_unigram_precision_with_brevity_penalty(output, references):
    assert ANY["bleu1"](output, references) == pytest.approx(unigram_bleu(output, references), abs=1e-9)


@given(SENTENCES, st.lists(SENTENCES, min_size=1, max_size=3))
def test_rouge1_is_unigram_f(output, references):
    words = stems(output)
    expected = max(
        f_measure(sum((Counter(words) & Counter(stems(r))).values()), len(words), len(stems(r)))
        for r in references
    )
    assert ANY["rouge1"](output, references) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None)  # the recursion below is exponential
@given(SENTENCES.filter(lambda s: len(s.split()) < 8), SENTENCES.filter(lambda s: len(s.split()) < 8))
def test_rouge_l_is_longest_common_subsequence_f(output, reference):
    a, b = stems(output), stems(reference)
    expected = f_measure(longest_common(a, b), len(a), len(b))
    assert ANY["rougeL"](output, [reference]) == pytest.approx(expected, abs=1e-9)


@given(st.text(alphabet="ab cdé.,'-12", max_size=60), st.text(alphabet="ab cde.,'-12", max_size=60))
def test_rouge_on_ascii_text_is_rouge_scores_to_the_bit(output, reference):
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(reference, output)
    if output.isascii():
        assert ANY["rouge1"](output, [reference]) == theirs["rouge1"].fmeasure
        assert ANY["rougeL"](output, [reference]) == theirs["rougeL"].fmeasure


@given(
    st.text(alphabet="ab cde.,'-12&<>„“«»—äöß", max_size=60), st.text(alphabet="ab cde.,'-12äß", max_size=60)
)
def test_bleu1_on_latin_text_is_13as_to_the_bit(output, reference):
    assert ANY["bleu1"](output, [reference]) == load_metric("bleu1", "13a")(output, [reference])


@given(st.lists(st.sampled_from("abcd"), max_size=9), st.lists(st.sampled_from("abcde"), max_size=9))
def test_the_bit_parallel_subsequence_is_as_long_as_the_recursive_one(a, b):
    assert longest_common_subsequence(a, b) == longest_common(a, b)


IN_SCRIPTS = {
    "ru": "Москва — столица России", "hi": "नई दिल्ली भारत की राजधानी है।", "ar": "القاهرة عاصمة مصر",
    "zh": "北京是中国的首都。", "ja": "東京は日本の首都です。", "ko": "서울은 대한민국의 수도이다",
    "th": "กรุงเทพเป็นเมืองหลวง", "el": "Η Αθήνα είναι πρωτεύουσα", "he": "ירושלים היא עיר",
    "de": "Die Straße führt über Köln", "my": "ရန်ကုန်မြို့", "ka": "თბილისი დედაქალაქია", "en": "Paris is the capital",
}  # fmt: skip


@pytest.mark.parametrize("name", ["bleu1", "rouge1", "rougeL", "chrf"])
@pytest.mark.parametrize("language", IN_SCRIPTS)
def test_metrics_of_words_know_every_script(name, language):
    text = IN_SCRIPTS[language]
    metric = ANY[name]
    assert metric(text, [text]) == pytest.approx(1.0)
    assert metric(unicodedata.normalize("NFD", text), [text]) == pytest.approx(1.0) or name in (
        "bleu1",
        "chrf",
    )
    other = IN_SCRIPTS["ru" if language != "ru" else "el"]
    assert metric(other, [text]) < 0.2
    half = text[: len(text) // 2]
    assert 0.0 < metric(half, [text]) < 1.0


@pytest.mark.parametrize(
    ("name", "output", "reference", "expected"),
    [
        ("rouge1", "नई दिल्ली", "नई दिल्ली भारत", 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # marks stay on their letters
        ("rouge1", "北京", "北京是", 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # a character is a word
        ("rouge1", "GPT北京", "gpt 北京", 1.0),
        ("rouge1", "für", "fur", 0.0),  # once "f" and "r"
        ("rouge1", "x²", "x", 1.0),  # as rouge_score
        ("rougeL", "京北", "北京", 1 / 2),
        ("bleu1", "是北京。", "北京是。", 1.0),
        ("bleu1", "भारत।", "भारत ।", 1.0),
        ("bleu1", "กา", "กา", 1.0),
        ("bleu1", "ቤት።", "ቤት ።", 1.0),
        ("rouge1", "DIE STRASSE", "die Straße", 1.0),
        ("rougeL", "istanbul", "İstanbul", 1.0),
        ("rouge1", "ΟΔΟΣ", "οδος", 1.0),
        ("rouge1", "ԵՐԵՒԱՆ", "Երևան", 1.0),
        ("rougeL", "😀🎉", "😀🎉", 1.0),  # a text without a word is its characters
        ("rouge1", "👍🏽", "👍🏽 🎉", 2 * 1 * (1 / 2) / (1 + 1 / 2)),
        ("rouge1", "great 😀", "great 🎉", 1.0),  # as rouge_score
        ("rouge1", "∑", "∏", 0.0),
    ],
)
def test_words_by_script(name, output, reference, expected):
    assert ANY[name](output, [reference]) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["bleu1", "rouge1", "rougeL", "chrf"])
@pytest.mark.parametrize(
    "text", ["서울은 수도입니다!", "Hà Nội là thủ đô", "İstanbul", "اسلام آباد کا ۓ", "අගනුවරයි ශ්‍රී"]
)
def test_composed_and_decomposed_text_is_the_same_text(name, text):
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", text)
        assert ANY[name](unicodedata.normalize(form, text), [other]) == pytest.approx(1.0)


@pytest.mark.parametrize("tokenizer", ["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab"])
def test_sacrebleus_tokenizers_give_sacrebleus_scores(tokenizer):
    import sacrebleu

    theirs = sacrebleu.metrics.BLEU(max_ngram_order=1, effective_order=True, tokenize=tokenizer)
    try:
        ours = load_metric("bleu1", tokenizer)
    except MetricError as missing:
        pytest.skip(str(missing))
    for language in ("zh", "ja", "ko", "en", "de"):
        text = IN_SCRIPTS[language]
        output = text[2:]
        assert ours(output, [text]) == theirs.sentence_score(output, [text]).score / 100
    assert f"tok:{tokenizer}" in ours.signature
    assert load_metric("rouge1", tokenizer)(IN_SCRIPTS["ja"], [IN_SCRIPTS["ja"]]) == 1.0


def test_a_tokenizer_that_is_not_there_is_told_with_its_cure(monkeypatch):
    with pytest.raises(MetricError, match=r'unknown tokenizer "13b"\. Known are auto, 13a'):
        load_metric("bleu1", "13b")
    monkeypatch.setattr(
        "messcli.metrics.words.version", lambda package: (_ for _ in ()).throw(PackageNotFoundError)
    )
    with pytest.raises(
        MetricError, match=r"needs mecab-python3 and ipadic. Run: pip install 'messcli\[ja\]'"
    ):
        load_metric("rougeL", "ja-mecab")


def test_a_tokenizer_whose_model_can_not_be_had_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(
        "sacrebleu.tokenizers.tokenizer_spm.download_file",
        lambda *_: (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(
        MetricError, match=r"tokenizer flores200 can't be loaded: OSError: no network\. Its model is"
    ):
        load_metric("bleu1", "flores200")


# (output, reference, ours, lm-eval's): gsm8k's flexible-extract, `(-?[$0-9.,]{2,})|(-?[0-9]+)`, the last match,
# without "," "$" and a last "."; then compared as text
NUMBERS = [
    ("The answer is 72.", "72", 1, 1), ("72 apples", "#### 72", 1, 1), ("It is $1,234.", "1234", 1, 1),
    ("-5 degrees", "-5", 1, 1), ("first 3, then 4", "4", 1, 1), ("first 3, then 4", "3", 0, 0), ("none", "4", 0, 0),
    ("#### 42\n\nQuestion: 7 + 1?", "42", 1, 0),  # lm-eval's strict-match reads ####, the flexible one doesn't
    ("\\boxed{8} as in step 3", "8", 1, 0),  # as hendrycks_math
    ("72.0", "72", 1, 0), ("072", "72", 1, 0), ("1/2", "0.5", 1, 0), ("\\boxed{\\frac{3}{4}}", "0.75", 1, 0),
    ("1 1/2 cups", "1.5", 1, 0), ("10-3", "3", 1, 0), ("1.234,5", "1234.5", 1, 0), ("1.234.567", "1234567", 1, 0),
    ("1\u202f000", "1000", 1, 0), ("1’000", "1000", 1, 0), ("1,5", "1.5", 1, 0), ("1,5", "15", 0, 1),
    ("−5", "-5", 1, 0),
    ("-$5", "-5", 1, 1), ("2e3", "2000", 1, 0), ("٧٢", "72", 1, 0), ("on 1/2/2026", "2026", 1, 1),
    ("version 1.2.3", "3", 1, 0),
    ("50%", "50", 1, 1), ("1/0", "0", 0, 1), ("nothing", "none", 0, 0), ("None.", "none", 1, 0), (".5", "0.5", 1, 0),
    ("9" * 5000, "9" * 5000, 1, 1),
    ("½", "0.5", 1, 0), ("3½ cups", "3.5", 1, 0), ("-¾", "-0.75", 1, 0), ("2\\frac{1}{2}", "2.5", 1, 0),
    ("\\frac34", "0.75", 1, 0), ("\\frac{-3}{4}", "-3/4", 1, 0), ("\\cfrac{1,000}{2}", "500", 1, 0),
    ("\\boxed{42\\,\\text{cm}^2}", "42", 1, 0), ("42 km^2", "42", 1, 0), ("42 m²", "42", 1, 1),
    ("\\boxed{1{,}000}", "1000", 1, 0), ("1\\,000", "1000", 1, 0), ("1 000 000 €", "1000000", 1, 0),
    ("12 500", "500", 0, 1),
    ("on 12\n500", "500", 1, 1), ("1_000", "1000", 1, 0), ("2 \\times 10^3", "2000", 1, 0),
    ("2.5×10⁻³", "0.0025", 1, 0),
    ("2x10^{3}", "2000", 1, 0), ("10^3", "1000", 1, 0), ("12,34,567", "1234567", 1, 1), ("0,500", "0.5", 1, 0),
    ("–18", "-18", 1, 0), ("5–10", "10", 1, 1), ("１，２３４", "1234", 1, 0), ("x^2 = 4", "4", 1, 1),
    ("7, 8, 9", "9", 1, 1),
    ("9" * 5000, "8" * 5000, 0, 0), ("(3)", "3", 1, 1), ("答案是42。", "42", 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("output", "reference", "ours", "theirs"), NUMBERS)
def test_number_against_lm_evals_rule(output, reference, ours, theirs):
    def published(text: str) -> str:
        found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text, re.ASCII)
        last = next(filter(None, found[-1]), "") if found else "[invalid]"
        return re.sub(r"\.$", "", re.sub(r"[,$]", "", last))

    assert ANY["number"](output, [reference]) == ours
    assert (published(output) == re.sub(r"[,$]|(?s:.*#### )", "", reference)) == theirs


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1), ("a  b", "B", 1), ("It's", "its", 1), ("The", "an", 1),
        ("Paris, France", "Paris", 0), ("another", "other", 0), ("«Москва».", "москва", 1), ("東京。", "東京", 1),
        ("", "", 1),
        ("twenty-one", "twentyone", 1), ("$5", "5", 1), ("STRASSE", "Straße", 1), ("istanbul", "İstanbul", 1),
    ],
)  # fmt: skip
def test_normalized_is_squads(output, reference, expected):
    def published(text: str) -> str:  # normalize_answer of SQuAD's evaluate-v1.1.py
        text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    assert ANY["normalized"](output, [reference]) == expected
    if (output + reference).isascii():
        assert (published(output) == published(reference)) == expected


@pytest.mark.parametrize(
    ("output", "references", "expected"),
    [
        ("It is in Paris, France.", ["Paris"], 1), ("in PARIS", ["paris"], 1), ("party", ["art"], 1),
        ("London", ["Paris"], 0),
        ("New\n York", ["new york"], 1), ("x", ["y", "X"], 1), ("x", [""], 0), ("", [""], 1),
        ("Die Straße", ["STRASSE"], 1),
        ("1 + 1 (two)", ["(two)"], 1), ("İstanbul'da", ["istanbul"], 1), ("ﬁve", ["FIVE"], 1),
    ],
)  # fmt: skip
def test_contains_is_lm_evals_squad_completion(output, references, expected):
    assert ANY["contains"](output, references) == expected
    if all(references) and output.isascii() and "\n" not in output:
        theirs = max(bool(re.search(re.escape(one), output, re.IGNORECASE)) for one in references)
        assert theirs == expected


@pytest.mark.parametrize(
    ("output", "answer", "reasoning"),
    [
        ("B", "B", ""),
        ("<think>A? No.</think>\n\nB", "B", "A? No."),
        ("A? No.</think>B", "B", "A? No."),  # the template opened it
        ("<think>A or", "", "A or"),  # cut off by the limit of tokens
        ("<think></think>B", "B", ""),
        ("<think>x<think>y</think>z</think>B", "B", "xyz"),
        ("[THINK]hm[/THINK]B", "B", "hm"),
        ("one <reasoning>two</reasoning> three", "one  three", "two"),
        (" kept as it is ", " kept as it is ", ""),
        ("a < b and <thinker>", "a < b and <thinker>", ""),
        ("<Think>x</THINK>B", "B", "x"),
        ("<think>I may use <think> here</think>B", "B", "I may use  here"),  # spoken of
        ("<think>x<think>y</think>z", "z", "xy"),
        ("<think>a</think>B<think>c", "B", "ac"),  # cut off
        ("<think>a</think>B<think>c</think>D", "BD", "ac"),
        ("<seed:think>x</seed:think>B", "B", "x"),
        ("<longcat_think>x</longcat_think>B", "B", "x"),
        ("◁think▷x◁/think▷B", "B", "x"),
        ("<|begin_of_thought|>x<|end_of_thought|><|begin_of_solution|>B<|end_of_solution|>", "B", "x"),
        ("<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>B<|END_RESPONSE|>", "B", "x"),
        ("<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>B", "B", "x"),
        ("analysisx assistantfinalB", "B", "x"),  # the same, decoded without its control tokens
        ("analysis of the final", "analysis of the final", ""),
    ],
)
def test_reasoning_is_no_answer(output, answer, reasoning):
    assert split_reasoning(output) == (answer, reasoning)


def test_no_metric_scores_what_was_thought():
    output = "<think>Surely the answer is A, or 7.</think>The answer is B, or 12."
    for name, metric in ANY.items():
        assert metric(output, ["B 12"]) == metric("The answer is B, or 12.", ["B 12"]), name


@pytest.mark.parametrize("name", METRICS)
@given(output=st.text(max_size=40), references=st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_every_metric_is_within_0_and_1_on_any_text(name, output, references):
    score = ANY[name](output, references)
    assert 0.0 <= score <= 1.0
    assert isinstance(score, float)


@pytest.mark.parametrize("name", METRICS)
@given(text=WORDS.filter(lambda words: "cat" in words).map(" ".join))
def test_every_metric_gives_1_to_the_reference_itself(name, text):
    # not for empty text: BLEU and ROUGE are 0 where there is nothing to match
    assert ANY[name](text, [text]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "bleu1"])
@given(output=SENTENCES, references=st.lists(SENTENCES, min_size=2, max_size=3))
def test_several_references_score_as_the_best_of_them(name, output, references):
    metric = ANY[name]
    best = max(metric(output, [reference]) for reference in references)
    assert metric(output, references) == pytest.approx(best)


@pytest.mark.parametrize(
    ("name", "output", "references", "expected"),
    [
        ("bleu1", "the cat", ["the cat sat down"], math.exp(1 - 4 / 2)),
        ("bleu1", "the the the", ["the cat sat"], 1 / 3),
        ("bleu1", "The cat", ["the cat"], 1 / 2),  # case counts
        ("bleu1", "Hello, world!", ["Hello , world !"], 1.0),  # 13a splits punctuation
        ("bleu1", "", ["the cat"], 0.0),
        ("bleu1", "das Haus", ["ein Haus", "das Auto"], 1.0),  # references are merged
        ("rouge1", "running cats", ["run cat"], 1.0),  # the stemmer
        ("rouge1", "THE CAT!", ["the cat"], 1.0),
        ("rouge1", "", ["the cat"], 0.0),
        ("rougeL", "cat the sat", ["the cat sat"], 2 / 3),
        ("chrf", "cat", ["cat"], 1.0),
        ("chrf", "dog", ["cat"], 0.0),
        ("exact", " the  cat\n", ["the cat"], 1.0),
        ("exact", "The cat", ["the cat"], 0.0),
        ("exact", "u\u0308ber", ["\u00fcber"], 1.0),  # decomposed and composed
        ("exact", "b", ["a", "b"], 1.0),
        ("exact", "", [""], 1.0),
    ],
)
def test_table(name, output, references, expected):
    assert ANY[name](output, references) == pytest.approx(expected, abs=1e-9)


CLEARLY_B = [
    "B", "(B)", "B.", "B)", "b", "b)", "(b)", " B\n", "[B]", "B. Paris", "B: Paris", "B - Paris",
    "B\n\nBecause ...",
    "The answer is B", "The answer is B.", "the answer is (b)", "Answer: (b)", "Answer: b", "Final answer: B",
    "The answer is: B) Paris", "The correct answer is option B", "Option B", "I would choose B.",
    "I think the answer is B", "My answer is B, since A is wrong", "The correct option is B because of it",
    "**B**", "**Answer:** B", "answer is **B**. Paris", "\\boxed{B}", "$\\boxed{\\text{B}}$", "<b>B</b>",
    "\uff08B\uff09", "\uff22", "Let's think. Two is even, so (B) is it",
]  # fmt: skip


@pytest.mark.parametrize("output", CLEARLY_B)
def test_choice_reads_the_letter(output):
    choice = ANY["choice"]
    assert choice(output, ["B"]) == 1.0
    assert choice(output, ["B. Paris"]) == 1.0
    assert choice(output, ["C"]) == 0.0
    assert chosen_letters(output) == {"B"}


@pytest.mark.parametrize(
    "output",
    [
        "", "A or B", "Answer: A or B", "Answer: A, B", "(A) and (B)", "A. x\nB. y\nC. z",
        "The answer is A. No, the answer is B", "not B", "The answer is not B", "A dog is B", "B12",
        "Because",
        "K", "(A) is wrong, (B) is right",
    ],
)  # fmt: skip
def test_choice_gives_nothing_to_an_ambiguous_or_missing_letter(output):
    assert ANY["choice"](output, ["B"]) == 0.0
    assert ANY["choice"](output, ["A"]) == 0.0


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
@pytest.mark.parametrize(
    "form", ["{}", "({})", "{}. x", "Answer: {}", "The answer is {}.", "the answer is {} because"]
)
def test_choice_knows_ten_letters_in_each_form(letter, form):
    assert ANY["choice"](form.format(letter), [letter]) == 1.0
    assert ANY["choice"](form.format(letter), [f"({letter}) some text"]) == 1.0


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("Paris", "B. Paris", 1.0),
        ("The answer is Paris.", "B. Paris", 1.0),
        ("paris", "(B) Paris", 1.0),
        ("B. Paris", "Paris", 1.0),
        ("The answer is B. Paris", "Paris", 1.0),
        ("(b)", "b", 1.0),
        ("London", "B. Paris", 0.0),
        ("not Paris", "B. Paris", 0.0),
        ("A. Paris", "B. Paris", 0.0),  # the letter decides
        ("a dog", "C. a dog", 1.0),  # articles and pronouns are no letters
        ("the answer is a dog", "C. a dog", 1.0),
        ("A dog", "A", 0.0),
        ("I think so", "I", 0.0),
        ("-3", "D. -3", 1.0),
        ("3", "D. -3", 0.0),
        ("1.5", "C. 1.5", 1.0),
        ("Vitamin C", "D. Vitamin C", 1.0),  # a text wins over a letter that is left over
        ("The answer is Vitamin C", "D. Vitamin C", 1.0),
        ("Plan B.", "A. Plan B", 1.0),
        ("C = 5", "B. C = 5", 1.0),
        ("La risposta è Roma", "B. Roma", 1.0),
        ("\\boxed{\\text{Paris}}", "B. Paris", 1.0),
        ("C", "C.巴黎", 1.0),
        ("巴黎", "C.巴黎", 1.0),
    ],
)
def test_choice_reads_the_option_text(output, reference, expected):
    assert ANY["choice"](output, [reference]) == expected


def test_choice_is_linear_in_the_length_of_the_output():
    output = "answer is " * 20_000 + "\\boxed{" * 5_000 + "(" * 20_000
    assert ANY["choice"](output, ["B"]) == 0.0  # after hours if it backtracked


CLEARLY_C = [
    # English
    "C is correct.", "C is the correct answer.", "Therefore, C is right.", "C, because it is red.",
    "The correct one is C.", "It must be C.", "Answer - C", "So it's C.", "C is the best answer.",
    "C is the answer.", "That leaves C.", "The most likely answer is C", "A is wrong. C is correct.",
    # German
    "Antwort: C", "Die Antwort ist C.", "C ist richtig.", "Die richtige Antwort lautet C", "Richtig ist C.",
    "C ist die richtige Antwort", "Lösung: C", "Ich wähle C.", "C, weil es rot ist",
    # Spanish
    "Respuesta: C", "La respuesta correcta es C.", "La respuesta es la opción C", "C es correcta.",
    "La respuesta correcta es la C", "C es la respuesta correcta", "Elijo C.",
    # French
    "La réponse est C.", "Réponse : C", "La bonne réponse est C.", "C est la bonne réponse", "C'est C.",
    "La réponse correcte est la C", "C est correct",
    # Russian
    "Ответ: C", "Правильный ответ: C", "Правильный ответ — C.", "Ответ C", "C — правильный ответ", "C верно",
    # Chinese, in both scripts
    "答案：C", "答案是C", "正确答案是C。", "正確答案是 C", "选C", "应选C。", "故选：C", "C是正确的",
    "选项C正确",
    "答案为C",
    # Korean
    "정답: C", "정답은 C입니다.", "답: C", "C가 정답입니다.", "C입니다", "정답은 C",
    # Japanese
    "答え：C", "答えはCです。", "正解はC", "Cが正解です", "正しい答えはCです", "Cです",
]  # fmt: skip


@pytest.mark.parametrize("output", CLEARLY_C)
def test_choice_reads_plain_answers_in_nine_languages(output):
    assert chosen_letters(output) == {"C"}
    assert ANY["choice"](output, ["C"]) == 1.0
    assert ANY["choice"](output, ["B"]) == 0.0


@pytest.mark.parametrize(
    "output",
    [
        "C is not correct.", "C is wrong.", "A correct answer needs thought.", "It is C major.",
        "It can be C or D.",
        "Die Antwort ist nicht C.", "C ist falsch.", "La respuesta no es C.", "La réponse n'est pas C.",
        "Ответ: не C", "答案不是C", "C不正确", "C不是正确答案", "정답은 C가 아니다", "정답은 C가 아닙니다",
        "答えはCではない", "答えはCじゃない", "C is correct, D is correct", "Vitamin C is good for you",
        "Is C the answer?",
    ],
)  # fmt: skip
def test_choice_takes_no_denied_or_doubtful_letter(output):
    assert ANY["choice"](output, ["C"]) == 0.0


ALSO_C = [
    # English
    "The answer is (C).", "C) Paris", "**C**", "\\boxed{C}", "Answer: C", "I'd go with C",
    "I would go with C.", "I'll go with option C.", "Not A or B, so C", "Option c", "option (c)", "C가 정답",
    "The answer is C) Paris.", "The answer is **C) Paris**.", "**Answer: C) Paris**", "### Answer\n**C**",
    "The correct answer is:\n\nC. Paris", "The correct answer is: **C. Paris**",
    "C. Paris is the capital of France, while A. London is of England", "Answer: **(C)**",
    "Correct answer: C", "Correct option: C", "The correct choice is C.", "The right answer would be C.",
    "My final answer is C.", "Final Answer: \\boxed{C}", "Final Answer: The final answer is $\\boxed{C}$.",
    "The answer is $C$.", "The answer is 'C'.", "The answer is \"C\".", "The answer is `C`", "answer is c.",
    "ANSWER: C", "ANSWER IS C", "Answer C", "The answer must be C", "Hence, the answer is C.", "Thus C.",
    "So the answer would be C, Paris.", "I choose C", "I pick C.", "I select C.", "I believe it's C.",
    "I think it is C.", "I'd say C.", "I would say C.", "My guess is C.", "It's (C).", "C.", "c.",
    "(c) Paris", "C: Paris", "C - Paris", "C – Paris", "[C]", "{C}", "<C>", "C, I think.", "C!",
    "Choice C is correct.", "Option C is the correct answer.", "Option C is right because it is red.",
    "The letter is C.", "The correct letter is C", "Choose C.", "Select C", "Answer is C",
    "The best choice is C.", "The best option is C.", "The best answer is C.",
    "Both A and B are wrong, so the answer is C.", "Options A, B and D are incorrect, so C is correct.",
    "A is incorrect. B is incorrect. C is correct. D is incorrect.", "Not A. Not B. The answer is C.",
    "A and B are wrong. Therefore C.", "The answer isn't A, it's C.", "The answer is not A but C.",
    "The answer is C, not A.", "The answer is C, not B.", "C, not A.", "C rather than B.",
    "It cannot be A. It must be C.", "I first thought A, but the answer is C.",
    "The answer is C because A is the capital of England.", "C because B is wrong",
    "Therefore, the correct answer is C: Paris.", "Therefore, option C is correct", "The answer is: C",
    "The answer: C", "Answer = C", "Answer -> C", "Answer => C", "→ C", "=> C", "Answer：C", "Ans: C",
    "Ans. C", "Ans C", "The correct statement is C.", "The solution is C.", "Solution: C",
    "So, C is the answer", "C is true.", "C is the one.", "C it is.", "C would be the answer.",
    "C should be correct.", "C must be correct.", "C seems right.", "C appears to be correct.",
    "C fits best.", "C is the most appropriate answer.", "C is definitely correct", "C is indeed correct.",
    "The only correct option is C.", "Only C is correct.", "Only C", "The answer is clearly C.",
    "We choose C.", "We get C.", "That makes C the correct answer.", "which is C.", "That is option C.",
    "This corresponds to option C.", "This matches option C.", "The correct answer is option C: Paris.",
    "The correct answer is option **C**", "The correct option is **(C) Paris**.", "Answer:\nC", "Answer\nC",
    "The answer is\n\n**C**", "<answer>C</answer>", "<answer>C. Paris</answer>", "{\"answer\": \"C\"}",
    "{'answer': 'C'}", "{\"choice\":\"C\"}", "```\nC\n```", "**C. Paris**", "**C** Paris", "*C*", "__C__",
    "~C~", "\\text{C}", "\\(C\\)", "\\[C\\]", "\\boxed{\\textbf{(C)}}", "\\boxed{(C) Paris}",
    "\\boxed{\\text{C. Paris}}", "\\boxed{C. Paris}", "$\\boxed{\\mathrm{C}}$", "\\fbox{C}", "Ｃ", "ⓒ", "Ⓒ",
    "C：Paris", "（Ｃ）", "C、Paris", "【C】", "《C》", "「C」", "［C］",
    # German
    "Die Antwort lautet C.", "Die richtige Antwort ist C) Paris.", "Antwort C ist richtig.", "Antwort C",
    "Richtige Antwort: C", "Korrekt ist C.", "Es ist C.", "Das ist C.", "Ich würde C wählen.",
    "Ich würde sagen C.", "Ich denke, es ist C.", "Ich nehme C.", "Meine Antwort: C", "Die Lösung ist C.",
    "Die korrekte Antwort ist (C).", "Option C ist korrekt.", "C ist korrekt, weil es rot ist.",
    "A ist falsch, C ist richtig.", "Nicht A, sondern C.", "Die Antwort ist nicht A, sondern C.", "Also C.",
    "Es muss C sein.", "Die Antwort ist daher C.", "Somit ist C die richtige Antwort.",
    "Daher ist die richtige Antwort C.", "Daher ist C richtig.", "Ich entscheide mich für C.",
    "C trifft zu.", "C stimmt.", "Richtig: C", "Buchstabe C",
    # Spanish
    "La respuesta es C.", "La respuesta es C) París.", "La respuesta correcta es: C",
    "La respuesta correcta es la opción C.", "La opción correcta es la C.", "La opción C es correcta.",
    "La opción C es la correcta.", "Opción C", "Es la C.", "Es C.", "La C.", "La correcta es la C.",
    "La respuesta es la letra C", "Respuesta correcta: C", "Escojo la C.", "Elegiría C.",
    "Yo elegiría la opción C.", "Creo que es C.", "Por lo tanto, la respuesta es C.",
    "Por lo tanto, es la C.", "No es A, es C.", "A es incorrecta; C es correcta.", "La solución es C.",
    "C es la correcta.", "C es la opción correcta.", "C porque es rojo", "Respuesta final: C",
    "La alternativa correcta es C",
    # French
    "La réponse est la C.", "La réponse est C) Paris.", "La bonne réponse est la C.",
    "La bonne réponse est donc C.", "La réponse correcte est : C", "Réponse: C", "Réponse C",
    "Réponse correcte : C", "Option C", "L'option C est correcte.", "L'option correcte est C.",
    "C'est la C.", "C'est la réponse C.", "C'est l'option C.", "Je choisis C.", "Je choisirais C.",
    "Je dirais C.", "Je pense que c'est C.", "Donc C.", "Donc, la réponse est C.",
    "A est faux, C est correct.", "Ce n'est pas A, c'est C.", "La réponse n'est pas A mais C.",
    "La bonne réponse est l'option C.", "Il s'agit de C.", "La lettre C", "C est juste.", "C est vrai.",
    "C est la réponse correcte.", "C car il est rouge.", "C, car il est rouge.",
    # Italian
    "La risposta è C.", "La risposta corretta è C.", "La risposta corretta è la C.", "Risposta: C",
    "Risposta C", "La risposta giusta è C) Parigi.", "L'opzione corretta è C.", "Opzione C",
    "C è corretta.", "C è la risposta corretta.", "La C.", "È la C.", "È C.", "Scelgo C.", "Scelgo la C.",
    "Soluzione: C", "Quindi la risposta è C.", "La lettera corretta è C", "L'opzione C è corretta.",
    "La risposta esatta è la C.", "Non A, ma C.", "C perché è rosso",
    # Portuguese
    "A resposta é C.", "A resposta correta é C.", "A resposta correta é a C.", "Resposta: C", "Resposta C",
    "A alternativa correta é C.", "A alternativa correta é a letra C.", "Alternativa C", "Letra C",
    "A opção correta é C.", "A opção C está correta.", "Opção C", "C está correta.",
    "C é a resposta correta.", "C é correta.", "É a C.", "Escolho C.", "Escolho a C.", "Eu escolheria C.",
    "Portanto, a resposta é C.", "Solução: C", "Gabarito: C", "A opção correta é a C.",
    # Russian
    "Ответ: C.", "Ответ: C) Париж", "Ответ — C", "Ответ C.", "Правильный ответ C.",
    "Правильный ответ: C) Париж", "Правильный ответ - C.", "Верный ответ: C", "Верный вариант: C",
    "Правильный вариант — C.", "Вариант C", "Вариант C верный.", "Вариант C правильный.", "Это C.",
    "Это вариант C.", "Я выбираю C.", "Выбираю C.", "Выбираю вариант C", "Я бы выбрал C.",
    "Я думаю, это C.", "Думаю, что C.", "Следовательно, ответ C.", "Значит, C.", "Не A, а C.",
    "A неверно, C верно.", "C является правильным ответом.", "C, потому что он красный",
    "Правильным ответом является C.", "Буква C", "Итак, ответ: C",
    # Chinese
    "答案: C。", "答案选C", "答案是 C. 巴黎", "答案是(C)", "答案是C，因为它是红的", "答案为：C",
    "正确答案：C", "正确答案为C", "正确的答案是C",
    "正确选项是C", "正确选项为C", "正确的选项是C", "选择C", "我选C", "我选择C。", "应该选C", "应选C",
    "应选择C", "故选C", "故答案为C", "故答案选C",
    "所以答案是C", "因此答案是C", "因此，正确答案是C。", "所以选C。", "选项C", "选项C是正确的", "C选项正确",
    "C选项是正确的", "C项正确", "C是正确答案",
    "C是对的", "是C", "C。", "C。因为它是红的", "A错误，C正确", "A不对，选C", "不是A，而是C",
    "答案不是A，是C", "答案是C，不是A", "我认为是C",
    "最佳答案是C", "最终答案：C", "**答案：C**", "本题选C", "此题答案为C", "\\boxed{C}", "【答案】C",
    "【答案】 C", "参考答案：C",
    # Korean
    "정답은 C번입니다", "정답은 (C)입니다.", "정답은 C. 파리입니다", "답은 C입니다", "답은 C다.",
    "답은 C이다.", "답 C", "C가 정답입니다",
    "C가 맞습니다", "C가 옳다.", "C번", "C번이 정답입니다", "C번입니다", "C입니다.", "C이다", "C예요",
    "C이에요", "C다.", "선택지 C", "옵션 C",
    "C를 선택합니다", "C를 고르겠습니다", "저는 C를 선택하겠습니다.", "올바른 답은 C입니다.",
    "따라서 정답은 C입니다.", "따라서 C입니다.",
    "그러므로 C가 정답이다.", "A가 아니라 C입니다.", "A는 틀리고 C가 맞다.", "정답은 A가 아니라 C입니다.",
    "최종 답: C", "C가 정답", "C 입니다",
    "보기 C",
    # Japanese
    "答えはC", "答えはCだ。", "答え: C", "解答：C", "回答：C", "正解：C", "正解はCです", "正解はCです。",
    "正解は（C）です", "正解は C. パリ です",
    "正しい選択肢はCです。", "正しいのはCです。", "選択肢C", "選択肢Cが正解です。", "選択肢Cが正しいです。",
    "Cが正解", "Cが正解です。", "Cが正しい。", "Cが答えです",
    "Cです。", "Cだ。", "Cである。", "Cを選びます。", "私はCを選びます", "Cになります。", "Cだと思います。",
    "Cと思います。", "したがって、答えはCです。",
    "よってC", "よって、正解はCである。", "Aではなく、Cです。", "答えはAではなくCです。",
    "Aは間違いで、Cが正しい。", "最終的な答え：C", "【答え】C", "答えは「C」です。",
    "正答はC",
    # with reasons, in the middle of other letters
    "The correct answer is:\n\nC. Paris", "### Answer\n**C**", "Answer:\nC", "The answer is\n\n**C**",
    "```\nC\n```",
    "Let's go through the options.\nA. Wrong because x.\nB. Wrong.\nC. Right.\nD. No.\nSo the answer is C.",
    "A. is wrong. B. is wrong.\n\nTherefore, the correct answer is **C. Paris**.",
    "Step 1: A is a city. Step 2: B is a river.\nFinal answer: C",
    "C. Paris\n\nExplanation: A is in England and B is in Spain.",
    "**C) Paris**\n\nThe other options A and B are incorrect.",
    "Looking at option A: no. Looking at option B: no.\n\nAnswer: C",
    "The answer is C. Option A is incorrect because x.", "The answer is C. A is wrong.",
    "The answer is C, since B is wrong.",
    "Option A is incorrect. Option B is incorrect. Option C is correct.",
    "Correct answer: C. Incorrect: A, B, D", "C is the correct answer because A and B are false",
    "I would choose option C, not option A.", "A is tempting, but the answer is C",
    "So the correct option is (C), because (A) and (B) are wrong.", "Die Antwort ist C, nicht A.",
    "答案选C，因为A错了", "C\n\nA is wrong because of x.", "C - since A is wrong", "(C) Paris. (A) is wrong.",
    "Based on the passage, the answer is C.", "Given this, C is the most likely answer.", "C.巴黎", "C、巴黎",
    "C．巴黎", "C）巴黎", "C:巴黎", "（C）巴黎", "选项C：巴黎", "A选项错误，B选项错误，C选项正确",
    "C) Le chat", "Réponse C.",
    "Je pense que la réponse est C", "Je pense que la bonne réponse est C.", "J'opte pour C.",
    "C, parce que c'est rouge", "Secondo me la risposta è C.", "Penso che sia C.", "Acho que é C.",
    "Acho que a resposta é C.", "Eu acho que a resposta correta é a letra C.",
    "Creo que la respuesta es C.", "Me parece que es la C.", "Думаю, ответ C",
    "Я считаю, что правильный ответ — C", "Meiner Meinung nach ist C richtig.",
    "Ich glaube, C ist richtig.", "Ich bin mir sicher, dass C richtig ist.", "Ich tippe auf C.",
    "Die Lösung lautet C.", "Lösung C", "Richtige Lösung: C", "Antwortmöglichkeit C", "Antwort (C)",
    "c) Paris", "c. Paris", "c", "(c)", "answer: c", "Answer: c) Paris", "the answer is c",
    "the correct answer is option c", "option c is correct", "c is correct", "c is the answer",
    "i choose c",
]  # fmt: skip

NO_LETTER = [
    "Hepatitis B", "Vitamin C", "Vitamin C is good for you", "Plan B", "The key of C major", "Grade A",
    "A dog", "I think so", "I don't know", "I am not sure.", "None of the above",
    "It is not clear whether A or B", "Is it C?", "Could it be C?", "Not C", "C is incorrect",
    "C is not right", "C is false.", "C is wrong, as it is red", "C can be ruled out.", "C can't be right",
    "C cannot be correct.", "C isn't correct.", "The answer isn't C.", "The answer cannot be C",
    "It's not C.", "It isn't C.", "I don't think it's C.", "I would not choose C.", "I wouldn't pick C",
    "Don't choose C", "C ist falsch.", "C ist nicht richtig.", "Nicht C.", "Es ist nicht C.",
    "Die Antwort lautet nicht C", "Ich wähle nicht C", "No es C.", "C no es correcta.", "C es incorrecta.",
    "La respuesta no es la C", "Ce n'est pas C.", "C n'est pas correct.", "C est faux.",
    "C est incorrecte.", "C est fausse", "Non è C.", "C non è corretta.", "C è sbagliata",
    "La risposta non è C", "Não é C.", "C não é correta.", "C está errada", "A resposta não é C", "Не C.",
    "C неверно.", "C неправильно", "Это не C.", "C не является правильным", "不是C", "C不对", "C是错的",
    "C错误",
    "不选C", "C选项错误", "C不是答案", "正确答案不是C", "C가 아닙니다", "C는 틀렸습니다",
    "C는 정답이 아닙니다", "Cではありません", "Cは間違いです",
    "Cは正しくない", "正解はCではない", "Washington, D.C.", "C++", "C#", "C-section", "°C", "20 °C", "25 C",
    "C/C++",
    "CD", "DNA", "A B C D", "A, B, C, D", "either C or D", "C and D", "C & D", "both C and D", "C/D",
    "C or D", "C, D", "Between C and D, hard to say", "e.g. x", "i.e. y", "The options are A, B, C and D.",
    "Figure C shows", "See appendix C.", "Section B.", "Group B is larger", "As in case B, it rains.",
    "B cells", "In D, the sun", "I'm sorry, I can't answer.", "E' vero", "A priori", "À Paris",
    "O maior é o Brasil", "E la nave va", "It depends on C's value", "¿Es C?", "est-ce C ?", "C?",
]  # fmt: skip

WORDS_TOO = {  # letters that are words in some language
    "A": [
        "A", "A.", "A)", "The answer is A.", "A is correct.", "A, because x", "Answer: A", "So A.", "It's A.",
        "I'd go with A", "(A)", "**A**", "A - Paris", "Therefore A is correct",
        "The answer is A because it rains", "Option A", "A is the answer", "A resposta é A.",
        "A resposta correta é a A.", "La réponse est A.", "答案是A", "A가 정답", "The answer is A, not I.",
        "Thus A",
        "The best answer is A", "答えはAです", "A is right", "A it is", "Choose A", "I choose A.",
    ],
    "I": [
        "I", "I.", "The answer is I.", "(I)", "I is correct.", "Answer: I", "Option I", "It must be I.",
        "So I.",
    ],
    "E": [
        "E", "La respuesta es E.", "La risposta è E.", "E è corretta.", "E is correct", "A resposta é E.",
    ],
}  # fmt: skip


@pytest.mark.parametrize("output", ALSO_C)
def test_choice_reads_what_a_reader_reads(output):
    assert chosen_letters(output) == {"C"}
    assert ANY["choice"](output, ["C"]) == 1.0
    assert ANY["choice"](output, ["A"]) == 0.0


@pytest.mark.parametrize("output", NO_LETTER)
def test_choice_reads_no_letter_where_none_is_chosen(output):
    assert len(chosen_letters(output)) != 1


@pytest.mark.parametrize(("letter", "output"), [(k, output) for k in WORDS_TOO for output in WORDS_TOO[k]])
def test_choice_reads_letters_that_are_words_too(letter, output):
    assert chosen_letters(output) == {letter}


# what made earlier patterns quadratic or cubic, and what would do so in others: units of text to be repeated
HOSTILE = [
    "final ", "answer is ", "option ", "the correct answer is ", "答案是", "C, ", "C or ", "\\boxed{", "(",
    " ", "\n",
    "a b\n", "9", "1 ", "1,", "1/", "1.", "$", "-", "\\frac{1", "<think>", "</think>", "<a", "#### ",
    "&quot;", "a ",
    "C is the best ", "it is ", "ы ", "गी", "\u0301", "e9", "'", "1'000",
    "C so ", "not C ", "C is not ", "{A} ", "**C** ", "\\boxed{C. ", "的C", "most likely correct ",
]  # fmt: skip
MEGABYTE = 1_000_000


def seconds(name: str, unit: str, size: int) -> float:
    start = time.process_time()
    ANY[name](unit * (size // len(unit)), ["the answer B is 12"])
    return time.process_time() - start


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.slow
def test_choice_reads_hostile_text_in_linear_time(unit):
    # a cubic pattern took 7.7 s for a fifth of this, a quadratic one 30 s for this
    assert seconds("choice", unit, MEGABYTE // 10) < 3.0


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_a_megabyte_of_hostile_text_takes_seconds(name):
    for unit in HOSTILE:
        assert seconds(name, unit, MEGABYTE) < 20.0, unit


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_a_megabyte_against_a_megabyte_ends(name):
    words = [f"w{number % 5000}" for number in range(MEGABYTE // 6)]
    output, reference = " ".join(words), " ".join(reversed(words))
    start = time.process_time()
    ANY[name](output, [reference])
    assert time.process_time() - start < 120  # rougeL 15 s; its table in rouge_score would take days


def test_signatures_name_what_the_numbers_depend_on():
    import sacrebleu

    assert ANY["bleu1"].signature == (
        f"bleu1|order:1|case:mixed|eff:yes|tok:auto|smooth:exp|version:{sacrebleu.__version__}"
    )
    theirs = sacrebleu.metrics.CHRF()
    theirs.corpus_score(["a"], [["a"]])
    for part in str(theirs.get_signature()).split("|"):
        assert part.startswith("nrefs") or part in ANY["chrf"].signature.split("|")
    for name, metric in ANY.items():
        assert metric.name == name
        assert re.fullmatch(rf"{name}(\|[\w]+:[^|:]+)+", metric.signature)
        assert "version:" in metric.signature
        assert all(earlier.startswith(f"{name}|") for earlier in metric.continues)


def test_bleu_does_not_keep_every_line():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    bleu = load_metric("bleu1")
    for number in range(5000):
        bleu(f"line {number}", ["line"])
    assert Tokenizer13a.__call__.cache_info().currsize < 4100


def test_a_metric_without_references_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="at least one reference"):
        ANY["exact"]("x", [])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blue1", 'unknown metric "blue1": did you mean "bleu1"?'),
        (
            "zzz",
            'unknown metric "zzz": Known are bleu1, rouge1, rougeL, chrf, exact, normalized, contains, number',
        ),
        (":f", "write it as module:function"),
        ("nowhere_at_all:f", 'Python finds no module "nowhere_at_all". Add its folder to PYTHONPATH'),
        ("nowhere_at_all.deeper:f", 'Python finds no module "nowhere_at_all"'),
        ("own_metrics:halff", 'the module has no function "halff". Did you mean "half"?'),
        ("own_metrics:constant", 'the module has no function "constant"'),
        ("own_broken:f", "importing it failed: ZeroDivisionError: division by zero"),
        ("own_needs:f", "importing it failed: ModuleNotFoundError: No module named 'not_installed'"),
    ],
)
def test_unknown_metrics_are_told_with_a_cure(own_modules, name, told):
    with pytest.raises(MetricError) as caught:
        load_metric(name)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("text", "returned str '0.5' for 'out'. Return a float"),
        ("nothing", "returned NoneType None"),
        ("nan", "returned nan for 'out'. Return a number from 0 to 1"),
        ("infinite", "returned inf"),
        ("percent", "returned 52 for"),
        ("endless", "returned inf for"),  # a whole number that no float holds
        ("fails", "failed on 'out': KeyError: 'gone'"),
        ("leaves", "failed on 'out': SystemExit: 3"),
    ],
)
def test_what_is_no_score_is_told_with_function_and_output(own_modules, function, told):
    metric = load_metric(f"own_metrics:{function}")
    with pytest.raises(MetricError) as caught:
        metric("out", ["ref"])
    assert f'metric "own_metrics:{function}" {told}' in str(caught.value)


def test_own_metrics_score(own_modules):
    assert load_metric("own_metrics:half")("a", ["b"]) == 0.5
    assert load_metric("own_metrics:truth")("a", ["b", "a"]) == 1.0
    assert load_metric("own_metrics:above")("a", ["a"]) == 1.0  # rounding noise is clamped
    assert load_metric("own_metrics:numpy_float")("a", ["a"]) == 0.25


def test_what_an_own_metric_prints_goes_to_standard_error(own_modules, capsys):
    assert load_metric("own_metrics:talks")("a", ["a"]) == 1.0
    assert capsys.readouterr() == ("", "scoring a\n")


def test_an_edited_function_has_another_signature(own_modules):
    before = load_metric("own_metrics:half").signature
    assert load_metric("own_metrics:half").signature == before
    (own_modules / "own_metrics.py").write_text("def half(o, r): return 0.4\n")
    assert load_metric("own_metrics:half").signature != before


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(
        """
import numpy
constant = 1
def half(output, references): return 0.5
def truth(output, references): return output in references
def above(output, references): return 1.0000001
def numpy_float(output, references): return numpy.float32(0.25)
def text(output, references): return "0.5"
def nothing(output, references): return None
def nan(output, references): return float("nan")
def infinite(output, references): return float("inf")
def percent(output, references): return 52
def endless(output, references): return 10**400
def fails(output, references): return {}["gone"]
def leaves(output, references): raise SystemExit(3)
def talks(output, references): print("scoring", output); return 1.0
"""
    )
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    (tmp_path / "own_needs.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own_metrics", "own_broken", "own_needs"):
        sys.modules.pop(name, None)
