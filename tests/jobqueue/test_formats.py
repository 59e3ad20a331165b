"""Layouts of rows that people really have: each is detected, and becomes the conversation or question that it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobqueue.formats import FORMATS, SkipRow, conversation, detect
from jobqueue.rows import check_file, load
from jobqueue.spec import DataSpec

MEDMCQA = {
    "question": "Which is a fish?",
    "opa": "oak",
    "opb": "trout",
    "opc": "crow",
    "opd": "bee",
    "cop": 1,
    "exp": "",
}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
PROMPT = {"prompt": "Hi", "completion": "Hello"}
ALPACA = {"instruction": "Say hello", "input": "", "output": "Hello"}


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation(row)]


@pytest.mark.parametrize(
    ("row", "name"),
    [(MEDMCQA, "lettered"), (SHAREGPT, "sharegpt"), (PROMPT, "prompt_completion"), (ALPACA, "instruction")],
)
def test_a_layout_is_recognised_by_its_columns(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert detect(row) == name
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    loaded = load(DataSpec(source=str(file)))
    assert loaded.summary.format == name
    assert check_file(DataSpec(source=str(file), format=name)).format == name  # type: ignore[arg-type]


def test_no_two_layouts_are_taken_for_each_other() -> None:
    rows = {"lettered": MEDMCQA, "sharegpt": SHAREGPT, "prompt_completion": PROMPT, "instruction": ALPACA}
    for name, row in rows.items():
        assert [other for other, layout in FORMATS.items() if not layout.missing(row)] == [name]


def test_medmcqa_is_a_question_with_its_right_option_counted_from_0() -> None:
    assert turns(MEDMCQA)[1] == ("assistant", "The correct answer is trout.")
    assert "A. oak\nB. trout\nC. crow\nD. bee" in turns(MEDMCQA)[0][1]
    five = {**MEDMCQA, "ope": "ant", "cop": "4"}
    assert turns(five)[1] == ("assistant", "The correct answer is ant.")


@pytest.mark.parametrize("wrong", [{"cop": -1}, {"cop": 4}, {"cop": None}, {"opb": ""}])
def test_medmcqa_rows_without_a_right_answer_are_skipped(wrong: dict[str, Any]) -> None:
    with pytest.raises(SkipRow):
        conversation({**MEDMCQA, **wrong})


def test_sharegpt_roles_become_those_of_chat_templates() -> None:
    row = {"conversations": [{"from": "system", "value": "Be brief"}, *SHAREGPT["conversations"]]}

    assert turns(row) == [("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize("turn", [{"from": "robot", "value": "x"}, {"from": "gpt"}, {"value": "x"}, "x"])
def test_a_sharegpt_turn_that_says_not_who_or_what_is_skipped(turn: Any) -> None:
    with pytest.raises(SkipRow):
        conversation({"conversations": [*SHAREGPT["conversations"], turn]})


def test_a_prompt_and_a_completion_may_be_text_or_turns() -> None:
    assert turns(PROMPT) == [("user", "Hi"), ("assistant", "Hello")]
    chat = {
        "prompt": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hello"}],
    }
    assert turns(chat) == [("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello")]


def test_the_input_of_an_instruction_stands_below_it_where_there_is_one() -> None:
    assert turns(ALPACA) == [("user", "Say hello"), ("assistant", "Hello")]
    assert turns({**ALPACA, "input": "to Ada"})[0] == ("user", "Say hello\n\nto Ada")
    assert turns({**ALPACA, "input": None})[0] == ("user", "Say hello")


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("ask,reply\nHi,Hello\n")

    loaded = load(DataSpec(source=str(file), columns={"prompt": "ask", "completion": "reply"}))

    assert loaded.examples[0][1].conversation[1]["content"] == "Hello"
