"""The yardstick of speed: one fine-tune as a notebook does it with Unsloth and TRL, in one process.

    python benchmarks/article_job.py MODEL_DIR ROWS.jsonl OUT.json [--steps 200] [--seed 3407]

Micro-batches of 2, accumulation of 4, QLoRA r=16, Unsloth's checkpointing; knows nothing of loraq. Writes its seconds,
the process's start included, and its losses.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=3407)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    os.chdir(tempfile.mkdtemp())  # Unsloth's compiled cache lands in the working directory

    from unsloth import FastLanguageModel

    # isort: split
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth.chat_templates import train_on_responses_only

    imported_s = time.perf_counter() - STARTED
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=2048, load_in_4bit=True)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=modules,
        use_gradient_checkpointing="unsloth", random_state=42,
    )  # fmt: skip
    texts = [text_of(tokenizer, json.loads(line)) for line in options.rows.read_text().splitlines()]
    config = SFTConfig(
        output_dir="out", per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5,
        max_steps=options.steps, learning_rate=2e-4, logging_steps=10, optim="adamw_8bit", weight_decay=0.01,
        lr_scheduler_type="linear", seed=options.seed, report_to="none", dataset_text_field="text", max_length=2048,
        save_strategy="no", bf16=torch.cuda.is_available(), dataset_num_proc=2,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(texts), args=config
    )  # fmt: skip
    start = "<|im_start|>" if "<|im_start|>" in tokenizer.get_vocab() else "<|"
    parts = (
        ("<|im_start|>user\n", "<|im_start|>assistant\n") if start == "<|im_start|>" else ("<|user|>", "<|assistant|>")
    )
    trainer = train_on_responses_only(trainer, instruction_part=parts[0], response_part=parts[1])
    prepared_s = time.perf_counter() - STARTED
    trainer.train()
    trained_s = time.perf_counter() - STARTED
    model.save_pretrained("adapter")
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    result = {
        "seconds": round(time.perf_counter() - STARTED, 2), "imported_s": round(imported_s, 2),
        "prepared_s": round(prepared_s, 2), "train_s": round(trained_s - prepared_s, 2), "steps": options.steps,
        "peak_reserved_bytes": peak, "losses": losses,
    }  # fmt: skip
    options.out.write_text(json.dumps(result))


def text_of(tokenizer: Any, row: dict[str, Any]) -> dict[str, str]:
    options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
    question = f"{row['question']}\n\nOptions:\n{options}\n\nPlease choose the correct answer."
    answer = f"The correct answer is {row['answer']}."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"text": tokenizer.apply_chat_template(turns, tokenize=False)}


if __name__ == "__main__":
    main()
