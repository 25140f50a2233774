"""One short answer: exact, normalized, contains, number.

Each rule is published with lm-eval; tests/test_metrics.py has the cases on which these agree with it and the ones
on which they don't, with the reason.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

import regex

from messcli.metrics.base import Metric
from messcli.metrics.words import folded


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

    signature = "normalized|norm:squad|punct:unicode|refs:any|version:{}"
    return Metric("normalized", signature.format(2), score, (signature.format(1),))


def _normalized(text: str) -> str:
    text = _PUNCTUATION.sub("", folded(text))
    return " ".join(_ARTICLES.sub(" ", text).split())


# --- contains: lm-eval's squad_completion ---


def contains() -> Metric:
    """1 when a reference stands in the output, whatever the case and white space.

    A reference is found inside a word too ("art" in "party"). An empty one is met by an empty output only.
    """

    def score(output: str, references: Sequence[str]) -> float:
        text = _spaced(folded(output))
        wanted = (_spaced(folded(reference)) for reference in references)
        return float(any(one in text if one else not text for one in wanted))

    signature = "contains|norm:nfc|space:collapse|case:fold|refs:any|version:{}"
    return Metric("contains", signature.format(2), score, (signature.format(1),))


# --- number: lm-eval's gsm8k ("####" and the last number) and the boxes of its hendrycks_math ---

_MOST_DIGITS = 300  # of a number; a longer one is none. Python reads at most 4,300, in quadratic time
_GROUP = r"['’_\u00A0\u2009\u202F]\d{3}(?!\d)"  # Swiss and ISO thousands
_SPACED_GROUPS = r"\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?"  # ... with an ordinary space
_PLAIN = rf"(?:{_SPACED_GROUPS}|\d+(?:{_GROUP}|[.,\u066B\u066C]\d+)*|\.\d+)(?:[eE][+-]?\d{{1,2}}(?!\d))?"
_PART = r"[-−]?\d[\d.,]*"  # of a fraction in LaTeX
# Linear: what follows a run of digits may be missing, so that no run is read again from its second digit.
_NUMBER = re.compile(
    r"[$€£¥₹]?(?P<sign>(?<![\w)])[-−–－﹣])?[$€£¥₹]?"
    r"(?:(?:(?P<times>\d+)\s?)?\\frac\{\s?"
    rf"(?P<above>{_PART})\s?\}}\s?\{{\s?(?P<below>{_PART})\s?\}}"
    rf"|(?:(?P<whole>\d+)\s(?=\d+\s?[/⁄]))?(?P<first>{_PLAIN})(?P<others>(?:\s?[/⁄]\s?\d+)*))"
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
# How LaTeX and full-width text write what a number is made of: (pattern, as _NUMBER reads it)
_NOTATIONS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])"), " "),
    (re.compile(r"[¼-¾⅐-⅞]"), lambda found: unicodedata.normalize("NFKC", found[0])),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac\s?(\d)\s?(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=\d)(?:\{,\}|，(?=\d{3}(?!\d)))(?=\d)"), ","),
    (re.compile(r"(?<=\d)．(?=\d)"), "."),
    (re.compile(r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))"), "\u202f"),
    # 2 \times 10^3
    (
        re.compile(
            r"(?<=\d)\s?(?:\\times|\\cdot|[×·*x])\s?10\s?(?:\^\s?\{?\s?([-−+]?\d{1,2})\s?\}?|([⁻⁰¹²³⁴-⁹]{1,3}))(?!\d)"
        ),
        lambda found: "e" + (found[1] or found[2].translate(_SUPERSCRIPTS)).replace("−", "-"),
    ),
    (
        re.compile(r"(?<![\d.,^])10\s?\^\s?\{?([-−+]?\d{1,2})\}?(?!\d)"),
        lambda found: "1e" + found[1].replace("−", "-"),
    ),
    (re.compile(r"(?<=[A-Za-z}])\^\{?-?\d{1,3}\}?"), ""),  # km^2 is a unit
)


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

    signature = "number|which:last|marks:####,boxed|value:exact|refs:any|version:{}"
    return Metric("number", signature.format(2), score, (signature.format(1),))


def last_number(text: str) -> Fraction | None:
    """The number that a text ends with, exactly; None where it has none.

    A comma or a point before groups of three digits separates thousands where that is the only reading or the
    English one: 1,000 and 1.000.000 are whole, 1.000, 0,500 and 1,5 have decimals.
    """
    for notation, as_read in _NOTATIONS:
        text = notation.sub(as_read, text)
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
        above, below = (found[name].replace("−", "-") for name in ("above", "below"))
        sign *= -1 if above.startswith("-") is not below.startswith("-") else 1
        value = _ratio(_plain(above.strip("-")), _plain(below.strip("-")))
        whole = _plain(found["times"]) if found["times"] else Fraction(0)
    else:
        value = _plain(found["first"])
        below = re.findall(r"\d+", found["others"])
        if len(below) == 1:
            value = _ratio(value, _plain(below[0]))
        elif below:  # 1/2/2026 is no fraction
            value = _plain(below[-1])
        whole = _plain(found["whole"]) if found["whole"] else Fraction(0)
    return None if value is None or whole is None else sign * (whole + value)


def _ratio(above: Fraction | None, below: Fraction | None) -> Fraction | None:
    return above / below if above is not None and below else None


def _plain(written: str) -> Fraction | None:
    """A number without sign as it is written: 1,234.5, 1.234,5, 1’000, .5, 2e3, ٣٫٥."""
    if len(written) > _MOST_DIGITS:
        return None
    text = re.sub(r"['’_\s]", "", written).replace("\u066b", ".").replace("\u066c", ",")
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
    """1,234 and 12,34,567 (India's), but not 0,500."""
    if not 1 <= len(groups[0]) <= 3 or groups[0].startswith("0"):
        return False
    *inner, last = groups[1:] or [""]
    return len(last) == 3 and {len(group) for group in inner} in (set(), {2}, {3})
