"""A model's tokenizer and chat template, from its files alone: what a laptop without transformers can have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jobqueue import base_model
from jobqueue.chat import Chat
from jobqueue.errors import MachineError, NotFoundError, StorageError
from jobqueue.templates import NAMED

TOKENIZER = "tokenizer.json"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
Find = Callable[[str], Path | None]  # a file's name -> where it is, None where the model has none


def chat_of(located: str, chat_template: str | None = None) -> Chat:
    """The tokenizer of a base model as `base_model.locate` gives it, with its chat template or another one.

    Raises MachineError where a package is missing, NotFoundError where the model or its tokenizer.json is,
    StorageError where the hub does not answer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MachineError(
            "tokens need the package tokenizers, which is not installed here", "Run `pip install 'loraq[data]'`."
        ) from None
    find = _in_folder(Path(located)) if base_model.is_path(located) else _on_hub(located)
    file = find(TOKENIZER)
    if file is None:
        raise NotFoundError(
            f"{located} has no {TOKENIZER} that this machine can read",
            "Give a model whose tokenizer it has with --base-model, e.g. the instruct version that a GGUF file is of.",
        )
    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    config = _json(find("tokenizer_config.json"))
    special = {name: token for name in SPECIAL if (token := _token(config.get(name)))}
    for name, value in _json(find("special_tokens_map.json")).items():
        if name in SPECIAL and (token := _token(value)):
            special.setdefault(name, token)
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
    template = NAMED.get(chat_template, chat_template) if chat_template else _template(config, find)
    return Chat(backend, template, special, bos is not None and backend.encode("x").ids[:1] == [bos])


def _template(config: Mapping[str, Any], find: Find) -> str | Mapping[str, str] | None:
    """A file of its own goes before the entry in the config, as in transformers."""
    file = find("chat_template.jinja")
    if file is not None:
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or _json(find("chat_template.json")).get("chat_template")
    if isinstance(template, list):
        return {str(one["name"]): str(one["template"]) for one in template}
    return template if isinstance(template, str) else None


def _token(value: object) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _json(file: Path | None) -> Mapping[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file else {}
    return content if isinstance(content, dict) else {}


def _in_folder(folder: Path) -> Find:
    return lambda name: folder / name if (folder / name).is_file() else None


def _on_hub(repository: str) -> Find:
    """From the hub's cache, else from the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # tokenizers brings it
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    silent = cache(lambda: not base_model.hub_answers())  # its library would try for 23 s, for each file
    do = "Try again once it does, or give a model of this machine with --base-model."

    def find(name: str) -> Path | None:
        known = try_to_load_from_cache(repository, name)
        if known is not None:
            return Path(known) if isinstance(known, str) else None  # else: known not to be there
        what = f"{repository}: the hub does not answer, and {name} is not in its cache"
        if silent():
            raise StorageError(what, do)
        try:
            return Path(hf_hub_download(repository, name))
        except GatedRepoError as error:
            raise MachineError(
                f"{repository} is gated", "Accept its terms on the hub, then set HF_TOKEN or run `hf auth login`."
            ) from error
        except RepositoryNotFoundError as error:
            raise NotFoundError(f"the hub has no model {repository}", "Correct base_model.") from error
        except OSError as error:
            raise StorageError(what, do) from error
        except EntryNotFoundError:
            return None

    return find
