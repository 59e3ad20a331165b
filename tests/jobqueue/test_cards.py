"""Score cards: what a sheet shows and hides, and what comes back from people and their spreadsheets."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from jobqueue.cards import COLUMNS, Deck, as_csv, deal, harmless, imported, keep, read_filled
from jobqueue.errors import DataError
from jobqueue.ratings import CRITERIA, OVERALL, Rated
from jobqueue.statistics import krippendorff_alpha
from jobqueue.storage import Storage
from jobqueue.written import Written

MODELS = [
    Rated("b.1.eval", "r=8", "base-1"),
    Rated("b.2.eval", "r=16", "base-1"),
    Rated("base-1", "base model (4-bit)"),
]
REVIEWERS = ("Ann", "Bob", "Çem")
Score = Callable[[str, str], int]
"""Of a reviewer for a job's answers."""


def wrote(job: str, rows: int = 8) -> dict[int, Written]:
    return {i: Written(i, f'Which {i}?\nA. this; or\nB. that, "it"', "A. this", f"{job} on {i}") for i in range(rows)}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def deck(storage: Storage) -> Deck:
    made = deal("b", MODELS, {model.job: wrote(model.job) for model in MODELS}, questions=4, seed=1)
    keep(made, "b", storage)
    return made


def fair(reviewer: str, job: str) -> int:
    return 2 if job == "base-1" else 4


def filled(deck: Deck, reviewer: str, score: Score = fair, **changes: str) -> list[dict[str, str]]:
    """The rows of a sheet after a reviewer has been at it; `changes` of cells in the first."""
    rows = list(csv.DictReader(io.StringIO(as_csv(deck).decode("utf-8-sig"), newline="")))
    by_id = {card.id: card for card in deck.cards}
    for row in rows:
        row.update({name: str(score(reviewer, by_id[row["card"]].job)) for name in CRITERIA})
    rows[0].update({"reviewer": reviewer, **changes})
    return rows


