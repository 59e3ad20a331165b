"""Those who asked for it are told of a batch's end: with real endpoints, and a real control worker."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import pytest
from helpers import LEASE_S, must_claim, new_job, snapshot, submit, wait_for
from webhook_server import Answer, WebhookServer, webhook_server
from worker_process import START_S, Site

from gpu_worker import webhook
from gpu_worker.notifier import HOLD_S, MOST_TRIES, Notifier
from jobqueue.archive import Lookup, archive
from jobqueue.job import Job, JobState, Settlement
from jobqueue.notification import Telling, Told
from jobqueue.results import BatchReport

TO_TELL = "{loraq}:to_tell"
SCORE = {"correct": 7, "questions": 10, "accuracy": 0.7, "interval": (0.4, 0.9)}


@pytest.fixture
def hook() -> Iterator[WebhookServer]:
    with webhook_server() as opened:
        yield opened


def report() -> dict[str, Any]:
    trial: dict[str, Any] = {
        "label": "data.source=<!channel>", "differs": {}, "job": "b.1", "evaluation": "b.1.eval", "state": "succeeded",
        "reason": None, "message": "", "attempts": 1, "worker": "", "gpu": "", "scores": {"likelihood": SCORE},
        "base": None, "versus_base": None, "peak_bytes": None, "training_bytes": None, "train_minutes": None,
        "tokens_per_s": None, "final_loss": None,
    }  # fmt: skip
    made = {
        "batch": "b", "base_model": "m", "complete": True, "metric": "likelihood", "questions": 10, "bases": (),
        "trials": (trial,), "versus_runner_up": None, "verdict": "data.source=<!channel> with 70.0% (likelihood).",
    }  # fmt: skip
    return asdict(BatchReport.from_dict(made))


def submitted(site: Site, *notify: str) -> None:
    control = {"device": "control", "queue": "control", "need": 0}
    spec = {"kind": "report", "batch": "b", "notify": notify}
    submit(site.store, new_job("b.1"), new_job("b.report", kind="report", spec=spec, follows=("b.1",), **control))


def ended(site: Site, *notify: str) -> None:
    """The batch b: one training that succeeded, and the report of it."""
    submitted(site, *notify)
    work_off(site)


def work_off(site: Site) -> None:
    site.store.settle(must_claim(site.store), Settlement(JobState.SUCCEEDED, outcome={}))
    site.store.settle(must_claim(site.store, device="control"), Settlement(JobState.SUCCEEDED, outcome=report()))


def notifier(site: Site, **settings: Any) -> Notifier:
    return Notifier(site.store, site.storage, replace(site.settings, **settings))


def told(site: Site) -> dict[str, Told]:
    return {each.target: each for each in site.store.batch("b").told}


def due_s(site: Site) -> float:
    """In how many seconds somebody is told again."""
    at = site.store._redis.zscore(TO_TELL, "b")
    assert at is not None, "it is over"
    return float(at) / 1000 - site.store._clock()


def make_due(site: Site) -> None:
    site.store._redis.zadd(TO_TELL, {"b": 0}, xx=True)


def test_a_webhook_gets_what_came_out_of_the_batch(here: Site, hook: WebhookServer) -> None:
    ended(here, "team")

    assert notifier(here, webhooks={"team": hook.url}).round()

    [heard] = hook.heard
    news = heard.body
    assert (news["event"], news["batch"], news["state"], news["owner"]) == ("batch_ended", "b", "succeeded", "ann")
    assert news["states"] == {"succeeded": 2}
    assert (news["best"]["job"], news["best"]["accuracy"], news["best"]["metric"]) == ("b.1", 0.7, "likelihood")
    assert news["report"] == here.storage.address("batches/b/report.json")
    assert news["makespan_s"] == pytest.approx(news["ended_at"] - news["submitted_at"], abs=0.002)
    assert news["text"].startswith("b has ended after 0 s: 2 succeeded. ")
    assert heard.key.startswith("b-")
    assert (told(here)["team"].state, told(here)["team"].tries) == (Telling.DELIVERED, 1)
    assert not notifier(here).round(), "nobody is told twice"


def test_a_label_cannot_call_a_whole_channel(here: Site, hook: WebhookServer) -> None:
    ended(here, "team")
    notifier(here, webhooks={"team": hook.url}).round()

    assert "&lt;!channel&gt; with 70.0%" in hook.heard[0].body["text"]
    assert hook.heard[0].body["best"]["trial"] == "data.source=<!channel>"


def test_an_endpoint_that_fails_first_is_tried_again_and_the_batch_is_as_it_was(
    here: Site, hook: WebhookServer
) -> None:
    hook.answer = lambda number: Answer(500 if number == 1 else 204)
    ended(here, "team")
    before = here.store.jobs(["b.1", "b.report"])
    ours = notifier(here, webhooks={"team": hook.url})

    ours.round()
    assert told(here)["team"].state is Telling.RETRYING
    assert told(here)["team"].message == "it answered 500 Internal Server Error"
    assert 3 < due_s(here) < 6
    assert not ours.round(), "not before its time"
    make_due(here)
    ours.round()

    assert (told(here)["team"].state, told(here)["team"].tries) == (Telling.DELIVERED, 2)
    assert hook.heard[0] == hook.heard[1], "the same news, with the same key"
    assert here.store.jobs(["b.1", "b.report"]) == before
    assert here.store.figures().totals["told", "retrying"] == 1


def test_an_endpoint_says_when_to_come_back(here: Site, hook: WebhookServer) -> None:
    hook.answer = lambda number: Answer(429, {"Retry-After": "120"})
    ended(here, "team")
    notifier(here, webhooks={"team": hook.url}).round()

    assert 110 < due_s(here) < 121


@pytest.mark.parametrize("status", [400, 404, 410])
def test_an_endpoint_that_refuses_is_not_asked_again(here: Site, hook: WebhookServer, status: int) -> None:
    hook.answer = lambda number: Answer(status)
    ended(here, "team")
    notifier(here, webhooks={"team": hook.url}).round()

    assert told(here)["team"].state is Telling.GIVEN_UP
    assert not here.store._redis.exists(TO_TELL)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(here: Site, hook: WebhookServer, status: int) -> None:
    with webhook_server() as elsewhere:
        hook.answer = lambda number: Answer(status, {"Location": elsewhere.url})
        ended(here, hook.url)
        notifier(here, webhook_hosts=(hook.host,)).round()

        assert len(hook.heard) == 1
        assert not elsewhere.heard
    assert told(here)[hook.url].state is Telling.GIVEN_UP
    assert "is not followed" in told(here)[hook.url].message


@pytest.mark.parametrize("answer", [Answer(hangs=True), Answer(drips=True)])
def test_an_endpoint_that_does_not_come_to_an_end_is_given_up_for_now(
    here: Site, hook: WebhookServer, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "ANSWER_S", 0.3)
    hook.answer = lambda number: answer
    ended(here, "team")
    notifier(here, webhooks={"team": hook.url}).round()

    assert told(here)["team"].state is Telling.RETRYING
    assert told(here)["team"].message == "no answer within 0.3 s"


def test_nobody_there_is_tried_so_often_and_no_more(here: Site) -> None:
    with webhook_server() as gone:
        url = gone.url
    ended(here, "team")
    ours = notifier(here, webhooks={"team": url})

    for _ in range(MOST_TRIES):
        make_due(here)
        assert ours.round()

    assert (told(here)["team"].state, told(here)["team"].tries) == (Telling.GIVEN_UP, MOST_TRIES)
    assert told(here)["team"].message == "it cannot be reached: Connection refused"
    assert not here.store._redis.exists(TO_TELL)


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("nobody", "has no such name"),
        ("http://{host}/x", "does not allow it"),
        ("http://allowed.example@{host}/x", "does not allow it"),
        ("http://{host}\\@allowed.example/x", "does not allow it"),
        ("http://{host}#@allowed.example/x", "does not allow it"),
        ("http://allowed.example.{host}/x", "does not allow it"),
        ("file:///etc/passwd", "does not allow it"),
        ("HTTP://{host}/", "does not allow it"),
        ("http://allowed.example:99999/", "does not allow it"),
    ],
)
def test_a_spec_leads_nowhere_that_the_operator_does_not_allow(
    here: Site, hook: WebhookServer, named: str, why: str
) -> None:
    name = named.replace("{host}", hook.host)
    ended(here, name)
    notifier(here, webhook_hosts=("allowed.example",)).round()

    assert told(here)[name].state is Telling.GIVEN_UP
    assert why in told(here)[name].message
    assert not hook.heard


def test_a_url_of_the_sweep_file_goes_to_a_host_that_is_allowed(here: Site, hook: WebhookServer) -> None:
    urls = [f"http://{hook.host}/run?number={number}" for number in (1, 2)]
    ended(here, *urls)
    notifier(here, webhook_hosts=("127.0.0.1",)).round()

    assert [heard.path for heard in hook.heard] == ["/run?number=1", "/run?number=2"]
    assert {each.state for each in told(here).values()} == {Telling.DELIVERED}


def test_the_operators_url_is_neither_in_redis_nor_in_the_log(
    here: Site, hook: WebhookServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ended(here, "team", "broken")
    hook.answer = lambda number: Answer(500)
    settings = {"team": hook.url, "broken": "http://no-such-host.invalid/s3cret"}
    notifier(here, webhooks=settings).round()

    assert "team is not told" in caplog.text
    assert "s3cret" not in caplog.text
    assert not any(b"s3cret" in content for content in snapshot(here.store.url).values())
    assert "s3cret" not in repr(replace(here.settings, webhooks=settings))


def test_who_was_told_is_left_alone_while_another_is_tried_again(here: Site, hook: WebhookServer) -> None:
    with webhook_server() as deaf:
        deaf.answer = lambda number: Answer(503)
        ended(here, "team", "deaf")
        ours = notifier(here, webhooks={"team": hook.url, "deaf": deaf.url})
        ours.round()
        make_due(here)
        ours.round()

        assert (len(hook.heard), len(deaf.heard)) == (1, 2)


def test_a_worker_that_dies_while_it_tells_has_lost_nothing(here: Site, hook: WebhookServer) -> None:
    ended(here, "team")
    assert here.store.to_tell(HOLD_S) is not None  # by a worker that is never heard of again
    ours = notifier(here, webhooks={"team": hook.url})

    assert not ours.round(), "it may be at it"
    make_due(here)  # it has had its time
    assert ours.round()
    assert len(hook.heard) == 1


def test_a_worker_that_is_late_does_not_say_what_another_has_done_by_now(here: Site, hook: WebhookServer) -> None:
    ended(here, "team")
    slow = here.store.to_tell(0)
    assert slow is not None
    assert notifier(here, webhooks={"team": hook.url}).round()

    here.store.told(slow, [Told("team", Telling.RETRYING, 1, 0.0)], ["retrying"], 5.0)
    assert told(here)["team"].state is Telling.DELIVERED
    assert not here.store._redis.exists(TO_TELL)


def test_a_clock_that_goes_back_keeps_no_news_back(here: Site, hook: WebhookServer) -> None:
    ended(here, "team")
    hour_ms = 3_600_000
    here.store.sweep(LEASE_S)
    here.store._redis.zincrby(TO_TELL, hour_ms, "b")  # it ended by a clock that is an hour ahead
    here.store._redis.hincrbyfloat("{loraq}:lease_clock", "seen_at", hour_ms)
    ours = notifier(here, webhooks={"team": hook.url})

    assert not ours.round()
    here.store.sweep(LEASE_S)
    assert ours.round()
    assert len(hook.heard) == 1


def test_a_batch_that_is_run_again_is_told_of_again(here: Site, hook: WebhookServer) -> None:
    ended(here, "team")
    ours = notifier(here, webhooks={"team": hook.url})
    old = here.store.to_tell(0)
    assert old is not None
    here.store.retry(["b.report"])
    assert not ours.round(), "it has not ended"
    here.store.settle(must_claim(here.store, device="control"), Settlement(JobState.SUCCEEDED, outcome=report()))

    here.store.told(old, [Told("team", Telling.DELIVERED, 1, 0.0)], ["delivered"], None)  # of the end before
    assert ours.round()
    assert len(hook.heard) == 1
    assert hook.heard[0].key != f"b-{old.ended_at}"


def test_a_cancelled_batch_is_told_of_and_a_removed_one_is_not(here: Site, hook: WebhookServer) -> None:
    submitted(here, "team")
    here.store.cancel(["b.report", "b.1"])
    ours = notifier(here, webhooks={"team": hook.url})
    ours.round()

    assert (hook.heard[0].body["state"], hook.heard[0].body["best"]) == ("cancelled", None)
    here.store.retry(["b.1", "b.report"])
    work_off(here)
    here.store.remove("b")
    assert not ours.round()


def test_a_cancelled_batch_is_told_of_when_all_of_it_has_stopped(here: Site, hook: WebhookServer) -> None:
    submitted(here, "team")
    claim = must_claim(here.store)
    here.store.cancel(["b.report", "b.1"])
    ours = notifier(here, webhooks={"team": hook.url})

    assert ours.round()
    assert not hook.heard, "one of its jobs still runs"
    here.store.settle(claim, Settlement(JobState.CANCELLED))
    make_due(here)
    assert ours.round()
    assert hook.heard[0].body["states"] == {"cancelled": 2}
    assert hook.heard[0].body["ended_at"] == here.store.job("b.1").ended_at


def test_a_batch_stays_on_the_server_until_it_was_told_of_and_takes_along_who_was(
    here: Site, hook: WebhookServer
) -> None:
    ended(here, "team")
    assert not archive(here.store, here.storage, "b")

    notifier(here, webhooks={"team": hook.url}).round()
    before = told(here)
    assert archive(here.store, here.storage, "b")
    assert Lookup(here.store, lambda: here.storage).batch("b").told == tuple(before.values())


def test_a_report_of_another_release_does_not_keep_the_news_back(here: Site, hook: WebhookServer) -> None:
    submitted(here, "team")
    here.store.settle(must_claim(here.store), Settlement(JobState.SUCCEEDED, outcome={}))
    here.store.settle(must_claim(here.store, device="control"), Settlement(JobState.SUCCEEDED, outcome={"new": 1}))
    notifier(here, webhooks={"team": hook.url}).round()

    assert (hook.heard[0].body["state"], hook.heard[0].body["best"]) == ("succeeded", None)


# -- the operator's command


COMMAND = "the operator's command"


def script(site: Site, text: str) -> str:
    file = site.folder / "tell.py"
    file.write_text(text)
    return f"{sys.executable} {file} 'one word'"


def test_the_operators_command_gets_the_news(here: Site) -> None:
    ended(here)  # whose sweep file names nobody
    out = here.folder / "out.json"
    command = script(
        here,
        "import json, os, sys\n"
        "said = {name: os.environ[name] for name in ('LORAQ_BATCH', 'LORAQ_BATCH_STATE', 'LORAQ_BATCH_JSON')}\n"
        f"open({str(out)!r}, 'w').write(json.dumps([sys.argv[1:], json.load(sys.stdin), said]))\n",
    )
    notifier(here, on_batch_end=command).round()

    words, news, environment = json.loads(out.read_text())
    assert words == ["one word"]
    assert (news["batch"], news["best"]["accuracy"]) == ("b", 0.7)
    assert (environment["LORAQ_BATCH"], environment["LORAQ_BATCH_STATE"]) == ("b", "succeeded")
    assert json.loads(environment["LORAQ_BATCH_JSON"]) == news
    assert told(here)[COMMAND].state is Telling.DELIVERED


def test_a_command_that_fails_is_run_again_and_its_last_line_kept(here: Site) -> None:
    ended(here)
    notifier(here, on_batch_end=script(here, "import sys\nprint('first')\nsys.exit('no mail server')")).round()

    assert told(here)[COMMAND].state is Telling.RETRYING
    assert told(here)[COMMAND].message == "it ended with 1: no mail server"


def test_a_command_that_hangs_is_ended_with_its_children(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "COMMAND_S", 2.0)
    ended(here)
    sleep = f"[{sys.executable!r}, '-c', 'import time; time.sleep(600)']"
    environment = f"dict(os.environ, LORAQ_BEATS={str(here.beats)!r})"
    command = script(here, f"import os, subprocess\nsubprocess.run({sleep}, env={environment})\n")
    notifier(here, on_batch_end=command).round()

    assert told(here)[COMMAND].message == "it did not end within 2 s"
    wait_for(lambda: not here.left(), 5, "nothing is left of it")


def test_a_command_that_is_no_longer_wanted_is_not_waited_for(here: Site) -> None:
    ended(here)
    notifier(here, on_batch_end="/no/such/command").round()
    make_due(here)
    notifier(here).round()

    assert told(here)[COMMAND].state is Telling.GIVEN_UP
    assert not here.store._redis.exists(TO_TELL)


def test_a_command_that_is_not_there_is_said(here: Site) -> None:
    ended(here)
    notifier(here, on_batch_end="/no/such/command").round()

    assert told(here)[COMMAND].message == "it cannot be started: No such file or directory"


# -- a real control worker


def test_a_control_worker_tells_and_another_goes_on_where_it_is_killed(here: Site, hook: WebhookServer) -> None:
    hook.answer = lambda number: Answer(hangs=number == 1)
    submitted(here, "team")
    here.store.settle(must_claim(here.store), Settlement(JobState.SUCCEEDED, outcome={}))
    environment = {"LORAQ_WEBHOOKS": json.dumps({"team": hook.url})}
    first = here.start("--control-only", **environment)
    wait_for(lambda: hook.heard, START_S, "the first is about to tell")
    assert ended_report(here), "a batch that nobody hears of has ended all the same"
    for process in [first.supervisor, *first.supervisor.children(recursive=True)]:
        process.kill()

    with ExitStack() as stack:
        second = here.start("--control-only", **environment)
        stack.callback(second.kill)
        make_due(here)
        wait_for(lambda: len(hook.heard) == 2, START_S, "the second tells")
        wait_for(lambda: told(here).get("team"), START_S, "it is known that it did")

    assert told(here)["team"].state is Telling.DELIVERED
    assert hook.heard[0].key == hook.heard[1].key


def ended_report(site: Site) -> Job | None:
    job = site.store.job("b.report")
    return job if job.state is JobState.SUCCEEDED else None
