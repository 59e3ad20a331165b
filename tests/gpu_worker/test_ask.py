"""Questions to a trial on a real worker: ahead of the queue, told as they are answered, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis
from helpers import wait_for
from worker_process import START_S, Site, train_job

from jobqueue.errors import CapacityError, DataError, LoraqError, NotFoundError
from jobqueue.job import Job, JobKind, JobState
from jobqueue.job_spec import AskSpec, EvaluateSpec
from jobqueue.memory import asking_peak, evaluation_peak
from jobqueue.service import Client
from jobqueue.spec import EvaluationSpec, ResourcesSpec


def files(here: Site) -> list[str]:
    """What is in the storage, but for the mark of it that workers make."""
    root = Path(here.settings.storage_url)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def asked(here: Site, client: Client, trial: str = "b/1") -> Job:
    return here.ended(client.ask(trial, ["Which drug?"]).id)


def test_a_question_is_answered_before_what_waits_and_leaves_only_its_record(here: Site) -> None:
    client = Client(here.settings)
    here.start()
    here.submit("b.1", "say:trained")
    here.ended("b.1")
    here.submit("c.1", "await:go")
    wait_for(lambda: here.lines("c.1"), START_S, "the only slot is busy")
    here.submit("d.1", "say:hello", priority=100)
    question = client.ask("b/1", ["Which drug?"], max_new_tokens=8)
    wait_for(lambda: client.job(question.id).state is JobState.QUEUED, START_S, "its memory is known")
    before = files(here)
    (here.beats / "go").touch()
    job = here.ended(question.id)
    assert (job.state, job.kind, job.batch) == (JobState.SUCCEEDED, JobKind.ASK, "")
    assert job.claimed_at < here.ended("d.1").claimed_at
    assert job.outcome["answers"] == [{"base": {"text": "base says"}, "adapter": {"text": "adapter says"}}]
    told = [event.data for event in client.events(job.id) if event.kind == "answer"]
    assert [(data["by"], data["text"], data["done"]) for data in told] == [
        ("base", "base says", True),
        ("adapter", "adapter says", True),
    ]
    assert [batch.name for batch in client.batches() if batch.name.startswith("ask")] == []
    assert [
        name for name in files(here) if name not in before and not name.startswith(("batches/c", "batches/d"))
    ] == []
    assert client.retry(job.id) == [], "it will be forgotten"
    with redis.Redis.from_url(here.store.url) as raw:
        keys = [f"{{loraq}}:job:{job.id}{part}" for part in ("", ":history", ":events")]
        assert all(0 < raw.ttl(key) <= 24 * 3600 for key in keys)  # type: ignore[operator]
        assert sorted(key.decode() for key in raw.scan_iter(f"*{job.id}*")) == sorted(keys)


def test_a_question_can_be_cancelled_while_it_is_answered(here: Site) -> None:
    client = Client(here.settings)
    here.start()
    here.submit("b.1", "only:ask/await:never")
    here.ended("b.1")
    question = client.ask("b/1", ["Which drug?"])
    wait_for(lambda: here.lines(question.id), START_S, "it is being answered")
    client.cancel(question.id)
    assert here.ended(question.id).state is JobState.CANCELLED


def test_what_cannot_be_asked_is_said_at_once(here: Site) -> None:
    client = Client(here.settings)
    here.submit("b.1", "fail:bad_data")
    with pytest.raises(LoraqError, match="b/1 has no adapter to ask: it is queued"):
        client.ask("b/1", ["Which drug?"])
    with pytest.raises(NotFoundError, match="b has no trial 2"):
        client.ask("b/2", ["Which drug?"])
    with pytest.raises(NotFoundError, match="there is no batch 'c'"):
        client.ask("c/1", ["Which drug?"])
    with pytest.raises(NotFoundError, match="'b' is no trial"):
        client.ask("b", ["Which drug?"])
    with pytest.raises(DataError, match="a prompt is empty"):
        client.ask("b/1", ["Which drug?", " "])
    with pytest.raises(DataError, match="1,001 prompts"):
        client.ask("b/1", ["?"] * 1_001)
    worker = here.start()
    here.ended("b.1")
    with pytest.raises(LoraqError, match="it is failed"):
        client.ask("b/1", ["Which drug?"])
    here.submit("e.1", "say:trained")
    here.ended("e.1")
    worker.stop()
    with pytest.raises(CapacityError, match="no worker is alive"):
        client.ask("e/1", ["Which drug?"])


def test_it_is_asked_as_it_was_trained(here: Site) -> None:
    client = Client(here.settings)
    here.start()
    spec = json.loads(train_job("b.1", "x").spec)
    spec |= {"method": "qlora", "dtype": "float16", "chat_template": "chatml"}
    spec["data"]["system_prompt"] = "Be kind."
    spec["training"]["max_seq_length"] = 512
    here.submit("b.1", "x", spec=spec)
    here.ended("b.1")
    made = AskSpec.model_validate_json(json.dumps(asked(here, client).spec))
    assert (made.load_in_4bit, made.chat_template, made.max_seq_length) == (True, "chatml", 512)
    assert made.dtype == "float16"
    assert made.system_prompt == "Be kind."
    assert client.job(client.ask("b/1", ["?"], system_prompt=None).id).spec["system_prompt"] is None


def test_memory_is_that_of_an_evaluation_of_one_row_without_its_scores() -> None:
    config = {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    }  # fmt: skip
    model = {"base_model": "m", "method": "qlora", "load_in_4bit": True, "max_seq_length": 2048}
    question = AskSpec.model_validate({**model, "adapter_job": "b.1", "prompts": ("?",), "max_new_tokens": 64})
    evaluation = EvaluateSpec(
        **model,  # type: ignore[arg-type]
        adapter_job=None,
        evaluation=EvaluationSpec(source="x", per_device_eval_batch_size=1),
        resources=ResourcesSpec(),
    )
    assert 1.8 * 2**30 < asking_peak(config, question) < evaluation_peak(config, evaluation)
