"""What the README says by hand has to agree with the code; the generated pages are checked by `make lint`."""

from __future__ import annotations

import re
from pathlib import Path

from cli.main import COMMANDS, exit_codes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_every_command() -> None:
    table = README.partition("## Commands")[2].partition("\n## ")[0]

    assert set(re.findall(r"`loraq ([a-z]+)", table)) == set(COMMANDS)


def test_the_readme_names_every_exit_code() -> None:
    table = README.partition("## Exit codes")[2].partition("\n## ")[0]

    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)] == [code for code, _ in exit_codes()]


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    targets = {(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))}

    assert targets
    assert not [(page.name, link) for page, link in targets if not (page.parent / link).exists()]


def test_the_sweep_of_the_readme_is_a_valid_one(tmp_path: Path) -> None:
    from jobqueue.sweep import read_sweep

    file = tmp_path / "sweep.yaml"
    file.write_text(README.partition("```yaml\n")[2].partition("```")[0])
    sweep = read_sweep(file)

    assert sweep.name == "medqa-rank"
    assert len(sweep.trials) == 4
