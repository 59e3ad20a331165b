"""Reading data files, and what becomes of their rows."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobqueue.data_spec import DataSpec
from jobqueue.errors import DataError, StorageError
from jobqueue.example import SkipRow
from jobqueue.formats import conversation
from jobqueue.rows import check_file, load, read

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
        ({"answer": "9" * 5000, "answer_idx": None}, "answer is not among the options"),
    ],
)
def test_a_row_that_lacks_something_is_skipped_and_counted(change: Any, reason: str, tmp_path: Path) -> None:
    """datasets#6641 among others: a null, a number, or a lone surrogate in one row ended the whole job."""
    loaded = load(spec(write(tmp_path / "d.jsonl", ROW, {**ROW, **change}, ROW, {**ROW, **change})))
    assert [index for index, _ in loaded.examples] == [0, 2]
    assert loaded.summary.report() == {
        "format": "multiple_choice", "format_reason": "multiple_choice: columns question, options, answer_idx, answer",
        "rows": 4, "usable": 2, "skipped": {reason: {"count": 2, "lines": [2, 4]}},
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
        conversation({"words": "no format has this column"})


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
        (b"[" * 100_000, ":1: not JSON"),
        (b"\x1f\x8b\x08\x00broken", "damaged gzip file"),
        (b"PAR1broken", "damaged Parquet file"),
    ],
)
def test_a_broken_file_is_refused_with_its_line_and_with_advice(content: bytes, message: str, tmp_path: Path) -> None:
    """datasets#7092, #6641: a Latin-1 byte, UTF-16, an empty file ended in errors without a place."""
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
    with pytest.raises(
        DataError,
        match="lacks the column answer_idx or answer or answerKey or label; its columns are question, options",
    ):
        check_file(spec(file, format="multiple_choice"))
    with pytest.raises(DataError, match="has no column nosuch"):
        check_file(spec(file, columns={"answer": "nosuch"}))


def test_a_file_with_both_layouts_is_read_as_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {**ROW, **CHAT})
    assert check_file(spec(file)).format == "multiple_choice"
    assert load(spec(file, format="messages")).examples[0][1].conversation == CHAT["messages"]


# -- files as people have them


def test_every_mistake_of_a_file_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    """datasets#7092, #6460: the reader named neither the line nor the others."""
    good = json.dumps(ROW).encode()
    (tmp_path / "d.jsonl").write_bytes(
        b"\n".join([good, b'{"question": ', good, b"[1]", b'{"a": "caf\xe9"}', good, b""])
    )
    with pytest.raises(DataError) as error:
        check_file(spec(tmp_path / "d.jsonl"))
    places = [line.partition("d.jsonl:")[2].partition(": ")[0] for line in error.value.what.splitlines()]
    assert places == ["2", "4", "5"]
    assert check_file(spec(tmp_path / "d.jsonl", limit=1)).usable == 1  # what is not asked for may be wrong

    (tmp_path / "many.jsonl").write_bytes(b"x\n" * 25)
    with pytest.raises(DataError, match="and 15 more lines"):
        check_file(spec(tmp_path / "many.jsonl"))
    (tmp_path / "d.csv").write_text("question,options,answer\na,b,c,d\na,b,c\n1,2,3,4,5\n")
    with pytest.raises(DataError, match=r"d\.csv:2: 4 values for 3 columns\n.*d\.csv:4: 5 values"):
        check_file(spec(tmp_path / "d.csv"))


def test_rows_that_begin_with_null_are_read_by_what_comes_later(tmp_path: Path) -> None:
    """datasets#7222: the type of a column was guessed from the first rows, which were null."""
    empty = {"question": None, "options": None, "answer": None}
    loaded = load(spec(write(tmp_path / "d.jsonl", *[empty] * 300, ROW)))
    assert (loaded.summary.rows, loaded.summary.usable) == (301, 1)
    late = load(spec(write(tmp_path / "late.jsonl", *[{"id": n} for n in range(300)], ROW)))
    assert (late.summary.format, late.summary.usable) == ("multiple_choice", 1)


def test_values_of_mixed_types_are_each_read_for_what_they_are(tmp_path: Path) -> None:
    """datasets#6460: "could not convert ... mixed types"."""
    rows = [
        ROW,
        {**ROW, "options": ["oak", "trout"]},
        {**ROW, "options": {"A": 1, "B": 2.5}, "answer": "1", "answer_idx": "A"},
    ]
    loaded = load(spec(write(tmp_path / "d.jsonl", *rows, {**ROW, "answer_idx": 1, "extra": [1, "x", None]})))
    assert loaded.summary.usable == 4
    assert loaded.examples[2][1].choice.options == {"A": "1", "B": "2.5"}  # type: ignore[union-attr]


