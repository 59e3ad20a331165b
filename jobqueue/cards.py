"""Score cards: a blind sheet of answers for people, and what at least three of them made of it.

In the storage, beside the batch: batches/<batch>/cards/<sheet>.json says who wrote which answer of a sheet, and
scores.json has what was imported last.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from jobqueue.errors import BusyError, DataError, MachineError, NotFoundError
from jobqueue.job import Job, JobKind
from jobqueue.ratings import CRITERIA, Criterion, Rated, Ratings, average, rate, rated_models
from jobqueue.results import BatchReport
from jobqueue.sheets import Sheet
from jobqueue.storage import Storage
from jobqueue.written import Written, drawn, of_job

COLUMNS = ("card", "question", "reference", "answer", *CRITERIA, "reviewer")
FEWEST = 3  # reviewers
# What a spreadsheet would take for a formula, also behind spaces and in full width.
FORMULA = re.compile(r"[\s\0]*[=+\-@＝＋－＠]|[\t\r\n]")


@dataclass(frozen=True)
class Card:
    """One answer to rate."""

    id: str  # card-<sheet>-<place>: says nothing of who wrote it, and no spreadsheet takes it for a number or a date
    job: str  # the evaluation in which it was written
    index: int  # of the question
    question: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Deck:
    """The cards of one sheet, in its order, and the models that wrote the answers."""

    sheet: str
    models: tuple[Rated, ...]
    cards: tuple[Card, ...]


def export(report: BatchReport, jobs: Sequence[Job], storage: Storage, questions: int, seed: int) -> Deck:
    """The deck of an ended batch, which the storage then knows. Raises BusyError, DataError, StorageError."""
    batch = report.batch
    if not report.complete:
        raise BusyError(f"{batch} has not ended, so not all of its answers are there", f"Wait: `loraq watch {batch}`.")
    answers = {job.id: of_job(job, storage) for job in jobs if job.kind is JobKind.EVALUATE}
    deck = deal(batch, rated_models(report), answers, questions, seed)
    keep(deck, batch, storage)
    return deck


def deal(
    batch: str, models: Sequence[Rated], answers: Mapping[str, Mapping[int, Written]], questions: int, seed: int
) -> Deck:
    """The answers of each model to the same few questions, shuffled: one seed always makes one sheet of a batch.

    Raises DataError where there is no question to which every model has written an answer.
    """
    models = [model for model in models if answers.get(model.job)]
    common = set[int].intersection(*(set(answers[model.job]) for model in models)) if models else set()
    if not common:
        raise DataError(
            f"{batch} has no question that every model has answered in words",
            "Evaluate with `metrics: [generated]` (questions with options) or `[bleu]` (any rows).",
        )
    some = drawn({index: answers[models[0].job][index] for index in common}, questions, seed)
    picked = [(model.job, answers[model.job][row.index]) for row in some for model in models]
    random.Random(seed).shuffle(picked)
    content = [batch, seed, [(job, row.index, row.text) for job, row in picked]]
    sheet = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:6]
    cards = [
        Card(f"card-{sheet}-{place:03}", job, row.index, row.question, row.reference, row.text)
        for place, (job, row) in enumerate(picked, start=1)
    ]
    return Deck(sheet, tuple(models), tuple(cards))


def as_csv(deck: Deck, delimiter: str = ",") -> bytes:
    """The sheet to fill in, as spreadsheets open it: UTF-8 with its mark, lines that end in CR LF, no formulas."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(COLUMNS)
    for card in deck.cards:
        texts = map(harmless, (card.question, card.reference, card.answer))
        writer.writerow([card.id, *texts, *([""] * (len(CRITERIA) + 1))])
    return file.getvalue().encode("utf-8-sig")


def harmless(text: str) -> str:
    """A cell that no spreadsheet computes."""
    return f"'{text}" if FORMULA.match(text) else text


def keep(deck: Deck, batch: str, storage: Storage) -> None:
    storage.write_text(_file(batch, deck.sheet), json.dumps(asdict(deck), indent=1))


def _file(batch: str, name: str) -> str:
    return f"batches/{batch}/cards/{name}.json"


def read_filled(batch: str, files: Mapping[str, bytes], storage: Storage) -> Ratings:
    """What the reviewers of these filled sheets made of the answers; kept in the storage, instead of an earlier import.

    Raises DataError with all that is wrong at once, each with file and line; MachineError without the packages.
    """
    sheets = [Sheet.parse(name, content, COLUMNS) for name, content in files.items()]
    named = [card for sheet in sheets for card in sheet.cards]
    deck = _deck(batch, named[0] if named else "", storage)
    problems = [problem for sheet in sheets for problem in sheet.check([card.id for card in deck.cards])]
    by_name = sorted(sheets, key=lambda sheet: sheet.reviewer.casefold())
    for reviewer, several in groupby(by_name, key=lambda sheet: sheet.reviewer.casefold()):
        first, *others = several
        problems += [f"{other.file}: {other.reviewer} has filled in {first.file} too" for other in others if reviewer]
    if len(sheets) < FEWEST:
        problems.append(
            f"{FEWEST} reviewers are needed at least, and there are {len(sheets)}: of fewer, one's taste decides"
        )
    if problems:
        raise DataError("\n".join(problems), "Nothing was imported. Correct this, and import all sheets again.")
    scores = {sheet.reviewer: sheet.scores for sheet in sorted(sheets, key=lambda sheet: sheet.reviewer)}
    ratings = _ratings(deck, scores)
    document = {"sheet": deck.sheet, "reviewers": scores, "ratings": asdict(ratings)}
    storage.write_text(_file(batch, "scores"), json.dumps(document, indent=1))
    return ratings


def _deck(batch: str, card: str, storage: Storage) -> Deck:
    """The one that a card belongs to. Raises DataError where there is none."""
    from pydantic import TypeAdapter

    found = re.fullmatch(r"card-([0-9a-f]{6})-\d+", card)
    try:
        text = storage.read_text(_file(batch, found[1] if found else "none"))
    except NotFoundError:
        raise DataError(
            f"{card or 'an empty sheet'} is of no sheet that was exported of {batch}",
            f"Name the batch that the sheets are of, or make one: `loraq cards export {batch} --out cards.csv`.",
        ) from None
    return TypeAdapter(Deck).validate_json(text)


def _ratings(deck: Deck, given: Mapping[str, Mapping[str, Mapping[Criterion, int]]]) -> Ratings:
    """Of each reviewer's scores by card."""
    try:
        from jobqueue.statistics import krippendorff_alpha

        agreement = {
            str(name): krippendorff_alpha([[of_one[card.id][name] for card in deck.cards] for of_one in given.values()])
            for name in CRITERIA
        }
        scores: dict[str, dict[int, Mapping[Criterion, float]]] = {}
        for card in deck.cards:
            scores.setdefault(card.job, {})[card.index] = average([of_one[card.id] for of_one in given.values()])
        models = rate(deck.models, scores)
    except ImportError as error:
        raise MachineError(
            f"what computes agreement and intervals is not installed here: {error}", "Run `pip install 'loraq[cards]'`."
        ) from error
    questions = {card.index for card in deck.cards}
    return Ratings("people", tuple(given), len(questions), models, agreement=agreement)


def imported(batch: str, storage: Storage) -> Ratings | None:
    """What was imported last. Raises StorageError."""
    from pydantic import TypeAdapter

    try:
        document = json.loads(storage.read_text(_file(batch, "scores")))
    except NotFoundError:
        return None
    return TypeAdapter(Ratings).validate_python(document["ratings"])
