"""Which option does a generated answer name? Pure. The rules are in docs/evaluation.md.

A verbose right answer counts, whether it says the option's text or its letter. An answer that names two
different options does not, nor does one that only looks like it: the article in "A fish lives in water" is
not the letter A, "Not trout" does not name trout.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping

ASKED_FORM = "correct answer is"  # what the assistant is trained to say: "The correct answer is X."
_SURELY = (
    r"(?:\s*,?\s*(?:clearly|therefore|thus|then|definitely|probably|(?:most )?likely|of course|option|choice)\b,?)*"
)
# What announces an answer. It counts for more than an option that is mentioned anywhere.
_ENGLISH = (
    r"(?<!incorrect )(?<!wrong )\b(?:answer|choice|option)(?: here| then)?"
    rf"(?:\s+(?:is|would be|should be|must be)\b{_SURELY}\s*:?|\s*[:=]|\s+[-\u2013\u2014](?=\s))\s*"
)
_OTHERS = (
    r"(?:respuesta|resposta|r\u00e9ponse|risposta|antwort|antwoord|odpowied\u017a|cevap|\u043e\u0442\u0432\u0435\u0442)"
    r"(?:\s+\w{3,}){0,2}\s*(?::|=|\b(?:es|\u00e9|est|\u00e8|ist|lautet|is|to)\b\s*:?)\s*"
    # Chinese, Japanese, Korean, Hindi, Arabic: the verb may follow the answer, or there is none.
    r"|(?:\u7b54\u6848|\u6b63\u89e3|\u7b54\u3048|\uc815\ub2f5|\u0909\u0924\u094d\u0924\u0930"
    r"|\u0627\u0644\u0625\u062c\u0627\u0628\u0629(?: \u0627\u0644\u0635\u062d\u064a\u062d\u0629)?)"
    r"(?:\u662f|\u4e3a|\u306f|\uc740|\s+\u0647\u064a)?\s*:?\s*"
)
_CLAIM = re.compile(f"{_ENGLISH}|{_OTHERS}", re.IGNORECASE)
# What comes before a letter that stands by itself: "I choose B.", "not A but B", "Therefore, B."
_WEAK_CLAIM = re.compile(
    r"\b(?:choose|pick|select|go with|it is|it's|it must be|therefore|thus|hence|so|(?<!all )but),?\s+(?:with\s+)?",
    re.IGNORECASE,
)
_NOT = re.compile(r"(?:\bnot|\bnever|\bcannot|n't)\s+$", re.IGNORECASE)
_NEGATION = re.compile(
    r"(?:\b(?:not|cannot|never|rather than|instead of|except|exclude|eliminate|rule out)|n't)\s+(?:be\s+)?"
    r"(?:an?\s+|the\s+)?(?:(?:option|choice|answer)\s+)?(?:\(?[A-Z]\)?[.):]?\s*)?\(?$",
    re.IGNORECASE,
)
_DENIED = r"(?!\)?\s+(?:is|was|are)(?:\s+(?:not|never|incorrect|wrong|false)\b|n't)|\)?\s+(?:can|cannot|can't)\b)"
_CORRECT = (
    r"\)?\s+is\s+(?:clearly |definitely )?(?:the )?(?:most (?:likely|appropriate) )?(?:correct|right|best|answer)\b"
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s+[A-Z]|\s*$)")
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|user|human|q)\s*\d*\s*:", re.IGNORECASE)
_SHORT = 3  # a shorter option text ("5", "no") is found in any prose: only a claim can name it


def has_asked_form(text: str) -> bool:
    """Whether the answer has the form that was asked for."""
    return ASKED_FORM in text.casefold()


def extract(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that `text` names, None where it names none or several."""
    text = _plain(text)
    text = _NEXT_QUESTION.split(text)[0]  # a model that goes on asks itself
    claimed = set(_announced(text, options))
    for claim in _CLAIM.finditer(text):
        claimed |= _claimed(text, claim.end(), options)
    opening = _claimed(text, 0, options, opening=True)
    starts = {letter for letter in options if re.search(rf"^\(?{re.escape(letter)}[.):]", text, re.MULTILINE)}
    if not claimed:
        # Options that are only listed are not claimed, unless it is the first one that is.
        claimed = starts if len(starts) > 1 else opening or _mentioned(text, options)
    elif re.match(r"\(?[A-Z]\)?[.):]", text):  # "A. trout. The correct answer is B." says two things
        claimed |= opening
    # Two letters of one text are one answer.
    texts = {_plain(options[letter]).casefold() for letter in claimed}
    return min(claimed) if len(texts) == 1 else None


