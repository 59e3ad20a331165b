"""Run a model over prompts with their replies, each prompt once: the tokens of all rows end to end, without padding.

A row is a prompt, then its replies as a tree in which what several begin with is there once. A token sees the prompt
and its own ancestors and has the position that it would have in its reply (SpecInfer's tree attention,
arXiv:2305.09781). Only attention has to know of rows: its queries, keys and values are laid out row by row, masked,
computed by the model's own attention, and its result is laid end to end again. What all prompts of a batch begin with
belongs to the first row; the others read its keys and values there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from gpu_worker.trainer.questions import Question

NAME = "loraq_shared_prompts"
ALIGNED = 8  # the attention kernels copy a mask whose rows are not a multiple of this
Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Tree:
    """The replies to a question, without their last tokens, which only are predicted.

    Node 0 is the end of the prompt; the nodes from 1 on are tokens, each after its parent.
    """

    tokens: list[int] = field(default_factory=lambda: [-1])
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    edges: dict[tuple[int, int], int] = field(default_factory=dict)
    """(node, the token that is predicted from it) -> number."""
    replies: dict[str, list[int]] = field(default_factory=dict)
    """Letter -> its edges."""

    @classmethod
    def of(cls, replies: dict[str, list[int]]) -> Tree:
        tree, children = cls(), dict[tuple[int, int], int]()
        for letter, reply in replies.items():
            node, tree.replies[letter] = 0, []
            for place, token in enumerate(reply):
                tree.replies[letter].append(tree.edges.setdefault((node, token), len(tree.edges)))
                if place == len(reply) - 1:
                    break
                if (node, token) not in children:
                    children[node, token] = len(tree.tokens)
                    tree.tokens.append(token)
                    tree.parents.append(node)
                    tree.depths.append(tree.depths[node] + 1)
                node = children[node, token]
        return tree

    def sees(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(nodes, nodes): itself and its ancestors, of each."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node in range(1, len(self.tokens)):
            seen[node] |= seen[self.parents[node]]
        return seen


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    tree: Tree
    question: Question

    def __len__(self) -> int:
        """Tokens: node 0 is the prompt's last one."""
        return len(self.prompt) - 1 + len(self.tree.tokens)


