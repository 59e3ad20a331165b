"""Ratings by a judge and by people, in every form of `loraq results`, and `loraq cards`."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_fakes import Command, FakeClient, make_job, two_trials, two_trials_answers
from click import unstyle

from jobqueue.cards import Card, Deck
from jobqueue.errors import DataError
from jobqueue.job import FailureReason, JobKind, JobState
from jobqueue.ratings import CRITERIA, JudgeUsage, Rated, Ratings, rate
from jobqueue.results import BatchReport

MODELS = [
    Rated("medqa.1.eval", "learning_rate=0.0001 r=8", "base-0123456789ab"),
    Rated("medqa.2.eval", "learning_rate=0.0002 r=8", "base-0123456789ab"),
    Rated("base-0123456789ab", "base model (4-bit)"),
]
FLAT = {"medqa.1.eval": 3.0, "medqa.2.eval": 4.0, "base-0123456789ab": 2.0}
RATED = rate(MODELS, {job: {i: dict.fromkeys(CRITERIA, s + i % 2) for i in range(10)} for job, s in FLAT.items()})
USAGE = JudgeUsage(60, 20, 1, 3, 120_000, 4_000, 0.52, 0.25, None)
JUDGE = Ratings("judge", ("grader",), 10, RATED, usage=USAGE)
PEOPLE = Ratings(
    "people", ("Ann", "Bob", "Cem"), 10, RATED, agreement={"relevance": 0.85, "accuracy": 0.5, "fluency": None}
)


class Rates(FakeClient):
    """Has ratings with every report, and reads and writes cards."""

    def report(self, batch: str) -> BatchReport:
        return replace(super().report(batch), judge=JUDGE, people=PEOPLE)

    def export_cards(self, batch: str, questions: int, seed: int) -> Deck:
        self.batch(batch)
        return Deck(
            "0a1b2c", tuple(MODELS), (Card("card-0a1b2c-001", "medqa.1.eval", seed, "Which?", "=A", f"ü{questions}"),)
        )

    def import_cards(self, batch: str, files: tuple[Path, ...]) -> Ratings:
        if len(files) < 3:
            raise DataError("a.csv:2: relevance is missing\n3 reviewers are needed", "Correct the sheets.")
        return PEOPLE


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Rates:
    fake = Rates(answers=two_trials_answers())
    fake.known["medqa"] = two_trials()
    monkeypatch.setattr("jobqueue.service.Client", lambda settings: fake)
    return fake


@pytest.mark.usefixtures("rates")
def test_the_table_shows_who_rated_whom_and_whether_it_is_shown(command: Command) -> None:
    lines = command("results", "medqa").stdout.splitlines()

    start = lines.index("Answers rated by the judge grader, 1 to 5, 10 questions")
    best, second, base = lines[start + 3 : start + 6]
    shown = "learning_rate=0.0002 r=8 4.50 [4.20, 4.80] 4.50 4.50 4.50 +2.00 [+2.00, +2.00] better 0.0039 10"
    assert " ".join(best.split()) == shown
    assert second.startswith("learning_rate=0.0001 r=8")
    assert base.split()[:4] == ["base", "model", "(4-bit)", "2.50"]
    text = "\n".join(lines)
    assert "60 judgements, 20 of them at hand from before, 1 unreadable, 3 requests sent again" in text
    assert "120,000 tokens read, 4,000 written, cost 0.5200." in text
    assert "Disagreement (highest less lowest score, on average): its samples of one answer 0.25." in text
    assert "Answers rated by 3 reviewers Ann, Bob, Cem, 1 to 5, 10 questions" in lines
    assert (
        "relevance 0.85 (reliable), accuracy 0.50 (too low to rely on), fluency not defined, as all scores are alike"
        in text
    )
    assert (
        "signed-rank test of the overall scores against the base model, with Holm's correction for the 2 trials."
        in text
    )


@pytest.mark.usefixtures("rates")
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_tables_of_ratings_adapt_to_the_terminal(command: Command, columns: int) -> None:
    text = unstyle(command("results", "medqa", columns=columns).stdout)
    rows = [line for line in text.splitlines() if not line.startswith(("Answers", "The judge", "Agreement", "p:"))]
    assert all(len(line) <= columns for line in rows)
    assert "+2.00" in text


@pytest.mark.usefixtures("rates")
def test_every_other_form_has_the_ratings_too(command: Command, tmp_path: Path) -> None:
    document = json.loads(command("results", "medqa", "--json").stdout)
    assert document["judge"]["usage"]["cost"] == 0.52
    (tmp_path / "kept.json").write_text(json.dumps(document))
    again = command("results", str(tmp_path / "kept.json"), "--markdown").stdout
    assert again == command("results", "medqa", "--markdown").stdout
    assert "| learning_rate=0.0002 r=8 | 4.50 | [4.20, 4.80] |" in again

    trial, _, _, base = csv.DictReader(command("results", "medqa", "--csv").stdout.splitlines())
    assert (trial["judge_overall"], trial["judge_vs_base"], trial["people_fluency"]) == ("4.5", "2.0", "4.5")
    assert (base["judge_overall"], base["judge_vs_base"]) == ("2.5", "")

    command("results", "medqa", "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Answers rated by the judge grader, 1 to 5, 10 questions</h2>" in page
    assert "too low to rely on" in page


@pytest.mark.usefixtures("rates")
def test_trials_are_sorted_and_filtered_by_their_ratings(command: Command) -> None:
    rows = list(
        csv.DictReader(
            command("results", "medqa", "--csv", "--sort", "people", "--filter", "judge>3").stdout.splitlines()
        )
    )
    assert [row["people_overall"] for row in rows if row["kind"] == "trial"] == ["4.5", "3.5"]


def test_without_ratings_nothing_is_said_of_them(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = two_trials()
    assert "Answers rated" not in command("results", "medqa").stdout
    assert "judge" not in command("results", "medqa", "--csv").stdout


def test_a_judge_that_failed_is_named_with_its_reason(command: Command, client: FakeClient) -> None:
    why = {"reason": FailureReason.REFUSED, "message": "it refuses the key. Set it."}
    client.known["medqa"] = [*two_trials(), make_job("medqa.judge", JobState.FAILED, kind=JobKind.JUDGE, **why)]
    for form in ((), ("--markdown",)):
        assert "medqa.judge failed (refused): it refuses the key. Set it." in command("results", "medqa", *form).stdout


@pytest.mark.usefixtures("rates")
def test_cards_are_written_as_a_sheet(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "cards.csv"
    done = command(
        "cards", "export", "medqa", "--out", str(out), "--questions", "7", "--seed", "5", "--delimiter", "semicolon"
    )
    assert done.stdout == f"wrote {out}: 1 card, 1 question to 3 models\n"
    assert out.read_bytes().decode("utf-8-sig").splitlines() == [
        "card;question;reference;answer;relevance;accuracy;fluency;reviewer",
        "card-0a1b2c-001;Which?;'=A;ü7;;;;",
    ]
    assert command("cards", "export", "medqa", "--out", str(tmp_path / "no" / "x.csv")).exit_code == 1


@pytest.mark.usefixtures("rates")
def test_filled_cards_are_shown_and_faults_end_with_the_code_of_bad_data(command: Command) -> None:
    done = command("cards", "import", "medqa", "a.csv", "b.csv", "c.csv")
    assert done.stdout.startswith("medqa: Answers rated by 3 reviewers Ann, Bob, Cem")
    assert "Agreement (Krippendorff's alpha, ordinal; 1 is perfect, 0 is chance): relevance 0.85" in done.stdout
    assert json.loads(command("cards", "import", "medqa", "a", "b", "c", "--json").stdout)["raters"] == [
        "Ann",
        "Bob",
        "Cem",
    ]
    wrong = command("cards", "import", "medqa", "a.csv")
    assert wrong.exit_code == 4
    assert "a.csv:2: relevance is missing" in wrong.stderr
