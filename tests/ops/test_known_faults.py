"""The table of docs/known-faults.md: every report has a test that is there, and that names the report."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "known-faults.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.read_text().splitlines() if line[:1] == "|"
]
REPORTS = {report: tests for report, _, _, tests in ROWS[2:]}


def docstring(test: str) -> str:
    """Of `path::name`; fails where there is no such test."""
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert found, f"there is no test {test}"
    return ast.get_docstring(found[0]) or ""


@pytest.mark.parametrize("report", list(REPORTS))
def test_a_report_has_its_tests_and_each_number_stands_in_one_of_them(report: str) -> None:
    told = " ".join(docstring(test) for test in re.findall(r"`([^`]+)`", REPORTS[report]))
    numbers = re.findall(r"#\d+", report)
    assert numbers or report.startswith("Redis")
    assert [number for number in numbers if not re.search(rf"{number}\b", told)] == []


def test_a_report_of_a_test_is_in_the_table() -> None:
    words = TABLE.read_text()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and re.match(r"[a-z-]+#\d+", ast.get_docstring(node) or ""):
                assert f"{file.relative_to(ROOT / 'tests')}::{node.name}`" in words
