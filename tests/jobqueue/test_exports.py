"""Exports: planned with a sweep, or for a trial that has succeeded; refused before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import must_claim, states

from jobqueue.errors import NotFoundError, SpecError
from jobqueue.export_spec import ExportOptions
from jobqueue.job import JobKind, JobState
from jobqueue.job_spec import ExportSpec
from jobqueue.plan import Plan, make_plan
from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.store import Settlement
from jobqueue.sweep import read_sweep

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}
BOTH = {"formats": ["merged_16bit", "gguf"]}
DONE = Settlement(JobState.SUCCEEDED, outcome={"folder": "batches/b/b.1/1-abc"})


@pytest.fixture
def client(settings: Settings) -> Client:
    return Client(settings)


def sweep_file(folder: Path, **changes: Any) -> Path:
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    fields = {
        "name": "b", "base_model": "owner/name-1B", "data": {"source": "rows.jsonl"}, "resources": {"memory": "4GiB"},
    } | changes  # fmt: skip
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return file


def plan(folder: Path, **changes: Any) -> Plan:
    return make_plan(read_sweep(sweep_file(folder, **changes)), workers_are_here=False)


def export_of(made: Plan) -> ExportSpec:
    [spec] = [job.spec for job in made.jobs if isinstance(job.spec, ExportSpec)]
    return spec


# -- with a sweep


def test_each_trial_is_exported_once_it_is_trained_and_the_report_waits_for_that(tmp_path: Path) -> None:
    made = plan(tmp_path, export=BOTH, evaluation={"source": "rows.jsonl"}, sweep={"grid": {"lora.r": [8, 16]}})

    exports = [(job.id, job.kind, job.needs, job.trial) for job in made.jobs if job.kind is JobKind.EXPORT]
    assert exports == [
        ("1.export", JobKind.EXPORT, ("1",), "r=8"),
        ("2.export", JobKind.EXPORT, ("2",), "r=16"),
    ]
    assert {"1.export", "2.export"} < set(made.jobs[-1].follows)


def test_its_prompts_are_of_the_rows_that_were_trained_on_unless_the_user_has_some(tmp_path: Path) -> None:
    data = {"source": "rows.jsonl", "system_prompt": "Be kind.", "replay": {"source": "other/rows"}}
    of_rows = export_of(plan(tmp_path, data=data, export=BOTH))

    assert of_rows.data is not None
    assert of_rows.data.source.startswith("loraq://")
    assert (of_rows.data.system_prompt, of_rows.data.replay) == ("Be kind.", None)
    assert export_of(plan(tmp_path, export=BOTH | {"prompts": ["Hi"]})).data is None


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        (
            {"data": None, "evaluation": {"source": "rows.jsonl"}, "export": BOTH},
            "export",
            "writes what was trained, and without data nothing is trained",
        ),
        ({"export": {"quantization_method": "q8_0"}}, "export.quantization_method", "is of gguf; add it"),
        ({"export": {"formats": ["lora"]}}, "export.formats", "must be 'merged_16bit' or 'gguf', not 'lora'"),
        ({"export": {"formats": []}}, "export.formats", "must have at least 1 value"),
        (
            {"export": BOTH | {"quantization_method": "q4_k_m"}},
            "export.quantization_method",
            "must be 'q8_0', 'bf16', 'f16' or 'f32', not 'q4_k_m'",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_with_its_place(
    tmp_path: Path, changes: dict[str, Any], path: str, words: str
) -> None:
    with pytest.raises(SpecError) as error:
        plan(tmp_path, **changes)
    [problem] = error.value.problems
    assert problem.path.startswith(path)
    assert words in problem.message


# -- afterwards


@pytest.fixture
def trained(client: Client, tmp_path: Path) -> Client:
    """b.1 has succeeded."""
    client.submit(client.plan(client.read(sweep_file(tmp_path, method="lora", lora={"r": 8}))))
    client.store.settle(must_claim(client.store), DONE)
    assert states(client.store, "b.1") == ["succeeded"]
    return client


def send(client: Client, trial: str = "b/1", **options: Any) -> str:
    return client.submit(client.plan_export(trial, ExportOptions(**options))).name


def test_a_trial_that_has_succeeded_becomes_a_batch_of_one_job(trained: Client) -> None:
    name = send(trained, formats=("gguf",), quantization_method="f16")

    batch = trained.batch(name)
    assert (name, batch.jobs, batch.base_model) == ("b-export", ("b-export.1.export",), "owner/name-1B")
    job = trained.job("b-export.1.export")
    assert (job.kind, job.state, job.spec["adapter_job"], job.spec["lora"]["r"]) == ("export", "queued", "b.1", 8)
    assert job.spec["data"]["source"] == trained.job("b.1").spec["data"]["source"]
    assert must_claim(trained.store).spec["export"] == {
        "formats": ["gguf"],
        "quantization_method": "f16",
        "prompts": None,
    }


def test_the_same_export_asked_twice_is_one_batch_and_another_form_is_another(trained: Client) -> None:
    assert [send(trained), send(trained, "b.1")] == ["b-export", "b-export"]
    assert send(trained, formats=("gguf",)) == "b-export-2"


def test_what_has_trained_nothing_is_refused_and_nothing_is_submitted(client: Client, tmp_path: Path) -> None:
    client.submit(client.plan(client.read(sweep_file(tmp_path))))
    for trial, words in (
        ("b", "'b' is no trial"),
        ("b/7", "there is no job 'b.7'"),
        ("b/1", "b.1 has nothing to export yet: it is queued"),
    ):
        with pytest.raises(NotFoundError, match=words):
            send(client, trial)
    assert client.store.batch_names() == ["b"]
