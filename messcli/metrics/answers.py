"""One short answer: exact, normalized, contains, number.

Each rule is published with lm-eval; tests/test_metrics.py has the cases on which these agree with it and the ones
on which they don't, with the reason.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

import regex

from messcli.metrics.base import Metric


def exact() -> Metric:
    """1 when the output equals a reference in Unicode NFC with runs of white space as one space."""

    def score(output: str, references: Sequence[str]) -> float:
        return float(_spaced(output) in {_spaced(reference) for reference in references})

    return Metric("exact", "exact|norm:nfc|space:collapse|case:mixed|refs:any|version:1", score)


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


# --- SQuAD: Rajpurkar et al. 2016, `normalize_answer` of its evaluation script ---

_PUNCTUATION = regex.compile(r"[\p{P}\p{S}]")  # on ASCII text: string.punctuation
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized() -> Metric:
    """1 when the output equals a reference without case, punctuation, articles and extra white space."""

    def score(output: str, references: Sequence[str]) -> float:
        return float(_normalized(output) in {_normalized(reference) for reference in references})

    return Metric("normalized", "normalized|norm:squad|punct:unicode|refs:any|version:1", score)


def _normalized(text: str) -> str:
    text = _PUNCTUATION.sub("", unicodedata.normalize("NFC", text).lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


# --- contains: lm-eval's squad_completion ---


def contains() -> Metric:
    """1 when a reference stands in the output, whatever the case and white space.

    A reference is found inside a word too ("art" in "party"). An empty one is met by an empty output only.
    """

    def score(output: str, references: Sequence[str]) -> float:
        text = _spaced(output).casefold()
        wanted = (_spaced(reference).casefold() for reference in references)
        return float(any(one in text if one else not text for one in wanted))

    return Metric("contains", "contains|norm:nfc|space:collapse|case:fold|refs:any|version:1", score)


# --- number: lm-eval's gsm8k ("####" and the last number) and the boxes of its hendrycks_math ---

_MOST_DIGITS = 300  # of a number; a longer one is none. Python reads at most 4,300, in quadratic time
_GROUP = r"['’\u00A0\u2009\u202F]\d{3}(?!\d)"  # Swiss and ISO thousands
_PLAIN = rf"(?:\d+(?:{_GROUP}|[.,\u066B\u066C]\d+)*|\.\d+)(?:[eE][+-]?\d{{1,2}}(?!\d))?"
# Linear: what follows a run of digits may be missing, so that no run is read again from its second digit.
_NUMBER = re.compile(
    r"[$€£¥₹]?(?P<sign>(?<![\w)])[-−])?[$€£¥₹]?"
    r"(?:\\[dt]?frac\{\s?(?P<above>\d+)\s?\}\{\s?(?P<below>\d+)\s?\}"
    rf"|(?:(?P<whole>\d+)\s(?=\d+\s?[/⁄]))?(?P<first>{_PLAIN})(?P<others>(?:\s?[/⁄]\s?\d+)*))"
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # ½ and its like: one character each


def number() -> Metric:
    """1 when the number that the output ends with equals a reference's: 1,000 = 1000.0, 1/2 = 0.5, -$5 = −5.

    The number is the first one after the last "####", else the last one in the last \\boxed{...}, else in the text. A
    reference without a number is compared as `normalized` does.
    """

    def score(output: str, references: Sequence[str]) -> float:
        found = last_number(output)
        for reference in references:
            wanted = last_number(reference)
            same = _normalized(output) == _normalized(reference) if wanted is None else found == wanted
            if same:
                return 1.0
        return 0.0

    return Metric("number", "number|which:last|marks:####,boxed|value:exact|refs:any|version:1", score)


def last_number(text: str) -> Fraction | None:
    """The number that a text ends with, exactly; None where it has none.

    A comma or a point before groups of three digits separates thousands where that is the only reading or the
    English one: 1,000 and 1.000.000 are whole, 1.000 and 1,5 have decimals.
    """
    text = _VULGAR.sub(lambda one: f" {unicodedata.normalize('NFKC', one[0])}", text)
    marked = _NUMBER.search(text, text.rfind("####") + 4) if "####" in text else None
    if marked is not None:
        return _value(marked)
    for part in (_last_box(text), text):
        last = None
        for last in _NUMBER.finditer(part):  # noqa: B007  # only the last one is wanted
            pass
        if last is not None:
            return _value(last)
    return None


def _last_box(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return text[start:]


def _value(found: re.Match[str]) -> Fraction | None:
    sign = -1 if found["sign"] else 1
    if found["above"]:
        value = _ratio(_plain(found["above"]), _plain(found["below"]))
    else:
        value = _plain(found["first"])
        below = re.findall(r"\d+", found["others"])
        if len(below) == 1:
            value = _ratio(value, _plain(below[0]))
        elif below:  # 1/2/2026 is no fraction
            value = _plain(below[-1])
        whole = _plain(found["whole"]) if found["whole"] else Fraction(0)
        value = None if value is None or whole is None else whole + value
    return None if value is None else sign * value


def _ratio(above: Fraction | None, below: Fraction | None) -> Fraction | None:
    return above / below if above is not None and below else None


def _plain(written: str) -> Fraction | None:
    """A number without sign as it is written: 1,234.5, 1.234,5, 1’000, .5, 2e3, ٣٫٥."""
    if len(written) > _MOST_DIGITS:
        return None
    text = re.sub(r"['’\u00A0\u2009\u202F]", "", written).replace("\u066b", ".").replace("\u066c", ",")
    digits, _, power = text.lower().partition("e")
    decimal = _decimal_sign(digits)
    parts = re.split(r"[.,]", digits)
    if decimal is None and len(parts) > 1 and not _thousands(parts):
        whole, fraction = parts[-1], ""  # 1,2,3 is a list, 1.2.3 a version: the last of them
    elif decimal is None:
        whole, fraction = "".join(parts), ""
    else:
        whole, fraction = "".join(parts[:-1]), parts[-1]
    scale = Fraction(10) ** (int(power or 0) - len(fraction))
    return int(f"{whole}{fraction}") * scale


def _decimal_sign(digits: str) -> str | None:
    """What stands before the decimals; None where there are none."""
    last = max(digits.rfind("."), digits.rfind(","))
    if last < 0:
        return None
    sign = digits[last]
    if digits.count(sign) > 1:
        return None
    other = "," if sign == "." else "."
    if sign == "," and other not in digits and _thousands(digits.split(",")):
        return None
    return sign


def _thousands(groups: Sequence[str]) -> bool:
    return 1 <= len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])
