"""Reading data files, and what becomes of their rows."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jobqueue.errors import DataError
from jobqueue.formats import SkipRow, conversation
from jobqueue.rows import check_file, load, read
from jobqueue.spec import DataSpec

ROW = {"question": "Which is a fish?", "options": {"A": "oak", "B": "trout"}, "answer": "trout", "answer_idx": "B"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def spec(source: Path | str, **fields: Any) -> DataSpec:
    return DataSpec(source=str(source), **fields)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def choice(row: dict[str, Any], tmp_path: Path) -> Any:
    return load(spec(write(tmp_path / "one.jsonl", row))).examples[0][1].choice


def test_the_prompt_and_the_reply_are_the_fixed_ones() -> None:
    assert conversation(ROW) == [
        {
            "role": "user",
            "content": "Which is a fish?\n\nOptions:\nA. oak\nB. trout\n\nPlease choose the correct answer.",
        },
        {"role": "assistant", "content": "The correct answer is trout."},
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"answer_idx": None}, {"answer": None}, {"answer": "B", "answer_idx": None}, {"answer": 1, "answer_idx": None},
        {"answer_idx": 1}, {"answer": "1", "answer_idx": None}, {"options": ["oak", "trout"]}, {"answer_idx": "b"},
        {"options": {"A": "oak", "B": "trout", "C": None}}, {"options": json.dumps(ROW["options"])},
    ],
)  # fmt: skip
def test_answers_and_options_are_understood_in_every_notation(change: dict[str, Any], tmp_path: Path) -> None:
    found = choice({**ROW, **change}, tmp_path)
    assert (found.options, found.answer) == ({"A": "oak", "B": "trout"}, "B")


def test_an_options_text_goes_before_its_letter(tmp_path: Path) -> None:
    row = {"question": "Blood group?", "options": {"A": "AB", "B": "A"}, "answer": "A"}
    assert choice(row, tmp_path).answer == "B"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": None}, "question is null"),
        ({"question": "  "}, "question is empty"),
        ({"question": "\ud800"}, "question has half a character (a lone surrogate)"),
        ({"options": None}, "options is null"),
        ({"options": ["oak"]}, "fewer than two options"),
        ({"options": {"A": "oak", "B": ["trout"]}}, "an option is not text"),
        ({"answer": "pike", "answer_idx": None}, "answer is not among the options"),
        ({"answer": None, "answer_idx": None}, "answer is null"),
        ({"answer": "oak", "answer_idx": "B"}, "answer and answer_idx disagree"),
        ({"answer": 2, "answer_idx": None}, "answer is not among the options"),
        ({"answer": True, "answer_idx": None}, "answer is not text"),
    ],
)
def test_a_row_that_lacks_something_is_skipped_and_counted(change: Any, reason: str, tmp_path: Path) -> None:
    loaded = load(spec(write(tmp_path / "d.jsonl", ROW, {**ROW, **change}, ROW, {**ROW, **change})))
    assert [index for index, _ in loaded.examples] == [0, 2]
    assert loaded.summary.report() == {
        "format": "multiple_choice", "rows": 4, "usable": 2, "skipped": {reason: {"count": 2, "lines": [2, 4]}},
    }  # fmt: skip


def test_only_the_first_lines_of_a_reason_are_listed(tmp_path: Path) -> None:
    summary = check_file(spec(write(tmp_path / "d.jsonl", ROW, *[{**ROW, "question": None}] * 9)))
    assert summary.skipped["question is null"].count == 9
    assert summary.skipped["question is null"].lines == [2, 3, 4, 5, 6]


def test_a_file_without_a_usable_row_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of its 1 rows can be used as multiple_choice: question is null"):
        load(spec(write(tmp_path / "d.jsonl", {**ROW, "question": None})))


def test_conversations_are_read_and_their_mistakes_counted(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    bad: list[Any] = [
        {"messages": []}, {"messages": None}, {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": None}, CHAT["messages"][1]]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
    ]  # fmt: skip
    file = write(tmp_path / "d.jsonl", CHAT, {"messages": [parts, CHAT["messages"][1]]}, *bad)
    loaded = load(spec(file))
    assert [example.conversation for _, example in loaded.examples] == [CHAT["messages"], CHAT["messages"]]
    assert sum(entry.count for entry in loaded.summary.skipped.values()) == len(bad)
    with pytest.raises(SkipRow):
        conversation({"text": "no format has this column"})


def test_bom_blank_lines_and_windows_line_ends_are_tolerated(tmp_path: Path) -> None:
    line = json.dumps(ROW).encode()
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\n\n")
    assert [number for number, _ in read(spec(tmp_path / "d.jsonl"))] == [1, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": 1}\n{"question": \n', ":2: not JSON"),
        (b'{"question": 1}\n[1]\n', ":2: a list, not an object"),
        (b'{"question": 1}\n{"question": "caf\xe9"}\n', ":2: not UTF-8 (byte 0xe9)"),
        ('{"question": 1}\n'.encode("utf-16"), "is UTF-16"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'[{"question": 1},\n{"question" 2}]', ":2: not JSON"),
        (b"\x1f\x8b\x08\x00broken", "damaged gzip file"),
        (b"PAR1broken", "damaged Parquet file"),
    ],
)
def test_a_broken_file_is_refused_with_its_line_and_with_advice(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError) as error:
        check_file(spec(tmp_path / "d.jsonl"))
    assert message in error.value.what
    assert error.value.do


def test_a_cut_off_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({**ROW, "n": n}).encode() + b"\n" for n in range(500)))
    (tmp_path / "d.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="damaged gzip file"):
        check_file(spec(tmp_path / "d.jsonl.gz"))


def test_a_file_is_recognised_by_its_content_where_it_has_no_name(tmp_path: Path) -> None:
    line = json.dumps(ROW).encode() + b"\n"
    contents = {
        "jsonl": line, "gz": gzip.compress(line), "array": b" [" + line + b"]",
        "csv": b'question,options,answer\nWhich?,"[""oak"", ""trout""]",trout\n',
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert check_file(spec(tmp_path / name)).usable == 1, name


def test_csv_keeps_na_and_none_as_text(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('question,options,answer\n"Salt,\nor?","[""NA"", ""None""]",NA\n')
    loaded = load(spec(tmp_path / "d.csv"))
    found = loaded.examples[0][1].choice
    assert found is not None
    assert (found.question, found.options, found.answer) == ("Salt,\nor?", {"A": "NA", "B": "None"}, "A")


def test_a_csv_row_with_too_many_values_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("question,options,answer\na,b,c\na,b,c,d\n")
    with pytest.raises(DataError, match=r"d\.csv:3: 4 values for 3 columns"):
        check_file(spec(tmp_path / "d.csv"))


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [ROW, {**ROW, "options": {"A": "oak", "B": "trout", "C": "ant"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    choices = [example.choice for _, example in load(spec(tmp_path / "d.parquet")).examples]
    assert [list(found.options) for found in choices if found] == [["A", "B"], ["A", "B", "C"]]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        check_file(spec(tmp_path / "d.parquet"))


def test_a_url_is_read(tmp_path: Path) -> None:
    assert check_file(spec(f"file://{write(tmp_path / 'd.jsonl', ROW)}")).usable == 1


@pytest.mark.parametrize("source", ["nowhere.jsonl", "/no/such/file", "~/nowhere.csv", "file:///no/such/file"])
def test_a_file_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(DataError) as error:
        check_file(spec(source))
    assert source in error.value.what


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        check_file(spec(tmp_path))


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert check_file(spec(write(tmp_path / "d.jsonl", *[ROW] * 9), limit=4)).rows == 4


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"q": "Which?", "options": ["oak", "trout"], "label": 1})
    with pytest.raises(DataError, match="fit no known format"):
        check_file(spec(file))
    found = load(spec(file, columns={"question": "q", "answer_idx": "label"})).examples[0][1].choice
    assert found is not None
    assert (found.question, found.answer) == ("Which?", "B")


def test_missing_columns_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"question": "Which?", "options": ["oak", "trout"]})
    with pytest.raises(DataError, match="lacks the column answer or answer_idx; its columns are question, options"):
        check_file(spec(file, format="multiple_choice"))
    with pytest.raises(DataError, match="has no column nosuch"):
        check_file(spec(file, columns={"answer": "nosuch"}))


def test_a_file_with_both_layouts_is_read_as_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {**ROW, **CHAT})
    assert check_file(spec(file)).format == "multiple_choice"
    assert load(spec(file, format="messages")).examples[0][1].conversation == CHAT["messages"]
