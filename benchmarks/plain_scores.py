"""The yardstick of likelihood accuracy: stock transformers, each option with its whole prompt, in padded batches.

    python benchmarks/plain_scores.py MODEL_DIR TEST.jsonl OUT.json

Writes {"picks": [letter per question], "accuracy": ..., "seconds": ...}. Knows nothing of loraq, so that its picks
can be held against loraq's.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 64


def read(data: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, .gz or not."""
    with (gzip.open if str(data).endswith(".gz") else open)(data, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompt_of(tokenizer: Any, row: dict[str, Any]) -> str:
    """A question as the model reads it."""
    options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
    content = f"{row['question']}\n\nOptions:\n{options}\n\nPlease choose the correct answer."
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    )


def reply_of(text: str) -> str:
    """What the assistant says who holds the option to be right."""
    return f"The correct answer is {text}."


def score(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[list[dict[str, float]], float]:
    """Each question's log-probabilities by letter, and the seconds that the model took for them."""
    items = []
    for number, row in enumerate(rows):
        prompt = tokenizer(prompt_of(tokenizer, row), add_special_tokens=False)["input_ids"]
        for letter, text in row["options"].items():
            reply = tokenizer(reply_of(text), add_special_tokens=False)["input_ids"]
            items.append((number, letter, prompt, reply))
    items.sort(key=lambda item: len(item[2]) + len(item[3]))
    started = time.perf_counter()
    scores: list[dict[str, float]] = [{} for _ in rows]
    with torch.inference_mode():
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            width = max(len(prompt) + len(reply) for _, _, prompt, reply in batch)
            shape = (len(batch), width)
            ids = torch.zeros(shape, dtype=torch.long)  # padding is on the right and masked: any token does
            mask = torch.zeros(shape, dtype=torch.long)
            for place, (_, _, prompt, reply) in enumerate(batch):
                ids[place, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
                mask[place, : len(prompt) + len(reply)] = 1
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            for place, (number, letter, prompt, reply) in enumerate(batch):
                end = len(prompt) + len(reply) - 1
                logprobs = logits[place, len(prompt) - 1 : end].float().log_softmax(-1)
                chosen = logprobs.gather(1, torch.tensor(reply, device=model.device)[:, None])
                scores[number][letter] = chosen.sum().item()
    return scores, time.perf_counter() - started


def main(model_dir: str, data: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device).eval()
    rows = read(data)
    scores, seconds = score(model, tokenizer, rows)
    picks = [max(options, key=options.__getitem__) for options in scores]
    right = sum(pick == row["answer_idx"] for pick, row in zip(picks, rows, strict=True))
    found = {"picks": picks, "accuracy": right / len(rows), "seconds": round(seconds, 1)}
    Path(out).write_text(json.dumps(found))
    print(f"plain scores: {right} of {len(rows)} right, {seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
