"""Where settings are read from: variables LORAQ_*, and the user's file with its profiles.

    timeout_s = 10        # for whatever no profile says otherwise
    profile = "lab"       # the one that counts where none is named

    [profiles.lab]
    redis_url = "redis://:PASSWORD@lab.example.org:6379/0"

A variable goes before the file. Only a profile that is named in the call itself goes before the variables: an exported
LORAQ_REDIS_URL must not send `loraq --profile lab rm` to another cluster.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from jobqueue.errors import LoraqError
from jobqueue.settings import Settings

NAMES = [field.name for field in fields(Settings)]
OF_COMPOSE = ("LORAQ_STORAGE_DIR",)  # it looks like LORAQ_STORAGE
TYPES = get_type_hints(Settings)
SECRET = [field.name for field in fields(Settings) if not field.repr]
WORDS = {str: "text", Path: "text", int: "a whole number", float: "a number",
         tuple: 'a list, e.g. ["a", "b"]', dict: 'values by name, e.g. {"a": ...}'}  # fmt: skip
TEXT, PATH = (str, str | None), (Path, Path | None)


@dataclass(frozen=True)
class Source:
    """One place where settings are written."""

    what: str
    values: Mapping[str, Any]
    written: Callable[[str], str] = str
    """How a setting is called there."""


def read_settings(profile: str | None = None, **given: Any) -> Settings:
    """This user's settings on this machine.

    Args:
        profile: as it is named in the call; None: that of LORAQ_PROFILE, or of the file, if any. "" is an error, as it
            comes from a command whose own variable is empty.
        given: settings that go before all others.

    Raises LoraqError with everything that is wrong.
    """
    found = [Source("the call", given), *sources(profile)]
    wrong = [*_misspelt(), *(mistake for source in found for mistake in _unknown(source))]
    merged = {name: source for source in reversed(found) for name in source.values if name in NAMES}
    checked = {}
    for name, source in merged.items():
        try:
            checked[name] = _as_typed(name, source.values[name])
        except ValueError as error:
            wrong.append(f"{source.written(name)} {error}")
    try:
        settings = Settings(**checked)
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        do = f"Correct {config_file()} or the variables LORAQ_*."
        raise LoraqError(f"The settings are wrong: {'; '.join(wrong)}", do)
    return settings


def sources(profile: str | None = None) -> list[Source]:
    """What counts, the strongest first. Raises LoraqError where there is no such profile, or file."""
    document = _document()
    tables = _profiles(document)
    file = Source(str(config_file()), {name: value for name, value in document.items() if name != "profiles"})
    texts = {name: os.environ.get(_variable(name), "") for name in NAMES}
    set_here = {name: _from_text(name, text) for name, text in texts.items() if text}
    variables = Source(", ".join(map(_variable, set_here)), set_here, _variable)
    named = set_here.get("profile") or document.get("profile", "") if profile is None else profile
    if profile is None and not named:
        return [variables, file]
    if named not in tables:
        names = f"The profiles there are: {', '.join(tables)}." if tables else f"Write one there: [profiles.{named}]."
        raise LoraqError(f"there is no profile {named!r} in {config_file()}", names)
    own = Source(f"profile {named}", {**tables[named], "profile": named}, lambda name: f"profiles.{named}.{name}")
    return [variables, own, file] if profile is None else [own, variables, file]


def profiles() -> list[str]:
    """Their names. Raises LoraqError where the file cannot be read."""
    return list(_profiles(_document()))


def config_file() -> Path:
    """`$LORAQ_CONFIG`, else `loraq/config.toml` in the user's configuration folder."""
    default = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "loraq" / "config.toml"
    return Path(os.environ.get("LORAQ_CONFIG") or default)


def _document() -> Mapping[str, Any]:
    import tomllib  # the file is often not there

    file = config_file()
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # some editors begin it with a mark
    except FileNotFoundError:
        if os.environ.get("LORAQ_CONFIG"):
            raise LoraqError(f"LORAQ_CONFIG names {file}, which is not there", "Correct it, or unset it.") from None
        return {}
    except OSError as error:
        raise LoraqError(f"{file} cannot be read: {error.strerror}", "Correct that.") from None
    except ValueError as error:
        raise LoraqError(f"{file} is not valid TOML: {error}", "Correct it.") from None


def _profiles(document: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    tables = document.get("profiles", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise LoraqError(f"the profiles in {config_file()} are no tables", "Write each as [profiles.NAME].")
    if not isinstance(document.get("profile", ""), str):
        do = 'Write each profile as [profiles.NAME], and profile = "NAME" for the one that counts by default.'
        raise LoraqError(f"profile in {config_file()} is no name", do)
    return tables


def _variable(name: str) -> str:
    return f"LORAQ_{name.upper()}"


def _from_text(name: str, text: str) -> Any:
    """Of a variable: JSON, where it is more than text."""
    if TYPES[name] in (*TEXT, *PATH):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _as_typed(name: str, value: Any) -> Any:
    """Raises ValueError. Pydantic takes longer to import than most commands take; text is what most people set."""
    if isinstance(value, str) and TYPES[name] in TEXT:
        return value
    if isinstance(value, str) and TYPES[name] in PATH:
        return Path(value)
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(TYPES[name]).validate_python(value)
    except ValidationError:
        secret = name in SECRET or not isinstance(value, str | float | int)  # a list may be of passwords
        given = "" if secret else f", not {value!r}"
        raise ValueError(f"must be {_expected(TYPES[name])}{given}") from None


def _expected(kind: Any) -> str:
    """A type, in words."""
    kinds = [each for each in get_args(kind) if each is not NoneType] if isinstance(kind, UnionType) else [kind]
    return " or ".join(WORDS[get_origin(each) or each] for each in kinds)


def _unknown(source: Source) -> Iterator[str]:
    for name in source.values:
        if name not in NAMES:
            close = difflib.get_close_matches(name.lower().removeprefix("loraq_"), NAMES, n=1)
            yield f"{source.written(name)} is no setting" + (f"; did you mean {close[0]}?" if close else "")


def _misspelt() -> Iterator[str]:
    """Variables that do nothing, and look like one that does."""
    known = list(map(_variable, (*NAMES, "config")))
    for name in os.environ:
        if name.startswith("LORAQ_") and name not in (*known, *OF_COMPOSE):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            yield from (f"{name} is no setting; did you mean {other}?" for other in close)
