"""docs/python.md: its program does what the page says, with a real server and worker."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from worker_process import ROOT, Site

from jobqueue.service import Client

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a"}
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_program_submits_waits_and_prints_what_came_out(
    here: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here.start()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    words = "only:evaluate/fail:bad_data"
    sweep = {"name": "page", "base_model": f"/stub/{words}", "data": {"source": "rows.jsonl"},
             "evaluation": {"source": "rows.jsonl"}, "resources": {"memory": "1GiB"}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    for name, value in here.environment().items():
        if name.startswith("LORAQ_"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    [program] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(program, "docs/python.md", "exec"), {})

    printed = capsys.readouterr().out
    assert "page failed" in printed
    assert "page.1.eval failed bad_data as asked" in printed
    assert here.store.job("page.1").spec["training"]["max_steps"] == 100


def test_the_page_names_methods_that_there_are_and_all_of_them() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    methods = {name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")}
    assert named == methods - {"warnings", "forget_server"}
