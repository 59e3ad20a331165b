"""General rows that are mixed in: how many, which, and where they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_families import LLAMA_3, chat

from jobqueue.data_spec import ReplaySpec
from jobqueue.errors import DataError
from jobqueue.job_spec import TrainSpec
from jobqueue.plan import make_plan
from jobqueue.replay import draw
from jobqueue.sweep import read_sweep


def general(folder: Path, count: int) -> Path:
    file = folder / "general.jsonl"
    rows = [{"prompt": f"Say {number}", "completion": str(number)} for number in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_so_many_are_drawn_that_they_make_the_fraction_and_the_seed_says_which(tmp_path: Path) -> None:
    source = str(general(tmp_path, 100))
    for fraction, wanted in ((0.1, 10), (0.25, 30), (0.0, 0)):
        drawn = draw(ReplaySpec(source=source, fraction=fraction), own=90)
        assert drawn is not None
        assert len(drawn.examples) == wanted == len({example.key for example in drawn.examples})
    first, again, other = (draw(ReplaySpec(source=source, seed=seed), own=90) for seed in (1, 1, 2))
    assert first
    assert again
    assert other
    assert first.examples == again.examples != other.examples
    assert draw(None, own=90) is None


def test_too_few_rows_are_all_taken_and_said(tmp_path: Path) -> None:
    drawn = draw(ReplaySpec(source=str(general(tmp_path, 5))), own=900)
    assert drawn is not None
    assert (len(drawn.examples), drawn.wanted) == (5, 100)
    assert drawn.shortage == f"{tmp_path / 'general.jsonl'} has 5 rows, and its fraction would be 100"


def test_rows_whose_answers_do_not_fit_are_counted_and_if_all_are_the_data_is_refused(tmp_path: Path) -> None:
    drawn = draw(ReplaySpec(source=str(general(tmp_path, 20)), fraction=0.5), own=10)
    assert drawn is not None
    tokens, said = drawn.tokens(chat(LLAMA_3), 512)
    assert (said["rows"], said["wanted"], said["used"], len(tokens)) == (20, 10, 10, 10)
    with pytest.raises(DataError, match=r"replay, .*general\.jsonl: no row is left to train on"):
        drawn.tokens(chat(LLAMA_3), 16)


def test_its_file_travels_with_the_job(tmp_path: Path) -> None:
    general(tmp_path, 3)
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Hello"}) + "\n")
    replay = {"source": "general.jsonl", "fraction": 0.2}
    sweep = {"name": "b", "base_model": "owner/m-1B", "data": {"source": "own.jsonl", "replay": replay}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    plan = make_plan(read_sweep(tmp_path / "sweep.yaml"), workers_are_here=False)
    spec = plan.jobs[0].spec
    assert isinstance(spec, TrainSpec)
    assert spec.data.replay is not None
    assert plan.files[spec.data.replay.source] == tmp_path / "general.jsonl"
    assert plan.files[spec.data.source] == tmp_path / "own.jsonl"

    (tmp_path / "general.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"general\.jsonl"):
        make_plan(read_sweep(tmp_path / "sweep.yaml"), workers_are_here=False)
