"""A sweep file as it was read, with the line of every key, and the problems that were found in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from jobqueue.errors import Problem, SpecError

ANY_KEY = (["sweep", "grid"], ["sweep", "random", "parameters"])
"""Sections whose keys are those that are varied, dots and all."""


@dataclass
class Document:
    """The file as it was read; `report` collects problems, `check` raises them."""

    path: Path
    root: CommentedMap
    set_keys: set[str] = field(default_factory=set)  # dotted keys that came from --set
    problems: list[Problem] = field(default_factory=list)

    def set_key(self, item: str) -> None:
        """`key=value` in the file's stead, with a dotted key and YAML as the value."""
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            self.problems.append(Problem(f"{item!r} must look like key=value", "--set"))
            return
        try:
            value = _yaml().load(text)
        except YAMLError:
            self.problems.append(Problem(f"the value {text!r} is not valid YAML", "--set", path=key))
            return
        if not put(self.root, key.strip(), value):
            self.problems.append(Problem(f"{key!r} goes into something that is no section", "--set"))
        self.set_keys.add(key.strip())

    def plain(self) -> Any:
        """The file without YAML's own classes; nothing where it is no JSON, which the check of the whole file says."""
        try:
            return json.loads(json.dumps(self.root, default=str))
        except (TypeError, ValueError):
            return {}

    def line(self, loc: Sequence[str | int]) -> tuple[int | None, str]:
        """1-based line and dotted path of the deepest part of `loc` that the file has."""
        node: Any = self.root
        line: int | None = 1
        path: list[str] = []
        for part in loc:
            try:
                if isinstance(node, CommentedMap) and part in node:
                    line, node = node.lc.key(part)[0] + 1, node[part]
                elif isinstance(node, CommentedSeq) and isinstance(part, int):
                    line, node = node.lc.item(part)[0] + 1, node[part]
                else:
                    break
            except (KeyError, IndexError, TypeError, AttributeError):  # of a --set, or merged with `<<`
                dotted = ".".join([*path, str(part)])
                if any(key.startswith(dotted) or dotted.startswith(key) for key in self.set_keys):
                    line = None
                node = node[part]
            path.append(str(part))
            if ".".join(path) in self.set_keys:
                line = None
        return line, ".".join(path)

    def report(self, message: str, loc: Sequence[str | int] = ()) -> None:
        line, path = self.line(loc)
        missing = ".".join(map(str, loc)) if message.startswith("is missing") else path
        place = "--set" if line is None else str(self.path)
        problem = Problem(message, place, line, missing)
        if problem not in self.problems:
            self.problems.append(problem)

    def check(self) -> None:
        if self.problems:
            raise SpecError(self.problems)


def _yaml() -> YAML:
    yaml = YAML(typ="rt")  # round trip: it keeps line numbers; YAML 1.2, where `no` is text and `2e-4` a number
    yaml.version = (1, 2)
    return yaml


def read(path: Path) -> Document:
    """Raises SpecError."""
    try:
        root = _yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError([Problem("there is no such file", str(path))]) from None
    except UnicodeDecodeError:
        raise SpecError([Problem("cannot be read: it is not UTF-8", str(path))]) from None
    except OSError as error:
        raise SpecError([Problem(f"cannot be read: {error.strerror}", str(path))]) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        message = " ".join(str(error.problem or error.context).split())
        raise SpecError([Problem(f"is not valid YAML: {message}", str(path), line)]) from None
    except YAMLError as error:
        raise SpecError([Problem(f"is not valid YAML: {' '.join(str(error).split())}", str(path))]) from None
    if not isinstance(root, CommentedMap):
        raise SpecError([Problem("must be a mapping of keys (name, base_model, data, ...)", str(path), 1)])
    return Document(path, root)


def put(root: Any, dotted: str, value: Any) -> bool:
    """Set root[a][b][c] = value for "a.b.c", making sections that are not there."""
    *parents, last = _parts(root, dotted)
    for parent in parents:
        if not isinstance(root, dict):
            return False
        if root.get(parent) is None:
            root[parent] = CommentedMap()
        root = root[parent]
    if not isinstance(root, dict):
        return False
    root[last] = value
    return True


def _parts(root: Any, dotted: str) -> list[str]:
    """Of "sweep.grid.lora.r" the last one is "lora.r"; behind a key with a section it is split again."""
    parts = dotted.split(".")
    for section in ANY_KEY:
        varied = ".".join(parts[len(section) :])
        if varied and parts[: len(section)] == section:
            node = root
            for part in section:
                node = node.get(part) if isinstance(node, dict) else None
            there = [key for key, value in node.items() if isinstance(value, dict)] if isinstance(node, dict) else []
            known = next((key for key in there if varied.startswith(f"{key}.")), varied)
            return [*section, known, *filter(None, varied.removeprefix(known).split("."))]
    return parts
