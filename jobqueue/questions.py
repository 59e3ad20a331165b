"""Multiple-choice rows in the layouts that data sets have; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jobqueue.example import LETTERS, Example, MultipleChoice, Row, SkipRow, checked_text, first, parsed


def _options(value: object) -> dict[str, str]:
    value = parsed(value)
    if value is None:
        raise SkipRow("options is null")
    if isinstance(value, Mapping):
        if value.keys() == {"text", "label"}:  # as ARC and CommonsenseQA have them: two lists side by side
            labels, texts = parsed(value["label"]), parsed(value["text"])
            if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
                raise SkipRow("options have text and label that are not two lists of one length")
            value = dict(zip(map(str, labels), texts, strict=True))
        # A Parquet file gives every row every key that any row has, as null.
        pairs = [(str(key).strip(), option) for key, option in value.items() if option is not None]
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        pairs = list(zip(LETTERS, value, strict=False))
    else:
        raise SkipRow("options is neither a list nor a dict")
    options = {letter: checked_text(option, "an option") for letter, option in pairs}
    if len(options) < 2:
        raise SkipRow("fewer than two options")
    return options


def _letter(value: object, options: dict[str, str], text_first: bool, sure: bool = True) -> str:
    """The letter that `value` means: an option's text, its letter, or its place from 0. A number is no text.

    Where it may be a text as well as a place, text goes first; if that is not `sure`, the row is skipped.
    """
    if value is None or isinstance(value, (bool, dict, list)):
        raise SkipRow("answer is null" if value is None else "answer is not text")
    wanted = checked_text(value, "answer")
    by_text = next((letter for letter, text in options.items() if text == wanted), None)
    by_letter = next((letter for letter in options if letter.casefold() == wanted.casefold()), None)
    place = wanted.removesuffix(".0")
    is_place = place.isdecimal() and len(place) < 5 and int(place) < len(options)  # Python refuses 4,301 digits
    by_place = list(options)[int(place)] if is_place else None
    if isinstance(value, (int, float)):
        found = by_letter or by_place or by_text
    elif not sure and text_first and by_text and by_place and by_text != by_place:
        raise SkipRow(
            "answer may be an option's text or its place; say `columns: {options: choices}` if it is a text, "
            "`columns: {answer_idx: answer}` if it is a place"
        )
    else:
        found = (by_text or by_letter or by_place) if text_first else (by_letter or by_place or by_text)
    if found is None:
        raise SkipRow("answer is not among the options")
    return found


QUESTION = ("question", "question_stem", "ctx")
OPTIONS = ("options", "choices", "endings")
ANSWER = ("answer_idx", "answer", "answerKey", "label")


def multiple_choice(row: Row) -> Example:
    """A question, its options (list or dict) and the answer: text, letter or place from 0."""
    question, options = checked_text(first(row, QUESTION), "question"), _options(first(row, OPTIONS))
    given = [column for column in ANSWER if row.get(column) is not None]
    if not given:
        raise SkipRow("answer is null")
    # MMLU's choices have places for answers; where they went through a CSV file, a place looks like a text.
    sure = row.get("choices") is None or row.get("options") is not None or len(given) > 1
    # A `label` beside an answer is about something else.
    named = [
        _letter(row[column], options, column == "answer", sure)
        for column in given
        if column != "label" or given == ["label"]
    ]
    if any(options[letter] != options[named[0]] for letter in named):
        raise SkipRow(f"{' and '.join(reversed(given))} disagree")
    choice = MultipleChoice(question, options, named[0])
    return Example(choice.conversation(), choice)


LETTERED = ("opa", "opb", "opc", "opd", "ope")


def lettered(row: Row) -> Example:
    """question, opa to opd (or ope), cop: the place of the right one from 0, as MedMCQA has it."""
    given = {letter: row.get(column) for letter, column in zip(LETTERS, LETTERED, strict=False)}
    return multiple_choice({"question": row.get("question"), "options": given, "answer_idx": row.get("cop")})
