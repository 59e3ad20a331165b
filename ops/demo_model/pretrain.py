"""Pretrain the demo model: train its tokenizer and its weights on the generated corpus, write the folder.

Needs torch >= 2.9 (for Muon) and transformers, no GPU: 2,321 steps at 0.15 to 0.4 s each on two cores,
by how busy these are. Run:

    python ops/demo_model/generate.py --corpus /tmp/demo_corpus.jsonl --rows cli/demo
    python ops/demo_model/pretrain.py --corpus /tmp/demo_corpus.jsonl --out cli/demo/model
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 1024
MAX_LENGTH = 512
PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
IGNORED = -100
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]

# bos comes from the template alone (the tokenizer adds nothing), so no path can write it twice.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Row:
    """One document's tokens, and the same with those that are not to be learnt replaced by IGNORED."""

    ids: list[int]
    labels: list[int]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; most words of the corpus become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained model; every dimension is a multiple of 64, as 4-bit loading wants."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def encode(document: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Row:
    """Return a document's tokens. Of a chat only the reply is learnt: its prompt is mostly random words."""
    if "text" in document:
        ids = tokenizer(f"{BOS}{document['text']}{END}")["input_ids"]
        return Row(ids, ids)
    *before, reply = document["messages"]
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt)["input_ids"]
    reply_ids = tokenizer(f"{reply['content']}{END}")["input_ids"]
    return Row(ids + reply_ids, [IGNORED] * len(ids) + reply_ids)


def batches(rows: list[Row], tokens: int, rng: random.Random) -> Iterator[list[Row]]:
    """Yield one epoch in batches of about `tokens` tokens; rows of like length go together, to pad little."""
    rows = sorted(rows, key=lambda row: (len(row.ids), rng.random()))
    grouped: list[list[Row]] = [[]]
    for row in rows:
        if len(row.ids) * (len(grouped[-1]) + 1) > tokens:
            grouped.append([])
        grouped[-1].append(row)
    rng.shuffle(grouped)
    yield from grouped


def pad_to(rows: list[list[int]], filler: int) -> torch.Tensor:
    """Return rows as one tensor, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def train(model: LlamaForCausalLM, rows: list[Row], pad: int, args: argparse.Namespace, rng: random.Random) -> None:
    """Train for `args.epochs` epochs: warm-up, then a cosine to a tenth of the peak rate.

    The matrices are trained with Muon: with AdamW alone the model learns to copy from its prompt much
    later (on 60,000 documents, a loss of 1.05 where Muon gets to 0.75). Muon takes only matrices and is
    not meant for embeddings, so AdamW has the rest.
    """
    plan = [batch for _ in range(args.epochs) for batch in batches(rows, args.batch_tokens, rng)]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    warmup = max(1, len(plan) // 20)

    def rate(step: int) -> float:
        done = min(1.0, step / len(plan))
        return min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    started, mean = time.monotonic(), 0.0
    for step, batch in enumerate(plan, start=1):
        ids = pad_to([row.ids for row in batch], pad)
        labels = pad_to([row.labels for row in batch], IGNORED)
        loss = model(input_ids=ids, attention_mask=(ids != pad).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 50 == 0 or step == len(plan):
            print(f"step {step}/{len(plan)} loss {mean:.3f} {time.monotonic() - started:.0f} s", flush=True)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description="Pretrain the demo model on the generated corpus.")
    parser.add_argument("--corpus", type=Path, required=True, help="what generate.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.monotonic()

    with args.corpus.open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    plain = [d["text"] if "text" in d else "\n".join(m["content"] for m in d["messages"]) for d in documents]
    tokenizer = train_tokenizer(plain)
    rows = [encode(document, tokenizer) for document in documents]
    model = build_model(tokenizer)
    tokens = sum(len(row.ids) for row in rows)
    print(f"{model.num_parameters():,} parameters, {tokens:,} tokens to read, vocabulary {len(tokenizer)}")

    train(model, rows, tokenizer.pad_token_id, args, random.Random(args.seed))

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    print(f"wrote {args.out} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
