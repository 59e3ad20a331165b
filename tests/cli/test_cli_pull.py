"""`loraq pull` as its users see it: what a name means, what is printed, exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import Command, make_batch, two_trials
from click.testing import CliRunner
from helpers import must_claim, new_job

from cli.main import loraq
from jobqueue.aggregate import build_report
from jobqueue.job import JobState, Settlement
from jobqueue.pull import best_of, trials_of
from jobqueue.settings import Settings
from jobqueue.storage import Storage, attempt_folder
from jobqueue.store import Store

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture
def storage(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    """Of real commands; they run in an empty folder."""
    monkeypatch.setenv("LORAQ_REDIS_URL", str(settings.redis_url))
    monkeypatch.setenv("LORAQ_STORAGE", settings.storage_url)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    opened = Storage(settings.storage_url)
    opened.pin()
    return opened


def batch(store: Store, storage: Storage, tmp_path: Path, *states: JobState, name: str = "b") -> None:
    """Of trials, each trained to such an end, with validation losses that fall."""
    jobs = [new_job(f"{name}.{number}") for number in range(1, len(states) + 1)]
    store.submit(name, "ann", len(states), "a/model", jobs, [job.id for job in jobs])
    made = tmp_path / "made" / "adapter"
    made.mkdir(parents=True, exist_ok=True)
    for file, content in FILES.items():
        (made / file).write_bytes(content)
    for number, state in enumerate(states):
        claim = must_claim(store)
        if state is JobState.SUCCEEDED:
            storage.publish(made.parent, attempt_folder(claim), {"job": claim.job_id})
            validation = {"kept_step": 1, "losses": [[1, 2.0 - number]], "rows": 1}
            end = Settlement(state, outcome={"folder": attempt_folder(claim), "validation": validation})
        else:
            end = Settlement(state, "bad_data")
        store.settle(claim, end)


def there() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file() and not path.name.startswith("."))


def test_a_trial_lands_in_a_folder_of_its_name_and_is_not_copied_twice(
    command: Command, store: Store, storage: Storage, tmp_path: Path
) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED, JobState.SUCCEEDED)
    first, second = command("pull", "b/2"), command("pull", "b/2")
    assert first.stdout == "b/2: 2 files, 9 bytes, in b-2/ (9 bytes copied)\n"
    assert second.stdout == "b/2: 2 files, 9 bytes, in b-2/ (nothing to copy)\n"
    assert there() == [f"b-2/{name}" for name in FILES]


def test_json_has_every_file_with_its_hash(command: Command, store: Store, storage: Storage, tmp_path: Path) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED)
    document = json.loads(command("pull", "b/1", "to", "--json").stdout)
    files = document.pop("files")
    assert document == {"trial": "b/1", "target": str(Path("to").resolve()), "bytes": 9, "copied_bytes": 9}
    assert {name: file["bytes"] for name, file in files.items()} == {name: len(FILES[name]) for name in FILES}
    assert all(len(file["sha256"]) == 64 for file in files.values())


def test_a_batch_of_one_trial_is_that_trial_and_of_several_a_question(
    command: Command, store: Store, storage: Storage, tmp_path: Path
) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED, name="one")
    batch(store, storage, tmp_path, JobState.SUCCEEDED, JobState.SUCCEEDED, name="two")
    assert command("pull", "one").exit_code == 0
    assert command("pull", "two.1").exit_code == 0
    asked = command("pull", "two")
    assert asked.exit_code == 2
    assert "two has 2 trials. Name one, as in two/1, or take --best or --all." in asked.stderr
    assert {Path(name).parent.name for name in there()} == {"one-1", "two-1"}


def test_the_best_trial_is_that_of_the_results(
    command: Command, store: Store, storage: Storage, tmp_path: Path
) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.FAILED)
    done = command("pull", "b", "--best", "to")
    assert (done.exit_code, done.stderr) == (0, "b/2 is the best trial.\n")
    assert done.stdout.startswith("b/2: ")
    assert there() == [f"to/{name}" for name in FILES]


def test_all_trials_lie_side_by_side_and_what_has_no_adapter_is_said(
    command: Command, store: Store, storage: Storage, tmp_path: Path
) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED)
    done = command("pull", "b", "--all", "to", "--json")
    assert done.exit_code == 0
    assert [document["trial"] for document in json.loads(done.stdout)] == ["b/1", "b/3"]
    assert done.stderr == "b/2 has no adapter: b.2 is failed.\n"
    assert {Path(name).parent.as_posix() for name in there()} == {"to/b-1", "to/b-3"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["b", "--best", "--all"], 2, "--best and --all exclude each other."),
        (["b/1", "--best"], 2, "b/1 is a trial; --best and --all are of a BATCH."),
        (["b/1", "--what", "weights"], 2, "'weights' is not one of"),
        (["nothing"], 6, "there is no batch 'nothing'"),
        (["b/9"], 6, "b has no trial 9"),
        (["b/2"], 6, "b/2 has no adapter: b.2 is failed"),
        (["b/1", "--what", "export"], 6, "b/1 has no export"),
        (["b", "--all", "--what", "export"], 6, "b/2 has no export"),
        (["b/1", "full"], 12, "full has another adapter_config.json"),
        (["b/1", "file"], 12, "file is no folder"),
        (["b/1", "file/below"], 9, "cannot write"),
    ],
)
def test_what_cannot_be_is_told_with_an_exit_code(
    arguments: list[str], code: int, said: str, command: Command, store: Store, storage: Storage, tmp_path: Path
) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED, JobState.FAILED)
    Path("full").mkdir()
    Path("full/adapter_config.json").write_text("mine")
    Path("file").write_text("mine")
    done = command("pull", *arguments)
    assert done.exit_code == code, done.stderr
    assert said in done.stderr
    assert there() == ["file", "full/adapter_config.json"]


def test_ctrl_c_says_that_it_goes_on(
    command: Command, store: Store, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "read_part", interrupted)
    done = command("pull", "b/1")
    assert done.exit_code == 130
    assert done.stderr == "Stopped. The same command goes on from there.\n"
    assert there() == []


def test_why_it_waits_is_said_once(
    command: Command, store: Store, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED)
    read_parts = Storage.read_parts

    def waiting(self: Storage, wanted: Any, waits: Any) -> Any:
        for why in ("nobody answers", "nobody answers", ""):
            waits(why)
        return read_parts(self, wanted, waits)

    monkeypatch.setattr(Storage, "read_parts", waiting)
    assert command("pull", "b/1").stderr == "nobody answers; waiting (ctrl-C ends).\n"


def test_tab_completes_batches_and_trials(store: Store, storage: Storage, tmp_path: Path) -> None:
    batch(store, storage, tmp_path, JobState.SUCCEEDED, JobState.SUCCEEDED, name="demo")
    environment = {"_LORAQ_COMPLETE": "bash_complete", "COMP_WORDS": "loraq pull de", "COMP_CWORD": "2"}
    done = CliRunner(env=environment).invoke(loraq, [], prog_name="loraq")
    assert [line.partition(",")[2] for line in done.stdout.split()] == ["demo", "demo/1", "demo/2"]


def test_a_vote_that_is_best_is_named_and_the_best_adapter_taken() -> None:
    jobs = two_trials("medqa")
    report = build_report(make_batch("medqa", jobs), jobs)
    assert trials_of(jobs)[:2] == ["medqa/1", "medqa/2"]
    best = f"medqa/{report.trials[0].job.rpartition('.')[2]}"
    assert best_of(report, jobs) == (best, [])
    vote = replace(report.trials[0], job="medqa.poll", label="poll (vote of 2)")
    with_vote = replace(report, trials=(vote, *report.trials))
    assert best_of(with_vote, jobs) == (best, ["poll (vote of 2)"])
