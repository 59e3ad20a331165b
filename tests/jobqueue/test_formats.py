"""Layouts of rows that people really have: each is detected, and becomes the conversation or question that it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobqueue.data_spec import DataSpec, RowTemplate
from jobqueue.errors import DataError
from jobqueue.example import Example, SkipRow
from jobqueue.formats import FORMATS, conversation, detect
from jobqueue.rows import check_file, load, split

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
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
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


# -- multiple choice, in the shapes of well-known data sets: each is trout, the second option

SHAPES: dict[str, dict[str, Any]] = {
    "MedQA": {
        "question": "Which is a fish?", "options": {"A": "oak", "B": "trout"}, "answer": "trout", "answer_idx": "B",
    },
    "list": {"question": "Which is a fish?", "options": ["oak", "trout"], "answer": "trout"},
    "MedMCQA": {**MEDMCQA, "opc": None, "opd": None},
    "ARC": {
        "id": "Mercury_1", "question": "Which is a fish?", "answerKey": "B",
        "choices": {"text": ["oak", "trout"], "label": ["A", "B"]},
    },
    "ARC with numbers": {
        "question": "Which is a fish?", "choices": {"text": ["oak", "trout"], "label": ["1", "2"]}, "answerKey": "2",
    },
    "OpenBookQA": {
        "question_stem": "Which is a fish?", "answerKey": "B",
        "choices": {"text": ["oak", "trout"], "label": ["A", "B"]},
    },
    "MMLU": {"question": "Which is a fish?", "subject": "biology", "choices": ["oak", "trout"], "answer": 1},
    "HellaSwag": {"ind": 4, "ctx": "Which is a fish?", "endings": ["oak", "trout"], "label": "1", "split": "val"},
    "a label that is about something else": {
        "question": "Which is a fish?", "options": ["oak", "trout"], "answer": "trout", "label": 0,
    },
    "CSV, where all is text": {"question": "Which is a fish?", "choices": '["oak", "trout"]', "answer": "1"},
    "arrays as Python prints them": {"question": "Which is a fish?", "choices": "['oak', 'trout']", "answer": "B"},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_multiple_choice_is_understood_in_the_shapes_of_well_known_data_sets(shape: str) -> None:
    asked, answered = turns(SHAPES[shape])
    assert asked[1].startswith("Which is a fish?\n\nOptions:\n")
    assert answered == ("assistant", "The correct answer is trout.")


def test_a_number_is_a_place_and_not_an_options_text() -> None:
    """MMLU's arithmetic: the options are numbers themselves."""
    row = {"question": "3 - 2?", "choices": ["4", "1", "0", "3"], "answer": 1}
    assert turns(row)[1][1] == "The correct answer is 1."
    assert turns({**row, "answer": 0})[1][1] == "The correct answer is 4."
    with pytest.raises(SkipRow, match="may be an option's text or its place"):
        conversation({**row, "answer": "0"})  # from a CSV file: the third option, or the first?
    assert turns({**row, "answer": "4"})[1][1] == "The correct answer is 4."
    assert turns({**row, "options": row["choices"], "answer": "0"})[1][1] == "The correct answer is 0."
    assert turns({**row, "answer_idx": "0", "answer": None})[1][1] == "The correct answer is 4."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": ""}, "answer is empty"),  # HellaSwag's test split
        ({"label": "-1"}, "not among the options"),
        ({"label": None}, "answer is null"),
        ({"endings": None}, "options is null"),
    ],
)
def test_questions_without_a_known_answer_are_skipped(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SkipRow, match=reason):
        conversation({**SHAPES["HellaSwag"], **change})


def test_choices_whose_labels_and_texts_do_not_match_are_skipped() -> None:
    with pytest.raises(SkipRow, match="two lists of one length"):
        conversation({**SHAPES["ARC"], "choices": {"text": ["oak"], "label": ["A", "B"]}})


# -- conversations


