"""A tokenizer from its files is the one that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, TALK, chat

from jobqueue import tokenizer_files
from jobqueue.errors import MachineError, NotFoundError, StorageError
from jobqueue.example import Example
from jobqueue.tokens import tokenise


@pytest.mark.parametrize("where", ["file", "config", "list"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_tokens_that_the_worker_has(name: str, where: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], chat(FAMILIES[name])
    model.backend.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": {"content": family.eos}, "unk_token": None}
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(family.template)
    else:
        named = [{"name": "default", "template": family.template}, {"name": "rag", "template": "x"}]
        config["chat_template"] = family.template if where == "config" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": family.bos} if family.bos else {}))

    found = tokenizer_files.chat_of(str(tmp_path))

    assert found.adds_bos == family.adds_bos
    assert tokenise(found, [Example(TALK)], 2048) == tokenise(model, [Example(TALK)], 2048)


def test_a_folder_without_a_tokenizer_is_named() -> None:
    with pytest.raises(NotFoundError, match=r"/nowhere has no tokenizer\.json"):
        tokenizer_files.chat_of("/nowhere")


def test_the_hub_is_asked_only_for_what_its_cache_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """unsloth#2393, #6817: fails offline though the model is in the cache."""
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    model = chat(FAMILIES["chatml"])
    model.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    cached = {name: str(tmp_path / name) for name in ("tokenizer.json", "tokenizer_config.json")}
    absent = object()  # what the cache says of files that the model does not have
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda _, name: cached.get(name, absent))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    assert tokenizer_files.chat_of("org/model").chat_template is None

    def failing(error: Exception) -> Any:
        def download(*_: object) -> str:
            raise error

        return download

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("jobqueue.base_model.hub_answers", lambda: False)
    with pytest.raises(StorageError, match="the hub does not answer"):  # and its library was not left to try for 23 s
        tokenizer_files.chat_of("org/model")
    monkeypatch.setattr("jobqueue.base_model.hub_answers", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", failing(errors.LocalEntryNotFoundError("no connection")))
    with pytest.raises(StorageError, match="the hub does not answer"):
        tokenizer_files.chat_of("org/model")
    response = pytest.importorskip("httpx").Response(
        401, request=pytest.importorskip("httpx").Request("GET", "http://h")
    )
    for kind, expected in ((errors.GatedRepoError, MachineError), (errors.RepositoryNotFoundError, NotFoundError)):
        monkeypatch.setattr(hub, "hf_hub_download", failing(kind("no", response=response)))
        with pytest.raises(expected):
            tokenizer_files.chat_of("org/model")
