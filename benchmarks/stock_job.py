"""The yardstick of losses: one QLoRA fine-tune by stock TRL, PEFT and bitsandbytes, in one process.

    python benchmarks/stock_job.py MODEL_DIR ROWS START_DIR OUT.json [--steps 60] [--limit 512]

Trains on the tokens and labels that loraq makes of the rows, in batches of 8, and writes its losses, seconds and peak
memory. The adapter as it was before the first step goes to START_DIR, so that another training can begin with it.

What the layers hand on is in bf16, as TRL leaves it. With PEFT's `prepare_model_for_kbit_training` it would be in 32
bits: the first steps of an adapter, which are smaller than what bf16 tells apart, would then count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from gpu_worker.trainer.data import chat_of
from jobqueue import rows
from jobqueue.data_spec import DataSpec
from jobqueue.spec import SEVEN_MODULES
from jobqueue.tokens import tokenise

SEED = 3407
LENGTH = 2048


class OnCpu(SFTTrainer):
    """TRL's own loss is a Triton kernel, which needs a GPU."""

    compute_loss = Trainer.compute_loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("start")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=512)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantised, dtype=torch.bfloat16 if on_gpu else torch.float32,
        device_map={"": 0} if on_gpu else "cpu",
    )  # fmt: skip
    training = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, gradient_accumulation_steps=1,
        max_steps=options.steps, learning_rate=2e-4, warmup_steps=5, lr_scheduler_type="linear", weight_decay=0.01,
        optim="adamw_8bit" if on_gpu else "adamw_torch_fused", seed=SEED, data_seed=SEED, logging_steps=1,
        max_length=LENGTH, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        gradient_checkpointing=on_gpu, bf16=on_gpu, use_cpu=not on_gpu, report_to="none", save_strategy="no",
        loss_type="nll", disable_tqdm=True, include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    trainer = (SFTTrainer if on_gpu else OnCpu)(
        model=model, args=training, processing_class=tokenizer,
        train_dataset=_dataset(options.rows, options.limit, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=list(SEVEN_MODULES), task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.save_model(options.start)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.train()
    result = {
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "train_s": time.perf_counter() - began,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
    }
    options.out.write_text(json.dumps(result))
    print({key: value for key, value in result.items() if key != "losses"}, flush=True)


def _dataset(source: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The rows as loraq tokenises them."""
    spec = DataSpec(source=source, limit=limit)
    examples = [example for _, example in rows.load(spec).examples]
    tokens, _ = tokenise(chat_of(tokenizer, None), examples, LENGTH)
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in tokens],
            "labels": [row.labels for row in tokens],
            "attention_mask": [[1] * len(row.input_ids) for row in tokens],
        }
    )


if __name__ == "__main__":
    main()
