"""Which adapter `from_adapter` means, and which are refused before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import must_claim

from jobqueue.adapters import locate
from jobqueue.errors import SpecError
from jobqueue.job import JobState
from jobqueue.plan import make_plan
from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.store import Settlement
from jobqueue.sweep import read_sweep

SWEEP = {
    "name": "b", "base_model": "owner/name-1B", "data": {"source": "rows.jsonl"}, "resources": {"memory": "4GiB"},
}  # fmt: skip
DONE = Settlement(JobState.SUCCEEDED, outcome={"folder": "batches/b/b.1/1-abc"})


@pytest.fixture
def client(settings: Settings) -> Client:
    return Client(settings)


def sweep_file(folder: Path, **changes: object) -> Path:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Hello"}) + "\n")
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(SWEEP | changes))
    return file


def send(client: Client, folder: Path, **changes: object) -> str:
    return client.submit(client.plan(client.read(sweep_file(folder, **changes))), again=True).name


@pytest.fixture
def trained(client: Client, tmp_path: Path) -> str:
    """A training that has succeeded: b.1."""
    send(client, tmp_path)
    claim = must_claim(client.store)
    client.store.settle(claim, DONE)
    assert client.job("b.1").state is JobState.SUCCEEDED
    return "b.1"


@pytest.mark.parametrize("name", ["b/1", "b.1"])
def test_a_trial_is_taken_from_where_its_training_left_it(
    client: Client, tmp_path: Path, trained: str, name: str
) -> None:
    batch = send(client, tmp_path, from_adapter=name)
    assert client.job(f"{batch}.1").spec["from_adapter"] == "storage:batches/b/b.1/1-abc/adapter"


def test_ewc_holds_on_to_the_rows_of_the_trial_or_to_those_that_are_named(
    client: Client, tmp_path: Path, trained: str
) -> None:
    def rows_of(**ewc: object) -> dict[str, object]:
        batch = send(client, tmp_path, from_adapter="b/1", ewc={"ewc_lambda": 10, **ewc})
        found: dict[str, object] = client.job(f"{batch}.1").spec["ewc"]["data"]
        return found

    assert rows_of() == client.job("b.1").spec["data"]
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "Bye", "completion": "So long"}) + "\n")
    source = rows_of(data={"source": "other.jsonl"})["source"]
    assert Path(client.storage.fetch_source(str(source), tmp_path / "got")).read_text().startswith('{"prompt": "Bye"')


def test_ewc_needs_an_adapter_and_its_rows(tmp_path: Path) -> None:
    ewc = {"ewc_lambda": 10}
    with pytest.raises(SpecError, match="ewc: holds on to the weights of an earlier adapter: set from_adapter"):
        read_sweep(sweep_file(tmp_path, ewc=ewc))
    replay = {"source": "a/b", "replay": {"source": "c/d"}}
    with pytest.raises(SpecError, match=r"ewc\.data\.replay: mixes rows into a training"):
        read_sweep(sweep_file(tmp_path, from_adapter="b/1", ewc=ewc | {"data": replay}))
    unknown = read_sweep(sweep_file(tmp_path, from_adapter="owner/adapter", ewc=ewc))
    with pytest.raises(SpecError, match="which rows was owner/adapter trained on") as error:
        make_plan(unknown, workers_are_here=False)
    assert error.value.problems[0].path == "ewc.data"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"from_adapter": "b/9"}, "b.9"),
        ({"from_adapter": "b/1", "base_model": "owner/other-1B"}, "b.1 was trained on owner/name-1B"),
        ({"from_adapter": "b/1", "revision": "v2"}, "and this trains owner/name-1B@v2"),
        (
            {"from_adapter": "b/1", "lora": {"r": 8, "use_rslora": True, "target_modules": ["q_proj"]}},
            "b.1 does not fit; as it was trained, set under lora: r: 16, use_rslora: false, target_modules: [down_proj",
        ),
    ],
)
def test_a_trial_that_is_not_there_or_does_not_fit_is_refused(
    client: Client, tmp_path: Path, trained: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(SpecError) as error:
        send(client, tmp_path, **changes)
    (problem,) = error.value.problems
    assert words in problem.message
    assert problem.path == "from_adapter"
    assert client.store.batch_names() == ["b"]


def test_a_training_that_has_not_ended_has_no_adapter_yet(client: Client, tmp_path: Path) -> None:
    send(client, tmp_path)
    with pytest.raises(SpecError, match=r"b\.1 has no adapter: it is queued; submit once it has succeeded"):
        send(client, tmp_path, from_adapter="b.1")


def test_folders_urls_and_hub_ids_are_known_by_how_they_look(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"no folder of an adapter: it has no adapter_config\.json"):
        locate("mine", tmp_path)
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    assert locate("mine", tmp_path) == locate("./mine", tmp_path) == str(tmp_path / "mine")
    assert locate("/on/a/worker", tmp_path) == "/on/a/worker"
    assert locate("s3://bucket/adapter", tmp_path) == "s3://bucket/adapter"
    assert locate("owner/adapter", tmp_path) == "owner/adapter"
    assert locate("my.batch-2/12", tmp_path) == "my.batch-2.12"
    stored = "storage:batches/medqa/medqa.2/1-ab/adapter"  # as the spec in a manifest has it
    assert locate(stored, tmp_path) == stored
    for wrong in ("./gone", "adapter", "a/b/c"):
        with pytest.raises(ValueError, match="neither a trial"):
            locate(wrong, tmp_path)


def test_a_folder_that_only_workers_have_is_a_mistake_where_they_are_here(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, from_adapter="/no/such/adapter"))
    with pytest.raises(SpecError, match="there is no adapter at /no/such/adapter"):
        make_plan(sweep, workers_are_here=True)
    assert make_plan(sweep, workers_are_here=False).warnings == (
        "/no/such/adapter is a folder; every worker must have it",
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "full"}, "method full trains none"),
        ({"method": "lora", "lora": {"loftq_config": {"loftq_bits": 4}}}, "lora.loftq_config initialises a fresh one"),
        ({"data": None, "evaluation": {"source": "a/b"}}, "without data nothing is trained"),
    ],
)
def test_what_trains_no_adapter_goes_on_from_none(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        read_sweep(sweep_file(tmp_path, from_adapter="b/1", **changes))
