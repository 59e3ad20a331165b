"""`loraq results` in its formats."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_fakes import (
    Command,
    FakeClient,
    answers_of,
    exported,
    make_job,
    scored,
    trained,
    two_trials,
    two_trials_answers,
)
from click import unstyle

from cli.trials import FIELDS
from jobqueue.job import FailureReason, Job, JobState
from jobqueue.results import BatchReport


@pytest.fixture(autouse=True)
def _finished(client: FakeClient) -> None:
    client.known["medqa"] = two_trials()


def test_best_first_then_failed_then_the_base_model(command: Command) -> None:
    lines = command("results", "medqa").stdout.splitlines()

    assert lines[0] == "medqa: org/tiny, 100 questions"
    assert [line.split()[0] for line in lines[4:8]] == [
        "learning_rate=0.0002",
        "learning_rate=0.0001",
        "learning_rate=0.1",
        "base",
    ]
    assert all(cell in lines[4] for cell in ("30.0% → 52.0%", "[43.0, 61.0]", "+22.0", "3.0 GiB", "2.5 min"))
    assert "learning_rate=0.1 r=8 failed (nan_loss): the loss was NaN at step [12]" in lines
    assert any(line.startswith("Best: learning_rate=0.0002 r=8 with 52.0% (likelihood), 22.0 points") for line in lines)


def test_an_export_is_a_line_with_how_close_it_is_or_why_it_failed(
    command: Command, client: FakeClient, tmp_path: Path
) -> None:
    wrong = {"reason": FailureReason.WRONG_EXPORT, "message": "gguf q8_0 does not answer as the adapter does"}
    client.known["medqa"] += [
        make_job("medqa.1.export", outcome=exported()),
        make_job("medqa.2.export", JobState.FAILED, **wrong),
    ]

    for form in ((), ("--markdown",)):
        lines = command("results", "medqa", *form).stdout.splitlines()
        assert (
            "learning_rate=0.0001 r=8: gguf q8_0 answers as the adapter does (log-probabilities differ by 0.004, "
            "119 of 120 tokens are the same; the base model's differ by 2.5): batches/x/1-a/gguf/medqa.1-Q8_0.gguf"
        ) in lines
        assert (
            "learning_rate=0.0002 r=8: its export failed (wrong_export): gguf q8_0 does not answer as the adapter does"
        ) in lines
    page = tmp_path / "page.html"
    assert command("results", "medqa", "--html", str(page)).exit_code == 0
    assert "<h2>Exports</h2>\n<p>learning_rate=0.0002 r=8: its export failed (wrong_export)" in page.read_text()
    report = BatchReport.from_dict(json.loads(command("results", "medqa", "--json").stdout))
    assert [trial.export and trial.export.job for trial in report.trials][:2] == ["medqa.2.export", "medqa.1.export"]
    assert "export" not in command("results", "medqa", "--csv").stdout.splitlines()[0]


@pytest.mark.parametrize("columns", [60, 80, 120, 160, 200])
def test_table_adapts_to_the_terminal(command: Command, client: FakeClient, columns: int) -> None:
    """From 80 columns on nothing that decides is left out; what stands beside it moves below it."""
    client.answers = two_trials_answers()

    text = unstyle(command("results", "medqa", columns=columns).stdout)

    assert all(len(line) <= columns for line in text.splitlines())
    assert "30.0% → 52.0%" in text
    if columns >= 80:
        assert all(cell in text for cell in ("[43.0, 61.0]", "+22.0", "better", "3.0 GiB", "2.5 min", "nan_loss"))
        assert "no difference shown" in " ".join(text.split())
    assert ("5,123" in text) is (columns >= 120)


def test_no_difference_is_said_of_each_trial(command: Command, client: FakeClient) -> None:
    client.answers = two_trials_answers()

    lines = command("results", "medqa").stdout.splitlines()

    [best] = [line for line in lines if line.startswith("learning_rate=0.0002 r=8 ")]
    [second] = [line for line in lines if line.startswith("learning_rate=0.0001 r=8 ")]
    assert " better " in best
    assert "[+13.0, +31.0]" in best
    assert " no difference shown " in second
    assert " 0.15 " in second
    assert (
        "p: exact McNemar test against the base model on the same questions, "
        "with Holm's correction for the 2 trials." in lines
    )


def test_failures_are_said_with_their_reason_also_of_the_base_model(command: Command, client: FakeClient) -> None:
    jobs = [make_job("medqa.1", trial="r=8", outcome=trained()), make_job("medqa.2", JobState.CANCELLED, trial="r=16")]
    jobs += [make_job("base-1", JobState.FAILED, reason=FailureReason.BAD_DATA, message="no question")]
    client.known["medqa"] = jobs

    for form in ([], ["--markdown"]):
        lines = command("results", "medqa", *form).stdout.splitlines()
        assert "base model org/tiny failed (bad_data): no question" in lines
        assert "r=16 was cancelled: no reason given" in lines


def test_unfinished_batch_says_so(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [
        make_job("medqa.1", trial="r=8", outcome=trained()),
        make_job("medqa.1.eval", trial="r=8", outcome=scored(40, 38)),
        make_job("medqa.2", JobState.RUNNING, trial="r=16"),
    ]

    text = command("results", "medqa").stdout

    assert "Best so far: r=8" in text
    assert "The batch is still at work: `loraq watch medqa`." in text


def test_json_can_be_read_back(command: Command) -> None:
    document = json.loads(command("results", "medqa", "--json").stdout)

    report = BatchReport.from_dict(document)
    assert json.loads(json.dumps(report.to_dict())) == document
    assert document["trials"][0]["scores"]["likelihood"]["correct"] == 52


def test_csv_has_plain_numbers(command: Command) -> None:
    rows = list(csv.DictReader(command("results", "medqa", "--csv").stdout.splitlines()))

    assert [row["kind"] for row in rows] == ["trial", "trial", "trial", "base"]
    assert (float(rows[0]["likelihood"]), float(rows[0]["points"]), rows[0]["peak_bytes"]) == (
        0.52,
        22.0,
        str(3 * 2**30),
    )
    assert [row["training.learning_rate"] for row in rows] == ["0.0002", "0.0001", "0.1", ""]
    assert rows[2]["message"] == "the loss was NaN at step [12]"
    assert rows[2]["likelihood"] == ""


def test_markdown_is_a_table(command: Command) -> None:
    lines = command("results", "medqa", "--markdown").stdout.splitlines()

    assert lines[0].startswith("| trial | job | state | likelihood base → tuned |")
    assert {line.count("|") for line in lines[:6]} == {lines[0].count("|")}
    assert lines[-1].startswith("Best: ")


def test_results_of_no_batch_is_an_error(command: Command) -> None:
    assert command("results", "nothing").exit_code == 6


def trials(command: Command, *arguments: str) -> list[str]:
    """The learning rates of the trials that are shown, in their order."""
    result = command("results", "medqa", "--csv", *arguments)
    assert result.exit_code == 0, result.output
    return [
        row["label"].split()[0].partition("=")[2] for row in csv.DictReader(result.stdout.splitlines()) if row["label"]
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["0.0002", "0.0001", "0.1"]),
        (["--reverse"], ["0.0001", "0.0002", "0.1"]),
        (["--sort", "training.learning_rate"], ["0.0001", "0.0002", "0.1"]),
        (["--sort", "learning_rate", "--reverse"], ["0.1", "0.0002", "0.0001"]),
        (["--sort", "loss"], ["0.0002", "0.0001", "0.1"]),
        (["--filter", "validation_loss<1.4"], ["0.0002", "0.0001"]),
        (["--sort", "generated", "--reverse"], ["0.0001", "0.0002", "0.1"]),
        (["--filter", "state=failed"], ["0.1"]),
        (["--filter", "reason=nan_loss"], ["0.1"]),
        (["--filter", "lora.r=8"], ["0.0002", "0.0001", "0.1"]),
        (["--filter", "learning_rate==1e-4"], ["0.0001"]),
        (["--filter", "state==failed"], ["0.1"]),
        (["--filter", "r!=8"], []),
        (["--filter", "learning_rate<=2e-4", "--filter", "accuracy > 50"], ["0.0002"]),
        (["--filter", "learning_rate=1e-4"], ["0.0001"]),
        (["--filter", "memory<3.5"], ["0.0002", "0.0001"]),
        (["--filter", "base_model=ORG/tiny", "--filter", "state!=failed"], ["0.0002", "0.0001"]),
    ],
)
def test_sort_and_filter(command: Command, arguments: list[str], expected: list[str]) -> None:
    assert trials(command, *arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--csv", "--json"], "--csv and --json are two forms"),
        (["--filter", "r"], "write KEY=VALUE"),
        (["--filter", "accuracy>50%"], "'50%' is no number"),
        (["--filter", "learning_rat=1"], "training.learning_rate"),
        (["--sort", "nothing"], "accuracy, likelihood"),
        (["--sort", "limit"], "data.limit or evaluation.limit"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    command: Command, client: FakeClient, arguments: list[str], said: str
) -> None:
    client.known["medqa"][0].spec["data"] = {"limit": 1}
    client.known["medqa"][1].spec["evaluation"] = {"limit": 2}

    result = command("results", "medqa", *arguments)

    assert result.exit_code == 2
    assert said in result.stderr


def test_a_batch_without_trials_is_referred_to_show(command: Command, client: FakeClient) -> None:
    client.known["medqa-export"] = [make_job("medqa-export.1.export", outcome=exported())]
    lines = command("results", "medqa-export").stdout.splitlines()
    assert lines[2:4] == ["`loraq show medqa-export` has what medqa-export did.", "There is no trial."]
    assert "There is no such trial." in command("results", "medqa", "--filter", "accuracy>99").stdout


def test_help_names_all_that_trials_can_be_sorted_and_filtered_by(command: Command) -> None:
    words = set(re.findall(r"\w+", command("results", "--help").stdout))
    assert set(FIELDS) <= words


def test_several_batches_are_ranked_together(command: Command, client: FakeClient) -> None:
    client.known["other"] = two_trials("other")
    for job in client.known["other"]:
        job.spec["method"] = "lora"

    lines = command("results", "medqa", "other", "medqa").stdout.splitlines()
    table = [line.split() for line in lines[5:13]]

    assert lines[:2] == ["medqa: org/tiny, 100 questions", "other: org/tiny, 100 questions"]
    assert [(row[0], row[1], row[2]) for row in table[:2]] == [
        ("medqa", "learning_rate=0.0002", "method=qlora"),
        ("other", "learning_rate=0.0002", "method=lora"),
    ]
    assert sum("base model" in line for line in lines[:13]) == 1
    assert [line[:13] for line in lines if line.startswith(("medqa: Best", "other: Best"))] == [
        "medqa: Best: ",
        "other: Best: ",
    ]
    assert [report["batch"] for report in json.loads(command("results", "medqa", "other", "--json").stdout)] == [
        "medqa",
        "other",
    ]


def test_a_section_that_one_batch_has_alone_is_one_word_of_a_label(command: Command, client: FakeClient) -> None:
    client.known["other"] = two_trials("other")
    for job in client.known["other"]:
        job.spec["ewc"] = {"ewc_lambda": 10.0 if job.id.startswith("other.1") else 20.0, "samples": 256, "seed": 3407}

    rows = command("results", "medqa", "other", "--markdown").stdout.splitlines()
    labels = [row.split(" | ")[1] for row in rows if row.startswith(("| medqa", "| other"))]

    assert labels[:2] == ["learning_rate=0.0002 ewc_lambda=none", "learning_rate=0.0002 ewc_lambda=20"]


def test_markdown_says_which_batch_a_verdict_is_of_and_what_the_numbers_are(
    command: Command, client: FakeClient
) -> None:
    client.known["other"], client.answers = two_trials("other"), two_trials_answers()
    alone = command("results", "medqa", "--markdown").stdout
    both = command("results", "medqa", "other", "--markdown").stdout.splitlines()

    assert "\nBest: " in alone
    assert "McNemar" in alone
    assert [line.split(":")[0] for line in both if ": Best: " in line] == ["medqa", "other"]


def test_batches_with_other_questions_are_not_to_be_compared(command: Command, client: FakeClient) -> None:
    client.known["other"] = two_trials("other")
    for job in client.known["other"]:
        if "evaluation" in job.spec:
            job.spec["evaluation"] = {**job.spec["evaluation"], "source": "others.jsonl"}

    assert "not asked the same questions" in command("results", "medqa", "other").stdout
    assert "not asked the same questions" not in command("results", "medqa").stdout


def test_cost_is_shown_where_a_price_is_set(command: Command, client: FakeClient) -> None:
    assert "cost" not in command("results", "medqa").stdout
    client.price = {"H100": 3.0}

    text = command("results", "medqa").stdout

    assert sum(line.endswith("NVIDIA H100") and " 1.00 " in line for line in text.splitlines()) == 2
    assert "cost: 2.00 in all for 0.67 GPU hours" in text


def test_memory_shows_every_figure_of_the_article(command: Command) -> None:
    text = command("results", "medqa", "--memory").stdout

    [line] = [line for line in text.splitlines() if line.startswith("learning_rate=0.0001 r=8  NVIDIA H100")]
    assert " ".join(line.split()[4:]) == "80.0 GiB 2.0 GiB 3.0 GiB 3.75% 1.0 GiB 1.25% 150.0 s 2.50 min"
    narrow = unstyle(command("results", "medqa", "--memory", columns=80).stdout)
    assert all(len(line) <= 80 for line in narrow.splitlines())
    assert all(figure in narrow for figure in ("80.0 GiB", "2.0 GiB", "3.75%", "1.25%", "150.0 s", "2.50 min"))


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_plot_fits_the_terminal(command: Command, columns: int) -> None:
    text = unstyle(command("results", "medqa", "--plot", columns=columns).stdout)
    lines = text.splitlines()

    assert all(len(line) <= columns for line in lines)
    assert "1 learning_rate=0.0002 r=8: 2.000 to 1.250" in lines
    [best] = [line for line in lines if line.startswith("0.0002 ")]
    [second] = [line for line in lines if line.startswith("0.0001 ")]
    assert best.endswith("52.0%")
    assert second.index("├") < second.index("●") < second.index("┤")
    assert best.index("●") > second.index("●")


def test_plot_has_colours_and_marks_for_nine_curves(
    command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    client.known["medqa"] = [make_job("medqa.1", JobState.FAILED, trial="r=0")]
    client.known["medqa"] += [make_job(f"medqa.{n}", trial=f"r={n}", outcome=trained()) for n in range(2, 14)]

    text = command("results", "medqa", "--plot", "--sort", "state").output

    assert "\x1b[94m" in text
    assert [line[:5] for line in unstyle(text).splitlines() if " r=" in line][-2:] == ["8 r=9", "9 r=1"]
    assert "and 3 more, not drawn" in text


def test_plot_of_a_batch_without_results(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.RUNNING, trial="r=8")]

    result = command("results", "medqa", "--plot")

    assert result.exit_code == 0
    assert "There is no loss yet." in result.stdout


def test_results_of_a_file_need_no_server(command: Command, client: FakeClient, tmp_path: Path) -> None:
    client.known["other"] = two_trials("other")
    one, both = tmp_path / "one.json", tmp_path / "both.json"
    one.write_text(command("results", "medqa", "--json").stdout)
    both.write_text(command("results", "medqa", "other", "--json").stdout)
    tables = [command("results", *batches).stdout for batches in (["medqa"], ["medqa", "other"])]
    client.known.clear()

    assert [command("results", str(file)).stdout for file in (one, both)] == tables


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"batch": "b"}'])
def test_file_without_results_is_said_in_a_line(command: Command, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)

    result = command("results", str(file))

    assert result.exit_code == 4
    assert result.stderr.startswith((f"cannot read {file}", f"{file} holds no results: "))
    assert len(result.stderr.splitlines()) == 2


LIGHT = """
import sys

