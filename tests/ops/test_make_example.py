"""The files of an example are made from what `loraq results --json` wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from jobqueue.results import BatchReport

ROOT = Path(__file__).parents[2]


def test_every_form_is_written_without_a_server(tmp_path: Path) -> None:
    report = BatchReport("medqa", "org/m", True, None, None, (), (), None, verdict="There is no trial.")
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))

    command = [sys.executable, "ops/make_example.py", str(tmp_path / "made"), str(tmp_path / "report.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    made = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "made").iterdir()}
    assert made.keys() == {
        "plot.txt", "results.csv", "results.html", "results.json", "results.md",
        "table-80.txt", "table-120.txt", "table-160.txt",
    }  # fmt: skip
    assert "There is no trial." in made["results.md"]
    assert "There is no trial." in made["table-80.txt"]
    assert "medqa" in made["results.html"]
