"""A score sheet as it comes back from a reviewer: whatever spreadsheet it went through."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobqueue.errors import DataError
from jobqueue.ratings import CRITERIA, HIGHEST, LOWEST, Criterion

DELIMITERS = ",;\t"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def contents(files: Sequence[Path]) -> dict[str, bytes]:
    """By name. Raises DataError where one cannot be read."""
    try:
        return {str(file): file.read_bytes() for file in files}
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}", "Check the path and its rights.") from error


@dataclass
class Sheet:
    """One reviewer's scores; what cannot be read is in `problems`, each with file and line."""

    file: str
    reviewer: str = ""
    cards: dict[str, int] = field(default_factory=dict)  # id -> line, from 1
    scores: dict[str, dict[Criterion, int]] = field(default_factory=dict)  # by card
    problems: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, file: str, content: bytes, columns: Sequence[str]) -> Sheet:
        """A sheet that has these columns, in any order, and perhaps others."""
        sheet = cls(file)
        try:
            rows = list(_rows(_text(content)))
        except csv.Error as error:
            sheet.problems.append(f"{file}: not CSV: {error}")
            return sheet
        header = [cell.strip().casefold() for cell in rows[0][1]] if rows else []
        lacking = [column for column in ("card", *CRITERIA, "reviewer") if column not in header]
        if lacking:
            sheet.problems.append(f"{file}:{rows[0][0] if rows else 1}: the column {', '.join(lacking)} is missing")
            return sheet
        names: dict[str, int] = {}
        for line, cells in rows[1:]:
            row = dict(zip(header, map(str.strip, cells), strict=False))
            sheet._take(line, row)
            if name := row.get("reviewer", ""):
                names.setdefault(name, line)
        if len(names) > 1:
            others = ", ".join(f"{name} (line {line})" for name, line in names.items())
            sheet.problems.append(f"{file}: several reviewers in one sheet: {others}")
        elif not names:
            sheet.problems.append(f"{file}:2: the reviewer's name is missing: write it into the column reviewer")
        sheet.reviewer = next(iter(names), "")
        return sheet

    def _take(self, line: int, row: dict[str, str]) -> None:
        card, place = row.get("card", ""), f"{self.file}:{line}"
        if not card:
            self.problems.append(f"{place}: the card's id is missing")
            return
        if card in self.cards:
            self.problems.append(f"{place}: {card} is there twice, first in line {self.cards[card]}")
            return
        self.cards[card] = line
        self.scores[card] = {}
        if not any(row.get(name) for name in CRITERIA):
            self.problems.append(f"{place}: {card} has no scores")
            return
        for name in CRITERIA:
            text = row.get(name, "")
            score = _score(text)
            if score is not None:
                self.scores[card][name] = score
                continue
            wrong = f"{text!r} is not a whole number from {LOWEST} to {HIGHEST}" if text else "is missing"
            self.problems.append(f"{place}: {name} of {card}: {wrong}")

    def check(self, expected: Sequence[str]) -> list[str]:
        """All that is wrong with it, for a sheet of these cards."""
        known = set(expected)
        unknown = [
            f"{self.file}:{line}: {card} is not of this sheet" for card, line in self.cards.items() if card not in known
        ]
        missing = [card for card in expected if card not in self.cards]
        if missing and self.cards:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            unknown.append(f"{self.file}: cards are missing: {', '.join(missing[:3])}{more}")
        return self.problems + unknown


def _score(text: str) -> int | None:
    """`4`, and `4.0` or `4,0`, as which spreadsheets write it."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return int(value) if value in range(LOWEST, HIGHEST + 1) else None


def _text(content: bytes) -> str:
    """UTF-8, UTF-16 with its mark, or what Excel calls CSV: only names and comments can differ in that."""
    if content[:2] in UTF16:
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line that it begins in."""
    csv.field_size_limit(sys.maxsize)
    first = text.partition("\n")[0]
    offset = 0
    if first.casefold().startswith("sep="):  # a line for Excel alone
        text, offset = text.partition("\n")[2], 1
        first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    line = 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield line + offset, cells
        line = reader.line_num + 1
