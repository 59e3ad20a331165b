"""Several adapters as one, by PEFT's weighted merges."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from gpu_worker.trainer.failures import bad_spec, one_line
from jobqueue.ensemble_spec import Members

NAME = "merged"  # of the adapter, as long as it is loaded beside those that it is made of
SEED = 3407  # dare draws which weights it drops


@dataclass(frozen=True)
class Merged:
    """An adapter that is yet to be made, of those in `folders`, and kept in the folder `into`."""

    members: Members
    folders: Sequence[str]
    into: Path

    def on(self, model: Any) -> Any:
        """The base model with it, and only it, at work. Raises JobFailure where PEFT cannot merge such adapters.

        Weights of LoRA alone are merged, whatever the base model's precision.
        """
        names = [f"member{number}" for number in range(len(self.folders))]
        merged: Any = PeftModel.from_pretrained(model, self.folders[0], adapter_name=names[0])
        for folder, name in zip(self.folders[1:], names[1:], strict=True):
            merged.load_adapter(folder, adapter_name=name)
        # The new adapter has the first one's config, and its weights the scale of all: with rslora they would be
        # scaled once more, by sqrt(r).
        merged.peft_config[names[0]].use_rslora = False
        torch.manual_seed(SEED)
        try:
            merged.base_model.add_weighted_adapter(
                names,
                list(self.members.weights or [1 / len(names)] * len(names)),
                NAME,
                combination_type=self.members.method,
                density=self.members.density,
                svd_full_matrices=False,
            )
        except ValueError as error:
            raise bad_spec(one_line(f"{self.members.name}: these adapters cannot be merged: {error}")) from error
        merged.set_adapter(NAME)
        for name in names:
            merged.delete_adapter(name)
        self._save(merged)
        return merged

    def _save(self, merged: Any) -> None:
        """In a folder as any adapter's: with the tokenizer that its members have."""
        shutil.copytree(self.folders[0], self.into)
        merged.save_pretrained(str(self.into), selected_adapters=[NAME])
        for file in (self.into / NAME).iterdir():  # where PEFT puts all but the adapter called default
            file.replace(self.into / file.name)
        (self.into / NAME).rmdir()
