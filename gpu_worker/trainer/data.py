"""What tokens and labels need of a tokenizer of transformers; how they are made is in jobqueue.chat and .tokens."""

from __future__ import annotations

from typing import Any

from jobqueue.chat import Chat
from jobqueue.templates import NAMED


def chat_of(tokenizer: Any, chat_template: str | None = None) -> Chat:
    """The tokenizer with its chat template, or with another one (a name or Jinja), which it then keeps."""
    if chat_template:
        tokenizer.chat_template = NAMED.get(chat_template, chat_template)
    bos = tokenizer.bos_token_id
    return Chat(
        backend=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template,
        special_tokens={
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        },
        adds_bos=bos is not None and tokenizer("x")["input_ids"][:1] == [bos],
    )


def end_ids(chat: Chat, model: Any) -> list[int]:
    """Tokens at which an answer ends: the model's own, the tokenizer's, and the one of the chat template."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = list(own) if isinstance(own, (list, tuple)) else [own]
    template = chat.ids(chat.turn_end)[:1] if chat.turn_end else []
    return sorted({i for i in (*ids, chat.eos_id, *template) if i is not None})
