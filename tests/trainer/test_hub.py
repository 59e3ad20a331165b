"""A hub that does not answer."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from trainer_child import DEMO, Child, evaluate_spec, train_spec

from gpu_worker.protocol import Ready
from gpu_worker.trainer import hub
from jobqueue import base_model

NOBODY = "http://127.0.0.1:9"


class Answers(BaseHTTPRequestHandler):
    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Answers.asked = 0
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_any_answer_is_one(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{endpoint}/")
    assert base_model.hub_answers()
    for silent in (NOBODY, "no address"):
        monkeypatch.setenv("HF_ENDPOINT", silent)
        assert not base_model.hub_answers()


def test_only_in_a_job_whose_hub_is_silent_the_cache_must_do(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with hub.asked_once("/models/tiny"):
        assert not constants.is_offline_mode()
    assert Answers.asked == 0
    with hub.asked_once("org/tiny"):
        assert not constants.is_offline_mode()
    assert Answers.asked == 1
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    with hub.asked_once("org/tiny"):
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()


def test_whoever_is_offline_anyway_stays_so_and_asks_nothing(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with hub.asked_once("org/tiny"):
        assert constants.is_offline_mode()
    assert constants.is_offline_mode()
    assert Answers.asked == 0


@pytest.mark.parametrize("cached", [True, False])
def test_a_training_waits_for_no_file_of_it(cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """unsloth#2393, #6817: failed though the model was in the cache; and each file was tried for 23 s."""
    folder, commit = tmp_path / "hub" / "models--org--tiny", "0123456789abcdef" * 2 + "01234567"
    if cached:
        shutil.copytree(DEMO / "model", folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    trainer = Child(tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0", HF_ENDPOINT=NOBODY)
    try:
        assert isinstance(trainer.next_event(), Ready)
        done = trainer.run(train_spec(base_model="org/tiny", training={"max_steps": 1}))
        if cached:
            assert done.outcome["commit"] == commit
        else:
            assert done.failure.reason == "storage"
            assert "org/tiny: its tokenizer cannot be fetched" in done.failure.message
        log = trainer.log.read_text()
        assert log.count("the hub does not answer: taking what its cache has") == 1
        assert "Retrying in" not in log
    finally:
        trainer.close()


def test_a_model_whose_branch_has_moved_is_loaded_anew_for_the_next_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    first, second = "1" * 40, "2" * 40
    for commit in (first, second):
        shutil.copytree(DEMO / "model", folder / "snapshots" / commit)
    trainer = Child(tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    loaded_before = []
    try:
        assert isinstance(trainer.next_event(), Ready)
        for commit in (first, first, second):
            (folder / "refs" / "main").write_text(commit)
            done = trainer.run(evaluate_spec(base_model="org/tiny"))
            assert done.outcome["commit"] == commit
            loaded_before.append(trainer.log.read_text().count("the base model is still loaded"))
    finally:
        trainer.close()

    assert loaded_before == [0, 1, 1]
