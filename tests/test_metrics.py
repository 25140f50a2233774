"""Metrics against tables of cases and against references computed here, independently."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messcli.errors import MetricError
from messcli.metrics import chosen_letters, load_metric
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


@pytest.mark.parametrize("name", ["rouge1", "rougeL", "chrf", "exact", "choice"])
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
        "The answer is A. No, the answer is B", "not B", "The answer is not B", "A dog is B", "B12", "Because",
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
    ],
)
def test_choice_reads_the_option_text(output, reference, expected):
    assert ANY["choice"](output, [reference]) == expected


def test_choice_is_linear_in_the_length_of_the_output():
    output = "answer is " * 20_000 + "\\boxed{" * 5_000 + "(" * 20_000
    assert ANY["choice"](output, ["B"]) == 0.0  # after hours if it backtracked


def test_signatures_name_what_the_numbers_depend_on():
    import sacrebleu

    assert ANY["bleu1"].signature == (
        f"bleu1|order:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    theirs = sacrebleu.metrics.CHRF()
    theirs.corpus_score(["a"], [["a"]])
    for part in str(theirs.get_signature()).split("|"):
        assert part.startswith("nrefs") or part in ANY["chrf"].signature.split("|")
    for name, metric in ANY.items():
        assert metric.name == name
        assert re.fullmatch(rf"{name}(\|[\w]+:[^|:]+)+", metric.signature)
        assert "version:" in metric.signature


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
        ("zzz", 'unknown metric "zzz": Known are bleu1, rouge1, rougeL, chrf, exact, choice, or your own'),
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
        ("fails", "failed on 'out': KeyError: 'gone'"),
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
def fails(output, references): return {}["gone"]
"""
    )
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    (tmp_path / "own_needs.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own_metrics", "own_broken", "own_needs"):
        sys.modules.pop(name, None)