def _plain(text: str) -> str:
    """Without markup and typographic variants; lines are kept."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u3002", ". ").replace("\u3001", ", ")
    text = re.sub(r"</?\w+>|<\|\w+\|>", " ", text)
    for _ in range(2):  # \boxed{\text{B}}
        text = re.sub(r"\$?\\(?:boxed|text|textbf|mathbf|mathrm)\{([^{}\n]*)\}\$?", r"\1", text)
    text = re.sub(r"\[([A-Za-z])\]", r"(\1)", text)
    text = re.sub(r"[*_`\"\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d]+", "", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _alternatives(options: Mapping[str, str]) -> str:
    return "|".join(re.escape(letter) for letter in sorted(options, key=len, reverse=True))


def _announced(text: str, options: Mapping[str, str]) -> Iterator[str]:
    """The letters of "option B", "I choose B.", "B is correct"; not those of "not option B", "option B is wrong"."""
    letters = _alternatives(options)
    alone = rf"\(?({letters})\)?(?=[.:;!]|\s*$|\s*\n|,? (?:because|since|as)\b)"
    for pattern in (
        rf"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer) \(?({letters})\b{_DENIED}",
        rf"(?<!\w)\(?({letters}){_CORRECT}",
    ):
        for found in re.finditer(pattern, text):
            before = text[: found.start()]
            if not _NEGATION.search(before) and not re.search(r"(?:\bincorrect|\bwrong|,|\band|\bor)\s+$", before):
                yield found[1]
    for claim in _WEAK_CLAIM.finditer(text):
        letter = re.match(alone, text[claim.end() :])
        if letter and not _NOT.search(text[: claim.start()]):
            yield letter[1]


def _named(text: str, options: Mapping[str, str], shortest: int = 1) -> list[tuple[int, int, str]]:
    """(start, end, letter) of every option text in `text`; one inside a longer one does not count."""
    spans: list[tuple[int, int, str]] = []
    for letter, option in options.items():
        wanted = re.sub(r"\s+", " ", _plain(option)).rstrip(". ")
        if len(wanted) < shortest:
            continue
        pattern = rf"(?<!\w){re.escape(wanted)}(?!\w)".replace(r"\ ", r"\s+")
        spans += [(found.start(), found.end(), letter) for found in re.finditer(pattern, text, re.IGNORECASE)]
    return [
        (start, end, letter)
        for start, end, letter in spans
        if not _NEGATION.search(text[:start])
        and not any(s <= start and end <= e and (e - s) > (end - start) for s, e, _ in spans)
    ]


def _claimed(text: str, start: int, options: Mapping[str, str], opening: bool = False) -> set[str]:
    """The options named from `start` to the end of the sentence: a letter at its beginning, and texts.

    `opening`: the answer begins here without an announcement, so a text counts only at the very beginning.
    """
    rest = text[start:]
    spans = _named(rest, options)
    leading = max((end for begin, end, _ in spans if begin == 0), default=0)
    letters = _alternatives(options)
    # "C.", "(C)", "C)", "C:", "C, because", "option C", or nothing but "C"; never "A fish".
    found = re.match(
        rf"(?:option\s+)?(?:\(({letters})\)"
        rf"|({letters})(?=[.):,;]|\s*$|\s*\n|\s+[-\u2013\u2014]\s|\s*[^\x00-\x7f\s]|\s+(?:because|since|as|and|or)\b))",
        rest,
        re.IGNORECASE,
    )
    named: set[str] = set()
    if found and found.end() > leading:
        named |= _with_case(found[1] or found[2], options)
        leading = found.end() + 1
        # "A or B", "A, B and D" name several.
        more = re.compile(rf"[.)]?\s*(?:,|/|&|and\b|or\b)\s*(?:(?:and|or)\s+)?\(?({letters})\b(?!\w)")
        place = found.end()
        while following := more.match(rest, place):
            named |= _with_case(following[1], options)
            place = following.end()
    stop = _SENTENCE_END.search(rest, leading)
    end = stop.start() if stop else len(rest)
    if opening and not leading:
        return set()
    return named | {key for begin, _, key in spans if begin < end} | _in_parentheses(rest[:end], options)


def _with_case(letter: str, options: Mapping[str, str]) -> set[str]:
    return {key for key in options if key.casefold() == letter.casefold()}


def _in_parentheses(text: str, options: Mapping[str, str]) -> set[str]:
    """The letters of "(B)", which are neither denied nor part of an option's text."""
    inside = [(start, end) for start, end, _ in _named(text, options, shortest=_SHORT)]
    return {
        letter
        for letter in options
        for found in re.finditer(rf"\({re.escape(letter)}\)", text)
        if not _NEGATION.search(text[: found.start()])
        and not any(start <= found.start() and found.end() <= end for start, end in inside)
    }


def _mentioned(text: str, options: Mapping[str, str]) -> set[str]:
    """The options whose text, or whose letter in parentheses, occurs anywhere."""
    spans = _named(text, options, shortest=_SHORT)
    return _in_parentheses(text, options) | {letter for _, _, letter in spans}
