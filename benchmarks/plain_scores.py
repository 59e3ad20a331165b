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

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 64


def main(model_dir: str, data: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device).eval()
    with (gzip.open if data.endswith(".gz") else open)(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    items = []
    for number, row in enumerate(rows):
        options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
        content = f"{row['question']}\n\nOptions:\n{options}\n\nPlease choose the correct answer."
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for letter, text in row["options"].items():
            reply = tokenizer(f"The correct answer is {text}.", add_special_tokens=False)["input_ids"]
            items.append((number, letter, prompt_ids, reply))
    items.sort(key=lambda item: len(item[2]) + len(item[3]))
    started = time.perf_counter()
    scores: list[dict[str, float]] = [{} for _ in rows]
    with torch.inference_mode():
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            width = max(len(prompt) + len(reply) for _, _, prompt, reply in batch)
            ids = torch.zeros(
                (len(batch), width), dtype=torch.long
            )  # padding is on the right and masked: any token does
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for place, (_, _, prompt, reply) in enumerate(batch):
                ids[place, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
                mask[place, : len(prompt) + len(reply)] = 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits  # (rows, width, vocab)
            for place, (number, letter, prompt, reply) in enumerate(batch):
                end = len(prompt) + len(reply) - 1
                logprobs = logits[place, len(prompt) - 1 : end].float().log_softmax(-1)
                chosen = logprobs.gather(1, torch.tensor(reply, device=device)[:, None])
                scores[number][letter] = chosen.sum().item()
    picks = [max(options, key=lambda letter: options[letter]) for options in scores]
    right = sum(pick == row["answer_idx"] for pick, row in zip(picks, rows, strict=True))
    seconds = round(time.perf_counter() - started, 1)
    Path(out).write_text(json.dumps({"picks": picks, "accuracy": right / len(rows), "seconds": seconds}))
    print(f"plain scores: {right} of {len(rows)} right, {seconds} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
