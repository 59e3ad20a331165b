"""The part of the schema that says as what a trained model is written; see spec.py for the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jobqueue.data_spec import Clash, Part

ExportFormat = Literal["merged_16bit", "gguf"]
QuantizationMethod = Literal["q8_0", "bf16", "f16", "f32"]


class ExportOptions(Part):
    """As what the trained model is written, beside its adapter. The names are those of Unsloth's
    `save_pretrained_merged` and `save_pretrained_gguf`."""

    formats: Annotated[tuple[ExportFormat, ...], Field(min_length=1)] = ("merged_16bit",)
    quantization_method: QuantizationMethod | None = None
    """Of gguf: what llama.cpp's converter writes by itself; None: q8_0."""
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """What is asked to compare the exported model's answers with the adapter's; None: the first rows that were
    trained on."""

    def clashes(self) -> Iterator[Clash]:
        if self.quantization_method and "gguf" not in self.formats:
            yield "quantization_method", "is of gguf; add it: formats: [merged_16bit, gguf]"

    @property
    def outtype(self) -> QuantizationMethod:
        """What the numbers in a GGUF file are."""
        return self.quantization_method or "q8_0"
