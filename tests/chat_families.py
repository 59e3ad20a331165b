"""The chat templates of well-known families, rebuilt small, and tokenizers that know their special tokens.

`SAID` is what each family makes of `TALK`, written by hand: between « and » stands what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jobqueue.chat import Chat

TALK = [
    {"role": "user", "content": "Which word names a tool?"},
    {"role": "assistant", "content": "pliers."},
    {"role": "user", "content": "And a tree? Not pliers."},
    {"role": "assistant", "content": "An oak!"},
]
SYSTEM = {"role": "system", "content": "Say pliers."}


# Llama 3's and Qwen's way to cut text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and what it makes of TALK, without and with SYSTEM before it."""

    template: str
    bos: str | None
    eos: str
    others: tuple[str, ...]
    said: str
    said_with_system: str
    adds_bos: bool = False
    """The tokenizer begins every text with BOS, as Llama's, Gemma's and Mistral's do."""


LLAMA_3 = Family(
    template="""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
        {{- message.tool_calls[0].function.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    others=("<|start_header_id|>", "<|end_header_id|>"),
    said="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhich word names a tool?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«pliers.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd a tree? Not pliers.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«An oak!<|eot_id|>»",
    said_with_system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nSay pliers.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhich word names a tool?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«pliers.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd a tree? Not pliers.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«An oak!<|eot_id|>»",
    adds_bos=True,
)
QWEN_3 = Family(
    template="""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- set response = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not response %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    bos=None,
    eos="<|im_end|>",
    others=("<|im_start|>", "<|endoftext|>"),
    said="<|im_start|>user\nWhich word names a tool?<|im_end|>\n<|im_start|>assistant\n«pliers.<|im_end|>»\n"
    "<|im_start|>user\nAnd a tree? Not pliers.<|im_end|>\n"
    "<|im_start|>assistant\n«<think>\n\n</think>\n\nAn oak!<|im_end|>»\n",
    said_with_system="<|im_start|>system\nSay pliers.<|im_end|>\n"
    "<|im_start|>user\nWhich word names a tool?<|im_end|>\n<|im_start|>assistant\n«pliers.<|im_end|>»\n"
    "<|im_start|>user\nAnd a tree? Not pliers.<|im_end|>\n"
    "<|im_start|>assistant\n«<think>\n\n</think>\n\nAn oak!<|im_end|>»\n",
)
GEMMA_3 = Family(
    template="""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}""",
    bos="<bos>",
    eos="<eos>",
    others=("<start_of_turn>", "<end_of_turn>"),
    said="<bos><start_of_turn>user\nWhich word names a tool?<end_of_turn>\n"
    "<start_of_turn>model\n«pliers.<end_of_turn>»\n<start_of_turn>user\nAnd a tree? Not pliers.<end_of_turn>\n"
    "<start_of_turn>model\n«An oak!<end_of_turn>»\n",
    said_with_system="<bos><start_of_turn>user\nSay pliers.\n\nWhich word names a tool?<end_of_turn>\n"
    "<start_of_turn>model\n«pliers.<end_of_turn>»\n<start_of_turn>user\nAnd a tree? Not pliers.<end_of_turn>\n"
    "<start_of_turn>model\n«An oak!<end_of_turn>»\n",
    adds_bos=True,
)
GEMMA_2 = replace(
    GEMMA_3,
    template="""{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
)
MISTRAL = Family(
    template="""{{ bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}""",
    bos="<s>",
    eos="</s>",
    others=("[INST]", "[/INST]"),
    said="<s>[INST] Which word names a tool? [/INST]« pliers.</s>»[INST] And a tree? Not pliers. [/INST]« An oak!</s>»",
    said_with_system="<s>[INST] Say pliers.\n\nWhich word names a tool? [/INST]« pliers.</s>»"
    "[INST] And a tree? Not pliers. [/INST]« An oak!</s>»",
    adds_bos=True,
)
# Mistral 7B v0.3 writes the system turn into the last user turn: earlier prompts are written otherwise.
MISTRAL_V3 = replace(
    MISTRAL,
    template="""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}{%- endif %}
{%- endfor %}""",
    said="<s>[INST] Which word names a tool?[/INST]« pliers.</s>»[INST] And a tree? Not pliers.[/INST]« An oak!</s>»",
    # It shows the system turn only where the last turn is the user's, so that training would never see it.
    said_with_system="<s>[INST] Say pliers.\n\nWhich word names a tool?[/INST]« pliers.</s>»"
    "[INST] And a tree? Not pliers.[/INST]« An oak!</s>»",
)
PHI_3 = Family(
    template="{% for message in messages %}"
    "{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    bos="<s>",
    eos="<|endoftext|>",
    others=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    said="<|user|>\nWhich word names a tool?<|end|>\n<|assistant|>\n«pliers.<|end|>»\n"
    "<|user|>\nAnd a tree? Not pliers.<|end|>\n<|assistant|>\n«An oak!<|end|>»\n<|endoftext|>",
    said_with_system="<|system|>\nSay pliers.<|end|>\n<|user|>\nWhich word names a tool?<|end|>\n"
    "<|assistant|>\n«pliers.<|end|>»\n<|user|>\nAnd a tree? Not pliers.<|end|>\n"
    "<|assistant|>\n«An oak!<|end|>»\n<|endoftext|>",
)
SMOLLM2 = Family(
    template="""{% for message in messages %}
{%- if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}
{{- '<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    bos="<|im_start|>",
    eos="<|im_end|>",
    others=("<|endoftext|>",),
    said="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhich word names a tool?<|im_end|>\n<|im_start|>assistant\n«pliers.<|im_end|>»\n"
    "<|im_start|>user\nAnd a tree? Not pliers.<|im_end|>\n<|im_start|>assistant\n«An oak!<|im_end|>»\n",
    said_with_system="<|im_start|>system\nSay pliers.<|im_end|>\n"
    "<|im_start|>user\nWhich word names a tool?<|im_end|>\n<|im_start|>assistant\n«pliers.<|im_end|>»\n"
    "<|im_start|>user\nAnd a tree? Not pliers.<|im_end|>\n<|im_start|>assistant\n«An oak!<|im_end|>»\n",
)
CHATML = Family(
    template="""{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    bos=None,
    eos="<|im_end|>",
    others=("<|im_start|>",),
    said="<|im_start|>user\nWhich word names a tool?<|im_end|>\n<|im_start|>assistant\n«pliers.<|im_end|>»\n"
    "<|im_start|>user\nAnd a tree? Not pliers.<|im_end|>\n<|im_start|>assistant\n«An oak!<|im_end|>»\n",
    said_with_system="<|im_start|>system\nSay pliers.<|im_end|>\n"
    "<|im_start|>user\nWhich word names a tool?<|im_end|>\n<|im_start|>assistant\n«pliers.<|im_end|>»\n"
    "<|im_start|>user\nAnd a tree? Not pliers.<|im_end|>\n<|im_start|>assistant\n«An oak!<|im_end|>»\n",
)
FAMILIES = {
    "llama-3": LLAMA_3, "qwen-3": QWEN_3, "gemma-3": GEMMA_3, "gemma-2": GEMMA_2, "mistral": MISTRAL,
    "mistral-v3": MISTRAL_V3, "phi-3": PHI_3, "smollm2": SMOLLM2, "chatml": CHATML,
}  # fmt: skip


def chat(family: Family, **changes: Any) -> Chat:
    """A tokenizer of that family, with its template."""
    named = {"bos_token": family.bos, "eos_token": family.eos}
    built = Chat(
        backend=_tokenizer(family.bos, family.eos, family.others, family.adds_bos),
        chat_template=family.template,
        special_tokens={name: token for name, token in named.items() if token},
        adds_bos=family.adds_bos,
    )
    return replace(built, **changes)


@cache
def _tokenizer(bos: str | None, eos: str, others: tuple[str, ...], adds_bos: bool) -> Tokenizer:
    tokenizer = tokenizer_with(*([bos] if bos else []), eos, others)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def tokenizer_with(*special: str | Sequence[str]) -> Tokenizer:
    """Byte-level BPE as Llama 3 and Qwen have it: it joins a full stop and the line breaks after it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [message["content"] for message in [*TALK, SYSTEM]]
    corpus += ["assistant user system model\n\n", "pliers.\n\n" * 9]
    tokens = [token for item in special for token in ([item] if isinstance(item, str) else item)]
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(tokens),
        special_tokens=list(dict.fromkeys(tokens)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer
