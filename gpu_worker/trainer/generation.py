"""A base model's own settings for generating text, as its makers published them."""

from __future__ import annotations

import logging
import re
from typing import Any

from transformers import GenerationConfig

log = logging.getLogger("loraq.trainer")


def make_savable(model: Any) -> None:
    """Take out settings without effect: transformers reads them, but refuses to save a model that has them."""
    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError as error:
        defaults = GenerationConfig()
        names = [name for name in re.findall(r"- `(\w+)`:", str(error)) if hasattr(defaults, name)]
        for name in names:
            setattr(settings, name, getattr(defaults, name))
        log.info("generation_config.json: left out, as without effect: %s", ", ".join(names))
