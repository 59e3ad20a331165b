"""`loraq export`, and what `loraq show` says of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_fakes import Command, FakeClient, exported, make_job

from jobqueue.job import FailureReason, JobState
from jobqueue.job_spec import ExportSpec
from jobqueue.plan import make_plan
from jobqueue.sweep import read_sweep


@pytest.fixture(autouse=True)
def _trained(client: FakeClient, tmp_path: Path) -> None:
    """medqa.1 has succeeded, medqa.2 is at work."""
    (tmp_path / "sweep.yaml").write_text("{name: medqa, base_model: org/tiny, data: {source: org/questions}}")
    [train, _] = make_plan(read_sweep(tmp_path / "sweep.yaml"), workers_are_here=False).jobs
    spec = train.spec.model_dump(mode="json")
    client.known["medqa"] = [make_job("medqa.1", spec=spec), make_job("medqa.2", JobState.RUNNING, spec=spec)]


def export_is(client: FakeClient, state: JobState, **fields: object) -> None:
    client.known["medqa-export"] = [make_job("medqa-export.1.export", state, **fields)]


def test_a_trial_is_sent_with_what_was_asked(command: Command, client: FakeClient) -> None:
    export_is(client, JobState.QUEUED)
    asked = ("--format", "gguf", "--quantization-method", "f16", "--prompt", "Hi")
    result = command("export", "medqa/1", *asked, "--force")

    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == "medqa-export.1.export is queued."
    assert "loraq show medqa-export.1.export" in result.stdout
    [plan] = client.submitted
    spec = plan.jobs[0].spec
    assert isinstance(spec, ExportSpec)
    assert (spec.adapter_job, spec.data, client.forced) == ("medqa.1", None, True)
    assert spec.export.model_dump() == {"formats": ("gguf",), "quantization_method": "f16", "prompts": ("Hi",)}


def test_with_wait_it_says_where_the_files_lie_and_how_close_they_are(command: Command, client: FakeClient) -> None:
    export_is(client, JobState.SUCCEEDED, outcome=exported())
    result = command("export", "medqa/1", "--wait")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-2:] == [
        f"{what} answers as the adapter does (log-probabilities differ by 0.004, 119 of 120 tokens are the same; "
        f"the base model's differ by 2.5): batches/x/1-a/{path}"
        for what, path in (("merged_16bit", "merged_16bit"), ("gguf q8_0", "gguf/medqa.1-Q8_0.gguf"))
    ]
    assert json.loads(command("export", "medqa/1", "--json").stdout)["outcome"]["exports"][0]["difference"] == 0.004


def test_prompts_that_do_not_tell_adapter_and_base_model_apart_are_named(command: Command, client: FakeClient) -> None:
    export_is(client, JobState.SUCCEEDED, outcome=exported(base_difference=0.1))
    assert "but so does the base model (by 0.1): ask other prompts" in command("export", "medqa/1").stdout


def test_one_that_failed_ends_with_its_reason_and_a_code(command: Command, client: FakeClient) -> None:
    export_is(client, JobState.FAILED, reason=FailureReason.WRONG_EXPORT, message="gguf q8_0 answers otherwise")
    result = command("export", "medqa/1", "--wait")

    assert result.exit_code == 10
    assert "medqa-export.1.export did not succeed: gguf q8_0 answers otherwise" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("medqa/2",), 6, "medqa.2 has nothing to export yet: it is running"),
        (("medqa",), 6, "'medqa' is no trial"),
        (("medqa/1", "--quantization-method", "f16"), 2, "--quantization-method is of gguf: add --format gguf"),
        (("medqa/1", "--format", "lora"), 2, "'lora' is not one of 'merged_16bit', 'gguf'"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    command: Command, client: FakeClient, arguments: tuple[str, ...], code: int, words: str
) -> None:
    result = command("export", *arguments)
    assert (result.exit_code, client.submitted) == (code, [])
    assert words in result.stderr


def test_show_has_the_files_and_how_close_they_are(command: Command, client: FakeClient) -> None:
    export_is(client, JobState.SUCCEEDED, outcome=exported())
    lines = [" ".join(line.split()) for line in command("show", "medqa-export.1.export").stdout.splitlines()]

    assert "merged_16bit batches/x/1-a/merged_16bit" in lines
    compared = lines.index("Compared with the adapter")
    assert lines[compared + 2].startswith("gguf q8_0 answers as the adapter does (log-probabilities differ by 0.004")
