"""Conversations as a model reads them: rendered by its chat template, tokenised, the answers found in the text.

A conversation is rendered once as text and tokenised once. Where the answers are in it is found by rendering it a
second time with marks around them; where one begins, by rendering what comes before it with a generation prompt. So
no template needs markers of its own, and no token differs from what the model reads when it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jobqueue.errors import ChatTemplateError
from jobqueue.example import Message
from jobqueue.templates import DATE, NAMED, RenderError, render, syntax_error

# Around an answer in a second rendering; private to Unicode's users, so that no data has them.
BEGINS, ENDS = "\U000f5a1e", "\U000f5a1f"
THOUGHT = "</think>"  # what stands before it, templates keep, move or leave out
_BLANK = re.compile(r"\s*")
Tools = Sequence[Mapping[str, Any]]


class BadTurn(Exception):
    """The template cannot render this conversation; the text says why."""


@dataclass(frozen=True)
class Span:
    """Characters of an answer, its end token included; `append_eos`: the template does not end it."""

    start: int
    end: int
    append_eos: bool = False


@dataclass(frozen=True)
class Chat:
    """A tokenizer and its chat template."""

    backend: Any
    """The `tokenizers.Tokenizer`."""
    chat_template: str | Mapping[str, str] | None
    """A template, or several by name ("default", "tool_use")."""
    special_tokens: Mapping[str, str]
    """"bos_token", "eos_token", ...: what templates call them -> the token."""
    adds_bos: bool
    """Whether the tokenizer itself begins a text with BOS."""

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids of each text, and the characters of each token. No special token is added."""
        # One call for all of them: the tokenizers library spreads it over the CPU's cores.
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(item.ids, item.offsets) for item in encoded]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    @property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._id("eos_token")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """Every token that is not text."""
        added = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        return tuple(dict.fromkeys([*added, *self.special_tokens.values()]))

    def with_bos(self, ids: list[int]) -> list[int]:
        """Exactly one BOS where the tokenizer puts one, whether or not the template wrote it."""
        bos = self.bos_id
        return ids if bos is None or ids[:1] == [bos] or not self.adds_bos else [bos, *ids]

    def prompt_ids(self, conversation: list[Message]) -> list[int]:
        """Token ids of everything before the assistant's next answer."""
        return self.with_bos(self.ids(self.render(conversation, generation_prompt=True)))

    def reply_ids(self, conversation: list[Message], replies: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids as of `prompt_ids`, and of each of the texts that may follow, as they follow.

        By itself a text may be other tokens: many tokenizers put a space before its first word.
        """
        text = self.render(conversation, generation_prompt=True)
        prompt, *wholes = (ids for ids, _ in self.encode([text, *(text + reply for reply in replies)]))
        found = [
            # Where the last token before it would grow into the reply, nothing follows the prompt as it is asked.
            whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.ids(reply)
            for reply, whole in zip(replies, wholes, strict=True)
        ]
        return self.with_bos(prompt), found

    def answer_text(self, conversation: list[Message]) -> str:
        """The last answer as the template writes it after the generation prompt, without its end token."""
        text = self.render(conversation)
        start = self.answer_spans(conversation, text)[-1].start
        places = self._places(self._fitting(conversation), None, text)
        return text[start : places[max(places)][1]]

    def render(self, conversation: list[Message], tools: Tools | None = None, generation_prompt: bool = False) -> str:
        """The conversation as the model reads it. Raises BadTurn; ChatTemplateError where there is no template."""
        return self._render(self._fitting(conversation), tools, generation_prompt)

    def _render(self, conversation: list[Message], tools: Tools | None, generation_prompt: bool = False) -> str:
        values = {
            **self.special_tokens, "messages": conversation, "tools": tools or None, "documents": None,
            "add_generation_prompt": generation_prompt, "date_string": DATE.strftime("%d %b %Y"),
        }  # fmt: skip
        try:
            return render(self._template(tools), values)
        except RenderError as error:
            raise BadTurn(f"the chat template refuses it: {error}") from error

    def _template(self, tools: Tools | None) -> str:
        template = self.chat_template
        if isinstance(template, Mapping):
            template = (template.get("tool_use") if tools else None) or template.get("default")
        if not template:
            raise ChatTemplateError(
                "this base model has no chat template",
                f"Take its instruct version, or say which: `chat_template: {' | '.join(NAMED)}`, or a Jinja file.",
            )
        wrong = syntax_error(template)
        if wrong:
            raise ChatTemplateError(f"the chat template {wrong}", "Give another one with `chat_template`.")
        return template

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template shows what a system turn says."""
        says = "be kind"
        try:
            shown = self._render([{"role": "system", "content": says}, *EXAMPLE], None)
        except BadTurn:
            return False
        return says in shown

    def _fitting(self, conversation: list[Message]) -> list[Message]:
        """Where the template has no system turn, what it says goes before the first user turn."""
        if not conversation or conversation[0]["role"] != "system" or self.takes_system:
            return conversation
        system, *turns = conversation
        if not turns or turns[0]["role"] != "user":
            return conversation
        first = {**turns[0], "content": f"{system['content']}\n\n{turns[0]['content']}"}
        return [first, *turns[1:]]

    @cached_property
    def turn_end(self) -> str | None:
        """The special token, or tokens, that end the last answer; None where the template writes none."""
        return self._after(EXAMPLE, rf"\s*((?:{self._special.pattern})+)")

    @cached_property
    def _turn_ends(self) -> tuple[str, ...]:
        """What ends the last answer, and what ends an earlier one where that is another token."""
        if self.turn_end is None:
            return ()  # what follows an earlier answer then begins the next turn
        earlier = self._after([*EXAMPLE, *EXAMPLE], rf"\s*({self._special.pattern})")
        return (self.turn_end, earlier) if earlier else (self.turn_end,)

    def _after(self, conversation: list[Message], pattern: str) -> str | None:
        """What of `pattern` follows the first answer."""
        try:
            text = self._render(conversation, None)
            found = re.compile(pattern).match(text, self._places(conversation, None, text)[1][1])
        except BadTurn:
            return None
        return found[1] if found else None

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def answer_spans(self, conversation: list[Message], text: str, tools: Tools | None = None) -> list[Span]:
        """The answers in `text`, which is the conversation rendered. Raises BadTurn where one cannot be found."""
        conversation = self._fitting(conversation)
        if "tool" not in self._template(tools) and (tools or any(_is_tool(message) for message in conversation)):
            raise BadTurn("the chat template knows no tools")
        places = self._places(conversation, tools, text)
        spans: list[Span] = []
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant" or not (turn in places or message.get("tool_calls")):
                continue
            begun = spans[-1].end if spans else 0
            start = self._answer_start(conversation[:turn], tools, text, begun, places.get(turn))
            words_end = places[turn][1] if turn in places else start
            if message.get("tool_calls"):
                until = min((place[0] for other, place in places.items() if other > turn), default=len(text))
                spans.append(self._call(text, start, _shown(message, text, words_end, until), until))
            else:
                spans.append(self._ended(text, start, words_end, last=turn == len(conversation) - 1))
        return spans

    def _places(self, conversation: list[Message], tools: Tools | None, text: str) -> dict[int, tuple[int, int]]:
        """From where to where in `text` the words of each turn of the assistant, and of a tool, are."""
        turns = [t for t, m in enumerate(conversation) if m["role"] in ("assistant", "tool") and _visible(m)]
        marked = self._render([_marked(m) if t in turns else m for t, m in enumerate(conversation)], tools)
        plain, *pieces = marked.split(BEGINS)
        places: list[tuple[int, int]] = []
        for piece in pieces:
            words, _, rest = piece.partition(ENDS)
            places.append((len(plain), len(plain) + len(words)))
            plain += words + rest
        if plain != text or len(places) != len(turns):
            raise BadTurn("the chat template does not show an answer as it is written")
        return dict(zip(turns, places, strict=True))

    def _answer_start(
        self, before: list[Message], tools: Tools | None, text: str, begun: int, place: tuple[int, int] | None
    ) -> int:
        """Where the generation prompt ends; `place`: of the answer's words, None where it has none."""
        prefix = self._prompt(before, tools)
        if prefix and text.startswith(prefix) and (place is None or len(prefix) <= place[0]):
            return len(prefix)
        # Some templates write earlier turns differently once later ones follow. What stands between the words before
        # and the answer is the same, but for an opened thought at its end.
        marked = self._prompt([*before[:-1], _marked(before[-1])], tools) if prefix else ""
        header = marked.rpartition(ENDS)[2] if marked.replace(BEGINS, "").replace(ENDS, "") == prefix else ""
        shortest = max((token.end() for token in self._special.finditer(header)), default=len(header) or 1)
        for length in range(len(header), shortest - 1, -1):
            part = header[:length]
            found = text.rfind(part, begun, place[0]) if place else text.find(part, begun)
            if found >= 0:
                return found + length
        if place is None:
            raise BadTurn("the chat template does not show a tool call")
        return place[0]

    def _prompt(self, before: list[Message], tools: Tools | None) -> str:
        """The text before an answer, "" where it cannot be had."""
        try:
            return self._render(before, tools, generation_prompt=True) if before else ""
        except BadTurn:
            return ""

    def _ended(self, text: str, start: int, words_end: int, last: bool) -> Span:
        """An answer in words, with what ends it."""
        after = _BLANK.match(text, words_end).end()  # type: ignore[union-attr]
        for end in self._turn_ends:
            if text.startswith(end, after):
                return Span(start, after + len(end))
        return Span(start, words_end, append_eos=last)

    def _call(self, text: str, start: int, shown: int, until: int) -> Span:
        """An answer that calls tools, in whatever notation the template has: up to its end, or to a special token that
        hands over to the tool."""
        ends = [found + len(end) for end in self._turn_ends if (found := text.find(end, shown, until)) >= 0]
        handed_over = self._special.search(text, shown, until)
        if not ends and not handed_over:
            raise BadTurn("the chat template does not end a tool call")
        return Span(start, min(ends) if ends else handed_over.end() if handed_over else shown)


EXAMPLE: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def _shown(message: Message, text: str, begin: int, until: int) -> int:
    """Where the names and arguments of a turn's calls end. Raises BadTurn where a name is not there."""
    end = begin
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        found = text.find(name, begin, until)
        if found < 0:
            raise BadTurn("the chat template does not show a tool call")
        end = max(end, found + len(name))
        for value in map(str, arguments.values() if isinstance(arguments, Mapping) else [arguments]):
            end = max(end, text.find(value, begin, until) + len(value) if value in text[begin:until] else end)
    return end


def _is_tool(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _visible(message: Message) -> str:
    """An answer without the thoughts before it."""
    return str(message["content"]).rpartition(THOUGHT)[2].strip()


def _marked(message: Message) -> Message:
    """With marks around its words; without words, itself."""
    content, words = str(message["content"]), _visible(message)
    at = content.rindex(words)
    return (
        {**message, "content": f"{content[:at]}{BEGINS}{words}{ENDS}{content[at + len(words) :]}"} if words else message
    )
