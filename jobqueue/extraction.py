"""Which option does a generated answer name? Pure.

A verbose right answer counts, whether it says the option's text or its letter. An answer that names two
different options does not, nor does one that only looks like it: the article in "A fish lives in water" is
not the letter A, "Not trout" does not name trout.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

ASKED_FORM = "correct answer is"  # what the assistant is trained to say: "The correct answer is X."
# What announces an answer. It counts for more than an option that is mentioned anywhere.
_CLAIM = re.compile(
    r"(?<!incorrect )(?<!wrong )\b(?:answer|choice|option)(?: here| then)?"
    r"(?:\s+(?:is|would be|should be|must be)\b\s*:?|\s*[:=])\s*",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"(?:\b(?:not|cannot|never|rather than|instead of|except)|n't)\s+(?:be\s+)?(?:an?\s+|the\s+)?$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s+[A-Z]|\s*$)")
_SHORT = 3  # a shorter option text ("5", "no") is found in any prose: only a claim can name it


def has_asked_form(text: str) -> bool:
    """Whether the answer has the form that was asked for."""
    return ASKED_FORM in text.casefold()


def extract(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that `text` names, None where it names none or several."""
    text = _plain(text)
    announced = r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer) \(?"
    claimed = {letter for letter in options if re.search(rf"{announced}{re.escape(letter)}\b", text)}
    for claim in _CLAIM.finditer(text):
        claimed |= _claimed(text, claim.end(), options)
    opening = _claimed(text, 0, options, opening=True)
    if not claimed:
        claimed = opening or _mentioned(text, options)
    elif re.match(r"\(?[A-Z]\)?[.):]", text):  # "A. trout. The correct answer is B." says two things
        claimed |= opening
    # Two letters of one text are one answer.
    texts = {_plain(options[letter]).casefold() for letter in claimed}
    return min(claimed) if len(texts) == 1 else None


def _plain(text: str) -> str:
    """Without markup and typographic variants; lines are kept."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    text = re.sub(r"[*_`\"\u201c\u201d]+", "", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


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
    letters = "|".join(re.escape(letter) for letter in sorted(options, key=len, reverse=True))
    # "C.", "(C)", "C)", "C:", "C, because", "option C", or nothing but "C"; never "A fish".
    found = re.match(
        rf"(?:option\s+)?(?:\(({letters})\)|({letters})(?=[.):,;]|\s*$|\s*\n|\s+-\s))", rest, re.IGNORECASE
    )
    named = set()
    if found and found.end() > leading:
        letter = (found[1] or found[2]).casefold()
        named |= {key for key in options if key.casefold() == letter}
        leading = found.end() + 1
    stop = _SENTENCE_END.search(rest, leading)
    end = stop.start() if stop else len(rest)
    if opening and not leading:
        return set()
    return named | {key for begin, _, key in spans if begin < end}


def _mentioned(text: str, options: Mapping[str, str]) -> set[str]:
    """The options whose text, or whose letter in parentheses, occurs anywhere."""
    spans = _named(text, options, shortest=_SHORT)
    inside = [(start, end) for start, end, _ in spans]
    letters = {
        letter
        for letter in options
        for found in re.finditer(rf"\({re.escape(letter)}\)", text)
        if not any(start <= found.start() and found.end() <= end for start, end in inside)
    }
    return letters | {letter for _, _, letter in spans}
