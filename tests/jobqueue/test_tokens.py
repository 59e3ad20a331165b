"""Tokens and labels, token by token, on the templates of well-known families."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_families import CHATML, FAMILIES, GEMMA_2, GEMMA_3, LLAMA_3, MISTRAL, QWEN_3, SMOLLM2, SYSTEM, TALK, chat
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jobqueue.chat import Chat
from jobqueue.errors import ChatTemplateError, DataError
from jobqueue.example import Example
from jobqueue.templates import NAMED
from jobqueue.tokens import IGNORED, Tokens, histogram, segments, tokenise

# No end token after an answer, and a line break that a tokenizer may join to the answer's last character.
PLAIN = """{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"""
THINKING = {"role": "assistant", "content": "<think>\nTools: pliers.\n</think>\n\nIt is pliers."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "find", "arguments": {"word": "oak"}}}],
}
TOOL_TALK = [
    TALK[0], CALL, {"role": "tool", "content": "a tree"}, {"role": "assistant", "content": "Not a tool: oak."},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]


def one(model: Chat, conversation: list[dict[str, Any]], max_seq_length: int = 2048, **fields: Any) -> Tokens:
    return tokenise(model, [Example(conversation, **fields)], max_seq_length)[0][0]


def expected(model: Chat, marked: str) -> tuple[list[str], list[str | None]]:
    """Tokens, and those of them that are trained, of a text with « and » around what is trained."""
    tokens: list[str] = []
    labels: list[str | None] = []
    for piece in marked.split("«"):
        trained, _, rest = piece.rpartition("»")
        for text, is_trained in ((trained, True), (rest, False)):
            found = model.backend.encode(text, add_special_tokens=False).tokens
            tokens += found
            labels += found if is_trained else [None] * len(found)
    return tokens, labels


def names(model: Chat, row: Tokens) -> tuple[list[str], list[str | None]]:
    named = [model.backend.id_to_token(i) for i in row.input_ids]
    return named, [None if i == IGNORED else model.backend.id_to_token(i) for i in row.labels]


def trained(model: Chat, row: Tokens) -> list[str]:
    return [text for text, is_trained in segments(model, row) if is_trained]


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_and_its_end_token_is_trained_and_nothing_else(name: str, with_system: bool) -> None:
    """axolotl#2089, #1761: wrong spans were masked, only the last turn was trained. unsloth#2095, #2900, #1290: markers
    of one template on another masked everything.

    The words of the first answer also stand in a question and in the system turn.
    """
    family = FAMILIES[name]
    model = chat(family)
    row = one(model, [SYSTEM, *TALK] if with_system else TALK)
    assert names(model, row) == expected(model, family.said_with_system if with_system else family.said)


@pytest.mark.parametrize("name", FAMILIES)
def test_begin_and_end_of_text_stand_there_exactly_once(name: str) -> None:
    """trl#1400: a template that writes BOS, and a tokenizer that adds it, made two."""
    family = FAMILIES[name]
    model = chat(family)
    row = one(model, TALK[:2])
    if family.bos and family.adds_bos:
        assert row.input_ids[0] == model.bos_id
        assert row.input_ids.count(model.bos_id or 0) == 1
    ends = [i for i in row.labels if i in (model.eos_id, model.backend.token_to_id(model.turn_end or ""))]
    assert len(ends) == 1


def test_bos_is_put_where_the_tokenizer_puts_it_and_the_template_does_not() -> None:
    """unsloth decided on BOS for a whole data set by its first row."""
    model = chat(LLAMA_3, chat_template=LLAMA_3.template.replace("{{- bos_token }}", ""))
    row = one(model, TALK)
    assert row.input_ids[0] == model.bos_id
    assert row.input_ids.count(model.bos_id or 0) == 1
    assert (row.labels[0], len(row.labels)) == (IGNORED, len(row.input_ids))


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_a_question_is_what_training_saw_before_the_answer(name: str, turns: int) -> None:
    model = chat(FAMILIES[name])
    prompt = model.prompt_ids(TALK[:turns])
    answer = model.ids(model.answer_text(TALK[: turns + 1]))
    row = one(model, TALK[: turns + 1])
    assert row.input_ids[: len(prompt)] == prompt
    assert row.input_ids[len(prompt) : len(prompt) + len(answer)] == answer


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_gives_the_text_that_transformers_gives(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = chat(FAMILIES[name])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=model.backend, **model.special_tokens)
    theirs.chat_template = model.chat_template
    for conversation, generation_prompt in ((TALK, False), (TALK[:3], True), (TALK[:1], True)):
        text = theirs.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=generation_prompt, date_string="26 Jul 2024"
        )
        assert model.render(conversation, generation_prompt=generation_prompt) == text


