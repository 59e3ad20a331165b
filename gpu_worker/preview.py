"""The preview task: what a training would read, for a machine that cannot see it; runs on a control worker."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_worker.confine import check_source
from gpu_worker.patience import Patience
from jobqueue import tokenizer_files
from jobqueue.chat import Chat
from jobqueue.data_spec import DataSpec
from jobqueue.errors import ChatTemplateError, LoraqError
from jobqueue.job import Claim
from jobqueue.preview import preview
from jobqueue.previewing import PreviewSpec
from jobqueue.settings import Settings
from jobqueue.sources import AnyData
from jobqueue.spec import RunSpec
from jobqueue.storage import Storage
from jobqueue.sweep import Sweep, Trial


def make_preview(claim: Claim, storage: Storage, settings: Settings, patience: Patience) -> dict[str, Any]:
    """The Preview as a dict. Raises LoraqError of all kinds."""
    spec = PreviewSpec.model_validate_json(json.dumps(claim.spec))
    with TemporaryDirectory(prefix="loraq-preview-") as scratch:

        def here(data: AnyData, name: str) -> AnyData:
            check_source(data.source, settings.model_roots)
            fetched = patience("read the data", lambda: storage.fetch_source(data.source, Path(scratch, name)))
            found: dict[str, Any] = {"source": str(fetched)}
            if isinstance(data, DataSpec) and data.replay is not None:
                found["replay"] = here(data.replay, "replay")
            return data.model_copy(update=found)

        run = spec.run.model_copy(
            update={
                "data": here(spec.run.data, "data") if spec.run.data else None,
                "evaluation": here(spec.run.evaluation, "evaluation") if spec.run.evaluation else None,
            }
        )
        chat = _chat(run, settings) if spec.tokens else "no base model; give one with --base-model"
        sweep = Sweep(run.name, Path(scratch, "sweep.yaml"), [Trial("", {}, run)])
        return asdict(preview(sweep, chat, spec.row, spec.data_alone))


def _chat(run: RunSpec, settings: Settings) -> Chat | str:
    """The tokenizer, or why there is none here either."""
    check_source(run.base_model, settings.model_roots)
    try:
        return tokenizer_files.chat_of(run.base_model, run.chat_template)
    except ChatTemplateError:
        raise
    except LoraqError as error:
        return f"{error.what}. {error.do}"
