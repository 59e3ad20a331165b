"""The trainer process over its protocol: training, evaluation, failures, several jobs in one process.

The tests share one trainer and run in the order of the file; the last ones end it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import safetensors.torch
import torch
from trainer_child import DEADLINE_S, DEMO, Child, Done, evaluate_spec, train_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.protocol import Failed, Progress, Ready
from jobqueue.templates import NAMED

STILL_LOADED = "the base model is still loaded"

FORKS = """
import os, sys

def told(what):
    with open(os.environ["FORKS"], "a") as file:
        file.write(f"{os.getpid()} {what}\\n")

if "gpu_worker.trainer.child" in sys.orig_argv:
    told("looks")
    sys.addaudithook(lambda event, _: told("forks") if event == "os.fork" else None)
"""
"""Python at its start: from then on each fork is noted, as multiprocessing makes them."""


@pytest.fixture(scope="module")
def trained(child: Child) -> Done:
    return child.run(train_spec(training={"max_steps": 12}))


@pytest.fixture(scope="module")
def base(child: Child) -> Done:
    return child.run(evaluate_spec())


def lines(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (done.folder / "questions.jsonl").read_text().splitlines()]


def test_training_reports_memory_time_losses_and_data(trained: Done) -> None:
    """trl#6168, unsloth#10785: SFTTrainer refused tokenizer= and max_seq_length=; it is given what this TRL takes."""
    outcome = trained.outcome
    assert outcome.keys() == {"memory", "time", "training", "losses", "ewc", "validation", "data", "versions", "commit"}
    memory, spent, training = outcome["memory"], outcome["time"], outcome["training"]
    assert (memory["kind"], memory["gpu"]) == ("ram", "cpu")
    assert 0 < memory["reserved_at_start_bytes"] <= memory["peak_reserved_bytes"] < memory["total_bytes"]
    assert memory["peak_for_training_bytes"] == memory["peak_reserved_bytes"] - memory["reserved_at_start_bytes"]
    assert 0 < memory["peak_percent"] < 100
    assert {"load_s", "data_s", "train_s", "save_s", "total_s", "train_minutes"} <= spent.keys()
    assert spent["train_s"] < spent["total_s"]
    assert (training["steps"], training["rows"], training["epochs"]) == (12, 96, 1.5)
    assert 0 < training["trained_parameters"] < training["parameters"]
    assert 0 < training["trained_tokens"] < training["tokens"]
    assert [step for step, _, _ in outcome["losses"]] == [1, 2, 4, 6, 8, 10, 12]
    assert outcome["losses"][-1][1] < outcome["losses"][0][1]
    assert training["final_loss"] == outcome["losses"][-1][1]
    assert (outcome["data"]["rows"], outcome["data"]["used"], outcome["data"]["dropped"]) == (64, 64, {})
    assert outcome["data"]["format_reason"] == "multiple_choice: columns question, options, answer_idx, answer"
    nothing = {"best_step": None, "best_loss": None, "kept_step": 12}
    assert outcome["validation"] == {"rows": 0, "losses": []} | nothing


def test_rows_that_are_kept_back_are_not_trained_on_and_their_loss_is_reported(child: Child) -> None:
    done = child.run(train_spec(training={"max_steps": 9, "eval_steps": 4}, data={"validation_split": 0.25}))
    outcome, validation = done.outcome, done.outcome["validation"]
    assert [step for step, _ in validation["losses"]] == [4, 8, 9]  # and at the end, wherever that is
    assert all(loss == pytest.approx(outcome["training"]["mean_loss"], abs=0.2) for _, loss in validation["losses"])
    assert outcome["data"]["rows"] + validation["rows"] == 64
    assert validation["rows"] == 13
    assert outcome["training"]["rows"] == 51 + 2 * 8  # an epoch and two steps: what validates is not counted as trained


