"""choice: the option that an answer names, by its letter A to J or by its text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise

from messcli.metrics.base import Metric

# Linear by construction: `_plain` leaves one white space at a time, and every repetition in a pattern that is
# searched for has a bound, or takes characters that can't begin the pattern again. So the work at each place
# of a text has a bound too.

_CJK = r"\u3040-\u30FF\u3400-\u9FFF\uAC00-\uD7AF"
_END = (
    rf"(?![^\W{_CJK}]|['’])"  # a Latin word ends here; Chinese, Japanese and Korean write on without a space
)

_REASON = (
    r"(?:because|since|as|for|with|which|due|based|weil|denn|da|porque|ya|parce|car|puisque|perché|poiché|pois|"
    r"потому|поскольку|так)\b"
)
_AND = r"(?:or|and|nor|oder|und|o|y|e|u|ou|et|или|и)\b"


def _any(words: str) -> str:
    """A pattern for any of the words of a table; the longest first, so that none hides another."""
    return "|".join(
        word.replace("_", r"\s") for word in sorted(words.split(), key=lambda word: (-len(word), word))
    )


_ADJECTIVE = _any(
    "final correct right best my only most_likely most_appropriate most_suitable most_accurate "
    "richtige korrekte beste meine richtig korrekt "
    "correcta final mi mejor única más_adecuada bonne meilleure ma correcte juste exacte "
    "corretta giusta esatta migliore mia finale correta certa melhor minha "
    "правильный правильным верный верным мой окончательный"
)
_HEAD = _any(
    "answer option choice solution letter statement guess ans "
    "antwort lösung auswahl antwortmöglichkeit buchstabe "
    "respuesta opción opcion solución alternativa letra "
    "réponse reponse choix lettre "
    "risposta opzione scelta soluzione lettera alternativa "
    "resposta opção solução gabarito "
    "ответ ответом вариант вариант_ответа буква"
)
_IS = _any(
    "is was would_be should_be must_be will_be ist wäre lautet ist_also es es_la sería debe_ser est est_la est_donc "
    "serait doit_être è è_la sarebbe é é_a seria é_o является это будет"
)
_FILLER = _any(
    "clearly therefore thus definitely option choice letter answer die_antwort antwort option buchstabe also daher "
    "la_opción opción la_letra la la_réponse l'option donc le_choix l'opzione opzione la_lettera "
    "a_opção opção a_letra letra a_alternativa вариант буква под_буквой"
)
_CHOOSE = _any(
    "choose pick select chose go_with answer_with leaves leaving wähle nehme tippe_auf mich_für elijo elegiría escojo "
    "selecciono choisis choisirais opte_pour scelgo sceglierei escolho escolho_a escolheria выбираю выбрал выбрала"
)
_SUBJECT = _any("it this that which das es esto eso c'est ce_sera ça это")
_SUBJECT_IS = _any(
    "is must_be should_be would_be has_to_be can_only_be will_be muss ist es debe_ser tiene_que_ser est doit_être"
)
_RIGHT = _any(
    "correct right true richtig korrekt correcta correcto verdadera correcte exact exacte juste vrai corretta corretto "
    "giusta esatta vera correta correto certa verdadeira"
)
_BEST = _any(
    "only best most_likely most_appropriate most_suitable most_accurate most_plausible correct right richtige korrekte "
    "bonne mejor migliore melhor"
)
_BE = _any(
    "is ist es est è é está would_be should_be must_be has_to_be will_be seems seems_to_be appears_to_be looks "
    "must_therefore_be parece sembra"
)
_SURELY = _any("indeed definitely clearly therefore thus also certainly probably likely the_most die la a")
# What says, after a letter, that it is the answer
_VERDICT = (
    rf"(?:{_BE})\s(?:(?:{_SURELY})\s){{0,2}}(?:(?:{_RIGHT})\b"
    rf"|(?:the\s|die\s|la\s|l['’])?(?:(?:{_BEST})\s){{1,2}}(?:{_HEAD}|one)\b"
    rf"|(?:the|die|la|my|mi|ma|meine|a)\s(?:{_HEAD}|one)\b)"
    r"|(?:stimmt|fits\sbest|trifft\szu|it\sis(?=[\s.!]{0,2}$))"
    r"|(?:wählen|nehmen|richtig|korrekt)\b"
    r"|(?:(?:является|это|[-–—])\s)?(?:правильн|верн)(?:ый|ая|о|а|ым|ен)?\b"
)
# "Therefore the right answer is" turned round: German puts the verb first
_TURNED = r"(?:somit|daher|damit|also|folglich|deshalb|makes)\s(?:ist\s)?"
# in scripts without word boundaries
_CJK_HEAD = _any(
    "正确答案 正確答案 答案 正确选项 正確選項 选项 選項 应选 應選 应该选 故选 故選 因此选 所以选 选择 選擇 选 選 "
    "答え 正解 正答 回答 解答 選択肢 正しいの 정답 정답은 답은 답 답변 선택지 옵션 보기"
)
_CJK_IS = _any("应该是 應該是 应为 應為 是 为 為 は が 은 는 이 가")
_CJK_VERDICT = (
    r"(?:选项|選項|項|项)?(?:是)?(?:正确|正確|对的|對的)"
    r"|(?:が|は)\s?(?:正解|正しい|正答|答え)|(?:가|이|는|은)\s?(?:정답|맞|옳|답이)|(?:번이|번)\s?정답"
    r"|を選|[를을]\s?(?:선택|고르|고릅|골라|택)"
)

# A letter as an option: upper case where it ends a word, lower case only where punctuation says that it is
# no word ("answer: a" but not "the answer is a dog"). "A" and "I" are English words, so they need it too,
# or one of the words that follow a letter and never a noun.
_AFTER_WORD = rf"(?=\s?(?:$|[\n.,;:!?)\]}}>|/&。、，]|[-–—]\s|[{_CJK}])|\s(?:{_REASON}|{_AND}|{_VERDICT}))"
_LETTER = rf"(?:[(\[{{<]\s?([A-Ja-j])\s?[)\]}}>]|([B-HJ]){_END}|([AIa-j]){_AFTER_WORD})"
_SEVERAL = rf"(?:\s?(?:,|/|&|\b{_AND}|和|或|と|と|와|과|또는){{1,2}}\s?{_LETTER})"
# "C가 아니다", "Cではない": Korean and Japanese put the no behind the letter
_NOT_DENIED = r"(?!\s?[가이]?\s?아[니닙닌]|\s?(?:では|じゃ|で)は?(?:な|あり))"

# What denies an option: before its letter, or before what points at it; and behind
_NOT = (
    r"(?i:not|cannot|never|neither|nor|wrong|incorrect\w{0,2}|false|nicht|kein|weder|falsch|ni|fals[ao]|pas|"
    r"faux|fausse|non|né|errat[ao]|sbagliat[ao]|não|nem|errad[ao]|не|ни|неверн\w{0,2}|неправильн\w{0,2})"
)
_DENIED_BEFORE = re.compile(
    rf"(?:\b(?:{_NOT}|(?i:than|instead\sof|no|statt|plutôt\sque))|n['’]t)\s"
    r"(?i:(?:be|think|believe|say|that|it['’]s|it\sis|option|es|è|é)\s){0,3}(?:la\s)?$|(?:不是|不选|非|不)$"
)
_DENIED_BEHIND = re.compile(
    rf"(?:\s(?!{_REASON})[^\s.,;:!?()]{{1,16}}){{0,4}}?(?:\s{_NOT}\b|n['’]t\b|\s(?i:out|eliminated|no)\b)"
    rf"|\s?[:,]\s?(?:{_NOT}|(?i:no|nein|нет))(?!\w|\s(?:option\s|la\s)?.(?!\w))"
    rf"|[^\s.,;:!?()。、，]{{0,8}}?\s?(?:아[니닙닌]|틀[린렸리]|(?:では|じゃ|く)な|ではあり|間違|誤|違|错|錯|不(?!是\s?[A-J]))"
)

_CUED = re.compile(
    rf"(?:(?i:\b(?:(?:{_ADJECTIVE})\s){{0,3}}(?:{_HEAD})\b(?:\s(?:{_ADJECTIVE})\b)?(?:\s(?:{_IS})(?!\w))?"
    rf"(?:\s(?:{_FILLER})\b){{0,3}}['\s]?(?:[:=.]|[-–—](?=\s)|[-=]>|→)?\s?['‘’]?(?:(?:{_FILLER})\s)?"
    rf"|\b(?:(?:{_ADJECTIVE})\s){{1,3}}one\s(?:{_IS})\s"
    rf"|\b(?:{_RIGHT})(?:\s(?:{_IS})\s(?:also\s)?|:\s)(?:(?:{_FILLER})\s)?"
    rf"|\b(?:{_CHOOSE})\s(?:only\s)?(?:(?:{_FILLER})\s){{0,2}})"
    rf"|(?:{_CJK_HEAD})\s?(?:{_CJK_IS})?\s?[:=]?\s?){_LETTER}{_NOT_DENIED}({_SEVERAL}{{0,9}})"
)
# "It must be C.": the letter has to end there, for "it is a dog" and "it is C major" name no option
_POINTED = re.compile(
    rf"(?i:\b(?:(?:{_SUBJECT})(?:['’]s|\s(?:{_SUBJECT_IS}))|c['’]est|s['’]agit\sde|это|es\smuss(?=\s.\ssein)|che\ssia)\s"
    rf"(?:(?:{_FILLER})\s)?)([A-J])(?=\s?(?:$|[\n.,;:!?)])|\s{_REASON}|\ssein\b)"
)
_JUDGED = re.compile(
    rf"(?<![^\W{_CJK}])(?<!['’])([A-J])(?:\s(?i:{_VERDICT})|\s?(?:{_CJK_VERDICT}))"
    rf"|^([b-hj])\s{_VERDICT}"
    rf"|\b(?i:{_TURNED})([A-J])\s(?i:(?:the|die)\s(?:(?:{_BEST})\s)?(?:{_HEAD})\b|(?:{_RIGHT})\b)",
    re.MULTILINE,
)
_LINE_START = re.compile(
    rf"^(?:[(\[{{<]\s?([A-Ja-j])\s?[)\]}}>]|([A-Ja-j])\s?[.):。、](?![^\W{_CJK}])|([A-J])[.):、](?=[^\W\d_]{{2}})"
    r"|([A-Ja-j])\s?$|([A-J])\s[-–—]\s"
    rf"|([A-J])(?:,?\s{_REASON}|[!])|([A-J])\s?(?:번)?(?:입니다|이다|예요|이에요|です|だ|번)(?!\w))",
    re.MULTILINE,
)
_BRACKETED = re.compile(r"[(\[]\s?([A-J])\s?[)\]]")
_LABELLED = re.compile(r"\s?(?:\(([A-J])\)|([A-J])(?:[.):]|\s[-–—]|$))\s?(.*)", re.DOTALL)
_ANSWER_IS = re.compile(
    rf"(?i:\b(?:answer|option|choice|antwort|respuesta|réponse|risposta|resposta|ответ)\s?(?:(?:{_IS})(?!\w)|:)"
    r"|答案(?:是|:)|答えは|정답은)\s?"
)

# Where nothing of all that stands: the one letter that is left once the denied ones are out, "Not A or B, so C."
_ALONE = re.compile(rf"(?<![^\W{_CJK}])(?<!['’])([A-J]){_END}(?![-+#/])")
_ARTICLE = re.compile(rf"\s(?!{_REASON}|{_AND})[^\W\d_A-Z]{{2}}")  # after A, E, I: "A dog", "I think"
_BETWEEN = re.compile(rf"\s?(?:,|/|&)?\s?(?:{_AND}|和|或|と|와|과)?\s?")
_CLAUSE = re.compile(r"(?:^|[\n.;:,!>)。、，；]\s?|[→=]\s?)$")
_LED_TO = re.compile(
    r"(?:(?i:(?:^|[\n.;:,!]\s?|\b(?:que|quindi|donc|portanto)\s)(?:la|es|è|é)\s(?:la\s|a\s)?"
    r"|\b(?:so|thus|hence|therefore|then|say|guess|think|believe|only|but|get|conclude|also|somit|daher|sondern|sagen"
    r"|sino|diría|donc|mais|dirais|quindi|dunque|ma|bensì|direi|credo|mas|logo|portanto|diria|а|значит|итак|думаю|что"
    r"|поэтому)\s(?:(?:it\sis|it['’]s|is)\s|la\s|a\s|option\s)?)"
    r"|[是选選即故]|所以|因此|よって|따라서\s?|그러므로\s?|아니라\s?|なく)$"
)
_STOPS = re.compile(
    rf"\s?(?:$|[\n,;:!)。、，]|\.(?!\w)|[-–—]\s)|\s{_REASON}|\s?번?(?:입니다|이다|다\b|예요|이에요|です|だ|である|になり|と思)"
)
_PREDICATE = re.compile(rf"\s(?:{_BE}|fits|matches|works|rather|not|and\snot|nicht|pas)\b")
_LOOK = 32  # characters before a letter that are looked at
_MOST_MENTIONS = 50  # letters alone; a text with more is a list of them
_LATEX = r"\\(?:boxed|fbox|text|mathbf|textbf|mathrm)\s?"
# \boxed{C. Paris}
_BOXED_OPTION = r"\\(?:boxed|fbox)\s?\{(?:\\\w{4,6}\s?\{)?\s?\(?([A-J])(?:\)[.:]?|[.:])\s[^{}]*\}{1,2}"


def choice() -> Metric:
    """1 when the one option that the output names is a reference's: its letter, A to J, or its text.

    A reference is "B", "(B)", "B. text" or an option's bare text. An output that names several options, or
    none, scores 0. What an answer sentence names ("the answer is B", "B is correct", in English, German,
    Spanish, French, Italian, Portuguese, Russian, Chinese, Korean or Japanese) wins over letters elsewhere,
    and such a letter over a text. Else the one letter counts that is left once denied ones are out.
    """

    def score(output: str, references: Sequence[str]) -> float:
        answer = _plain(output)
        letters = _chosen(answer)
        options = [_option(_plain(reference)) for reference in references]
        for letter, text in options:
            if letter is not None and letters:
                if letters == {letter}:
                    return 1.0
            elif text and _says(answer, text):
                return 1.0
        return float(not letters and _left_over(answer) in {letter for letter, _ in options if letter})

    signature = "choice|options:A-J|ambiguous:0|norm:nfkc|refs:any|version:{}"
    return Metric("choice", signature.format(3), score, (signature.format(1), signature.format(2)))


def chosen_letters(output: str) -> set[str]:
    """The option letters that an answer names, upper case: one when it is clear, several when it is not."""
    answer = _plain(output)
    last = _left_over(answer)
    return _chosen(answer) or ({last} if last else set())


def _chosen(text: str) -> set[str]:
    cued: set[str] = set()
    for match in _CUED.finditer(text):
        if not _is_denied(text, match.start(), match.start(4)):
            cued |= _letters(match.groups()[:3])
            for groups in re.findall(_LETTER, match[4]):
                cued |= _letters(groups)
    for pattern in (_POINTED, _JUDGED):
        for match in pattern.finditer(text):
            if not _is_denied(text, match.start(), match.end()):
                cued |= _letters(match.groups())
    if cued:
        return cued
    bracketed = {
        match[1]
        for match in islice(_BRACKETED.finditer(text), _MOST_MENTIONS)
        if not _is_denied(text, match.start(), match.end())
    }
    if _LINE_START.match(text):
        # every labelled line counts: an output that lists the options has chosen none
        return bracketed | {letter for groups in _LINE_START.findall(text) for letter in _letters(groups)}
    return bracketed


def _is_denied(text: str, start: int, end: int) -> bool:
    """Whether what stands from `start` to `end` of a text is said not to be so."""
    before = text[max(0, start - _LOOK) : start]
    return bool(_DENIED_BEFORE.search(before) or _DENIED_BEHIND.match(text, end))


def _left_over(text: str) -> str | None:
    """The one letter that stands alone in a text and isn't denied there; None where there are several, or none.

    It has to begin a clause or to follow a word such as "so": "Hepatitis B" names no option.
    """
    mentions = [
        mention
        for mention in islice(_ALONE.finditer(text), _MOST_MENTIONS)
        if mention[1] not in "AEI" or not _ARTICLE.match(text, mention.end())
    ]
    denied = [_is_denied(text, mention.start(), mention.end()) for mention in mentions]
    joined = [bool(_BETWEEN.fullmatch(text, a.end(), b.start())) for a, b in pairwise(mentions)]
    for i in range(len(joined)):  # "not A or B"
        denied[i + 1] |= denied[i] and joined[i]
    for i in reversed(range(len(joined))):  # "A and B are wrong"
        denied[i] |= denied[i + 1] and joined[i]
    left = [i for i, is_denied in enumerate(denied) if not is_denied]
    letters = {mentions[i][1] for i in left}
    if len(letters) != 1 or len(mentions) == _MOST_MENTIONS:
        return None
    for mention in (mentions[i] for i in left):
        before = text[max(0, mention.start() - _LOOK) : mention.start()]
        ends = _STOPS.match(text, mention.end())
        if _CLAUSE.search(before) and (ends or _PREDICATE.match(text, mention.end())):
            return letters.pop()
        if ends and _LED_TO.search(before):
            return letters.pop()
    return None


def _letters(groups: Iterable[str | None]) -> set[str]:
    return {letter.upper() for letter in groups if letter}


def _plain(text: str) -> str:
    """Without the marks that models put around letters (Markdown, LaTeX, brackets of other scripts, full-width forms),
    and with one white space, a line end where there was one, instead of several."""
    text = re.sub(r"^\s*\*\*\s?([A-J])\s?\*\*", r"(\1)", unicodedata.normalize("NFKC", text))
    text = re.sub(r"[【《]\s?([A-J])\s?[】》]", r"(\1)", text)
    text = re.sub(r"(?<!\w)['‘’]([A-J])['‘’](?!\w)", r"\1", text)
    text = re.sub(r"\\([()\[\]])", r"\1", text)
    text = re.sub(_BOXED_OPTION, r"(\1)", text)
    text = re.sub(rf"{_LATEX}\{{([^{{}}]*)\}}", r"(\1)", text)
    text = re.sub(rf"{_LATEX}\{{([^{{}}]*)\}}", r"\1", text)  # one inside another
    text = re.sub(r"[*_`~$\"“”「」『』【】]|^#+|</?(?![A-J]>)\w+>", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s+", lambda space: "\n" if "\n" in space[0] else " ", text).strip()
    return re.sub(r"^A:\s(?=\(?[A-J]\)?(?:$|[.,:)\s]))", "Answer: ", text)  # "Q: ... A: C"


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