def saved(rows: list[dict[str, str]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    """As a spreadsheet writes it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode(encoding)


def three(deck: Deck, **others: bytes) -> dict[str, bytes]:
    return {f"{name}.csv": saved(filled(deck, name)) for name in REVIEWERS} | {f"{k}.csv": v for k, v in others.items()}


def problems(files: Mapping[str, bytes], storage: Storage) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_filled("b", files, storage)
    assert imported("b", storage) is None
    return caught.value.what.splitlines()


def test_a_sheet_asks_all_models_the_same_questions_and_hides_who_wrote_what(deck: Deck) -> None:
    rows = filled(deck, "Ann")

    assert len(rows) == 4 * 3
    assert tuple(rows[0]) == COLUMNS
    assert len({card.index for card in deck.cards}) == 4
    assert {(card.job, card.index) for card in deck.cards} == {(m.job, c.index) for m in MODELS for c in deck.cards}
    jobs = [card.job for card in deck.cards]
    assert jobs not in (sorted(jobs), [model.job for _ in range(4) for model in MODELS])
    shown = " ".join(row["card"] for row in rows)
    assert not [model for model in MODELS if model.job in shown or model.label in shown]


def test_one_seed_makes_one_sheet_and_another_seed_another(deck: Deck) -> None:
    answers = {model.job: wrote(model.job) for model in MODELS}
    assert deal("b", MODELS, answers, 4, seed=1) == deck
    other = deal("b", MODELS, answers, 4, seed=2)
    assert other.sheet != deck.sheet
    assert {card.index for card in other.cards} != {card.index for card in deck.cards}


def test_models_without_written_answers_are_left_out_and_without_any_there_is_no_sheet() -> None:
    made = deal("b", MODELS, {"b.1.eval": wrote("b.1.eval"), "b.2.eval": {}}, 4, seed=1)
    assert [model.job for model in made.models] == ["b.1.eval"]
    with pytest.raises(DataError, match="no question that every model has answered"):
        deal("b", MODELS, {"b.1.eval": {0: wrote("x")[0]}, "base-1": {1: wrote("x")[1]}}, 4, seed=1)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "  =1", "\t=1", "\r=1", "\n=cmd()", "＝1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert harmless(text) == f"'{text}"
    answers = {"base-1": {0: Written(0, text, text, text)}}
    sheet = as_csv(deal("b", MODELS[2:], answers, 1, seed=1)).decode("utf-8-sig")
    [row] = csv.DictReader(io.StringIO(sheet, newline=""))
    assert [row[name] for name in ("question", "reference", "answer")] == [f"'{text}"] * 3


def test_words_stay_as_they_are() -> None:
    assert harmless("the = sign - and @ too") == "the = sign - and @ too"


def test_three_sheets_give_means_differences_and_agreement(deck: Deck, storage: Storage) -> None:
    def score(reviewer: str, job: str) -> int:
        return fair(reviewer, job) + (reviewer == "Ann")

    made = read_filled("b", {f"{n}.csv": saved(filled(deck, n, score)) for n in REVIEWERS}, storage)

    assert made.raters == ("Ann", "Bob", "Çem")
    assert made.questions == 4
    assert [model.label for model in made.models] == ["r=8", "r=16", "base model (4-bit)"]
    assert [model.means[OVERALL].value for model in made.models] == pytest.approx([13 / 3, 13 / 3, 7 / 3])
    assert made.models[0].differences["accuracy"].value == 2
    assert made.models[0].differences[OVERALL].interval == (2, 2)
    assert (made.models[0].finding, made.models[2].finding) == ("no difference shown", "not tested")  # four questions
    assert set(made.agreement) == set(CRITERIA)
    assert 0 < (made.agreement["fluency"] or 0) < 1
    assert imported("b", storage) == made


def test_scores_that_are_all_alike_have_no_agreement(deck: Deck, storage: Storage) -> None:
    made = read_filled("b", {f"{n}.csv": saved(filled(deck, n, lambda *_: 3)) for n in REVIEWERS}, storage)
    assert made.agreement == dict.fromkeys(CRITERIA)


@pytest.mark.parametrize(
    "mangled",
    [
        lambda rows: saved(rows, ",", "utf-8-sig"),
        lambda rows: saved(rows, ";", "utf-8-sig"),  # Excel, in most of Europe
        lambda rows: saved(rows, ";", "cp1252"),
        lambda rows: saved(rows, "\t", "utf-16"),  # Excel's "Unicode text"
        lambda rows: b"sep=;\r\n" + saved(rows, ";"),
        lambda rows: saved(rows).replace(b"\r\n", b"\n"),
        lambda rows: saved(rows) + b",,,,,,,\r\n,,,,,,,\r\n",  # rows that were once touched
        lambda rows: saved([{key.upper(): f" {value} " for key, value in row.items()} for row in rows[::-1]]),  # sorted
        lambda rows: saved([{"note": "hm, \"so\"\n;", **row, "fluency": row["fluency"] + ",0"} for row in rows]),
    ],
)  # fmt: skip
def test_a_sheet_survives_its_spreadsheet(
    deck: Deck, storage: Storage, mangled: Callable[[list[dict[str, str]]], bytes]
) -> None:
    plain = read_filled("b", three(deck), storage)
    files = {f"{name}.csv": mangled(filled(deck, name)) for name in REVIEWERS}
    assert read_filled("b", files, storage) == plain


def test_every_fault_is_named_at_once_with_file_and_line(deck: Deck, storage: Storage) -> None:
    second, third, last = (deck.cards[place].id for place in (1, 2, 11))
    rows = filled(deck, "Dan", relevance="6", fluency="")
    rows[1]["accuracy"] = "good"
    rows[2]["card"] = second
    rows[5] |= dict.fromkeys(("relevance", "accuracy", "fluency"), "")
    rows[11]["card"] = "card-000000-001"

    found = problems(three(deck, Dan=saved(rows)), storage)

    lines = [1 + 3 * place + 1 for place in range(12)]  # a question takes three lines
    assert found == [
        f"Dan.csv:{lines[0]}: relevance of {deck.cards[0].id}: '6' is not a whole number from 1 to 5",
        f"Dan.csv:{lines[0]}: fluency of {deck.cards[0].id}: is missing",
        f"Dan.csv:{lines[1]}: accuracy of {second}: 'good' is not a whole number from 1 to 5",
        f"Dan.csv:{lines[2]}: {second} is there twice, first in line {lines[1]}",
        f"Dan.csv:{lines[5]}: {deck.cards[5].id} has no scores",
        f"Dan.csv:{lines[11]}: card-000000-001 is not of this sheet",
        f"Dan.csv: cards are missing: {third}, {last}",
    ]


def test_a_reviewer_counts_once_and_has_a_name(deck: Deck, storage: Storage) -> None:
    nobody, two = filled(deck, ""), filled(deck, "Eve")
    two[3]["reviewer"] = "Fay"

    found = problems(three(deck, again=saved(filled(deck, "bob")), nobody=saved(nobody), two=saved(two)), storage)

    assert found == [
        "nobody.csv:2: the reviewer's name is missing: write it into the column reviewer",
        "two.csv: several reviewers in one sheet: Eve (line 2), Fay (line 11)",
        "again.csv: bob has filled in Bob.csv too",
    ]


def test_fewer_than_three_reviewers_are_refused(deck: Deck, storage: Storage) -> None:
    files = dict(list(three(deck).items())[:2])
    assert problems(files, storage) == [
        "3 reviewers are needed at least, and there are 2: of fewer, one's taste decides"
    ]


def test_a_file_that_is_no_sheet_says_what_it_lacks(deck: Deck, storage: Storage) -> None:
    found = problems(three(deck, x=b"card,relevance\nx,3\n", y=b"", z=b'card,"x'), storage)
    assert found[:2] == [
        "x.csv:1: the column accuracy, fluency, reviewer is missing",
        "y.csv:1: the column card, relevance, accuracy, fluency, reviewer is missing",
    ]
    assert found[2].startswith("z.csv:1: the column")


def test_sheets_of_another_batch_are_refused(deck: Deck, storage: Storage) -> None:
    with pytest.raises(DataError, match=f"card-{deck.sheet}-001 is of no sheet that was exported of other"):
        read_filled("other", three(deck), storage)


def test_agreement_is_that_of_the_published_example() -> None:
    """Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C: twelve units, four observers, values
    missing; alpha is 0.815 on the ordinal scale."""
    no = math.nan
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, no, no, no],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, no, 3],
        [no, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, no],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, no],
    ]
    assert krippendorff_alpha(ratings) == pytest.approx(0.815, abs=0.0005)
