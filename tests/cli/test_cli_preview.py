"""`loraq preview`: what is read, what is trained on, what is unusual."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_families import LLAMA_3, chat
from cli_fakes import Command, FakeClient

from jobqueue.preview import preview
from jobqueue.sweep import read_sweep
from jobqueue.tokenizer_files import chat_of

ROOT = Path(__file__).parents[2]
SWEEP = """\
name: medqa
base_model: ./model
data: {source: rows.jsonl}
training: {max_seq_length: 140, max_steps: 1}
"""
HI = {"prompt": "Hi", "completion": "Hello"}
LONG = {"prompt": "word " * 120, "completion": "Hello"}
LONG_ANSWER = {"prompt": "Hi", "completion": "word " * 120}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep over six rows: two that are the same, one without an answer, one cut, one dropped; and a tokenizer."""
    (tmp_path / "model").mkdir()
    model = chat(LLAMA_3)
    model.backend.save(str(tmp_path / "model" / "tokenizer.json"))
    config = {"bos_token": model.special_tokens["bos_token"], "eos_token": {"content": LLAMA_3.eos}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "chat_template.jinja").write_text(LLAMA_3.template)
    rows = [{**HI, "completion": None}, HI, HI, LONG, LONG_ANSWER, {**HI, "completion": "Good day"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


def document(command: Command, *arguments: object) -> dict[str, Any]:
    result = command("preview", *map(str, arguments), "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_it_counts_what_is_left_out_cut_dropped_and_doubled(command: Command, folder: Path) -> None:
    found = document(command, folder / "sweep.yaml")

    assert found["rows"]["reason"] == "prompt_completion: columns prompt, completion"
    assert found["rows"]["skipped"] == {"a turn's content is null": {"count": 1, "lines": [1]}}
    tokens = found["tokens"]
    assert (tokens["rows"], tokens["used"], tokens["truncated"], tokens["duplicates"]) == (5, 4, 1, 1)
    assert tokens["dropped"] == {"no answer within max_seq_length": 1}
    assert sum(count for _, _, count in tokens["histogram"]) == 5
    assert found["row"]["number"] == 2  # the first that is used
    assert "".join(text for text, _ in found["row"]["segments"]).startswith(
        "<|begin_of_text|><|start_header_id|>system"
    )
    assert [text for text, part in found["row"]["segments"] if part == "trained"] == ["Hello<|eot_id|>"]


def test_in_a_pipe_marks_stand_for_colours(command: Command, folder: Path) -> None:
    text = command("preview", str(folder / "sweep.yaml"), "--row", "5").stdout

    assert "left out   1: a turn's content is null (line 1)" in text
    assert "dropped    1 row: no answer within max_seq_length" in text
    assert "Row 5, " in text
    assert "<|end_header_id|>\n\n<<word word" in text
    assert "[cut: " in text
    assert "Tokens per row" in text
    assert "some cut" in text or "  cut" in text


def test_rows_that_are_left_out_say_why(command: Command, folder: Path) -> None:
    assert (
        "It is left out: a turn's content is null"
        in command("preview", str(folder / "sweep.yaml"), "--row", "1").stdout
    )
    dropped = command("preview", str(folder / "sweep.yaml"), "--row", "4").stdout
    assert "It is left out: no answer within max_seq_length" in dropped
    missing = command("preview", str(folder / "sweep.yaml"), "--row", "7")
    assert (missing.exit_code, "has no row 7" in missing.stderr) == (4, True)


def test_what_is_unusual_is_pointed_out(command: Command, folder: Path) -> None:
    question = {"question": "Which?", "options": ["oak", "trout"], "answer": "oak"}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    sets = ["training.learning_rate=0.1", "training.max_steps=100", "training.max_seq_length=2048"]
    warnings = document(command, folder / "sweep.yaml", *(x for item in sets for x in ("--set", item)))["warnings"]
    assert warnings == [
        "learning_rate 0.1 is above the usual range for method qlora (5e-06 to 0.0005)",
        "160 epochs: after 3 a model mostly learns its rows by heart; early_stopping_patience stops when it does",
        "5 rows are few: some hundreds are usual",
        "nothing will tell whether it helps: set evaluation, or data.validation_split",
        "1 of 5 rows read the same as an earlier one",
    ]
    steps = ["--set", "training.max_steps=100", "--set", "training.packing=true"]
    packed = document(command, folder / "sweep.yaml", *steps)["warnings"]
    assert not any("epochs" in warning for warning in packed), "nobody knows how many rows a step has"
    validates = ["--set", "data.validation_split=0.5", "--set", "data.validation_seed=1"]
    warnings = document(command, folder / "sweep.yaml", *validates)["warnings"]
    assert "the validation loss is known at the end alone: training.eval_steps shows from where on it rises" in warnings
    warnings = document(command, folder / "sweep.yaml", *validates, "--set", "training.eval_steps=10")["warnings"]
    assert not any("at the end alone" in warning for warning in warnings)
    same = ["--set", "data.source=questions.jsonl", "--set", "evaluation.source=questions.jsonl"]
    warnings = document(command, folder / "sweep.yaml", *same, "--set", "training.max_seq_length=512")["warnings"]
    assert "1 of 1 questions of the evaluation are also trained on" in warnings


def test_rows_that_are_mixed_in_are_counted(command: Command, folder: Path) -> None:
    (folder / "general.jsonl").write_text(json.dumps(HI) + "\n")
    replay = ["--set", "data.replay.source=general.jsonl", "--set", "data.replay.fraction=0.5"]
    found = document(command, folder / "sweep.yaml", *replay)
    assert found["replayed"] == 1
    assert f"replay: {folder / 'general.jsonl'} has 1 rows, and its fraction would be 5" in found["warnings"]
    shown = command("preview", str(folder / "sweep.yaml"), *replay).stdout
    assert "replay     1 row of other data mixed in" in shown


def test_a_data_file_alone_needs_no_sweep_and_without_a_model_has_no_tokens(command: Command, folder: Path) -> None:
    text = command("preview", str(folder / "rows.jsonl")).stdout
    assert "tokens     none: no base model; give one with --base-model" in text
    assert text.endswith("user: Hi\nassistant: Hello\n")
    assert "warning" not in text
    found = document(command, folder / "rows.jsonl", "--base-model", folder / "model")
    assert found["tokens"]["used"] == 5


LIGHT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "datasets", "pyarrow", "celery", "redis", "huggingface_hub"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import cli.main
cli.main.loraq(sys.argv[1:], prog_name="loraq")
"""


def test_a_laptop_needs_no_more_than_tokenizers(folder: Path) -> None:
    command = [sys.executable, "-c", LIGHT, "preview", str(folder / "sweep.yaml"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"]["used"] == 4


def test_without_the_package_tokens_are_left_out_with_what_to_install(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The light install has neither transformers nor tokenizers."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    text = command("preview", str(folder / "sweep.yaml")).stdout
    assert "Run `pip install 'loraq[data]'`." in text
    assert "assistant: Hello" in text


def test_what_this_machine_lacks_a_worker_has(
    command: Command, client: FakeClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = command("preview", str(folder / "sweep.yaml"), "--row", "6")
    client.previewed = preview(read_sweep(folder / "sweep.yaml"), chat_of(str(folder / "model")), 6)
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    asked = command("preview", str(folder / "sweep.yaml"), "--row", "6")

    assert asked.stdout == shown.stdout
    assert client.asked == ("medqa", 6, {"data_alone": False, "tokens": True})


def test_without_a_worker_there_is_what_this_machine_has_and_why_no_more(
    command: Command, client: FakeClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    text = command("preview", str(folder / "sweep.yaml")).stdout
    assert "And no worker has read them: no control worker is alive to make the preview." in text
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub = command("preview", "owner/rows")
    assert hub.exit_code == 9
    assert "needs the package datasets; and no control worker is alive to make the preview" in hub.stderr


def test_a_model_without_a_template_and_one_without_a_tokenizer_say_what_to_do(command: Command, folder: Path) -> None:
    """transformers#33246, unsloth#2096."""
    (folder / "model" / "chat_template.jinja").unlink()
    refused = command("preview", str(folder / "sweep.yaml"))
    assert (refused.exit_code, "has no chat template" in refused.stderr) == (4, True)
    chosen = document(command, folder / "sweep.yaml", "--set", "chat_template=llama-3")
    assert chosen["tokens"]["used"] == 5
    (folder / "model" / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in document(command, folder / "sweep.yaml")["no_tokens"]


def test_a_sweep_that_trains_nothing_is_refused(command: Command, folder: Path) -> None:
    (folder / "sweep.yaml").write_text("name: x\nbase_model: ./model\nevaluation: {source: rows.jsonl}\n")
    result = command("preview", str(folder / "sweep.yaml"))
    assert (result.exit_code, "trains nothing" in result.stderr) == (3, True)