for name in ("numpy", "pandas", "scipy", "statsmodels", "torch"):
    sys.modules[name] = None
import cli.main
cli.main.loraq(sys.argv[1:], prog_name="loraq")
"""


@pytest.mark.parametrize("form", [[], ["--plot"], ["--markdown"], ["--html", "page.html"]])
def test_a_laptop_without_scipy_shows_the_tests(
    command: Command, client: FakeClient, tmp_path: Path, form: list[str]
) -> None:
    client.answers = two_trials_answers()
    (tmp_path / "report.json").write_text(command("results", "medqa", "--json").stdout)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    done = subprocess.run(
        [sys.executable, "-c", LIGHT, "results", "report.json", *form],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "page.html").read_text() if "--html" in form else done.stdout
    assert "--plot" in form or "no difference shown" in shown
    assert "learning_rate=0.0002 r=8" in shown


def test_perplexity_and_bleu_have_columns_and_fields(command: Command, client: FakeClient) -> None:
    texts = {"chat.1.eval": (12.5, 20.04), "chat.2.eval": (7.25, 31.0), "base-0": (40.0, 3.0)}
    outcomes = {
        job: {"questions": 0, "perplexity": {"perplexity": perplexity}, "bleu": {"bleu": bleu}}
        for job, (perplexity, bleu) in texts.items()
    }
    client.known["chat"] = [
        *(make_job(f"chat.{n}", batch="chat", trial=f"r={n}", outcome=trained()) for n in (1, 2)),
        *(make_job(job, batch="chat" * job.startswith("chat"), outcome=outcome) for job, outcome in outcomes.items()),
    ]

    text = command("results", "chat").stdout

    header, best, second, base = (line.split() for line in text.splitlines()[2:6])
    assert header[2:4] == ["perplexity", "BLEU"]
    assert best[:4] == ["r=2", "chat.2", "7.250", "31.0"]
    assert second[:4] == ["r=1", "chat.1", "12.500", "20.0"]
    assert base[4:6] == ["40.000", "3.0"]
    assert "Lowest perplexity: 7.25, r=2 (the base model: 40.00; not tested)." in text
    table = list(csv.DictReader(command("results", "chat", "--csv", "--sort", "bleu").stdout.splitlines()))
    assert [(row["kind"], row["perplexity"], row["bleu"]) for row in table] == [
        ("trial", "7.25", "31.0"), ("trial", "12.5", "20.04"), ("base", "40.0", "3.0"),
    ]  # fmt: skip
    assert len(command("results", "chat", "--filter", "perplexity<10", "--csv").stdout.splitlines()) == 3


def test_an_ensemble_is_a_row_with_its_comparison_with_the_best_trial(
    command: Command, client: FakeClient, tmp_path: Path
) -> None:
    jobs = two_trials()
    single = jobs[1]
    members = {"name": "top", "trains": ["medqa.1", "medqa.2"], "method": "cat", "best": None, "weights": None}
    spec = {**single.spec, "adapter_job": None, "members": members}
    outcome = scored(80, 80) | {"memory": {"peak_reserved_bytes": 77 * 2**30}}
    top = replace(single, id="medqa.top", trial="top (cat of 2)", spec=spec, outcome=outcome)
    client.known["medqa"] = [*jobs[:-1], top, jobs[-1]]
    client.answers = {**two_trials_answers(), "medqa.top": answers_of(*range(80))}
    out = command("results", "medqa", columns=200).stdout
    [row] = [line for line in out.splitlines() if line.startswith("top (cat of 2)")]
    assert "30.0% → 80.0%" in row
    assert "+28.0 better" in row
    assert "vs best trial: the same test against the best single trial." in out
    assert "Holm's correction for all tests of the batch" in out
    assert "77.0 GiB" not in row, "memory is what training took"
    lines = {line["label"]: line for line in csv.DictReader(command("results", "medqa", "--csv").stdout.splitlines())}
    ensemble = lines.pop("top (cat of 2)")
    assert (float(ensemble["versus_single_points"]), ensemble["versus_single_finding"]) == (28.0, "better")
    assert not any(line["versus_single_points"] for line in lines.values())
    page = tmp_path / "page.html"
    assert command("results", "medqa", "--html", str(page)).exit_code == 0
    assert "top (cat of 2)" in page.read_text()
    assert "Accuracy (likelihood) by training.learning_rate" in page.read_text()
    assert "accuracy" in command("results", "medqa", "--plot").stdout.lower()
    assert command("show", "medqa.top", columns=100).exit_code == 0


def test_the_original_task_has_columns_and_fields(command: Command, client: FakeClient) -> None:
    general = {"evaluation": {"source": "general.jsonl", "split": "test", "metrics": ["likelihood"]}}

    def asked(job_id: str, right: int | None) -> Job:
        job = make_job(job_id, outcome=scored(right, right) if right is not None else {})
        return replace(job, spec=job.spec | general)

    failed = asked("medqa.3.original", None)
    client.known["medqa"] = [
        *(job for job in two_trials() if not job.id.startswith("medqa.3")),
        make_job("medqa.3", trial="r=16", outcome=trained()),
        make_job("medqa.3.eval", outcome=scored(20, 20)),
        asked("base-fedcba", 70),
        asked("medqa.1.original", 68),
        asked("medqa.2.original", 41),
        replace(failed, state=JobState.FAILED, reason=FailureReason.BAD_DATA, message="no question"),
    ]
    client.answers = two_trials_answers() | {
        "base-fedcba": answers_of(*range(70)),
        "medqa.1.original": answers_of(*range(68)),
        "medqa.2.original": answers_of(*range(41)),
    }

    text = command("results", "medqa", columns=200).stdout

    assert all(cell in text for cell in ("70.0% → 41.0%", "-29.0 worse", "70.0% → 68.0%", "-2.0 not shown"))
    assert "r=16 on the original task failed (bad_data): no question" in text
    said = " ".join(unstyle(text).split())
    assert "On the original task it has 41.0%, before 70.0%: 29.0 points below what it began with (p < 0.0001)." in said
    narrow = unstyle(command("results", "medqa", columns=80).stdout)
    assert all(len(line) <= 80 for line in narrow.splitlines())
    assert "70.0% → 41.0%" in narrow

    assert trials(command, "--filter", "kept>-10") == ["0.0001"]
    assert trials(command, "--sort", "original")[:2] == ["0.0001", "0.0002"]
    table = {row["label"]: row for row in csv.DictReader(command("results", "medqa", "--csv").stdout.splitlines())}
    row = table["learning_rate=0.0002 r=8"]
    assert (row["original_before"], row["original"], row["original_points"], row["original_finding"]) == (
        "0.7", "0.41", "-29.0", "worse",
    )  # fmt: skip
    assert "70.0% → 41.0%" in command("results", "medqa", "--markdown").stdout
    document = json.loads(command("results", "medqa", "--json").stdout)
    assert document["trials"][0]["original"]["versus_before"]["lost"] == 29
