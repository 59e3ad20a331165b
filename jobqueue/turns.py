"""Rows that hold a conversation, a prompt with its answer, or plain text; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobqueue.example import Example, Message, Row, SkipRow, checked_text, first, parsed

ROLES = ("system", "user", "assistant", "tool")


def _content(value: object) -> str:
    """A turn's text; a list of parts, as some chat files have it, is joined."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise SkipRow("a turn has a part that is not text")
        value = "".join(str(part) for part in parts)
    return checked_text(value, "a turn's content")


ROLE_NAMES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "developer": "system",
}  # fmt: skip


def messages(row: Row) -> Example:
    """messages: a list of {role, content}, with at least one turn of the assistant; perhaps tools."""
    return _conversation(row.get("messages"), "messages", row.get("tools"))


def _conversation(turns: object, name: str, tools: object = None) -> Example:
    """Turns as {role, content} or {from, value}."""
    turns = parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise SkipRow(f"{name} is not a list of turns" if turns else f"{name} is empty")
    conversation = [_turn(turn) for turn in turns]
    if not any(message["role"] == "assistant" for message in conversation):
        raise SkipRow("no turn of the assistant")
    tools = parsed(tools)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise SkipRow("tools is not a list of JSON schemas")
    return Example(conversation, tools=list(tools) if isinstance(tools, list) and tools else None)


def _turn(turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise SkipRow("a turn lacks role or content")
    role, content = first(turn, ("role", "from")), first(turn, ("content", "value"))
    calls = parsed(turn.get("tool_calls"))
    if role is None or not ({"content", "value"} & turn.keys() or calls):
        raise SkipRow("a turn lacks role or content")
    role = ROLE_NAMES.get(str(role), role)
    if role not in ROLES:
        raise SkipRow(f"a turn has a role that is none of {', '.join(ROLES)}")
    if not calls:
        return {"role": role, "content": _content(content)}
    if role != "assistant" or not isinstance(calls, list):
        raise SkipRow("tool_calls is not a list in a turn of the assistant")
    said = _content(content) if content and str(content).strip() else ""
    return {"role": role, "content": said, "tool_calls": [_call(call) for call in calls]}


def _call(call: object) -> dict[str, Any]:
    """A call as templates want it: the arguments as an object, where OpenAI's files have them as text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise SkipRow("a tool call has no function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise SkipRow("a tool call has no function with a name")
    return {"type": "function", **call, "function": {**function, "arguments": parsed(function.get("arguments") or {})}}


def sharegpt(row: Row) -> Example:
    """conversations: a list of {from, value}, from being human, gpt or system."""
    return _conversation(row.get("conversations"), "conversations", row.get("tools"))


def prompt_completion(row: Row) -> Example:
    """prompt and completion: each a text, or a list of {role, content}."""
    return _conversation([*_side(row.get("prompt"), "user"), *_side(first(row, COMPLETION), "assistant")], "prompt")


def _side(value: object, role: str) -> list[object]:
    """The turns of a prompt or a completion. A text that happens to be JSON stays a text."""
    turns = parsed(value)
    if isinstance(turns, list) and turns and all(isinstance(turn, Mapping) for turn in turns):
        return turns
    return [{"role": role, "content": value}]


COMPLETION = ("completion", "response")
OUTPUT = ("output", "response")


def instruction(row: Row) -> Example:
    """instruction, output and, where it is not empty, input: what the instruction is about (Alpaca, Dolly)."""
    asked = checked_text(row.get("instruction"), "instruction")
    about = first(row, ("input", "context"))
    if about is not None and str(about).strip():
        asked = f"{asked}\n\n{checked_text(about, 'input')}"
    reply = {"role": "assistant", "content": checked_text(first(row, OUTPUT), "output")}
    return Example([{"role": "user", "content": asked}, reply])


def plain(row: Row) -> Example:
    """text: to go on with, as it is."""
    return Example([], text=checked_text(row.get("text"), "text"))
