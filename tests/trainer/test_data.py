"""From a tokenizer of transformers to tokens, labels and batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_from_adapter import NAME
from tokenizers import normalizers
from trainer_child import DEMO, Child, train_spec
from transformers import AutoTokenizer

from gpu_worker.trainer.collator import KEPT_BACK, Collator
from gpu_worker.trainer.data import chat_of
from gpu_worker.trainer.failures import failed
from gpu_worker.trainer.questions import to_questions
from jobqueue.errors import ChatTemplateError
from jobqueue.example import Example, MultipleChoice
from jobqueue.templates import NAMED
from jobqueue.tokens import IGNORED, tokenise

TALK = [{"role": "user", "content": "Which word names a tool?"}, {"role": "assistant", "content": "pliers."}]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model")


def test_tokens_are_those_that_transformers_makes_of_the_same_conversation(tokenizer: Any) -> None:
    chat = chat_of(tokenizer)
    row = tokenise(chat, [Example(TALK)], 512)[0][0]
    assert row.input_ids == list(tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"])
    prompt = tokenizer.apply_chat_template(TALK[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert chat.prompt_ids(TALK[:1]) == list(prompt)


def test_replies_to_a_question_are_read_behind_its_prompt_as_in_training(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("x")  # to whatever begins a text
    chat = chat_of(tokenizer)
    choice = MultipleChoice("Which word names a tool?", {"A": "oak", "B": "pliers"}, "B")
    [question], _, _ = to_questions(chat, [(0, choice)], 512, 0)
    for letter, reply in question.replies.items():
        row = tokenise(chat, [Example(choice.conversation(letter))], 512)[0][0]
        read = question.prompt + reply
        assert read == row.input_ids[: len(read)]


def test_a_tokenizer_that_begins_texts_with_bos_is_recognised(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    assert not chat_of(tokenizer).adds_bos
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert chat_of(tokenizer).adds_bos


def test_another_template_is_kept_by_the_tokenizer_and_so_saved_with_the_adapter(tokenizer: Any) -> None:
    assert chat_of(tokenizer, "chatml").chat_template == NAMED["chatml"] == tokenizer.chat_template
    assert chat_of(tokenizer, "{{ messages[0].content }}").render(TALK) == "Which word names a tool?"


def test_a_base_model_without_a_template_is_a_mistake_of_the_spec_with_a_remedy(tokenizer: Any) -> None:
    """transformers#33246, unsloth#2096."""
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError) as error:
        tokenise(chat_of(tokenizer), [Example(TALK)], 512)
    failure = failed(error.value)
    assert failure.reason == "bad_spec"
    assert "`chat_template: alpaca" in failure.message


def test_padding_is_masked_by_position_and_never_by_the_pad_id() -> None:
    """trl#976, transformers#23530: pad is eos, padding was masked by the pad id, and no model learned to stop."""
    eos = 2
    collate = Collator(pad_token_id=eos)
    batch = collate(
        [
            {"input_ids": [5, 6, 7, eos], "labels": [IGNORED, 6, 7, eos]},
            {"input_ids": [5, eos], "labels": [IGNORED, eos]},
        ]
    )
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, eos], [IGNORED, eos, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, eos], [5, eos, eos, eos]]
    assert list(collate.batches) == [(2, 6, 4)]


def test_rows_that_validate_are_not_counted_as_trained() -> None:
    collate = Collator(pad_token_id=0)
    collate([{"input_ids": [5], "labels": [5], KEPT_BACK: True}])
    assert not collate.batches


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"training": {"max_seq_length": 16}}, "no row is left to train on"),
        ({"data": {"replay": {"source": "EMPTY", "fraction": 0.5}}}, "has no rows"),
        (
            {"from_adapter": NAME, "ewc": {"ewc_lambda": 1.0, "data": {"source": "EMPTY"}}},
            "has no rows",
        ),
    ],
)
def test_bad_rows_are_told_before_the_model_is_loaded(
    child: Child, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    """Here it cannot even be loaded."""
    model, empty = tmp_path / "model", tmp_path / "empty.jsonl"
    shutil.copytree(DEMO / "model", model)
    (model / "model.safetensors").write_bytes(b"broken")
    empty.write_text("")
    spec = json.loads(json.dumps(train_spec(base_model=str(model), **wrong)).replace("EMPTY", str(empty)))

    failure = child.run(spec).failure

    assert failure.reason == "bad_data"
    assert said in failure.message
