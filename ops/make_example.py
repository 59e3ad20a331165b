"""Write the results of batches in every form, as examples/ shows them.

python ops/make_example.py examples/medqa-sweep medqa-rank        a batch of the server that is set
python ops/make_example.py examples/medqa-sweep report.json       what `loraq results --json` wrote elsewhere
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WIDTHS = (80, 120, 160)
FORMS = {"results.json": "--json", "results.csv": "--csv", "results.md": "--markdown", "plot.txt": "--plot"}


def results(*arguments: str, columns: int = 100) -> str:
    """What `loraq results` prints on a terminal of that width, without colours."""
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "cli.main", "results", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    folder, batches = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, form in FORMS.items():
        (folder / name).write_text(results(*batches, form), encoding="utf-8")
    for columns in WIDTHS:
        (folder / f"table-{columns}.txt").write_text(results(*batches, "--memory", columns=columns), encoding="utf-8")
    results(*batches, "--html", str(folder / "results.html"))
    for file in sorted(folder.iterdir()):
        print(file)


if __name__ == "__main__":
    main()
