"""Writes the demo model, or one trained from it, as a GGUF file: what llama.cpp's convert_hf_to_gguf.py does, for its
one architecture and a tokenizer that the script does not know.

    python gguf_converter.py FOLDER --outfile FILE --outtype f32|f16|bf16|q8_0
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
from tokenizers import Tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(folder: Path, path: Path, outtype: str = "f32", pre: str = "gpt-2", *, permutes: bool = True) -> None:
    """The model in `folder` as llama.cpp lays it out; `permutes`: its pairing of the rotary dimensions."""
    config = json.loads((folder / "config.json").read_text())
    raw = json.loads((folder / "tokenizer.json").read_text())
    named = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    size = config["vocab_size"]
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    writer.add_token_list([tokens.get(number, f"[unused{number}]") for number in range(size)])
    special = set(tokenizer.get_added_tokens_decoder())
    writer.add_token_types([3 if number in special else 1 for number in range(size)])
    merges = raw["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.token_to_id(named["bos_token"]))
    writer.add_eos_token_id(tokenizer.token_to_id(named["eos_token"]))
    writer.add_pad_token_id(tokenizer.token_to_id(named["pad_token"]))
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, values in weights(folder / "model.safetensors").items():
        if permutes and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        short = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if short is None:
            _, _, layer, *part, _ = name.split(".")
            short = f"blk.{layer}.{NAMES['.'.join(part)]}.weight"
        add(writer, short, np.ascontiguousarray(values), outtype if values.ndim > 1 else "f32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights(file: Path) -> dict[str, Any]:
    """In 32 bits; without torch, whose import would take ten times as long as everything else here."""
    found = {}
    for name, tensor in sorted(safetensors.deserialize(file.read_bytes())):
        if tensor["dtype"] == "BF16":  # the upper half of a 32-bit number
            numbers = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            numbers = np.frombuffer(tensor["data"], {"F16": np.float16, "F32": np.float32}[tensor["dtype"]])
        found[name] = numbers.astype(np.float32).reshape(tensor["shape"])
    return found


def add(writer: Any, name: str, values: Any, outtype: str) -> None:
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    numbers = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, numbers, raw_dtype=None if outtype in ("f32", "f16") else kind)


def main(*, permutes: bool = True) -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--outfile", type=Path)
    arguments.add_argument("--outtype")
    asked = arguments.parse_args()
    print(f"writing {asked.outfile.name}", file=sys.stderr)
    write(asked.folder, asked.outfile, asked.outtype, permutes=permutes)


if __name__ == "__main__":
    main()
