"""A GGUF file becomes a folder that is the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_converter import write
from safetensors.torch import load_file
from trainer_child import DEMO
from transformers import AutoTokenizer

from gpu_worker.trainer import gguf
from gpu_worker.trainer.failures import JobFailure


def test_weights_config_tokens_and_template_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gguf.CACHE_DIR, str(tmp_path / "cache"))
    config = json.loads((DEMO / "model" / "config.json").read_text())
    write(DEMO / "model", tmp_path / "demo.gguf")
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
    monkeypatch.setattr(gguf, "read", None)
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
