"""The answers that models wrote, one by one, as a judge or a person rates them; which of them are drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobqueue import answers
from jobqueue.errors import NotFoundError
from jobqueue.job import Job, JobState
from jobqueue.storage import Storage

FILE = "answers.jsonl"  # one line for each reference answer, beside the questions of answers.FILE


@dataclass(frozen=True)
class Written:
    """What one model wrote as an answer to one row."""

    index: int  # row of the file, from 0
    question: str  # with its options, where it has some
    reference: str  # the right answer
    text: str


def read_written(questions: str, texts: str) -> dict[int, Written]:
    """By the row's index, from the content of `questions.jsonl` and `answers.jsonl`, each "" where there is none.

    Raises ValueError, KeyError where they hold something else.
    """
    rows = [_of_text(row) for row in _rows(texts) if row["text"] is not None and row.get("question")]
    rows += [_of_question(row) for row in _rows(questions) if row.get("text") is not None and row.get("question")]
    return {row.index: row for row in rows}


def _rows(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.split("\n") if line]


def _of_text(row: Mapping[str, Any]) -> Written:
    return Written(row["index"], row["question"], row["reference"], row["text"])


def _of_question(row: Mapping[str, Any]) -> Written:
    options: Mapping[str, str] = row["options"]
    asked = "\n".join([row["question"], *(f"{letter}. {text}" for letter, text in options.items())])
    return Written(row["index"], asked, f"{row['answer']}. {options[row['answer']]}", row["text"])


def of_job(job: Job, storage: Storage) -> dict[int, Written]:
    """What an evaluation wrote; nothing where it did not succeed. Raises StorageError."""

    def text(name: str) -> str:
        try:
            return storage.read_text(f"{job.outcome['folder']}/{name}")
        except NotFoundError:
            return ""

    return read_written(text(answers.FILE), text(FILE)) if job.state is JobState.SUCCEEDED else {}


def drawn(written: Mapping[int, Written], limit: int | None, seed: int) -> list[Written]:
    """At most `limit` of them, in an order that hangs on the questions and the seed alone: the same for every model."""

    def place(row: Written) -> str:
        return hashlib.sha256(json.dumps([seed, row.index, row.question, row.reference]).encode()).hexdigest()

    return sorted(written.values(), key=place)[:limit]
