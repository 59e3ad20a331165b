"""A hub that does not answer is asked once in a job, not once for each file and try."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import constants

from jobqueue import base_model

log = logging.getLogger("loraq.trainer")


@contextmanager
def asked_once(model: str) -> Iterator[None]:
    """Within the block of a job on that base model: where the hub is silent, what its cache has must do.

    The libraries would try for 23 s for each file, also for those that are there.
    """
    if base_model.is_path(model) or constants.is_offline_mode() or base_model.hub_answers():
        yield
        return
    log.warning("the hub does not answer: taking what its cache has")
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
