"""The command line as its users start it, with a real server, a real worker and the real trainer on the CPU."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import restartable_server, snapshot, wait_for

from jobqueue.memory import GIB
from jobqueue.service import Client
from jobqueue.settings import Settings

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "cli" / "demo"
TRAINING_S = 150.0  # for a batch, the import of Unsloth included, on a busy machine


class Shell:
    """The command `loraq` in a folder, with settings of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.storage = folder / "storage"
        self.worker: subprocess.Popen[bytes] | None = None
        self.client = Client(Settings(redis_url=url, storage=str(self.storage), data_dir=folder / "data", owner="ann"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LORAQ_")},
            "LORAQ_REDIS_URL": url,
            "LORAQ_STORAGE": str(self.storage),
            "LORAQ_DATA_DIR": str(folder / "data"),
            "LORAQ_CONFIG": os.devnull,
            "LORAQ_OWNER": "ann",
            "LORAQ_POLL_S": "0.2",
            "LORAQ_SWEEP_S": "0.3",
            "LORAQ_RENEW_S": "1",
            "LORAQ_GGUF_CONVERTER": str(ROOT / "tests" / "trainer" / "gguf_converter.py"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        }

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "cli.main", *arguments]

    def run(self, *arguments: str, seconds: float = 60, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment | changes, cwd=self.folder,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def write_sweep(self, name: str, **changes: object) -> None:
        """`<name>.yaml`: the demo's model, a short training, 20 questions."""
        fields: Mapping[str, object] = {
            "name": name,
            "base_model": str(DEMO / "model"),
            "data": {"source": str(DEMO / "train.jsonl"), "limit": 64},
            "evaluation": {"source": str(DEMO / "test.jsonl"), "limit": 20, "max_new_tokens": 8},
            "training": {"max_steps": 4, "per_device_train_batch_size": 4, "max_seq_length": 256, "logging_steps": 1},
            **changes,
        }
        present = {key: value for key, value in fields.items() if value is not None}
        (self.folder / f"{name}.yaml").write_text(json.dumps(present))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A server, a worker of the CPU, and a batch that was submitted to them."""
    folder = tmp_path_factory.mktemp("shell")
    with restartable_server(folder / "server") as server, (folder / "worker.log").open("wb") as log:
        opened = Shell(folder, server.url)
        worker = subprocess.Popen(
            opened.command("worker", "--cpu"), env=opened.environment, cwd=folder, stdout=log, stderr=log
        )
        opened.write_sweep("sweep")
        assert opened.json("submit", "sweep.yaml")["name"] == "sweep"
        opened.worker = worker
        try:
            yield opened
        finally:
            worker.kill()
            worker.wait()


@pytest.fixture(scope="module")
def ended(shell: Shell) -> Shell:
    """When the batch has ended."""

    def over() -> bool:
        return shell.client.batch("sweep").ended

    wait_for(over, TRAINING_S, f"the batch ends; the worker's log is {shell.folder / 'worker.log'}")
    return shell


# -- bad input; these come first, while the worker imports Unsloth

SPEC, DATA, SERVER, CAPACITY = 3, 4, 5, 8
BAD: dict[str, tuple[int, dict[str, object] | str, str]] = {
    "yaml that does not parse": (SPEC, "name: [b\nbase_model: x", "bad.yaml:2"),
    "an unknown key": (SPEC, {"lora": {"rank": 8}}, "lora.rank"),
    "a wrong type": (SPEC, {"lora": {"r": "eight"}}, "lora.r"),
    "a learning rate below zero": (SPEC, {"training": {"learning_rate": -1}}, "training.learning_rate"),
    "a model folder that is not there": (SPEC, {"base_model": "./no-such-model"}, "no-such-model"),
    "an empty data file": (DATA, {"data": {"source": "empty.jsonl"}}, "empty.jsonl"),
    "a data file without its columns": (DATA, {"data": {"source": "columns.jsonl"}}, "columns.jsonl"),
    "a data file that is not there": (DATA, {"data": {"source": "missing.jsonl"}}, "missing.jsonl"),
    "no worker with enough memory": (CAPACITY, {"resources": {"memory": "50GiB"}}, "50.0 GiB"),
}


def two_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]  # of what is unusual
    assert done.stdout == ""
    assert len(lines) == 2, done.stderr
    return lines


@pytest.fixture
def bad(redis_url: str, tmp_path: Path, shell: Shell) -> Shell:
    """Another empty server, which knows one small worker; `shell` is only asked for to be under way meanwhile."""
    opened = Shell(tmp_path, redis_url)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "columns.jsonl").write_text('{"title": "no question"}\n')
    info = {"host": "h", "device": "NVIDIA", "uuid": "", "usable_bytes": 8 * GIB, "slots": 1, "running": []}
    opened.client.store.heartbeat("h/gpu0", "gpu", {**info, "every_s": 60})
    return opened


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_two_lines_and_leaves_nothing_behind(bad: Shell, name: str) -> None:
    code, content, told = BAD[name]
    if isinstance(content, str):
        (bad.folder / "bad.yaml").write_text(content)
    else:
        bad.write_sweep("bad", **content)
    before = snapshot(bad.client.store.url)

    done = bad.run("submit", "bad.yaml")

    what, do = two_lines(done)
    assert done.returncode == code
    assert told in what
    assert do
    assert snapshot(bad.client.store.url) == before
    assert not bad.storage.exists()


def test_a_sweep_file_that_is_not_there_is_told_in_two_lines(bad: Shell) -> None:
    done = bad.run("submit", "nowhere.yaml")

    assert done.returncode == SPEC
    assert two_lines(done)[0] == "nowhere.yaml: there is no such file"


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "127.0.0.1:6379", ""])
def test_a_server_that_cannot_be_reached_is_told_in_two_lines(bad: Shell, url: str) -> None:
    bad.write_sweep("good")
    done = bad.run("submit", "good.yaml", LORAQ_REDIS_URL=url)

    assert done.returncode == SERVER
    assert "LORAQ_REDIS_URL" in two_lines(done)[1]
    assert not bad.storage.exists()


def test_names_that_are_not_there_are_told_in_two_lines(bad: Shell) -> None:
    done = bad.run("show", "sweep.1")

    assert done.returncode == 6
    assert two_lines(done)[0] == "there is no job 'sweep.1'"


# -- a batch from its submission to its results


def test_a_batch_succeeds_and_its_results_compare_adapter_and_base_model(ended: Shell) -> None:
    jobs = {job["id"]: job["state"] for job in ended.json("ls", "sweep")}
    assert set(jobs.values()) == {"succeeded"}, ended.run("ls", "sweep").stdout
    assert len(jobs) == 4

    report = ended.json("results", "sweep")

    [trial], [base] = report["trials"], report["bases"]
    assert (trial["job"], trial["state"], base["state"]) == ("sweep.1", "succeeded", "succeeded")
    for row in (trial, base):
        for metric in ("likelihood", "generated"):
            score = row["scores"][metric]
            assert score["questions"] == 20
            assert 0 <= score["accuracy"] <= 1
    assert trial["versus_base"]["points"] == pytest.approx(
        100 * (trial["scores"]["likelihood"]["accuracy"] - base["scores"]["likelihood"]["accuracy"])
    )
    assert trial["final_loss"] > 0
    assert trial["train_minutes"] > 0
    assert "base model (4-bit)" in ended.run("results", "sweep").stdout


def test_the_adapter_is_in_the_storage_with_a_manifest_whose_hashes_are_right(ended: Shell) -> None:
    [manifest_file] = ended.storage.glob("batches/sweep/sweep.1/*/manifest.json")
    manifest = json.loads(manifest_file.read_text())
    present = {  # relative name -> path
        path.relative_to(manifest_file.parent).as_posix(): path
        for path in manifest_file.parent.rglob("*")
        if path.is_file() and path != manifest_file
    }

    assert set(manifest["files"]) == set(present)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "log.txt"} <= set(present)
    for name, entry in manifest["files"].items():
        content = present[name].read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["spec"]["training"]["max_steps"] == 4
    assert not list(ended.storage.rglob("*.part"))


def test_an_adapter_is_pulled_without_the_storage_and_peft_loads_it(ended: Shell, tmp_path: Path) -> None:
    laptop = {"LORAQ_STORAGE": "", "LORAQ_DATA_DIR": str(tmp_path / "laptop")}
    done = ended.run("pull", "sweep", str(tmp_path / "to"), **laptop)
    assert done.returncode == 0, done.stderr

    program = (
        "import sys; from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer;"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]);"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])('The opposite of dirty is', return_tensors='pt');"
        "print(model.generate(**tokens, max_new_tokens=2).shape[1] - tokens['input_ids'].shape[1])"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "to")]
    loaded = subprocess.run(command, env=ended.environment, capture_output=True, text=True, timeout=120, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert int(loaded.stdout) in (1, 2)


def test_a_job_shows_its_progress_its_log_and_its_attempts(ended: Shell) -> None:
    job = ended.json("show", "sweep.1")
    assert (job["state"], job["attempt"], job["failures"]) == ("succeeded", 1, 0)
    assert job["progress"]["step"] == job["progress"]["steps"] or job["progress"]["phase"] == "save"

    shown = ended.run("show", "sweep.1").stdout
    assert "succeeded" in shown
    logs = ended.run("logs", "sweep.1")
    assert logs.returncode == 0
    assert len(logs.stdout.splitlines()) >= 1


def test_a_trial_is_exported_afterwards_and_its_files_are_where_it_says(ended: Shell) -> None:
    asked = ("export", "sweep/1", "--format", "merged_16bit", "--format", "gguf")
    done = ended.run(*asked, "--wait", seconds=TRAINING_S)
    assert done.returncode == 0, done.stderr
    again = ended.run(*asked)

    lines = done.stdout.splitlines()[-2:]
    assert again.stdout.splitlines() == lines
    assert [line.split(" answers as the adapter does ")[0] for line in lines] == ["merged_16bit", "gguf q8_0"]
    for line, file in zip(lines, ("config.json", ""), strict=True):
        assert (ended.storage / line.rpartition(": ")[2] / file).is_file()
    assert [batch["name"] for batch in ended.json("ls")] == ["sweep-export", "sweep"]


def test_a_running_batch_is_cancelled_and_ends_within_seconds(ended: Shell) -> None:
    training = {"max_steps": 100_000, "per_device_train_batch_size": 1, "max_seq_length": 64, "logging_steps": 1}
    ended.write_sweep("long", training=training, evaluation=None)
    assert ended.json("submit", "long.yaml")["name"] == "long"
    wait_for(lambda: ended.client.job("long.1").progress.get("step"), TRAINING_S, "the job trains")

    asked = ended.json("cancel", "long")
    assert {job["id"] for job in asked} == {"long.1", "long.report"}
    wait_for(lambda: ended.client.batch("long").ended, 30, "the batch ends")

    assert [job["state"] for job in ended.json("ls", "long")] == ["cancelled", "cancelled"]
    assert [batch["name"] for batch in ended.json("ls")] == ["long", "sweep-export", "sweep"]
    assert not list(ended.storage.glob("batches/long/long.1/*/manifest.json"))


def test_sigterm_ends_the_worker_and_the_trainer_that_rests_in_it(ended: Shell) -> None:
    mark = str(ended.folder / "data")
    ours = [process for process in psutil.process_iter() if _data_dir(process) == mark]
    assert len(ours) >= 3, "the supervisor, its worker of the CPU and the control worker"
    assert ended.worker is not None
    ended.worker.send_signal(signal.SIGTERM)

    assert ended.worker.wait(20) == 0
    assert [process for process in psutil.process_iter() if _data_dir(process) == mark] == []


def _data_dir(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get("LORAQ_DATA_DIR")
    except psutil.Error:
        return None
