"""Labels on the chat templates that TRL ships copies of: what families of models really have."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from chat_families import SYSTEM, TALK, tokenizer_with

from jobqueue.chat import Chat
from jobqueue.example import Example
from jobqueue.tokens import Tokens, label, segments
from jobqueue.turns import messages

_TRL = importlib.util.find_spec("trl")
FOLDER = Path((_TRL.submodule_search_locations or [""])[0] if _TRL else "") / "chat_templates"
PICTURES = ("idefics", "llava", "smolvlm")  # their turns are lists of parts; such models are refused anyway
SPECIAL = re.compile(r"<\|[^|<>]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<[a-z]+_of_turn>|<｜[^｜]+｜>")
PARAMETERS = {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}, "required": []}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": PARAMETERS}}]
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"word": "oak"}'}}
TOOL_TALK = [
    TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "it grows"},
    {"role": "assistant", "content": "Not a tool."},
]  # fmt: skip


def trained(template: str, example: Example) -> list[str] | str:
    special = list(dict.fromkeys(SPECIAL.findall(template)))
    chat = Chat(
        tokenizer_with("<BOS>", "<EOS>", special), template, {"bos_token": "<BOS>", "eos_token": "<EOS>"}, False
    )
    row = next(label(chat, [example]))
    return [text for text, is_trained in segments(chat, row) if is_trained] if isinstance(row, Tokens) else row


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.jinja")), ids=lambda file: file.stem)
def test_answers_and_calls_are_trained_and_nothing_else(file: Path) -> None:
    template = file.read_text(encoding="utf-8")
    for conversation in (TALK, [SYSTEM, *TALK]):
        found = trained(template, Example(conversation))
        if file.name.startswith(PICTURES):
            assert isinstance(found, str)  # a reason, and no guess
            continue
        assert isinstance(found, list), found
        assert len(found) == 2
        assert re.fullmatch(
            r"(\s|</?think>|<\|channel\|>final<\|message\|>| to=user<\|message\|>)*pliers\..*", found[0]
        )
        assert re.fullmatch(r"(\s|</?think>|<\|channel\|>final<\|message\|>| to=user<\|message\|>)*An oak!.+", found[1])
        assert re.fullmatch(r"(<[^<>]+>)*", found[0].partition("pliers.")[2])
        assert re.fullmatch(r"(<[^<>]+>)+", found[1].partition("An oak!")[2])

    calls = trained(template, messages({"messages": TOOL_TALK, "tools": TOOLS}))
    if isinstance(calls, list):  # else the template knows no tools, or not in this way
        assert len(calls) == 2
        assert "find" in calls[0]
        assert "oak" in calls[0]
        assert re.search(r"[>]$", calls[0]), "it ends with a special token"
        assert "Not a tool." in calls[1]
        assert not any("it grows" in text or "Which word" in text for text in calls)


def test_there_are_templates_to_look_at() -> None:
    assert len(list(FOLDER.glob("*.jinja"))) > 20


def test_an_earlier_answer_may_end_with_another_token_than_the_last() -> None:
    assert trained((FOLDER / "gptoss.jinja").read_text(encoding="utf-8"), Example(TALK)) == [
        "<|channel|>final<|message|>pliers.<|end|>",
        "<|channel|>final<|message|>An oak!<|return|>",
    ]


def test_a_call_after_a_generation_prompt_that_opens_a_thought_is_found() -> None:
    calls = trained(
        (FOLDER / "nemotron_3_nano.jinja").read_text(encoding="utf-8"),
        messages({"messages": TOOL_TALK, "tools": TOOLS}),
    )
    assert isinstance(calls, list), calls
    assert calls[0].startswith("</think>\n<tool_call>\n<function=find>")