def test_todays_date_is_never_in_a_prompt() -> None:
    """sglang#3296: Llama 3.1 and 3.2 print today's date where no date_string is given."""
    clock = LLAMA_3.template.replace("not date_string is defined", "true")  # asks the clock, whatever it is given
    for template in (LLAMA_3.template, clock):
        assert "Today Date: 26 Jul 2024" in chat(LLAMA_3, chat_template=template).render(TALK)


@pytest.mark.parametrize("family", [GEMMA_2, MISTRAL])
def test_a_system_turn_that_the_template_refuses_goes_before_the_first_question_and_that_is_said(family: Any) -> None:
    model = chat(family)
    _, report = tokenise(model, [Example([SYSTEM, *TALK])], 2048)
    assert report.dropped == {}
    assert report.notes == ["the chat template has no system turn: what it says is put before the first user turn"]
    assert model.render([SYSTEM, TALK[0]]) == model.render(
        [{**TALK[0], "content": f"Say pliers.\n\n{TALK[0]['content']}"}]
    )
    assert tokenise(model, [Example(TALK)], 2048)[1].notes == []


def test_a_template_that_swallows_the_system_turn_gets_it_too() -> None:
    silent = MISTRAL.template.replace(
        "== 'user' %}{{ '[INST]", "== 'system' %}{% elif message['role'] == 'user' %}{{ '[INST]"
    )
    silent = silent.replace(
        "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}", ""
    )
    model = chat(MISTRAL, chat_template=silent)
    assert "Say pliers." in model.render([SYSTEM, *TALK])


def test_thoughts_of_the_last_answer_are_trained_and_those_of_earlier_ones_are_left_out_as_qwen_does() -> None:
    model = chat(QWEN_3)
    row = one(model, [TALK[0], THINKING])
    assert trained(model, row) == ["<think>\nTools: pliers.\n</think>\n\nIt is pliers.<|im_end|>"]
    row = one(model, [TALK[0], THINKING, *TALK[2:]])
    assert trained(model, row) == ["It is pliers.<|im_end|>", "<think>\n\n</think>\n\nAn oak!<|im_end|>"]


def test_a_template_that_knows_no_thoughts_shows_them_as_they_are() -> None:
    model = chat(CHATML)
    row = one(model, [TALK[0], THINKING, *TALK[2:]])
    assert trained(model, row) == [f"{THINKING['content']}<|im_end|>", "An oak!<|im_end|>"]


def test_a_generation_prompt_that_opens_a_thought_is_not_trained() -> None:
    """As QwQ and Qwen 3 Thinking have it: what the prompt holds, the model need not learn to write."""
    opens = QWEN_3.template.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    model = chat(QWEN_3, chat_template=opens)
    assert trained(model, one(model, [TALK[0], THINKING])) == ["Tools: pliers.\n</think>\n\nIt is pliers.<|im_end|>"]


@pytest.mark.parametrize(
    ("family", "call"),
    [
        (QWEN_3, '<tool_call>\n{"name": "find", "arguments": {"word": "oak"}}\n</tool_call><|im_end|>'),
        (LLAMA_3, '{"name": "find", "parameters": {"word": "oak"}}<|eot_id|>'),
    ],
)
def test_calls_of_tools_are_trained_and_what_tools_answer_is_not(family: Any, call: str) -> None:
    model = chat(family)
    row = one(model, TOOL_TALK, tools=TOOLS)
    first, last = trained(model, row)
    assert first.endswith(call)
    assert last.endswith(f"Not a tool: oak.{family.eos}")
    assert "a tree" not in first + last


def test_a_template_that_knows_no_tools_drops_such_rows_with_the_reason() -> None:
    _, report = tokenise(chat(SMOLLM2), [Example(TOOL_TALK), Example(TALK, tools=TOOLS), Example(TALK)], 2048)
    assert report.dropped == {"the chat template knows no tools": 2}


@pytest.mark.parametrize("prompt", ["{{ messages | length }} turns. ", "{{ messages[0].content | length }} letters. "])
def test_an_answer_begins_after_the_generation_prompt_whatever_else_the_template_writes(prompt: str) -> None:
    """Both put something before the conversation: one that changes with later turns, one with the words themselves."""
    model = chat(MISTRAL, chat_template=prompt + MISTRAL.template)
    assert trained(model, one(model, TALK)) == [" pliers.</s>", " An oak!</s>"]