def edge_log_probabilities(model: Any, rows: list[Row]) -> torch.Tensor:
    """Those of the edges of all rows' trees, one after the other: (edges).

    Raises RuntimeError where a model does not know `logits_to_keep`.
    """
    layout = Layout.of(rows)

    def there(array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(model.device)

    with torch.inference_mode():
        mask = layout.mask(model.dtype, model.device)
        with _attention(model, there(layout.sources), there(layout.places)):
            logits = model(
                input_ids=there(layout.ids)[None],
                attention_mask=mask,
                position_ids=there(layout.positions)[None],
                use_cache=False,
                logits_to_keep=there(layout.nodes),
            ).logits
        check_shape(logits, 1, len(layout.nodes))
        counts = [len(row.tree.tokens) for row in rows]
        # Row by row: all of them in 32 bits would be twice as large as they are.
        totals = torch.cat([part.float().logsumexp(-1) for part in logits[0].split(counts)])
        node, token = there(layout.edges)
        found: torch.Tensor = logits[0, node, token].float() - totals[node]
        return found


def check_shape(logits: torch.Tensor, rows: int, kept: int) -> None:
    """Raises RuntimeError where a model does not know `logits_to_keep`."""
    if logits.shape[:2] != (rows, kept):
        raise RuntimeError(f"the model gave logits of shape {tuple(logits.shape)}, not {(rows, kept)}")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch lie. All rows end in the last column."""

    ids: Array  # (tokens), as are the next two
    positions: Array
    places: Array  # row * width + column
    sources: Array  # (rows, width): which of the tokens stands there; any where none does
    starts: Array  # (rows): first column of each
    nodes: Array  # (nodes of all trees): which token each is
    edges: Array  # (2, edges of all trees): from which of those nodes, to which token
    seen: np.ndarray[Any, np.dtype[np.bool_]]  # (rows, n, n): by what lies in the last n columns, of what does

    @classmethod
    def of(cls, rows: list[Row]) -> Layout:
        shared = _common([row.prompt[:-1] for row in rows])
        width = max(map(len, rows))
        width += -width % ALIGNED
        most = max(len(row.tree.tokens) for row in rows)
        sources = np.zeros((len(rows), width), dtype=np.int64)
        starts = np.empty(len(rows), dtype=np.int64)
        seen = np.ones((len(rows), most, most), dtype=bool)
        ids, positions, places, nodes, edges = ([] for _ in range(5))
        tokens = before = 0
        for number, row in enumerate(rows):
            skipped = shared if number else 0
            count, start = len(row.tree.tokens), width - len(row)
            own = len(row) - skipped
            starts[number] = start
            sources[number, start : start + skipped] = np.arange(skipped)
            sources[number, start + skipped :] = np.arange(tokens, tokens + own)
            ids.append(row.prompt[skipped:] + row.tree.tokens[1:])
            positions += [np.arange(skipped, len(row.prompt) - 1), np.add(row.tree.depths, len(row.prompt) - 1)]
            places.append(np.arange(start + skipped, width) + number * width)
            seen[number, -count:, -count:] = row.tree.sees()
            nodes.append(np.arange(tokens + own - count, tokens + own))
            edges.append(np.array([(before + node, token) for node, token in row.tree.edges]).T)
            tokens, before = tokens + own, before + count
        return cls(
            ids=np.concatenate(ids), positions=np.concatenate(positions), places=np.concatenate(places),
            sources=sources, starts=starts, nodes=np.concatenate(nodes), edges=np.concatenate(edges, axis=1), seen=seen,
        )  # fmt: skip

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(rows, 1, width, width): 0 where a column sees another one, else the least number."""
        column = torch.arange(self.sources.shape[1], device=device)
        starts, seen = torch.from_numpy(self.starts).to(device), torch.from_numpy(self.seen).to(device)
        sees = (column <= column[:, None]) & (column >= starts[:, None, None])
        sees[:, -seen.shape[1] :, -seen.shape[1] :] &= seen
        sees |= torch.eye(len(column), dtype=torch.bool, device=device)  # what is empty sees itself, or it would be NaN
        mask = torch.zeros(sees.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def _common(sequences: list[list[int]]) -> int:
    """How many tokens all begin with."""
    least, most = min(sequences), max(sequences)
    return next((place for place, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))


@dataclass(frozen=True)
class _Laid:
    """What attention has to know of a batch."""

    sources: torch.Tensor  # as in Layout, as is the next one
    places: torch.Tensor
    usual: str  # the model's own attention

    def by_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, heads, tokens, size) -> (rows, heads, width, size)."""
        laid = tokens[0].transpose(0, 1).index_select(0, self.sources.view(-1))
        return laid.view(*self.sources.shape, *laid.shape[1:]).transpose(1, 2)

    def end_to_end(self, laid: torch.Tensor) -> torch.Tensor:
        """(rows, width, heads, size) -> (1, tokens, heads, size)."""
        return laid.flatten(0, 1)[self.places][None]


_batch = ContextVar[_Laid]("batch")


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, None]:
    batch = _batch.get()
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    own = AttentionInterface().get_interface(batch.usual, eager)
    found, _ = own(module, batch.by_rows(query), batch.by_rows(key), batch.by_rows(value), mask, **options)
    return batch.end_to_end(found), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def _attention(model: Any, sources: torch.Tensor, places: torch.Tensor) -> Iterator[None]:
    """Within the block the model's attention computes row by row what lies end to end."""
    usual = model.config._attn_implementation
    before = _batch.set(_Laid(sources, places, usual))
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = usual
        _batch.reset(before)
