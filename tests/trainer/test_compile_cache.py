"""Trainers that share what Unsloth has compiled; on a CPU it compiles nothing by itself, so it is asked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from trainer_child import DEADLINE_S, ROOT

TRAINERS, TIMES = 3, 40
SET = ("LORAQ_", "UNSLOTH_", "TORCHINDUCTOR_", "TRITON_")  # torch sets its own where another test has used it

# Modules of one name whose code differs, as the settings of jobs make it differ; each says whose it is.
COMPILES = f"""
import json, os, sys, time
from pathlib import Path
from gpu_worker.trainer.child import _environment
_environment()
import unsloth
import torch
from unsloth_zoo.compiler import create_new_function

own, folder = sys.argv[1], Path(sys.argv[2])
kept = Path(os.environ["UNSLOTH_COMPILE_LOCATION"], "of_an_earlier_trainer.py")
(folder / f"ready-{{own}}").touch()
while len(list(folder.glob("ready-*"))) < {TRAINERS}:
    time.sleep(0.01)
said = []
for count in range({TIMES}):
    source = f"def whose(count):\\n    return ['{{own}}', count]\\n"
    made = create_new_function("UnslothWhose", source, "transformers.models.llama.modeling_llama", [])
    said.append(made.whose(count))
if own == "0":  # it takes its time
    assert torch.compile(lambda x: x.exp() + 1)(torch.zeros(3)).tolist() == [2, 2, 2]
print(json.dumps({{"said": said, "kept": kept.read_text()}}))
"""


def test_trainers_that_compile_at_once_neither_wipe_one_cache_nor_run_each_others_code(tmp_path: Path) -> None:
    """unsloth#8457, unsloth-zoo#967: processes wiped the compiled cache, or raced on its files."""
    cache = tmp_path / "cache"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SET)}
    environment |= {"LORAQ_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    compiled = cache / "unsloth" / version("unsloth")
    compiled.mkdir(parents=True)
    (compiled / "of_an_earlier_trainer.py").write_text("here = 1\n")
    # Each guardian gives its trainer one: Unsloth turns there from a race, to one name for all.
    for number in range(TRAINERS):
        (tmp_path / f"tmp{number}").mkdir()
    trainers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", COMPILES, str(number), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=(tmp_path / f"log{number}").open("w"), text=True,
            env={**environment, "TMPDIR": str(tmp_path / f"tmp{number}")}, cwd=tmp_path,
        )
        for number in range(TRAINERS)
    ]  # fmt: skip
    try:
        outputs = [trainer.communicate(timeout=DEADLINE_S)[0] for trainer in trainers]
    finally:
        for trainer in trainers:
            trainer.kill()
    for number, (trainer, output) in enumerate(zip(trainers, outputs, strict=True)):
        assert trainer.returncode == 0, (tmp_path / f"log{number}").read_text()[-3000:]
        told = json.loads(output.splitlines()[-1])
        assert told["said"] == [[str(number), count] for count in range(TIMES)]
        assert told["kept"] == "here = 1\n"
    assert (compiled / "UnslothWhose.py").exists()
    assert any((cache / "torch" / version("torch")).rglob("*.so")), "what torch.compile has made is there too"
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith("tmp")}
    assert folders == {"cache"}, "not in the working directory"