@pytest.mark.parametrize("kind", ["prepend", "replace", "first", "always", "never"])
def test_the_space_before_an_answer_is_trained_whatever_a_tokenizer_makes_of_spaces(kind: str) -> None:
    """Tokenizers that come from SentencePiece (Llama 2, Mistral, Gemma) write spaces as part of words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "replace":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([message["content"] for message in TALK] + [" pliers.", " An oak!"], trainer)
    model = Chat(tokenizer, MISTRAL.template, {"bos_token": "<s>", "eos_token": "</s>"}, False)
    tokens, labels = names(model, one(model, TALK))
    inside, answers = False, []
    for token in tokens:  # an answer is all that stands between [/INST] and </s>
        answers.append(token if inside else None)
        inside = token == "[/INST]" or (inside and token != "</s>")
    assert labels == answers
    assert "".join(token for token in labels if token).replace("▁", "") == "pliers.</s>Anoak!</s>"
    assert one(model, TALK[:2]).input_ids[: len(model.prompt_ids(TALK[:1]))] == model.prompt_ids(TALK[:1])


@pytest.mark.parametrize("header", ["[/INST] ", "[/INST]\n"])  # as Mistral's, and as alpaca's
def test_a_reply_is_read_as_it_is_trained_whatever_a_tokenizer_puts_before_a_text(header: str) -> None:
    """Llama 2 and Mistral: [/INST] is text, and the first word of a text that stands alone gets a space."""
    model = spaced(f"{{{{ '[INST]' + m.content + {header.strip(' ')!r} }}}}", header.endswith(" "))
    lead = model.answer_text(TALK[:2]).removesuffix("pliers.")
    prompt, (right, wrong) = model.reply_ids(TALK[:1], [f"{lead}pliers.", f"{lead}An oak!"])
    row = one(model, TALK[:2])
    assert prompt == model.prompt_ids(TALK[:1]) == row.input_ids[: len(prompt)]
    assert [*right, model.eos_id] == row.input_ids[len(prompt) :]
    assert model.decode(wrong) == f"{lead}An oak!".replace(" ", "▁")


def test_a_reply_that_would_change_the_last_token_before_it_is_read_by_itself() -> None:
    model = spaced("{{ '[INST]' + m.content + 'p' }}", False)
    prompt, replies = model.reply_ids(TALK[:1], ["l", "pliers."])
    assert [model.decode([prompt[-1], *reply]) for reply in replies] == ["p▁l", "ppliers."]
    assert prompt == model.prompt_ids(TALK[:1])


def spaced(asked: str, space: bool) -> Chat:
    """With a tokenizer of characters, and of "pl", that puts a space before a text; `space`: also before an answer."""
    characters = sorted({*"▁\n[INST/]", *"".join(message["content"] for message in TALK).replace(" ", "")})
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *characters, "pl"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("p", "l")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    answered = f"{{{{ '{' ' * space}' + m.content + eos_token }}}}"
    turn = f"{{% if m.role == 'user' %}}{asked}{{% else %}}{answered}{{% endif %}}"
    template = f"{{{{ bos_token }}}}{{% for m in messages %}}{turn}{{% endfor %}}"
    return Chat(tokenizer, template, {"bos_token": "<s>", "eos_token": "</s>"}, False)


def test_marks_for_other_trainers_change_nothing() -> None:
    marked = CHATML.template.replace("{{- '<|im_start|>'", "{% generation %}{{- '<|im_start|>'")
    marked = marked.replace("'\\n' }}{% endfor %}", "'\\n' }}{% endgeneration %}{% endfor %}")
    assert one(chat(CHATML, chat_template=marked), TALK) == one(chat(CHATML), TALK)


def test_a_token_that_is_only_partly_an_answer_is_not_trained() -> None:
    model = chat(CHATML, chat_template=PLAIN)
    assert trained(model, one(model, TALK)) == ["pliers", "An oak!<|im_end|>"]  # the first full stop is in ".\n\n"


def test_an_answer_that_the_template_does_not_end_gets_the_end_token_and_keeps_its_last_character() -> None:
    model = chat(CHATML, chat_template=PLAIN)
    row = one(model, TALK[:2])
    assert trained(model, row) == ["pliers.<|im_end|>"]
    assert row.input_ids[-1] == model.eos_id
    assert model.decode(model.ids("pliers.\n\n")[-1:]) == ".\n\n"  # which would be no part of the answer


def test_a_special_token_that_begins_the_next_turn_does_not_end_an_answer() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '\\n' }}{% endfor %}"
    model = chat(
        CHATML, chat_template=template + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert trained(model, one(model, TALK)) == ["pliers.", "An oak!<|im_end|>"]


@pytest.mark.parametrize("name", NAMED)
def test_the_named_templates_train_every_answer_with_an_end_token(name: str) -> None:
    """transformers#33246, unsloth#2096: base models have no template; one of these can be chosen."""
    family = {"llama-3": LLAMA_3, "gemma": GEMMA_3, "mistral": MISTRAL}.get(name, CHATML)
    model = chat(family, chat_template=NAMED[name])
    texts = [text.strip() for text in trained(model, one(model, [SYSTEM, *TALK]))]
    end = model.turn_end
    assert texts == [f"pliers.{end}", f"An oak!{end}"]