def test_general_rows_are_mixed_in_and_counted(child: Child, trained: Done, tmp_path: Path) -> None:
    file = tmp_path / "general.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) + "\n" for n in range(40)))
    replay = {"source": str(file), "fraction": 0.2}
    whole = {"max_steps": -1, "num_train_epochs": 1.0}
    outcome = child.run(train_spec(data={"replay": replay}, training=whole)).outcome
    assert outcome["training"]["rows"] == 64 + 16
    assert (outcome["data"]["used"], outcome["data"]["replay"]["used"]) == (64, 16)
    assert outcome["training"]["tokens"] == outcome["data"]["tokens"] + outcome["data"]["replay"]["tokens"]
    assert trained.outcome["data"]["replay"] is None


def test_dataset_num_proc_starts_no_processes_that_could_die(
    trained: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """unsloth#2693, LlamaFactory#7079, celery#1709: dataset_num_proc=4 inside a worker ended with "subprocesses has
    abruptly died" or "daemonic processes are not allowed to have children"."""
    (tmp_path / "sitecustomize.py").write_text(FORKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("FORKS", str(tmp_path / "forks"))
    trainer = Child(tmp_path)
    try:
        assert isinstance(trainer.next_event(), Ready)
        done = trainer.run(train_spec(training={"max_steps": 12, "dataset_num_proc": 4}))
    finally:
        trainer.close()
    assert done.outcome["losses"] == trained.outcome["losses"]
    assert (tmp_path / "forks").read_text() == f"{trainer.process.pid} looks\n"


def test_another_chat_template_is_trained_with_and_goes_with_the_adapter(child: Child) -> None:
    """transformers#33246, unsloth#2096: a base model without a template is trained with the one that was chosen."""
    done = child.run(train_spec(chat_template="alpaca", training={"max_steps": 1}))
    assert done.outcome["data"]["preview"].startswith("<|bos|>### Instruction:\n")
    saved = AutoTokenizer.from_pretrained(done.folder / "adapter")
    assert saved.chat_template == NAMED["alpaca"]
    asked = child.run(evaluate_spec(chat_template="alpaca"), adapter=done.folder / "adapter")
    assert asked.outcome["questions"] == 24


def test_progress_runs_from_load_to_save(trained: Done) -> None:
    assert list(dict.fromkeys(event.phase for event in trained.progress)) == ["load", "data", "train", "save"]
    steps = [event for event in trained.progress if event.phase == "train" and event.loss is not None]
    assert [event.step for event in steps] == [1, 2, 4, 6, 8, 10, 12]
    assert all(event.steps == 12 and event.tokens_per_s and event.reserved_bytes for event in steps)
    assert all(event.grad_norm and event.grad_norm > 0 for event in steps)


def test_an_adapter_folder_holds_the_adapter_its_tokenizer_and_no_base_model(trained: Done) -> None:
    """unsloth#1061: a folder with both configs was taken for an adapter and for a base model."""
    files = {path.name for path in (trained.folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "config.json" not in files
    config = json.loads((trained.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (str(DEMO / "model"), 16)
    assert [path.name for path in trained.folder.iterdir()] == ["adapter"]


def test_the_same_job_in_the_same_process_gives_the_same_adapter(child: Child, trained: Done) -> None:
    again = child.run(train_spec(training={"max_steps": 12}))
    first, second = ((done.folder / "adapter" / "adapter_model.safetensors").read_bytes() for done in (trained, again))
    assert first == second
    assert again.outcome["losses"] == trained.outcome["losses"]
    assert again.outcome["data"]["sha256"] == trained.outcome["data"]["sha256"]
    assert again.outcome["versions"] == trained.outcome["versions"]
    shorter = child.run(train_spec(training={"max_steps": 1}, data={"limit": 63}))
    assert shorter.outcome["data"]["sha256"] != trained.outcome["data"]["sha256"]


def test_which_commit_of_a_hub_model_was_trained_is_known(child: Child) -> None:
    """unsloth#2393, #6817: failed offline though the model was in the cache, as it is here, with HF_HUB_OFFLINE=1."""
    cached = child.folder / "hub" / "hub" / "models--org--tiny"
    commit = "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(DEMO / "model", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    done = child.run(train_spec(base_model="org/tiny", training={"max_steps": 1}))
    assert done.outcome["commit"] == commit


def test_a_loss_that_is_no_number_ends_the_job_within_a_few_steps(child: Child) -> None:
    failure = child.run(train_spec(training={"max_steps": 200, "logging_steps": 100, "learning_rate": 1e30})).failure
    assert failure.reason == "nan_loss"
    assert int(failure.message.partition("by step ")[2].partition(";")[0]) <= 4


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_every_split_of_the_same_effective_batch_gives_the_same_losses_to_rounding(
    child: Child, trained: Done, micro: int, accumulation: int
) -> None:
    """transformers#37197, transformers#35203: the loss was multiplied by the accumulation."""
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "max_steps": 12}
    other = child.run(train_spec(training=split)).outcome

    assert len(other["data"]["histogram"]) > 1, "the rows are of unequal length"
    for (_, loss, _), (_, expected, _) in zip(other["losses"], trained.outcome["losses"], strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)


def test_scores_are_the_log_probabilities_that_full_logits_give(base: Done) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()[:6]]
    for row, line in zip(rows, lines(base), strict=False):
        options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
        content = f"{row['question']}\n\nOptions:\n{options}\n\nPlease choose the correct answer."
        asked = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for letter, text in row["options"].items():
            reply = tokenizer(f"The correct answer is {text}.", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + reply])).logits[0].log_softmax(-1)
            places = range(len(prompt_ids) - 1, len(prompt_ids) + len(reply) - 1)
            expected = sum(logits[place, token].item() for place, token in zip(places, reply, strict=True))
            assert line["scores"][letter] == pytest.approx(expected, abs=1e-3)
        assert line["picks"]["likelihood"] == max(line["scores"], key=line["scores"].__getitem__)
        assert line["answer"] == row["answer_idx"]
        assert (line["question"], line["options"]) == (row["question"], row["options"])


def test_an_evaluation_reports_accuracies_that_its_lines_bear_out(base: Done) -> None:
    outcome, questions = base.outcome, lines(base)
    assert outcome["questions"] == len(questions) == 24
    for metric in ("likelihood", "likelihood_normalised", "generated"):
        correct = sum(line["picks"][metric] == line["answer"] for line in questions)
        low, high = outcome[metric]["interval"]
        assert outcome[metric]["correct"] == correct
        if metric != "generated":
            assert outcome[metric]["ties"] == sum(metric in line["ties"] for line in questions)
        assert outcome[metric]["accuracy"] == correct / 24
        assert low < outcome[metric]["accuracy"] < high
    assert outcome["likelihood"]["plain_because"] is None
    assert outcome["generated"]["answer_form"] == sum("correct answer is" in line["text"] for line in questions) / 24
    assert all("<|end|>" not in line["text"] for line in questions)
    assert base.progress[-1].step == base.progress[-1].steps == 48
    # 95% Wilson interval of `correct` out of 24, by its formula.
    share, z = outcome["likelihood"]["accuracy"], 1.959964
    centre, spread = share + z * z / 48, z * math.sqrt(share * (1 - share) / 24 + z * z / (4 * 24 * 24))
    expected = [(centre - spread) / (1 + z * z / 24), (centre + spread) / (1 + z * z / 24)]
    assert outcome["likelihood"]["interval"] == pytest.approx(expected, abs=1e-6)


def test_a_greedy_answer_does_not_depend_on_what_is_in_its_batch(child: Child, base: Done) -> None:
    alone = child.run(evaluate_spec(evaluation={"per_device_eval_batch_size": 1, "metrics": ["generated"]}))
    assert [line["text"] for line in lines(alone)] == [line["text"] for line in lines(base)]
    assert "likelihood" not in alone.outcome


def test_an_adapter_changes_the_scores_and_half_the_batch_does_not(child: Child, trained: Done, base: Done) -> None:
    asked = child.run(evaluate_spec(evaluation={"metrics": ["likelihood"]}), trained.folder / "adapter")
    halved = {"metrics": ["likelihood"], "per_device_eval_batch_size": 2}
    again = child.run(evaluate_spec(evaluation=halved), trained.folder / "adapter")
    for tuned, same, plain in zip(lines(asked), lines(again), lines(base), strict=True):
        assert tuned["scores"] == pytest.approx(same["scores"], abs=1e-3)
        assert tuned["scores"] != pytest.approx(plain["scores"], abs=1e-3)


def test_adapters_of_one_base_are_asked_on_one_loaded_base_with_the_same_scores(
    child: Child, trained: Done, tmp_path: Path
) -> None:
    """Byte for byte those of another trainer that loads everything anew for each."""
    spec = evaluate_spec(evaluation={"limit": 8})
    other = tmp_path / "other"  # another adapter of the same base
    shutil.copytree(trained.folder / "adapter", other)
    weights = safetensors.torch.load_file(other / "adapter_model.safetensors")
    safetensors.torch.save_file({name: -2 * w for name, w in weights.items()}, other / "adapter_model.safetensors")
    asked = [trained.folder / "adapter", other, None]

    def answers_of(trainer: Child, jobs: Sequence[Path | None], forgets: bool = False) -> tuple[list[str], int]:
        """And how often the base model was still there; `forgets`: another one is loaded before each job."""
        before, answers = trainer.log.read_text().count(STILL_LOADED), []
        for adapter in jobs:
            if forgets:
                quantised = {"method": "qlora", "load_in_4bit": True}
                trainer.run(evaluate_spec(**quantised, evaluation={"limit": 1, "metrics": ["likelihood"]}))
            done = trainer.run(spec, adapter)
            assert done.outcome
            answers.append((done.folder / "questions.jsonl").read_text())
        return answers, trainer.log.read_text().count(STILL_LOADED) - before

    alone, kept = answers_of(child, asked, forgets=True)
    assert kept == 0
    assert len(set(alone)) == 3
    fresh = Child(tmp_path)
    try:
        assert isinstance(fresh.next_event(), Ready)
        assert answers_of(fresh, [*asked, asked[0]]) == ([*alone, alone[0]], 3)
    finally:
        fresh.close()


def test_in_four_bits_too_a_score_does_not_depend_on_what_was_asked_before(child: Child, trained: Done) -> None:
    asked = evaluate_spec(method="qlora", load_in_4bit=True, evaluation={"limit": 8})
    child.run(evaluate_spec(evaluation={"limit": 1}))  # in 32 bits: none in 4 bits stays loaded
    alone = child.run(asked, trained.folder / "adapter")
    child.run(asked)
    after_the_base = child.run(asked, trained.folder / "adapter")
    assert lines(after_the_base) == lines(alone)


def test_a_base_that_an_adapter_has_changed_is_loaded_anew(child: Child, tmp_path: Path) -> None:
    biased = child.run(train_spec(lora={"bias": "lora_only"}, training={"max_steps": 1}))
    before = child.log.read_text().count(STILL_LOADED)
    asked = evaluate_spec(evaluation={"limit": 4, "metrics": ["likelihood"]})
    child.run(asked, biased.folder / "adapter")
    child.run(asked)
    assert child.log.read_text().count(STILL_LOADED) == before


def test_four_bits_and_all_weights_are_trained_and_asked_too(child: Child) -> None:
    quantised = child.run(train_spec(method="qlora", training={"max_steps": 1}))
    assert quantised.outcome["training"]["trained_parameters"] < quantised.outcome["training"]["parameters"]
    asked = evaluate_spec(method="qlora", load_in_4bit=True, evaluation={"limit": 4, "metrics": ["likelihood"]})
    assert child.run(asked, quantised.folder / "adapter").outcome["questions"] == 4

    full = child.run(train_spec(method="full", training={"max_steps": 1}))
    assert full.outcome["training"]["trained_parameters"] == full.outcome["training"]["parameters"]
    files = {path.name for path in (full.folder / "adapter").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert "adapter_config.json" not in files
    asked = evaluate_spec(method="full", evaluation={"limit": 4, "metrics": ["likelihood"]})
    assert child.run(asked, full.folder / "adapter").outcome["questions"] == 4


def test_reference_answers_have_a_perplexity_and_written_ones_a_bleu(child: Child, base: Done, tmp_path: Path) -> None:
    """Against each conversation alone; the answers of two turns count, the tokens that end them too."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    rows = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()[:6]]
    conversations = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] * times
        for row, times in zip(rows, (1, 2, 1, 2, 1, 1), strict=True)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    asked = {"source": str(file), "metrics": ["perplexity", "bleu"], "per_device_eval_batch_size": 4}
    done = child.run(evaluate_spec(evaluation=asked))
    loss, tokens = 0.0, 0
    for turns in conversations:
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        answering = False
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        start = tokenizer("<|assistant|>\n", add_special_tokens=False)["input_ids"]
        for place, token in enumerate(ids):
            if answering:
                loss, tokens = loss - log_probabilities[place - 1, token].item(), tokens + 1
                answering = token != end
            answering = answering or ids[max(0, place - len(start) + 1) : place + 1] == start
    found = done.outcome["perplexity"]
    assert (found["rows"], found["tokens"]) == (6, tokens)
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert done.outcome["questions"] == 0
    written = [json.loads(line) for line in (done.folder / "answers.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in written] == [row["answer"] for row in rows]
    assert all(line["question"] for line in written)
    bleu = sacrebleu.corpus_bleu([line["text"] for line in written], [[line["reference"] for line in written]])
    assert done.outcome["bleu"]["bleu"] == pytest.approx(bleu.score)
    assert "tok:13a" in done.outcome["bleu"]["signature"]
    assert done.progress[-1].step == done.progress[-1].steps == 12


def test_written_answers_to_questions_serve_both_metrics(child: Child, base: Done) -> None:
    done = child.run(evaluate_spec(evaluation={"metrics": ["generated", "bleu"]}))
    written = [json.loads(line) for line in (done.folder / "answers.jsonl").read_text().splitlines()]
    assert [line["text"] for line in written] == [line["text"] for line in lines(base)]
    assert written[0]["reference"].startswith("The correct answer is ")
    assert done.outcome["bleu"]["bleu"] > 0
    unparsed = sum(line["picks"]["generated"] is None for line in lines(done))
    assert done.outcome["generated"]["unparsed"] == unparsed


def test_conversations_are_trained_on_and_cannot_be_asked(child: Child, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": turns * 2}) + "\n")
    done = child.run(train_spec(data={"source": str(file)}, training={"max_steps": 1}))
    assert done.outcome["data"]["preview"].count("<<Hello<|end|>>>") == 2
    failure = child.run(evaluate_spec(evaluation={"source": str(file)})).failure
    assert failure.reason == "bad_data"
    assert "likelihood, generated need multiple-choice rows" in failure.message


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"base_model": "/no/such/folder"}, "bad_spec", "/no/such/folder does not exist"),
        ({"base_model": str(DEMO)}, "bad_spec", "no config.json"),
        ({"base_model": str(DEMO / "train.jsonl")}, "bad_spec", "not a GGUF model"),
        ({"training": {"optim": "sgdd"}}, "bad_spec", "sgdd"),
        ({"training": {"lr_scheduler_type": "zigzag"}}, "bad_spec", "zigzag"),
        ({"lora": {"target_modules": ["no_such_proj"]}}, "bad_spec", "no_such_proj"),
        ({"lora": {"rank": 4}}, "bad_spec", "not valid"),
        ({"data": {"source": "/no/such/file.jsonl"}}, "bad_data", "/no/such/file.jsonl does not exist"),
        ({"training": {"max_seq_length": 16}}, "bad_data", "no row is left to train on"),
        ({"training": {"learning_rate": 1e30}}, "nan_loss", "the loss became NaN"),
    ],
)
def test_a_job_that_cannot_work_fails_with_its_reason_and_the_trainer_goes_on(
    changes: dict[str, Any], reason: str, words: str, child: Child
) -> None:
    failure = child.run(train_spec(**changes)).failure
    assert failure.reason == reason, failure
    assert words in failure.message
    assert "\n" not in failure.message
    assert child.process.poll() is None


def test_a_folder_without_weights_an_adapter_and_another_kind_of_model_are_no_base_models(
    child: Child, trained: Done, tmp_path: Path
) -> None:
    cases = {"weights": "has no weights", "kind": "no causal language model"}
    for name in cases:
        (tmp_path / name).mkdir()
        for file in (DEMO / "model").iterdir():
            if name == "kind" or file.suffix != ".safetensors":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "kind" / "config.json").read_text())
    (tmp_path / "kind" / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]})
    )
    (tmp_path / "adapter").symlink_to(trained.folder / "adapter")
    for name, words in (cases | {"adapter": "is an adapter, not a base model"}).items():
        failure = child.run(train_spec(base_model=str(tmp_path / name))).failure
        assert (failure.reason, words in failure.message) == ("bad_spec", True), failure


def test_an_evaluation_without_its_adapter_is_a_matter_of_storage(child: Child, tmp_path: Path) -> None:
    assert child.run(evaluate_spec(), adapter=tmp_path).failure.reason == "storage"


def test_questions_that_do_not_fit_are_left_out_and_counted(child: Child, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()[:3]]
    rows[1]["question"] = "fish " * 200
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"source": str(tmp_path / "d.jsonl"), "metrics": ["likelihood"]}
    done = child.run(evaluate_spec(max_seq_length=150, evaluation=asked))
    assert (done.outcome["questions"], done.outcome["data"]["too_long"]) == (2, 1)
    assert [line["index"] for line in lines(done)] == [0, 2]


def test_questions_that_the_chat_template_refuses_are_left_out_and_named_unless_all_are(
    child: Child, tmp_path: Path
) -> None:
    """One such row failed the whole evaluation."""
    refuses = "{% if 'fish' in messages[0].content %}{{ raise_exception('no fish') }}{% endif %}"
    template = refuses + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    rows = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()[:3]]
    rows[0]["question"] = rows[1]["question"] = "Which fish?"
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"source": str(tmp_path / "d.jsonl"), "metrics": ["likelihood", "perplexity"]}

    done = child.run(evaluate_spec(chat_template=template, evaluation=asked))
    assert done.outcome["questions"] == done.outcome["perplexity"]["rows"] == 1
    assert done.outcome["data"]["dropped"] == {"the chat template refuses it: no fish": 2}
    assert [line["index"] for line in lines(done)] == [2]

    failure = child.run(evaluate_spec(chat_template=template, evaluation={**asked, "limit": 2})).failure
    assert failure.reason == "bad_data"
    assert "2 questions: the chat template refuses it: no fish" in failure.message


def test_an_unforeseen_failure_is_reported_and_ends_the_trainer(child: Child, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").mkdir()  # where a file is to be written
    done = child.run(evaluate_spec(evaluation={"limit": 2, "metrics": ["likelihood"]}), output=tmp_path)
    assert done.failure.reason == "internal"
    assert done.failure.message.startswith("IsADirectoryError")
    assert child.next_event() is None
    assert child.process.wait(DEADLINE_S) == 0
    assert "Traceback (most recent call last)" in child.log.read_text()


def test_sigterm_ends_a_trainer_in_the_middle_of_a_job(tmp_path: Path) -> None:
    child = Child(tmp_path)
    try:
        assert isinstance(child.next_event(), Ready)
        child.send(train_spec(training={"max_steps": 10_000, "num_train_epochs": None}))
        event = child.next_event()
        while not (isinstance(event, Progress) and event.phase == "train"):
            assert event is not None
            assert not isinstance(event, Failed)
            event = child.next_event()
        child.process.send_signal(signal.SIGTERM)
        assert child.process.wait(DEADLINE_S) == -signal.SIGTERM
    finally:
        child.close()
