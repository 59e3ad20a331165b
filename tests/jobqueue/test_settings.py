"""Settings that need more than a number."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jobqueue.settings import Settings


@pytest.mark.parametrize(
    ("text", "price"), [("", None), ("2.5", 2.5), ("0", 0.0), ('{"H100": 2.5, "T4": 0.35}', {"H100": 2.5, "T4": 0.35})]
)
def test_price_of_a_gpu_hour(monkeypatch: pytest.MonkeyPatch, text: str, price: Any) -> None:
    monkeypatch.setenv("LORAQ_GPU_HOUR_PRICE", text)

    assert Settings().gpu_hour_price == price


@pytest.mark.parametrize("text", ["-1", "cheap", '{"H100": "?"}'])
def test_price_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LORAQ_GPU_HOUR_PRICE", text)

    with pytest.raises(ValidationError, match="gpu_hour_price"):
        Settings()