def test_a_model_without_a_chat_template_gets_a_choice_not_a_traceback() -> None:
    """transformers#33246, unsloth#2096."""
    with pytest.raises(ChatTemplateError) as error:
        tokenise(chat(CHATML, chat_template=None), [Example(TALK)], 512)
    assert error.value.what == "this base model has no chat template"
    assert "chat_template: alpaca | chatml" in error.value.do


def test_plain_text_is_trained_whole_and_needs_no_template() -> None:
    model = chat(LLAMA_3, chat_template=None)
    row = one(model, [], text="An oak is a tree.")
    assert names(model, row) == expected(model, "<|begin_of_text|>«An oak is a tree.<|eot_id|>»")


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_any() -> None:
    model = chat(QWEN_3, chat_template={"default": CHATML.template, "tool_use": QWEN_3.template})
    assert "<tool_call>" in one_text(model, Example(TOOL_TALK, tools=TOOLS))
    assert "<think>" not in one_text(model, Example(TALK))


def one_text(model: Chat, example: Example) -> str:
    return model.decode(tokenise(model, [example], 2048)[0][0].input_ids)


def test_a_long_row_loses_its_end_and_is_counted() -> None:
    model = chat(LLAMA_3)
    whole = one(model, TALK)
    length = len(whole.input_ids) - 4
    rows, report = tokenise(model, [Example(TALK), Example(TALK[:2])], length)
    assert rows[0] == Tokens(whole.input_ids[:length], whole.labels[:length])
    assert (report.truncated, report.longest, report.used) == (1, len(whole.input_ids), 2)


def test_rows_whose_answer_is_cut_off_are_dropped_and_if_all_are_the_data_is_refused() -> None:
    """unsloth#11321, transformers#34494: max_seq_length cut off the answer, every label was -100, the loss NaN."""
    model = chat(CHATML)
    long = Example([{"role": "user", "content": "word " * 50}, TALK[1]])
    rows, report = tokenise(model, [long, Example(TALK[:2])], 60)
    assert len(rows) == 1
    assert report.dropped == {"no answer within max_seq_length": 1}
    with pytest.raises(DataError, match=r"no row is left to train on \(2 rows: no answer within max_seq_length\)"):
        tokenise(model, [long, long], 60)


def test_rows_that_the_template_refuses_are_dropped_with_its_words() -> None:
    rows, report = tokenise(chat(GEMMA_3), [Example([TALK[0], *TALK]), Example(TALK)], 2048)
    assert len(rows) == 1
    assert [reason for reason in report.dropped if "roles must alternate" in reason]


def test_an_answer_that_the_template_changes_is_not_guessed_at() -> None:
    upper = CHATML.template.replace("message['content']", "message['content'] | replace('e', 'E')")
    model = chat(CHATML, chat_template=upper)
    assert trained(model, one(model, TALK[:2])) == ["pliErs.<|im_end|>"]
    shortened = CHATML.template.replace("message['content']", "message['content'][:3]")
    with pytest.raises(DataError, match="does not show an answer as it is written"):
        tokenise(chat(CHATML, chat_template=shortened), [Example(TALK)], 512)


def test_the_report_counts_what_was_seen() -> None:
    rows, report = tokenise(chat(CHATML), [Example(TALK), Example(TALK[:2]), Example(TALK)], 512)
    assert (report.rows, report.used, report.duplicates) == (3, 3, 1)
    assert report.tokens == sum(len(row.input_ids) for row in rows)
    assert report.trained_tokens == sum(label != IGNORED for row in rows for label in row.labels)
    assert sum(count for _, _, count in report.histogram) == 3


def test_the_preview_marks_what_is_trained() -> None:
    _, report = tokenise(chat(CHATML), [Example(TALK[:2])], 512)
    assert report.preview.endswith("<|im_start|>assistant\n<<pliers.<|im_end|>>>\n")
    assert report.preview.count("<<") == 1


def test_a_histogram_has_every_length_in_one_bin() -> None:
    assert histogram([]) == []
    assert histogram([7]) == [(7, 7, 1)]
    assert histogram([1, 2, 3, 10], bins=2) == [(1, 5, 3), (6, 10, 1)]
    lengths = [3, 900, 17, 17, 64, 2048]
    assert sum(count for _, _, count in histogram(lengths)) == len(lengths)


def test_a_private_character_of_a_row_does_not_move_its_labels() -> None:
    odd = replace(Example(TALK[:2]), conversation=[TALK[0], {"role": "assistant", "content": "pl\U000f5a1eiers."}])
    with pytest.raises(DataError, match="does not show an answer"):
        tokenise(chat(CHATML), [odd], 512)
