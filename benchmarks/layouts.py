"""The same multiple-choice rows in every layout that loraq reads, for benchmarks/training.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jobqueue.questions import multiple_choice

Row = dict[str, Any]


def _turns(row: Row) -> tuple[str, str]:
    """What the user asks and the assistant answers, as loraq has it."""
    said = multiple_choice(row).conversation
    return said[0]["content"], said[1]["content"]


def _messages(row: Row) -> Row:
    return {"messages": multiple_choice(row).conversation}


def _sharegpt(row: Row) -> Row:
    user, assistant = _turns(row)
    return {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": assistant}]}


def _prompt_completion(row: Row) -> Row:
    return dict(zip(("prompt", "completion"), _turns(row), strict=True))


def _instruction(row: Row) -> Row:
    user, assistant = _turns(row)
    return {"instruction": "Answer the question.", "input": user, "output": assistant}


def _text(row: Row) -> Row:
    return {"text": "\n\n".join(_turns(row))}


def _place(row: Row) -> int:
    return list(row["options"]).index(row["answer_idx"])


def _options_as_list(row: Row) -> Row:
    return {"question": row["question"], "options": list(row["options"].values()), "answer": row["answer"]}


def _lettered(row: Row) -> Row:
    options = {f"op{letter.lower()}": text for letter, text in row["options"].items()}
    return {"question": row["question"], **options, "cop": _place(row)}


def _arc(row: Row) -> Row:
    choices = {"text": list(row["options"].values()), "label": list(row["options"])}
    return {"question": row["question"], "choices": choices, "answerKey": row["answer_idx"]}


def _mmlu(row: Row) -> Row:
    return {"question": row["question"], "choices": list(row["options"].values()), "answer": _place(row)}


def _hellaswag(row: Row) -> Row:
    return {"ctx": row["question"], "endings": list(row["options"].values()), "label": str(_place(row))}


LAYOUTS: dict[str, Callable[[Row], Row]] = {
    "options_as_object": lambda row: row,
    "options_as_list": _options_as_list,
    "lettered": _lettered,
    "arc": _arc,
    "mmlu": _mmlu,
    "hellaswag": _hellaswag,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "text": _text,
}


def write(rows: Iterable[Row], folder: Path) -> list[str]:
    """One JSONL file per layout. Returns their names."""
    rows = list(rows)
    for name, convert in LAYOUTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(convert(row)) + "\n" for row in rows))
    return [f"{name}.jsonl" for name in LAYOUTS]
