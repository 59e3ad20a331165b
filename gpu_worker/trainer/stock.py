"""transformers' own classes, for evaluations in a process in which Unsloth has trained.

To train, Unsloth replaces methods of transformers' classes for the whole process. An evaluation exchanges them for
what they were before, and puts Unsloth's back when it is done, so that the next training finds what it left.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

Names = list[tuple[Any, str, Any]]  # module or class, name in it, value
_before: dict[str, Names] = {}  # module -> its names before Unsloth


def remember(config: Any) -> None:
    """The classes of this kind of model as they are; to be called before Unsloth loads the first one."""
    module = _module(config)
    if module.__name__ in _before:
        return
    names: Names = [(module, name, value) for name, value in vars(module).items() if _counts(name, value)]
    for _, _, owner in [*names]:
        if inspect.isclass(owner) and owner.__module__ == module.__name__:
            names += [(owner, name, value) for name, value in vars(owner).items() if _counts(name, value)]
    _before[module.__name__] = names


@contextmanager
def classes(config: Any) -> Iterator[None]:
    """Within the block, models of this kind run as transformers has them."""
    before = _before.get(_module(config).__name__, [])
    wanted = [(owner, name, value) for owner, name, value in before if vars(owner).get(name) is not value]
    replaced = [(owner, name, vars(owner)[name]) for owner, name, _ in wanted if name in vars(owner)]
    for owner, name, value in wanted:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in replaced:
            setattr(owner, name, value)


def _module(config: Any) -> Any:
    return sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]


def _counts(name: str, value: Any) -> bool:
    return (callable(value) or isinstance(value, (staticmethod, classmethod, property))) and (
        not name.startswith("__") or name in ("__init__", "__call__")
    )