def test_a_last_line_that_is_cut_off_is_named(tmp_path: Path) -> None:
    """datasets#6641 and others: half a row at the end, as an interrupted copy leaves it."""
    whole = "".join(json.dumps(ROW) + "\n" for _ in range(3))
    (tmp_path / "d.jsonl").write_text(whole[:-20])
    with pytest.raises(DataError, match=r"d\.jsonl:3: the last line is cut off") as error:
        check_file(spec(tmp_path / "d.jsonl"))
    assert error.value.do == "Write or copy the file again."


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_unicode_encodings_are_refused_by_name(encoding: str, tmp_path: Path) -> None:
    """datasets#7092: UTF-16 ended in a traceback."""
    (tmp_path / "d.jsonl").write_text(json.dumps(ROW), encoding=encoding)
    with pytest.raises(DataError, match=r"is UTF-16|is no text: it has zero bytes"):
        check_file(spec(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', "question,options,answer\n"])
def test_a_file_without_rows_is_empty_and_no_bare_stop_iteration(content: str, tmp_path: Path) -> None:
    """TRL ended in a bare StopIteration."""
    (tmp_path / ("d.csv" if "," in content else "d.json")).write_text(content)
    with pytest.raises(DataError, match=r"is empty|no list"):
        check_file(spec(next(tmp_path.iterdir())))


def packed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    return pytest.importorskip("backports.zstd").compress(content) if name.endswith(".zst") else content  # type: ignore[no-any-return]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_is_read_packed_or_not(kind: str, suffix: str, tmp_path: Path) -> None:
    row = {"prompt": "Hi, you", "completion": "Hello"}
    contents = {
        "jsonl": json.dumps(row).encode() + b"\n", "json": json.dumps([row], indent=1).encode(),
        "csv": b'prompt,completion\n"Hi, you",Hello\n', "tsv": b"prompt\tcompletion\nHi, you\tHello\n",
    }  # fmt: skip
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "plain")
        contents["parquet"] = (tmp_path / "plain").read_bytes()
    file = tmp_path / f"d.{kind}{suffix}"
    file.write_bytes(packed(file.name, contents[kind]))
    for source in (file, f"file://{file}"):
        loaded = load(spec(source))
        assert [e.conversation[0]["content"] for _, e in loaded.examples] == ["Hi, you"]
        assert loaded.summary.format == "prompt_completion"


def test_a_json_document_may_hold_the_list_of_rows_in_an_object(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": [ROW, ROW]}, indent=2))
    assert check_file(spec(tmp_path / "d.json")).usable == 2
    long = {**ROW, "context": "word " * 5000}
    (tmp_path / "lines.json").write_text((json.dumps(long) + "\n") * 3)
    assert check_file(spec(tmp_path / "lines.json")).usable == 3
    (tmp_path / "one.json").write_text(json.dumps(CHAT))
    assert load(spec(tmp_path / "one.json")).examples[0][1].conversation == CHAT["messages"]
    (tmp_path / "two.json").write_text(json.dumps({"train": [ROW], "test": [ROW]}, indent=2))
    with pytest.raises(DataError, match="one JSON object with the lists train, test"):
        check_file(spec(tmp_path / "two.json"))


def test_a_cut_off_zstd_file_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    whole = packed("x.zst", b"".join(json.dumps({**ROW, "n": n}).encode() + b"\n" for n in range(500)))
    contents = {"cut.zst": whole[:-20], "bad.zst": whole[:8] + b"\0" * 90, "a.zip": b"PK\x03\x04", "a.bz2": b"BZh91AY"}
    words = {
        "cut.zst": "damaged zstd",
        "bad.zst": "damaged zstd",
        "a.zip": "a zip archive",
        "a.bz2": "packed with bzip2",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words[name]):
            check_file(spec(tmp_path / name))


def test_zstd_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(DataError, match=r"pip install 'loraq\[data\]'"):
        check_file(spec(tmp_path / "d.jsonl.zst"))


def test_urls_that_cannot_be_read_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="Give a path, a hub id, or a URL"):
        check_file(spec("ftpx://host/d.jsonl"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match="Install s3fs on the workers"):
        check_file(spec("s3://bucket/d.jsonl"))
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9/d\.jsonl cannot be read"):
        check_file(spec("http://127.0.0.1:9/d.jsonl"))


# -- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The datasets library, with a folder of this machine in the place of the hub; the calls that it got."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", ROW, ROW)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    original, calls = datasets.load_dataset, []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        calls.append({"path": path, "name": name, **options})
        return original(
            str(tmp_path / "hub"), **{key: options[key] for key in ("split", "cache_dir") if key in options}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_data_set_has_a_name_a_revision_and_a_split(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    loaded = load(spec("org/set", name="main", revision="v1", split="train"))
    assert loaded.summary.usable == 2
    assert hub == [{"path": "org/set", "name": "main", "revision": "v1", "split": "train"}]
    with pytest.raises(DataError, match=r"org/set \(name main, split tset\) is no file here .* Unknown split"):
        load(spec("org/set", name="main", split="tset"))
    with pytest.raises(DataError, match="is a file; name and revision are of data sets of the hub"):
        load(spec(write(tmp_path / "d.jsonl", ROW), revision="v1"))


def test_a_job_whose_shared_cache_another_one_broke_reads_into_its_own(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets#4661, #2728, huggingface_hub#4306: jobs crashed on one cache; flock does nothing on some NFS."""
    assert load(spec("org/set")).summary.usable == 2
    for file in (tmp_path / "cache").rglob("*"):
        if file.suffix == ".arrow":
            file.write_bytes(b"another job writes here now")
    assert load(spec("org/set")).summary.usable == 2
    assert ["cache_dir" in call for call in hub] == [False, False, True]


CONCURRENT = """
import sys
import datasets
from pathlib import Path
from jobqueue.rows import load
from jobqueue.data_spec import DataSpec
original = datasets.load_dataset
def load_dataset(path, name=None, *, split, revision=None, **options):
    return original(sys.argv[1], split=split, **options)
datasets.load_dataset = load_dataset
print("ready", flush=True)
sys.stdin.readline()
print(load(DataSpec(source="org/set")).summary.usable)
"""


def test_concurrent_jobs_share_one_cache(tmp_path: Path) -> None:
    """datasets#4661, #2728."""
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", *[{**ROW, "n": n} for n in range(2000)])
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CONCURRENT, str(tmp_path / "hub")]
    jobs = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        assert [job.stdout.readline() for job in jobs if job.stdout] == ["ready\n"] * 4
        for job in jobs:
            assert job.stdin is not None
            job.stdin.write("\n")
            job.stdin.flush()
        assert [job.communicate(timeout=180)[0].strip() for job in jobs] == ["2000"] * 4
    finally:
        for job in jobs:
            job.kill()
