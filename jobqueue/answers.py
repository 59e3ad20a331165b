"""What models answered, question by question: the file that an evaluation leaves, and what a report shows of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FILE = "questions.jsonl"
MOST_CHANGED = 100  # questions in a report that were gained, and as many that were lost
MOST_CHARACTERS = 4_000  # of a question's text in a report
NO_PICK = "none"


@dataclass(frozen=True)
class Answer:
    """One question, and what one model made of it."""

    index: int  # row of the file, from 0
    answer: str  # the right letter
    picks: Mapping[str, str | None]  # metric -> letter; None: no option could be read from the answer
    right: frozenset[str]  # metrics whose pick is right
    question: str = ""  # "" in files of before 0.2
    options: Mapping[str, str] = field(default_factory=dict)  # letter -> text
    scores: Mapping[str, float] = field(default_factory=dict)  # letter -> log-likelihood, where that was asked for


Answers = Mapping[int, Answer]
"""Of one evaluation, by the question's index."""


@dataclass(frozen=True)
class Confusion:
    """How often a model picked which letter where another was right."""

    job: str
    label: str
    letters: tuple[str, ...]  # of the right answers: the rows
    picks: tuple[str, ...]  # of the columns; "none" last, where an answer named no option
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChangedQuestion:
    """One that either the base model or the best trial has right, and the other wrong."""

    index: int
    question: str
    options: Mapping[str, str]
    answer: str
    base_pick: str | None
    pick: str | None  # of the best trial
    gained: bool  # right by the trial; False: by the base model


def read_answers(lines: str) -> dict[int, Answer]:
    """The content of `questions.jsonl`. Raises ValueError, KeyError where it is something else."""
    # not splitlines: a question may hold a line separator of Unicode's
    return {row["index"]: _answer(row) for row in map(json.loads, filter(None, lines.split("\n")))}


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(
        index=row["index"],
        answer=row["answer"],
        picks=row["picks"],
        right=frozenset(row["right"]),
        question=row.get("question", ""),
        options=row.get("options", {}),
        scores=row.get("scores", {}),
    )


def confusion(job: str, label: str, answers: Answers, metric: str) -> Confusion:
    """Of the picks by `metric`."""
    asked = [(answer.answer, answer.picks[metric] or NO_PICK) for answer in answers.values() if metric in answer.picks]
    letters = sorted({right for right, _ in asked})
    picks = sorted({*letters, *(pick for _, pick in asked)}, key=lambda pick: (pick == NO_PICK, pick))
    counted = Counter(asked)
    counts = tuple(tuple(counted[right, pick] for pick in picks) for right in letters)
    return Confusion(job, label, tuple(letters), tuple(picks), counts)


def changed(base: Answers, best: Answers, metric: str) -> tuple[ChangedQuestion, ...]:
    """The questions that only one of the two has right, in the order of the file, at most MOST_CHANGED each way."""
    both = [(base[index], best[index]) for index in sorted(base.keys() & best.keys())]
    gained = [pair for pair in both if metric in pair[1].right - pair[0].right][:MOST_CHANGED]
    lost = [pair for pair in both if metric in pair[0].right - pair[1].right][:MOST_CHANGED]
    return tuple(_changed(*pair, metric, won) for pairs, won in ((gained, True), (lost, False)) for pair in pairs)


def _changed(base: Answer, best: Answer, metric: str, gained: bool) -> ChangedQuestion:
    return ChangedQuestion(
        index=best.index,
        question=_short(best.question),
        options={letter: _short(text) for letter, text in best.options.items()},
        answer=best.answer,
        base_pick=base.picks.get(metric),
        pick=best.picks.get(metric),
        gained=gained,
    )


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
