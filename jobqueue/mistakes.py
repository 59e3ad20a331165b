"""What pydantic finds wrong with a sweep file, in words for the one who wrote it; pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from jobqueue.data_spec import ClashError
from jobqueue.sweep_file import ANY_KEY

LONGEST = 100  # of a value that is repeated in a message


def mistakes(model: type[BaseModel], error: ValidationError) -> Iterator[tuple[Sequence[str | int], str]]:
    """The place of each mistake, and one line about it."""
    for details in _one_per_value(model, error.errors(include_url=False)):
        loc, cause = details["loc"], details.get("ctx", {}).get("error")
        if isinstance(cause, ClashError):
            yield from (((*loc, *filter(None, key.split("."))), why) for key, why in cause.found)
        else:
            yield loc, _message(model, details, loc)


def _one_per_value(model: type[BaseModel], errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One error for a value that may be of several kinds, not one for each: "must be true or false or 'unsloth'"."""
    merged: list[Mapping[str, Any]] = []
    for details in errors:
        *value, kind = details["loc"] or ("",)
        is_key = kind in _fields(model, value) or value in ANY_KEY
        is_kind = isinstance(kind, str) and not is_key  # pydantic names the kind last
        another = is_kind and bool(merged) and merged[-1]["loc"][:-1] == tuple(value)
        if details["type"] == "too_short":
            if details["ctx"]["actual_length"] < len(details["input"]):
                continue  # pydantic counts only what is right; what is wrong has an error of its own
        elif is_kind and isinstance(details["input"], list) and _is_list(value, errors):
            continue  # it may be a list, and what is wrong with it as a list is said
        if another and details["type"] != "extra_forbidden":
            other = details["msg"].removeprefix("Input should be ").replace("String should match pattern", "match")
            merged[-1] = {**merged[-1], "msg": f"{merged[-1]['msg']} or {other}"}
        else:
            merged.append(details)
    return merged


def _is_list(value: Sequence[str | int], errors: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of the errors is about what a list at `value` holds, or how much."""
    return any(
        error["loc"][: len(value)] == tuple(value)
        and (len(error["loc"]) > len(value) + 1 or error["type"] == "too_short")
        for error in errors
    )


def _message(model: type[BaseModel], details: Mapping[str, Any], loc: Sequence[str | int]) -> str:
    """One line for one of pydantic's errors."""
    given = "" if isinstance(details["input"], (dict, list)) else f", not {_as_written(details['input'])}"
    match details["type"]:
        case "extra_forbidden":
            known = _fields(model, loc[:-1])
            elsewhere = sorted(
                (key for key in _dotted(model) if key.endswith(f".{loc[-1]}")), key=lambda k: k.count(".")
            )
            close = elsewhere[:3] or difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(sorted(known))}"
            return f"unknown key {loc[-1]!r}; {hint}"
        case "missing":
            return "is missing"
        case "value_error":
            return str(details["ctx"]["error"])
        case "byte_size":
            return f"must be a size such as 12GiB{given}"
        case "none_required":
            return f"must be left empty{given}"
        case "too_short":
            least = details["ctx"]["min_length"]
            return f"must have at least {least} value{'s' if least > 1 else ''}"
        case "string_pattern_mismatch" if loc and loc[-1] == "name":
            return f"must be letters, digits, '.', '_' and '-' only{given}"
    message = str(details["msg"]).replace("Input should be", "must be").replace("String should", "must") + given
    message = message.replace("a valid ", "a ").replace("a array", "a list").replace("a integer", "an integer")
    one = details["type"].startswith(("int", "float", "string", "bool", "literal"))
    if one and isinstance(details["input"], list):
        message += "; several values to try belong under sweep.grid"
    return message.replace("an object", "a section").replace("a boolean", "true or false")


def _as_written(value: Any) -> str:
    """A value as YAML has it, shortened where it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value) if len(repr(value)) <= LONGEST else f"{repr(value)[:LONGEST]}..."


def _dotted(model: type[BaseModel]) -> Iterator[str]:
    """Every key below `model`, those of sections with their sections."""
    for name, info in model.model_fields.items():
        yield name
        for kind in [info.annotation, *get_args(info.annotation)]:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from (f"{name}.{inner}" for inner in _dotted(kind))


def _fields(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """The keys that are known at `loc` below `model`."""
    for part in loc:
        info = model.model_fields.get(str(part))
        kinds = [] if info is None else [info.annotation, *get_args(info.annotation)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not inner:
            return list(model.model_fields)
        model = inner[0]
    return list(model.model_fields)
