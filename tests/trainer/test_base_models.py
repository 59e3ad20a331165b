"""Base models that cannot be trained: each with its reason and a remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from trainer_child import DEADLINE_S, DEMO, Child, evaluate_spec, train_spec


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "model", tmp_path / "model"))


def test_shards_that_are_missing_are_named(child: Child, copy: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors").rename(copy / names["a"])
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    failure = child.run(train_spec(base_model=str(copy))).failure
    assert failure.reason == "bad_spec"
    assert failure.message == f"base_model {copy} lacks model-00002-of-00002.safetensors; copy the folder again"


def test_weights_that_are_cut_off_are_a_mistake_of_the_spec(child: Child, copy: Path) -> None:
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    failure = child.run(train_spec(base_model=str(copy))).failure
    assert (failure.reason, str(copy) in failure.message) == ("bad_spec", True)


@pytest.mark.parametrize("used", ["in a row", "as padding", "never"])
def test_a_token_that_the_model_does_not_know_is_refused_where_it_is_used(child: Child, copy: Path, used: str) -> None:
    """peft#2415, peft#1932: the vocabulary was extended, and the adapter fits no base model any more; here it is
    never extended, and rows that would need it are refused. transformers#37011: Gemma 3 1B has one it never needs."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    highest = max(token["id"] for token in tokenizer["added_tokens"])
    highest = max(highest, *tokenizer["model"]["vocab"].values())
    new = tokenizer["added_tokens"][0] | {"id": highest + 1, "content": "<|new|>"}
    tokenizer["added_tokens"].append(new)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    if used == "as padding":
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|new|>"}))
    rows = copy / "rows.jsonl"
    answers = ["yes", "no", "<|new|>" if used == "in a row" else "perhaps"]
    rows.write_text("".join(json.dumps({"prompt": "Is it?", "completion": answer}) + "\n" for answer in answers))
    asked = {"limit": 4, "metrics": ["generated"], "max_new_tokens": 3}
    assert child.run(evaluate_spec(base_model=str(copy), evaluation=asked)).outcome["questions"] == 4
    done = child.run(train_spec(base_model=str(copy), data={"source": str(rows)}, training={"max_steps": 1}))
    if used == "never":
        assert done.outcome["training"]["steps"] == 1
        return
    failure = done.failure
    assert failure.reason == "bad_spec"
    assert f"its tokenizer has a token {highest + 1}" in failure.message
    assert "take the tokenizer that was published with it" in failure.message


class Gated(BaseHTTPRequestHandler):
    """A hub all of whose models are gated."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model owner/gated is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_gated_model_without_a_token_says_what_to_do(tmp_path: Path) -> None:
    code = "from gpu_worker.trainer import model; model.load('owner/gated', 'lora', 256, False)"
    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "UNSLOTH_DISABLE_STATISTICS": "1",
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S
        )
        hub.shutdown()
    assert "owner/gated is gated or private, and this worker may not read it" in done.stderr, done.stderr[-2000:]
    assert "set HF_TOKEN in the worker's environment" in done.stderr
