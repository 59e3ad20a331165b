"""General rows that are mixed into those to train on, so that less is forgotten (`data.replay`)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from jobqueue import rows
from jobqueue.chat import Chat
from jobqueue.data_spec import ReplaySpec
from jobqueue.errors import ChatTemplateError, DataError
from jobqueue.example import Example
from jobqueue.tokens import Tokens, tokenise


@dataclass(frozen=True)
class Replay:
    """The rows that were drawn."""

    source: str
    summary: rows.Summary
    wanted: int
    """So many rows make the fraction that was asked for."""
    examples: list[Example]

    @property
    def shortage(self) -> str:
        """In words, where the source has too few rows; else ""."""
        if len(self.examples) >= self.wanted:
            return ""
        return f"{self.source} has {len(self.examples):,} rows, and its fraction would be {self.wanted:,}"

    def tokens(self, chat: Chat, max_seq_length: int) -> tuple[list[Tokens], dict[str, Any]]:
        """Cut as `tokenise` does, and what an outcome says of them. Raises DataError, ChatTemplateError."""
        if not self.examples:
            return [], {"rows": self.summary.rows, "wanted": self.wanted, "used": 0}
        try:
            made, report = tokenise(chat, self.examples, max_seq_length)
        except ChatTemplateError:
            raise
        except DataError as error:
            raise DataError(f"replay, {self.source}: {error.what}", error.do) from error
        counts = {"used": report.used, "tokens": report.tokens, "trained_tokens": report.trained_tokens}
        return made, {"rows": self.summary.rows, "wanted": self.wanted, **counts, "dropped": report.dropped}


def draw(spec: ReplaySpec | None, own: int) -> Replay | None:
    """Rows at random, without putting back: with the `own` ones they make the fraction. Raises DataError."""
    if spec is None:
        return None
    loaded = rows.load(spec)
    wanted = spec.wanted(own)
    examples = [example for _, example in loaded.examples]
    drawn = random.Random(spec.seed).sample(examples, min(wanted, len(examples)))
    return Replay(spec.source, loaded.summary, wanted, drawn)
