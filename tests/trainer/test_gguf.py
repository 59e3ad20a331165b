"""A GGUF file becomes a folder that is the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from trainer_child import DEMO
from transformers import AutoTokenizer

from gpu_worker.trainer import gguf
from gpu_worker.trainer.failures import JobFailure

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_demo(path: Path, pre: str) -> dict[str, Any]:
    """The demo model as a GGUF file in 32 bits, as llama.cpp lays it out; returns its config."""
    library = pytest.importorskip("gguf")
    config = json.loads((DEMO / "model" / "config.json").read_text())
    raw = json.loads((DEMO / "model" / "tokenizer.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    weights = load_file(DEMO / "model" / "model.safetensors")

    writer = library.GGUFWriter(path, "llama")
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
    special = set(tokenizer.added_tokens_decoder)
    writer.add_token_types([3 if number in special else 1 for number in range(size)])
    writer.add_token_merges([" ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in weights.items():
        values = weight.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs the rotary dimensions otherwise
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        short = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if short is None:
            _, _, layer, *part, _ = name.split(".")
            short = f"blk.{layer}.{NAMES['.'.join(part)]}.weight"
        writer.add_tensor(short, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(config)


def test_weights_config_tokens_and_template_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gguf.CACHE_DIR, str(tmp_path / "cache"))
    config = write_demo(tmp_path / "demo.gguf", "gpt-2")
    folder = gguf.folder_of(tmp_path / "demo.gguf")

    original, converted = load_file(DEMO / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert original.keys() == converted.keys()
    assert all(original[name].equal(converted[name]) for name in original)
    written = json.loads((folder / "config.json").read_text())
    same = ("rms_norm_eps", "vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings")
    assert {key: written[key] for key in same} == {key: config[key] for key in same}
    assert "quantization_config" not in written

    before, after = AutoTokenizer.from_pretrained(DEMO / "model"), AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "Is 1024 a number, or trout?"}, {"role": "assistant", "content": "Yes."}]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for tokenizer in (before, after)]
    assert texts[0] == texts[1]
    ids = [tokenizer(texts[0], add_special_tokens=False)["input_ids"] for tokenizer in (before, after)]
    assert ids[0] == ids[1]
    assert (after.eos_token, after.pad_token, after.bos_token) == (before.eos_token, before.pad_token, before.bos_token)

    # A second time it comes from the cache, under any name.
    (tmp_path / "demo.gguf").rename(tmp_path / "other.gguf")
    monkeypatch.setattr(gguf.subprocess, "run", None)
    assert gguf.folder_of(tmp_path / "other.gguf") == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_broken_file_is_refused_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gguf.CACHE_DIR, str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    assert gguf.is_gguf(tmp_path / "broken.gguf")
    with pytest.raises(JobFailure, match="cannot be read as a GGUF model") as error:
        gguf.folder_of(tmp_path / "broken.gguf")
    assert error.value.reason == "bad_spec"
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
