"""Labels, token by token, on chat templates of different kinds."""

from __future__ import annotations

from typing import Any

import pytest
from trainer_child import DEMO
from transformers import AutoTokenizer

from gpu_worker.trainer.data import DATE, IGNORED, Tokens, answer_text, prompt_ids, render, tokenise
from gpu_worker.trainer.failures import JobFailure

LLAMA = """{{ bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
CHATML = """{% for m in messages %}
{%- if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim
 + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
PLAIN = """{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"""
SPECIAL = [
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip
# template -> what is trained of the two answers "pliers." and "An oak!"
TRAINED = {
    "llama": (LLAMA, ["pliers.<|eot_id|>", "An oak!<|eot_id|>"]),
    "chatml": (CHATML, ["pliers.<|im_end|>", "An oak!<|im_end|>"]),
    "mistral": (MISTRAL, [" pliers.<|end|>", " An oak!<|end|>"]),
    "gemma": (GEMMA, ["pliers.<end_of_turn>", "An oak!<end_of_turn>"]),
}
TALK = [
    {"role": "user", "content": "Which word names a tool?"},
    {"role": "assistant", "content": "pliers."},
    {"role": "user", "content": "And a tree? Not pliers."},
    {"role": "assistant", "content": "An oak!"},
]


@pytest.fixture(scope="module")
def plain_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


@pytest.fixture
def tokenizer(plain_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The demo's tokenizer, which knows the special tokens of every template here."""
    monkeypatch.setattr(plain_tokenizer, "chat_template", plain_tokenizer.chat_template)
    return plain_tokenizer


def one(tokenizer: Any, conversation: list[dict[str, str]], max_seq_length: int = 512) -> Tokens:
    return tokenise(tokenizer, [conversation], max_seq_length)[0][0]


def expected(tokenizer: Any, text: str, trained: list[str]) -> tuple[list[int], list[int]]:
    """Ids and labels from the pieces of the text: special tokens make tokenising piecewise the same."""
    ids: list[int] = []
    labels: list[int] = []
    for answer in trained:
        before, text = text.split(answer, 1)
        for piece, is_trained in ((before, False), (answer, True)):
            piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += piece_ids
            labels += piece_ids if is_trained else [IGNORED] * len(piece_ids)
    rest = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids + rest, labels + [IGNORED] * len(rest)


@pytest.mark.parametrize("turns", [2, 4])
@pytest.mark.parametrize("name", TRAINED)
def test_every_answer_and_its_end_token_is_trained_and_nothing_else(name: str, turns: int, tokenizer: Any) -> None:
    tokenizer.chat_template, trained = TRAINED[name]
    row = one(tokenizer, TALK[:turns])
    # Expect: what stands between the answers, split off by hand. "pliers." in the question is no answer.
    ids, labels = expected(tokenizer, render(tokenizer, TALK[:turns]), trained[: turns // 2])
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == tokenizer.convert_ids_to_tokens(ids)
    assert row.labels == labels
    assert row.input_ids.count(tokenizer.bos_token_id) == (0 if name == "chatml" else 1)


@pytest.mark.parametrize("name", TRAINED)
def test_the_prompt_of_a_question_is_what_training_saw_before_the_answer(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template, trained = TRAINED[name]
    prompt = prompt_ids(tokenizer, TALK[:1])
    answer = tokenizer(answer_text(tokenizer, TALK[:2]), add_special_tokens=False)["input_ids"]
    row = one(tokenizer, TALK[:2])
    assert row.input_ids[: len(prompt)] == prompt
    assert row.input_ids[len(prompt) : len(prompt) + len(answer)] == answer
    assert tokenizer.decode(answer) == trained[0].split("<")[0]


def test_a_system_prompt_and_the_templates_own_date_do_not_shift_the_labels(tokenizer: Any) -> None:
    tokenizer.chat_template = LLAMA
    row = one(tokenizer, [{"role": "system", "content": "Say pliers."}, *TALK[:2]])
    trained = [token for token in row.labels if token != IGNORED]
    assert tokenizer.decode(trained) == "pliers.<|eot_id|>"


@pytest.mark.parametrize(
    "template",
    [
        LLAMA.replace("strftime_now('%d %b %Y')", "'today'"),  # asks for date_string
        LLAMA.replace("not date_string is defined", "true"),  # asks for the time of day, whatever it is given
    ],
)
def test_a_template_prints_the_fixed_date_and_not_todays(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    assert f"Today Date: {DATE:%d %b %Y}" in render(tokenizer, TALK)


def test_an_answer_that_the_template_does_not_end_gets_the_end_token(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    row = one(tokenizer, TALK[:2])
    trained = [token for token in row.labels if token != IGNORED]
    assert tokenizer.decode(trained) == "pliers.<|end|>"
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_bos_is_put_where_the_tokenizer_puts_it_and_the_template_does_not(tokenizer: Any) -> None:
    class WithBos:
        """The tokenizer, but it begins texts with BOS as Llama's does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: Any, add_special_tokens: bool = True, **rest: Any) -> Any:
            encoded = tokenizer(text, add_special_tokens=False, **rest)
            return {"input_ids": [tokenizer.bos_token_id, *encoded["input_ids"]]} if add_special_tokens else encoded

    for template in (CHATML, LLAMA):
        tokenizer.chat_template = template
        row = one(WithBos(), TALK)
        assert row.input_ids.count(tokenizer.bos_token_id) == 1
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert row.labels[0] == IGNORED
        assert len(row.labels) == len(row.input_ids)


def test_a_long_row_loses_its_end_and_is_counted(tokenizer: Any) -> None:
    whole = one(tokenizer, TALK)
    length = len(whole.input_ids) - 4
    rows, report = tokenise(tokenizer, [TALK, TALK[:2]], length)
    assert rows[0] == Tokens(whole.input_ids[:length], whole.labels[:length])
    assert (report.truncated, report.longest, report.used) == (1, len(whole.input_ids), 2)


def test_a_row_without_its_answer_is_dropped_and_if_all_are_the_job_fails(tokenizer: Any) -> None:
    long = [{"role": "user", "content": "word " * 50}, TALK[1]]
    rows, report = tokenise(tokenizer, [long, TALK[:2]], 40)
    assert len(rows) == 1
    assert report.dropped == {"no answer within max_seq_length": 1}
    with pytest.raises(JobFailure, match="no row is left to train on") as error:
        tokenise(tokenizer, [long, long], 40)
    assert error.value.reason == "bad_data"


def test_rows_that_the_template_refuses_are_dropped_with_its_words(tokenizer: Any) -> None:
    tokenizer.chat_template = GEMMA
    rows, report = tokenise(tokenizer, [[{"role": "system", "content": "x"}, *TALK], TALK], 512)
    assert len(rows) == 1
    assert [reason for reason in report.dropped if "System role not supported" in reason]


def test_the_report_counts_what_was_seen(tokenizer: Any) -> None:
    rows, report = tokenise(tokenizer, [TALK, TALK[:2], TALK], 512)
    assert (report.rows, report.used, report.duplicates) == (3, 3, 1)
    assert report.tokens == sum(len(row.input_ids) for row in rows)
    assert report.trained_tokens == sum(label != IGNORED for row in rows for label in row.labels)


def test_the_preview_marks_what_is_trained(tokenizer: Any) -> None:
    _, report = tokenise(tokenizer, [TALK[:2]], 512)
    assert report.preview.endswith("<|assistant|>\n<<pliers.<|end|>>>\n")
    assert report.preview.count("<<") == 1


def test_a_model_without_a_chat_template_is_refused_with_advice(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(JobFailure, match="no chat template; take its instruct version") as error:
        tokenise(tokenizer, [TALK], 512)
    assert error.value.reason == "bad_spec"