def test_turns_may_be_named_in_either_way_in_either_column() -> None:
    said = [("user", "Hi"), ("assistant", "Hello")]
    assert (
        turns({"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}) == said
    )
    assert turns({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}) == said
    assert turns({"messages": [{"role": "developer", "content": "Be brief"}, *CHAT]})[0] == ("system", "Be brief")


def test_calls_of_tools_and_their_results_stay_as_they_are_but_for_arguments_written_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"word": "oak"}'}}
    row = {
        "messages": [
            CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "a tree"}, CHAT[1],
        ],
        "tools": '[{"type": "function", "function": {"name": "find"}}]',
    }  # fmt: skip
    example = FORMATS["messages"].convert(row)
    assert example.tools == [{"type": "function", "function": {"name": "find"}}]
    assert example.conversation[1]["content"] == ""
    assert example.conversation[1]["tool_calls"][0]["type"] == "function"  # templates ask for it
    assert example.conversation[1]["tool_calls"][0]["function"] == {"name": "find", "arguments": {"word": "oak"}}
    assert example.conversation[2] == {"role": "tool", "content": "a tree"}
    for wrong in ({"id": 1}, {"function": {"arguments": "{}"}}, {"function": {"name": ["find"]}}):
        with pytest.raises(SkipRow, match="a tool call has no function"):
            conversation({"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [wrong]}]})
    with pytest.raises(SkipRow, match="tools is not a list"):
        conversation({**row, "tools": "find"})


def test_a_completion_that_is_json_is_a_text() -> None:
    assert turns({"prompt": "[1, 2]", "completion": '{"sum": 3}'}) == [("user", "[1, 2]"), ("assistant", '{"sum": 3}')]


def test_dolly_and_plain_text_are_recognised() -> None:
    assert turns({"instruction": "Say hello", "context": "to Ada", "response": "Hello"})[0] == (
        "user",
        "Say hello\n\nto Ada",
    )
    assert detect({"text": "An oak is a tree.", "id": 1}) == "text"
    assert FORMATS["text"].convert({"text": "An oak."}).text == "An oak."


# -- what a spec can say


def test_the_reason_names_the_columns_and_what_else_would_fit(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**SHAPES["MedQA"], **SHAREGPT}))
    assert check_file(DataSpec(source=str(file))).reason == (
        "multiple_choice: columns question, options, answer_idx, answer (sharegpt would fit too; `format` chooses)"
    )
    assert check_file(DataSpec(source=str(file), format="sharegpt")).reason == "sharegpt: as data.format says"


def test_a_template_of_ones_own_reads_any_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"q": "2 + 2", "unit of": "m", "a": 4}, {"q": None, "unit of": "m", "a": 4}, {"unit of": "m", "a": 1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = RowTemplate(system="Reckon.", user="{{ q }} in {{ row['unit of'] }}?", assistant="{{ a }}")
    loaded = load(DataSpec(source=str(file), template=template))
    assert [example.conversation for _, example in loaded.examples] == [
        [
            {"role": "system", "content": "Reckon."},
            {"role": "user", "content": "2 + 2 in m?"},
            {"role": "assistant", "content": "4"},
        ]
    ]
    assert loaded.summary.format == "template"
    assert {reason: entry.lines for reason, entry in loaded.summary.skipped.items()} == {
        "the template's user cannot be rendered: a value is null": [2],
        "the template's user cannot be rendered: 'q' is undefined": [3],
    }
    text = load(DataSpec(source=str(file), template=RowTemplate(text="{{ a }} {{ row['unit of'] }}")))
    assert [example.text for _, example in text.examples] == ["4 m", "4 m", "1 m"]
    with pytest.raises(DataError, match="lacks the column answer; its columns are q, unit of, a") as error:
        load(DataSpec(source=str(file), template=RowTemplate(user="{{ q }}", assistant="{{ answer }}")))
    assert error.value.do == "Correct the names in `template`."


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ row.update({'a': 1}) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_reaches_nothing_but_the_row(source: str, tmp_path: Path) -> None:
    """Whoever may submit must not thereby run code on the workers."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 4}')
    with pytest.raises(DataError, match="cannot be rendered"):
        load(DataSpec(source=str(file), template=RowTemplate(user="{{ a }}", assistant=source)))


def test_a_system_prompt_goes_before_every_conversation_that_has_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    own = {"messages": [{"role": "system", "content": "Be long"}, *CHAT]}
    file.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps(own))
    loaded = load(DataSpec(source=str(file), system_prompt="Be brief"))
    assert [example.conversation[0]["content"] for _, example in loaded.examples] == ["Be brief", "Be long"]

    file.write_text(json.dumps(SHAPES["MedQA"]))
    choice = load(DataSpec(source=str(file), system_prompt="Be brief")).examples[0][1].choice
    assert choice is not None
    assert choice.conversation()[0] == {"role": "system", "content": "Be brief"}  # in an evaluation too


# -- train and validation


def examples(count: int) -> list[Example]:
    return [Example([{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}]) for n in range(count)]


def test_a_split_keeps_its_share_back_by_what_rows_say_and_by_the_seed() -> None:
    rows = examples(1000)
    data = DataSpec(source="x", validation_split=0.2)
    trained, kept = split(data, rows)
    assert 160 <= len(kept) <= 240
    assert sorted(example.key for example in trained + kept) == sorted(example.key for example in rows)
    # The order, and rows that come later, change nothing; equal rows are on one side.
    assert {e.key for e in split(data, rows[::-1])[1]} == {e.key for e in kept}
    assert {e.key for e in split(data, [*rows, *examples(1500)])[1]} >= {e.key for e in kept}
    later_trained, later_kept = split(data, rows + rows)
    assert not {e.key for e in later_trained} & {e.key for e in later_kept}
    other = split(data.model_copy(update={"validation_seed": 1}), rows)[1]
    assert len({e.key for e in other} & {e.key for e in kept}) < 100
    assert split(DataSpec(source="x"), rows) == (rows, [])


def test_a_split_that_leaves_one_side_empty_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PROMPT))
    with pytest.raises(DataError, match=r"validation_split 0\.1 of 1 rows leaves none to validate on"):
        check_file(DataSpec(source=str(file), validation_split=0.1))
