"""A real control worker has a batch's answers rated by an endpoint of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import must_claim, new_job, restartable_server, snapshot, submit, wait_for
from judge_server import KEY, Asked, JudgeServer, Reply, judge_server, refuses, scores
from worker_process import ROOT, START_S, Site, Worker, site

from jobqueue.job import FailureReason, JobState, Settlement
from jobqueue.service import Client
from jobqueue.storage import Storage

QUESTIONS = 6
SLOW = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "slow_fs"), str(ROOT)])}
EVALUATION = {"source": "q.jsonl", "metrics": ["generated"]}


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    with judge_server() as opened:
        opened.answer = rates
        yield opened


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Site]:
    with restartable_server(tmp_path / "server") as running, site(running.url, tmp_path / "site") as made:
        yield made


@pytest.fixture
def slow(opened: Site) -> Path:
    """A storage that hangs while it has a file of that name."""
    folder = opened.folder / "slow"
    folder.mkdir()
    opened.storage = Storage(str(folder))
    return folder


def rates(asked: Asked, number: int) -> Reply:
    """Well-written answers get 5; the grumpy model gives one less."""
    good = 5 if "well" in asked.data["answer"] else 2
    return scores(good, good - (asked.body["model"] == "grumpy"), 5)


def answered(site: Site, judge: JudgeServer, **options: Any) -> None:
    """The batch b: base model and adapter have answered; what is left is to judge, and to report."""
    folder = {"base-1": "evaluations/base-1/1-a", "b.1.eval": "batches/b/b.1.eval/1-a"}
    for job, text in (("base-1", "poor"), ("b.1.eval", "well")):
        lines = [
            {
                "index": index, "answer": "A", "picks": {"generated": "A"}, "right": [], "question": f"Which {index}?",
                "options": {"A": "salmon", "B": "oak"}, "text": f"{text} {index or 'the same'}",
            }
            for index in range(QUESTIONS)
        ]  # fmt: skip
        lines[-1]["text"] = "both models wrote this well"
        site.storage.write_text(f"{folder[job]}/questions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    spec = {"model": "grader", "base_url": judge.url, "concurrency": 1, "samples": 2, "max_retries": 0, **options}
    evaluate = {"kind": "evaluate", "base_model": "m", "load_in_4bit": True, "evaluation": EVALUATION}
    control = {"device": "control", "queue": "control", "need": 0}
    submit(
        site.store,
        new_job("b.1", spec={"kind": "train", "base_model": "m"}),
        new_job("b.1.eval", kind="evaluate", spec={**evaluate, "adapter_job": "b.1"}, needs=("b.1",)),
        new_job("base-1", kind="evaluate", spec={**evaluate, "adapter_job": None}, batch=""),
        new_job(
            "b.judge",
            kind="judge",
            spec={"kind": "judge", "batch": "b", "judge": spec},
            follows=("b.1.eval", "base-1"),
            **control,
        ),
        new_job(
            "b.report",
            kind="report",
            spec={"kind": "report", "batch": "b"},
            follows=("b.1", "b.1.eval", "base-1", "b.judge"),
            **control,
        ),
    )
    for _ in range(3):
        claimed = must_claim(site.store)
        outcome = {"questions": QUESTIONS, "folder": folder.get(claimed.job_id, "none")}
        site.store.settle(claimed, Settlement(JobState.SUCCEEDED, outcome=outcome))


def control_worker(site: Site, judge: JudgeServer, **environment: object) -> Worker:
    changes = {"LORAQ_JUDGE_URLS": json.dumps([judge.url]), "OPENAI_API_KEY": KEY, **environment}
    return site.start("--control-only", **changes)


def test_a_batch_is_rated_blind_and_its_report_tells_by_how_much(opened: Site, judge: JudgeServer) -> None:
    prices = {"price_per_million_input_tokens": 10.0, "price_per_million_output_tokens": 100.0}
    answered(opened, judge, model=["grader", "grumpy"], concurrency=4, **prices)
    worker = control_worker(opened, judge)

    report = opened.ended("b.report").outcome

    [tuned, base] = report["judge"]["models"]
    assert (tuned["job"], base["job"]) == ("b.1.eval", "base-1")
    assert tuned["means"]["relevance"]["value"] == 5
    assert tuned["means"]["accuracy"]["value"] == 4.5  # the mean of both models
    assert base["means"]["relevance"]["value"] == pytest.approx((5 * 2 + 5) / 6)
    assert tuned["differences"]["relevance"]["value"] == pytest.approx(2.5)
    low, high = tuned["differences"]["overall"]["interval"]
    assert low < 5 / 3 < high
    assert tuned["differences"]["overall"]["value"] == pytest.approx(5 / 3)
    assert tuned["p_holm"] == tuned["p_value"] == pytest.approx(2 / 2**5)  # five pairs differ, all one way
    assert tuned["finding"] == "no difference shown"

    usage = report["judge"]["usage"]
    distinct = 2 * QUESTIONS - 1  # what both wrote to a question is rated once
    assert usage["judgements"] == len(judge.asked) == distinct * 2 * 2
    assert (usage["input_tokens"], usage["output_tokens"]) == (100 * len(judge.asked), 10 * len(judge.asked))
    assert usage["cost"] == pytest.approx(len(judge.asked) * (100 * 10 + 10 * 100) / 1e6)
    assert usage["between_samples"] == 0
    assert usage["between_models"] == pytest.approx(1 / 3)

    for asked in judge.asked:
        assert not {"b.1", "base-1", "adapter"} & {
            word for part in asked.body["messages"] for word in part["content"].split()
        }
    order = [("well" in asked.data["answer"]) for asked in judge.asked]
    assert order not in (sorted(order), sorted(order, reverse=True))  # the models' answers come mixed
    job = opened.store.job("b.judge")
    assert job.progress == {"phase": "judge", "step": len(judge.asked), "steps": len(judge.asked)}
    kept = [path for path in Path(opened.settings.storage_url).rglob("*") if path.is_file() and path.suffix != ".part"]
    assert all(KEY.encode() not in path.read_bytes() for path in kept)
    assert all(KEY.encode() not in value for value in snapshot(opened.store.url).values())
    assert KEY not in worker.log.read_text()


def test_a_refused_judge_ends_with_a_word_and_a_retry_pays_for_the_rest_alone(opened: Site, judge: JudgeServer) -> None:
    answered(opened, judge)
    judge.answer = lambda asked, number: rates(asked, number) if number <= 4 else refuses(401, f"bad key {KEY}")
    worker = control_worker(opened, judge)

    failed = opened.ended("b.judge")

    assert (failed.state, failed.reason, failed.attempt) == ("failed", "refused", 1)
    assert "refuses the key (401): bad key ***. Set OPENAI_API_KEY right" in failed.message
    assert len(judge.asked) == 5
    report = opened.ended("b.report").outcome
    assert report["judge"] is None
    assert report["problems"] == [f"b.judge failed (refused): {failed.message}"]

    judge.answer = rates
    Client(opened.settings).retry("b")

    usage = opened.ended("b.judge").outcome["usage"]
    everything = (2 * QUESTIONS - 1) * 2
    assert (usage["judgements"], usage["reused"]) == (everything, 4)
    assert len(judge.asked) == 5 + everything - 4
    report = opened.ended("b.report").outcome
    assert report["judge"]["usage"]["judgements"] == everything
    assert report["problems"] == []
    assert KEY not in worker.log.read_text()


def test_a_cancel_does_not_wait_for_the_endpoint(opened: Site, judge: JudgeServer) -> None:
    answered(opened, judge)
    judge.answer = lambda asked, number: Reply(hangs=True)
    control_worker(opened, judge)
    wait_for(lambda: judge.asked, START_S, "the judge is asked")

    Client(opened.settings).cancel("b.judge")

    assert opened.ended("b.judge").state is JobState.CANCELLED
    assert not judge.over.is_set()
    assert opened.ended("b.report").outcome["judge"] is None


def test_a_drained_worker_gives_its_judging_back_with_what_was_rated(opened: Site, judge: JudgeServer) -> None:
    answered(opened, judge)
    judge.answer = lambda asked, number: rates(asked, number) if number <= 4 else Reply(hangs=True)
    first = control_worker(opened, judge)
    wait_for(lambda: len(judge.asked) >= 5, START_S, "the judge is in mid-work")

    first.stop()

    given_back = opened.store.job("b.judge")
    assert (given_back.state, given_back.failures) == ("queued", 0)
    judge.answer = rates
    control_worker(opened, judge)
    assert opened.ended("b.judge").outcome["usage"]["reused"] == 4


def test_a_stop_does_not_wait_for_a_storage_that_hangs(opened: Site, judge: JudgeServer, slow: Path) -> None:
    worker = control_worker(opened, judge, **SLOW, LORAQ_STORAGE=f"slow://{slow}")
    wait_for(lambda: [w for w in opened.store.workers() if not w.note], START_S, "it has tried its storage")
    (slow / "hang").write_text("")
    answered(opened, judge)
    wait_for(lambda: opened.store.job("b.judge").state is JobState.RUNNING, START_S, "it reads the answers")

    assert worker.stop() == 0
    job = opened.store.job("b.judge")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)


def test_a_stop_does_not_wait_for_a_judgement_that_cannot_be_kept(opened: Site, judge: JudgeServer, slow: Path) -> None:
    answered(opened, judge)

    def hangs_then(asked: Asked, number: int) -> Reply:
        (slow / "hang").write_text("")
        return rates(asked, number)

    judge.answer = hangs_then
    worker = control_worker(opened, judge, **SLOW, LORAQ_STORAGE=f"slow://{slow}")
    wait_for(lambda: judge.asked, START_S, "the judge is asked")

    assert worker.stop() == 0
    job = opened.store.job("b.judge")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)


def test_a_worker_that_may_not_talk_to_the_endpoint_sends_it_nothing(opened: Site, judge: JudgeServer) -> None:
    answered(opened, judge)
    control_worker(opened, judge, LORAQ_JUDGE_URLS="[]")

    job = opened.ended("b.judge")

    assert (job.state, job.reason) == ("failed", "refused")
    assert f"may not send answers to {judge.url}. Add it to LORAQ_JUDGE_URLS" in job.message
    assert judge.asked == []


def test_a_judge_that_gives_no_usable_score_is_no_result(opened: Site, judge: JudgeServer) -> None:
    answered(opened, judge, limit=1, samples=1)
    judge.answer = lambda asked, number: scores(7, 7, 7)
    control_worker(opened, judge)

    job = opened.ended("b.judge")

    assert (job.state, job.reason) == ("failed", "refused")
    assert "no scores could be read from any reply of grader" in job.message
