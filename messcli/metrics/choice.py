"""choice: the option that an answer names, by its letter A to J or by its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from messcli.metrics.base import Metric

# Linear by construction: `_plain` leaves one white space at a time, and every repetition in a pattern that is
# searched for has a bound, or takes characters that can't begin the pattern again. So the work at each place
# of a text has a bound too.

_CJK = r"\u3040-\u30FF\u3400-\u9FFF\uAC00-\uD7AF"
_END = (
    rf"(?![^\W{_CJK}]|['’])"  # a Latin word ends here; Chinese, Japanese and Korean write on without a space
)

# A letter as an option: upper case where it ends a word, lower case only where punctuation says that it is
# no word ("answer: a" but not "the answer is a dog"). "A" and "I" are English words, so they need it too,
# or one of the words that follow a letter and never a noun.
_REASON = (
    r"(?:because|since|as|for|with|which|due|based|weil|denn|da|porque|ya|parce|car|puisque|"
    r"потому|поскольку|так)\b"
)
_AND = r"(?:or|and|oder|und|o|y|ou|et|или|и)\b"
_AFTER_WORD = rf"(?=\s?(?:$|[\n.,;:!?)\]}}>|/&。、，]|[-–—]\s|[{_CJK}])|\s(?:{_REASON}|{_AND}))"
_LETTER = rf"(?:[(\[{{<]\s?([A-Ja-j])\s?[)\]}}>]|([B-HJ]){_END}|([AIa-j]){_AFTER_WORD})"
_SEVERAL = rf"(?:\s?(?:,|/|&|\b{_AND}|和|或|と|と|와|과|또는){{1,2}}\s?{_LETTER})"
# "C가 아니다", "Cではない": Korean and Japanese put the no behind the letter
_NOT_DENIED = r"(?!\s?[가이]?\s?아[니닙닌]|\s?(?:では|じゃ|で)は?(?:な|あり))"


def _any(words: str) -> str:
    """A pattern for any of the words of a table; the longest first, so that none hides another."""
    return "|".join(
        word.replace("_", r"\s") for word in sorted(words.split(), key=lambda word: (-len(word), word))
    )


_ADJECTIVE = _any(
    "final correct right best my only most_likely "
    "richtige korrekte beste meine richtig korrekt "
    "correcta final mi mejor única bonne meilleure ma correcte juste "
    "corretta esatta giusta migliore mia correta certa melhor minha "
    "правильный верный мой окончательный"
)
_HEAD = _any(
    "answer option choice solution letter "
    "antwort lösung auswahl antwortmöglichkeit buchstabe "
    "respuesta opción opcion solución alternativa letra resposta "
    "réponse reponse choix lettre "
    "risposta opzione scelta soluzione opção opcao solução alternativa escolha "
    "ответ вариант вариант_ответа буква"
)
_IS = _any(
    "is was would_be should_be must_be will_be ist wäre lautet ist_also es sería debe_ser est serait doit_être "
    "является это будет è é é_a sarebbe seria será"
)
_FILLER = _any(
    "clearly therefore thus definitely option choice letter answer die_antwort antwort option buchstabe also "
    "la_opción opción la_letra la la_réponse l'option le_choix вариант буква под_буквой"
)
_CHOOSE = _any(
    "choose pick select chose go_with answer_with say leaves leaving wähle nehme tippe_auf elijo escojo selecciono "
    "choisis opte_pour scelgo escolho выбираю"
)
_SUBJECT = _any("it this that das es esto eso c'est ce_sera ça это")
_SUBJECT_IS = _any(
    "is must_be should_be would_be has_to_be can_only_be will_be muss ist es debe_ser tiene_que_ser est doit_être"
)
_RIGHT = _any(
    "correct right best richtig korrekt correcta correcto correcte exact exacte corretta giusta correta certa"
)
_BEST = _any("only best most_likely correct right richtige korrekte bonne mejor")
_VERDICT = (
    rf"(?:is|ist|es|est|è|é)\s(?:(?:{_RIGHT})\b|(?:the|die|la)\s(?:(?:{_BEST})\s){{1,2}}(?:{_HEAD}|one)\b"
    r"|(?:the|die|la|a|my|mi|ma|meine)\s(?:answer|antwort|respuesta|réponse|risposta|resposta)\b)"
    r"|(?:(?:является|это|[-–—])\s)?(?:правильн|верн)(?:ый|ая|о|а|ым|ен)?\b"
)
# in scripts without word boundaries
_CJK_HEAD = _any(
    "正确答案 正確答案 答案 正确选项 正確選項 选项 選項 应选 應選 应该选 故选 故選 因此选 所以选 选择 選擇 选 選 "
    "答え 正解 回答 解答 選択肢 정답 정답은 답은 답 답변 선택지"
)
_CJK_IS = _any("应该是 應該是 应为 應為 是 为 為 は が 은 는 이 가")
_CJK_VERDICT = (
    r"(?:选项|選項|項)?(?:是)?(?:正确|正確|对的|對的)"
    r"|(?:が|は)\s?(?:正解|正しい|正答|答え)|(?:가|이|는|은)\s?(?:정답|맞|옳|답이)|(?:번이|번)\s?정답"
)

_CUED = re.compile(
    rf"(?:(?i:\b(?:(?:{_ADJECTIVE})\s){{0,3}}(?:{_HEAD})\b(?:\s(?:{_ADJECTIVE})\b)?(?:\s(?:{_IS})\b)?"
    rf"(?:\s(?:{_FILLER})\b){{0,3}}\s?(?:[:=]|[-–—](?=\s))?\s?(?:(?:{_FILLER})\s)?"
    rf"|\b(?:(?:{_ADJECTIVE})\s){{1,3}}one\s(?:{_IS})\s"
    rf"|\b(?:richtig|korrekt|correct|right|correcto)\s(?:ist|is|es)\s(?:(?:{_FILLER})\s)?"
    rf"|\b(?:{_ADJECTIVE})\s?:\s?"
    rf"|\b(?:{_CHOOSE})\s(?:only\s)?(?:(?:{_FILLER})\s){{0,2}})"
    rf"|(?:{_CJK_HEAD})\s?(?:{_CJK_IS})?\s?[:=]?\s?){_LETTER}{_NOT_DENIED}({_SEVERAL}{{0,9}})"
)
_SO = _any("so thus hence therefore also deshalb daher donc entonces quindi dunque então logo значит поэтому")
# "It must be C.", "so C.": the letter has to end there, for "it is a dog" and "it is C major" name no option
_POINTED = re.compile(
    rf"(?i:\b(?:(?:{_SUBJECT})(?:['’]s|\s(?:{_SUBJECT_IS}))|c['’]est|(?:{_SO}),?)\s(?:(?:{_FILLER})\s)?)([A-J])(?=\s?(?:$|[\n.,;:!?)]))"
)
_JUDGED = re.compile(rf"(?<![\w'’])([A-J])(?:\s(?i:{_VERDICT})|\s?(?:{_CJK_VERDICT}))")
_LINE_START = re.compile(
    r"^(?:[(\[]\s?([A-Ja-j])\s?[)\]]|([A-Ja-j])\s?[.):。、](?!\w)|([A-Ja-j])\s?$|([A-J])\s[-–—]\s"
    rf"|([A-J]),?\s{_REASON}|([A-J])\s?(?:입니다|이다|です|だ)(?!\w))",
    re.MULTILINE,
)
_BRACKETED = re.compile(r"[(\[]\s?([A-J])\s?[)\]]")
_LABELLED = re.compile(r"\s?(?:\(([A-J])\)|([A-J])(?:[.):]|\s[-–—]|$))\s?(.*)", re.DOTALL)
_ANSWER_IS = re.compile(
    rf"(?i:\b(?:answer|option|choice|antwort|respuesta|réponse|ответ)\s?(?:(?:{_IS})\b|:)|答案(?:是|:)|答えは|정답은)\s?"
)


def choice() -> Metric:
    """1 when the one option that the output names is a reference's: its letter, A to J, or its text.

    A reference is "B", "(B)", "B. text" or an option's bare text. An output that names several options, or
    none, scores 0. What an answer sentence names ("the answer is B", "B is correct", in English, German,
    Spanish, French, Italian, Portuguese, Russian, Chinese, Korean or Japanese) wins over letters elsewhere, and
    a letter over a text.
    """

    def score(output: str, references: Sequence[str]) -> float:
        answer = _plain(output)
        letters = _chosen(answer)
        for reference in references:
            letter, text = _option(_plain(reference))
            if letter is not None and letters:
                if letters == {letter}:
                    return 1.0
            elif text and _says(answer, text):
                return 1.0
        return 0.0

    signature = "choice|options:A-J|ambiguous:0|norm:nfkc|refs:any|version:{}"
    return Metric("choice", signature.format(2), score, (signature.format(1),))


def chosen_letters(output: str) -> set[str]:
    """The option letters that an answer names, upper case: one when it is clear, several when it is not."""
    return _chosen(_plain(output))


def _chosen(text: str) -> set[str]:
    cued: set[str] = set()
    for match in _CUED.finditer(text):
        cued |= _letters(match.groups()[:3])
        for groups in re.findall(_LETTER, match[4]):
            cued |= _letters(groups)
    for pattern in (_POINTED, _JUDGED):
        cued.update(pattern.findall(text))
    if cued:
        return cued
    if _LINE_START.match(text):
        # every labelled line counts: an output that lists the options has chosen none
        labels = {letter for groups in _LINE_START.findall(text) for letter in _letters(groups)}
        return labels | set(_BRACKETED.findall(text))
    return set(_BRACKETED.findall(text))


def _letters(groups: Iterable[str | None]) -> set[str]:
    return {letter.upper() for letter in groups if letter}


def _plain(text: str) -> str:
    """Without the marks that models put around letters (Markdown, LaTeX boxes, full-width forms), and with one
    white space, a line end where there was one, instead of several."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\(?:boxed|text|mathbf|textbf|mathrm)\s?\{([^{}]*)\}", r"(\1)", text)
    text = re.sub(r"\\(?:boxed|text|mathbf|textbf|mathrm)\s?\{([^{}]*)\}", r"\1", text)  # one inside another
    text = re.sub(r"[*_`$\"“”「」『』]|^#+|</?\w+>", "", text, flags=re.MULTILINE)
    return re.sub(r"\s+", lambda space: "\n" if "\n" in space[0] else " ", text).strip()


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
    said = _ANSWER_IS.search(answer)
    forms = {answer, _option(answer)[1]}
    if said:
        rest = answer[said.end() :]
        forms |= {rest, _option(rest)[1]}
    return _folded(text) in {_folded(form) for form in forms}


def _folded(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s.+-]", " ", text.casefold()).split()).strip(" .")
