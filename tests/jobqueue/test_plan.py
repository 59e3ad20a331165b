"""A sweep becomes jobs; no server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from jobqueue.base_model import commit, fingerprint
from jobqueue.errors import DataError, SpecError
from jobqueue.job import JobKind
from jobqueue.job_spec import EvaluateSpec, ExportSpec, RateSpec, ReportSpec, TrainSpec
from jobqueue.memory import GIB
from jobqueue.plan import Plan, make_plan
from jobqueue.storage import file_hash
from jobqueue.sweep import read_sweep

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}
CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two data files and a model."""
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def plan(folder: Path, *, workers_are_here: bool = True, **changes: object) -> Plan:
    fields: dict[str, object] = {
        "name": "b", "base_model": "./model", "data": {"source": "train.jsonl"},
        "evaluation": {"source": "test.jsonl"},
    }  # fmt: skip
    fields |= changes
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return make_plan(read_sweep(file), workers_are_here=workers_are_here)


def base_id(made: Plan) -> str:
    [only] = [job.id for job in made.jobs if job.shared]
    return only


def test_who_is_told_is_the_reports_and_makes_no_other_batch(folder: Path) -> None:
    made = plan(folder, notify=["team", "https://ci.example.org/x"])

    spec = made.jobs[-1].spec
    assert isinstance(spec, ReportSpec)
    assert spec.notify == ("team", "https://ci.example.org/x")
    assert made.key == plan(folder).key


def test_a_sweep_is_a_train_and_an_evaluation_each_one_base_evaluation_and_one_report(folder: Path) -> None:
    made = plan(folder, sweep={"grid": {"lora.r": [8, 16]}})

    base = base_id(made)
    assert [(job.id, job.kind.value, job.needs) for job in made.jobs] == [
        ("1", "train", ()),
        (base, "evaluate", ()),
        ("1.eval", "evaluate", ("1",)),
        ("2", "train", ()),
        ("2.eval", "evaluate", ("2",)),
        ("report", "report", ()),
    ]
    assert made.jobs[-1].follows == ("1", base, "1.eval", "2", "2.eval")
    assert [job.trial for job in made.jobs if job.kind is JobKind.TRAIN] == ["r=8", "r=16"]
    assert {job.spec.lora.r for job in made.jobs if isinstance(job.spec, TrainSpec)} == {8, 16}


def test_each_job_comes_after_those_that_it_waits_for(folder: Path) -> None:
    made = plan(folder, sweep={"grid": {"lora.r": [8, 16], "training.max_seq_length": [64, 128]}})
    seen: set[str] = set()

    for job in made.jobs:
        assert set(job.after) <= seen
        seen.add(job.id)


def test_a_judge_is_one_job_between_the_evaluations_and_the_report(folder: Path) -> None:
    judge = {"model": "grader", "limit": 5}
    plain = plan(folder, sweep={"grid": {"lora.r": [8, 16]}})
    made = plan(folder, evaluation={"source": "test.jsonl", "judge": judge}, sweep={"grid": {"lora.r": [8, 16]}})

    job = {job.id: job for job in made.jobs}
    assert (job["judge"].kind, job["judge"].queue, job["judge"].needs) == (JobKind.JUDGE, "control", ())
    assert set(job["judge"].follows) == {"1.eval", "2.eval", base_id(made)}
    assert set(job["report"].follows) == set(job) - {"report"}
    assert isinstance(job["judge"].spec, RateSpec)
    assert (job["judge"].spec.judge.model, job["judge"].spec.judge.limit) == ("grader", 5)
    assert base_id(made) == base_id(plain)  # the base model's scores serve those with a judge and those without


def test_two_judges_in_one_sweep_are_refused(folder: Path) -> None:
    evaluation = {"source": "test.jsonl", "judge": {"model": "grader"}}
    with pytest.raises(SpecError, match=r"evaluation\.judge: one judge rates all configurations"):
        plan(folder, evaluation=evaluation, sweep={"grid": {"evaluation.judge.model": ["grader", "other"]}})


def test_without_evaluation_there_is_none(folder: Path) -> None:
    assert [job.id for job in plan(folder, evaluation=None).jobs] == ["1", "report"]


def test_without_data_only_the_base_model_is_evaluated(folder: Path) -> None:
    made = plan(folder, data=None)

    assert [job.kind.value for job in made.jobs] == ["evaluate", "report"]
    assert made.jobs[0].shared


def test_without_a_comparison_the_base_model_is_not_evaluated(folder: Path) -> None:
    made = plan(folder, evaluation={"source": "test.jsonl", "compare_with_base": False})

    assert [job.id for job in made.jobs] == ["1", "1.eval", "report"]


# -- which evaluations of a base model are the same


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"lora": {"r": 64}},
        {"training": {"learning_rate": 1.0, "seed": 1}},
        {"data": {"source": "test.jsonl"}},
        {"resources": {"priority": 5, "memory": "3GiB"}},
        {"evaluation": {"source": "test.jsonl", "per_device_eval_batch_size": 1}},
        {"method": "lora", "evaluation": {"source": "test.jsonl", "load_in_4bit": True}},
    ],
)
def test_what_does_not_change_the_scores_does_not_change_the_base_evaluation(
    folder: Path, changes: dict[str, object]
) -> None:
    assert base_id(plan(folder, **changes)) == base_id(plan(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora"},
        {"training": {"max_seq_length": 64}},
        {"evaluation": {"source": "train.jsonl"}},
        {"evaluation": {"source": "test.jsonl", "limit": 1}},
        {"evaluation": {"source": "test.jsonl", "metrics": ["likelihood"]}},
        {"evaluation": {"source": "test.jsonl", "max_new_tokens": 8}},
        {"evaluation": {"source": "test.jsonl", "load_in_4bit": False}},
        {"base_model": "owner/name"},
        {"base_model": "owner/name", "revision": "v2"},
        {"dtype": "bfloat16"},
        {"chat_template": "chatml"},
        {"evaluation": {"source": "test.jsonl", "system_prompt": "Be brief"}},
    ],
)
def test_what_may_change_the_scores_makes_another_base_evaluation(folder: Path, changes: dict[str, object]) -> None:
    assert base_id(plan(folder, **changes)) != base_id(plan(folder))


def test_other_questions_under_the_same_name_make_another_base_evaluation(folder: Path) -> None:
    before = base_id(plan(folder))
    (folder / "test.jsonl").write_text(json.dumps({**ROW, "question": "!"}) + "\n")

    assert base_id(plan(folder)) != before


def test_another_model_in_the_same_folder_makes_another_base_evaluation(folder: Path) -> None:
    before = base_id(plan(folder))
    os.utime(folder / "model" / "config.json", (1, 1))

    assert base_id(plan(folder)) != before


# -- data files


def test_a_local_file_is_named_by_its_content_and_uploaded_once(folder: Path) -> None:
    made = plan(folder, evaluation={"source": "./train.jsonl"}, sweep={"grid": {"lora.r": [8, 16, 32]}})

    source = f"loraq://{file_hash(folder / 'train.jsonl')}/train.jsonl"
    assert {key: path.resolve() for key, path in made.files.items()} == {source: folder / "train.jsonl"}
    for job in made.jobs:
        if isinstance(job.spec, TrainSpec):
            assert job.spec.data.source == source
        if isinstance(job.spec, EvaluateSpec):
            assert job.spec.evaluation.source == source


@pytest.mark.parametrize("source", ["owner/name", "s3://bucket/rows.jsonl"])
def test_what_is_not_on_this_machine_is_left_to_the_workers(folder: Path, source: str) -> None:
    made = plan(folder, data={"source": source}, evaluation=None)

    assert made.files == {}
    assert isinstance(made.jobs[0].spec, TrainSpec)
    assert made.jobs[0].spec.data.source == source


@pytest.mark.parametrize("key", ["data", "evaluation"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no data file"),
        ("empty.jsonl", "", "empty"),
        ("other.jsonl", '{"words": 1}\n', "words"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_refused(
    folder: Path, key: str, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (folder / name).write_text(content)

    with pytest.raises(DataError, match=message) as error:
        plan(folder, **{key: {"source": name}})
    assert name in error.value.what
    assert error.value.do


@pytest.mark.parametrize("source", ["rows", "./rows", "rows/"])
def test_a_folder_is_no_data_file_and_taken_for_no_hub_id(folder: Path, source: str) -> None:
    (folder / "rows").mkdir()
    with pytest.raises(DataError, match="rows is a folder"):
        plan(folder, data={"source": source})

    (folder / "owner" / "name").mkdir(parents=True)  # a copy of what the hub has, perhaps
    assert plan(folder, data={"source": "owner/name"}).jobs


def test_all_data_that_cannot_be_used_is_told_at_once(folder: Path) -> None:
    (folder / "odd.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError) as error:
        plan(folder, data={"source": "gone.csv", "replay": {"source": "odd.jsonl"}}, evaluation={"source": "no.json"})
    for words in ("no data file", "gone.csv", "odd.jsonl has the columns a", "no.json"):
        assert words in error.value.what
    assert "`source: gone.csv`" in error.value.do
    assert "`columns`" in error.value.do


def test_what_the_file_has_wrong_and_what_its_data_has_wrong_are_told_together(folder: Path) -> None:
    with pytest.raises(SpecError) as error:
        plan(folder, base_model="./gone", chat_template="nothing", evaluation={"source": "gone.json"})
    paths = [problem.path for problem in error.value.problems]
    assert paths == ["base_model", "chat_template", "evaluation.source"]
    assert "gone.json" in error.value.problems[2].message


LINES = """\
name: b
base_model: ./gone
data: {source: train.jsonl}
evaluation:
  source: no.jsonl
sweep:
  grid:
    chat_template:
      - chatml
      - nothing
  list:
    - {data.source: train.jsonl}
    - {data.source: trian.jsonl}
"""


def test_what_is_not_there_is_told_with_the_line_that_names_it(folder: Path) -> None:
    file = folder / "sweep.yaml"
    file.write_text(LINES)
    with pytest.raises(SpecError) as error:
        make_plan(read_sweep(file, ["from_adapter=./none"]), workers_are_here=True)
    assert [(problem.file, problem.line, problem.path) for problem in error.value.problems] == [
        ("--set", None, "from_adapter"),
        (str(file), 2, "base_model"),
        (str(file), 5, "evaluation.source"),
        (str(file), 10, "chat_template"),
        (str(file), 13, "data.source"),
    ]


def test_data_alone_that_is_not_there_is_told_with_its_line_and_the_name_of_a_file_like_it(folder: Path) -> None:
    file = folder / "sweep.yaml"
    file.write_text(LINES.replace("./gone", "./model").replace("nothing", "llama-3").replace("no.json", "test.json"))
    with pytest.raises(DataError) as error:
        make_plan(read_sweep(file), workers_are_here=True)
    assert error.value.what == f"{file}:13: data.source: there is no data file {folder / 'trian.jsonl'}"
    assert error.value.do == "Did you mean train.jsonl?"


def test_the_spec_of_a_training_is_a_sweep_file_of_the_same_training(folder: Path) -> None:
    """As docs/reproduce.md has it."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    first = plan(folder, chat_template=template, lora={"use_gradient_checkpointing": "unsloth"}).jobs[0].spec
    (folder / "train.jsonl").unlink()
    fields = first.model_dump(mode="json", exclude={"kind"})

    assert plan(folder, evaluation=None, **fields).jobs[0].spec == first


def test_a_file_that_is_read_in_two_ways_is_checked_in_both(folder: Path) -> None:
    with pytest.raises(DataError, match="has no column frage"):
        plan(folder, evaluation={"source": "train.jsonl", "columns": {"question": "frage"}})


# -- models and memory


def test_a_model_beside_the_file_is_found_whatever_the_working_directory_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")

    assert isinstance(spec := plan(folder).jobs[0].spec, TrainSpec)
    assert spec.base_model == str(folder / "model")


def test_a_model_that_is_missing_is_an_error_where_the_workers_see_this_machine_else_a_warning(folder: Path) -> None:
    with pytest.raises(SpecError, match="there is no model at /no/such"):
        plan(folder, base_model="/no/such")

    made = plan(folder, base_model="/no/such", workers_are_here=False, sweep={"grid": {"lora.r": [8, 16]}})
    assert made.warnings == ("/no/such is not on this machine; every worker must have it",)

    (folder / "empty").mkdir()
    with pytest.raises(SpecError, match="is no model: it has no config"):
        plan(folder, base_model="./empty")
    made = plan(folder, base_model="./empty", workers_are_here=False)
    said = f"{folder / 'empty'} on this machine is no model: it has no config.json; every worker must have one there"
    assert made.warnings == (said,)


@pytest.mark.parametrize(
    ("file", "words"), [("README.md", "no model: it has no config"), ("adapter_config.json", "an adapter, not a base")]
)
def test_a_folder_that_holds_no_model_is_an_error_where_the_workers_see_it(folder: Path, file: str, words: str) -> None:
    (folder / "other").mkdir()
    (folder / "other" / file).touch()
    with pytest.raises(SpecError, match=words):
        plan(folder, base_model="./other")

    assert plan(folder, base_model="./other", workers_are_here=False).jobs


@pytest.mark.parametrize("name", ["./no-such", "no such", "a/b/c"])
def test_a_model_that_can_be_nowhere_is_an_error(folder: Path, name: str) -> None:
    with pytest.raises(SpecError, match=name):
        plan(folder, base_model=name, workers_are_here=False)


def test_a_job_knows_its_memory_where_the_config_can_be_read(folder: Path) -> None:
    known = plan(folder)
    assert all(job.need_bytes > 0 and job.queue == "gpu8" for job in known.jobs[:-1])

    (folder / "model" / "config.json").write_text("{}")
    assert [(job.need_bytes, job.queue) for job in plan(folder).jobs] == [(0, "")] * 3 + [(0, "control")]
    assert plan(folder, resources={"memory": "20GiB"}).jobs[0].need_bytes == 20 * GIB
    assert plan(folder, resources={"memory": "20GiB"}).jobs[0].queue == "gpu24"
    assert plan(folder, resources={"device": "cpu"}).jobs[0].queue == "cpu"


# -- metrics and rows


@pytest.fixture
def chat(folder: Path) -> Path:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return folder


def test_conversations_are_evaluated_by_perplexity_and_bleu(chat: Path) -> None:
    made = plan(chat, evaluation={"source": "chat.jsonl", "metrics": ["perplexity", "bleu"], "format": "messages"})
    assert [job.kind.value for job in made.jobs] == ["train", "evaluate", "evaluate", "report"]


def test_conversations_cannot_be_asked_for_their_options(chat: Path) -> None:
    with pytest.raises(DataError, match=r"format messages, and likelihood need questions with options"):
        plan(chat, evaluation={"source": "chat.jsonl", "metrics": ["perplexity", "likelihood"]})
    with pytest.raises(SpecError) as refused:
        plan(chat, evaluation={"source": "chat.jsonl", "format": "messages"})
    assert "likelihood, generated need questions with options" in str(refused.value)


# -- which version of a hub model is meant


def test_a_revision_goes_to_every_job_and_is_refused_for_a_path(folder: Path) -> None:
    made = plan(folder, base_model="owner/name", revision="v2")
    specs = [job.spec for job in made.jobs if isinstance(job.spec, (TrainSpec, EvaluateSpec))]
    assert [spec.revision for spec in specs] == ["v2"] * 3
    with pytest.raises(SpecError, match="only a hub model has one"):
        plan(folder, revision="v2")


def test_a_dtype_goes_to_every_job_that_loads_a_model(folder: Path) -> None:
    made = plan(
        folder, dtype="float16", export={}, original_task={"source": "test.jsonl", "limit": 1}, base_model="owner/name",
        ensembles=[{"name": "mean", "method": "cat"}], sweep={"grid": {"lora.r": [8, 16]}},
    )  # fmt: skip
    specs = {job.id: job.spec for job in made.jobs if isinstance(job.spec, (TrainSpec, EvaluateSpec, ExportSpec))}
    assert {"1", "1.export", "1.eval", "1.original", "mean"} < set(specs)
    assert {name: spec.dtype for name, spec in specs.items()} == dict.fromkeys(specs, "float16")


def test_base_evaluations_differ_by_dtype(folder: Path) -> None:
    assert len({base_id(plan(folder, dtype=dtype)) for dtype in (None, "bfloat16", "float16")}) == 3


def test_base_evaluations_differ_by_revision(folder: Path) -> None:
    ids = {base_id(plan(folder, base_model="owner/name", revision=name)) for name in (None, "v2", "v3")}
    assert len(ids) == 3
    assert base_id(plan(folder, base_model="owner/name", revision="main")) in ids


class Hub(BaseHTTPRequestHandler):
    """Says what the commit of `main` is, to those who have the token."""

    sha = "a" * 40

    def do_GET(self) -> None:
        known = self.path == "/api/models/owner/name/revision/main" and self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"sha": self.sha}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield Hub
        server.shutdown()
        thread.join()


def test_a_base_model_whose_branch_moved_is_asked_anew(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = base_id(plan(folder, base_model="owner/name"))
    assert base_id(plan(folder, base_model="owner/name")) == before
    assert base_id(plan(folder, base_model="owner/name", revision="a" * 40)) == before  # the commit that main is
    monkeypatch.setattr(hub, "sha", "b" * 40)
    assert base_id(plan(folder, base_model="owner/name")) != before
    assert commit("owner/other", None) is None


def test_offline_the_cache_says_what_a_branch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert commit("owner/name", None) is None
    (tmp_path / "models--owner--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("c" * 40)
    assert commit("owner/name", None) == "c" * 40
    assert fingerprint("owner/name") == f"owner/name@{'c' * 40}"


# -- chat templates and prompts


def templates(made: Plan) -> set[str | None]:
    return {job.spec.chat_template for job in made.jobs if isinstance(job.spec, (TrainSpec, EvaluateSpec))}


def test_a_chat_template_is_a_name_jinja_or_a_file_whose_content_travels(folder: Path) -> None:
    (folder / "own.jinja").write_text("{{ messages[0].content }}")
    assert templates(plan(folder)) == {None}
    assert templates(plan(folder, chat_template="chatml")) == {"chatml"}
    assert templates(plan(folder, chat_template="own.jinja")) == {"{{ messages[0].content }}"}
    assert templates(plan(folder, chat_template="{{ bos_token }}")) == {"{{ bos_token }}"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("chatmll", "neither alpaca, chatml, gemma"),
        ("no.jinja", "'no.jinja' is neither"),
        ("{% if %}", "no valid Jinja"),
    ],
)
def test_a_chat_template_that_cannot_be_is_refused(folder: Path, given: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as error:
        plan(folder, chat_template=given)
    assert error.value.problems[0].path == "chat_template"


def test_a_system_prompt_that_the_evaluation_does_not_have_is_pointed_out(folder: Path) -> None:
    made = plan(folder, data={"source": "train.jsonl", "system_prompt": "Be brief"})
    assert any("different system prompts" in warning for warning in made.warnings)
    both = {"source": "test.jsonl", "system_prompt": "Be brief"}
    assert plan(folder, data=both, evaluation=both).warnings == ()


def test_a_split_that_cannot_be_is_refused_before_anything_is_submitted(folder: Path) -> None:
    with pytest.raises(DataError, match="leaves none to"):
        plan(folder, data={"source": "train.jsonl", "validation_split": 0.5})


ORIGINAL = {"source": "test.jsonl", "split": "test", "metrics": ["likelihood"]}


def asked(made: Plan) -> list[tuple[str, bool, str | None, tuple[str, ...]]]:
    return [
        (job.id, job.spec.original_task, job.spec.from_adapter, job.needs)
        for job in made.jobs
        if isinstance(job.spec, EvaluateSpec) and not job.shared
    ]


def test_the_original_task_is_asked_of_the_base_model_once_and_of_each_adapter(folder: Path) -> None:
    made = plan(folder, original_task=ORIGINAL, sweep={"grid": {"lora.r": [8, 16]}})
    assert asked(made) == [
        ("1.eval", False, None, ("1",)),
        ("1.original", True, None, ("1",)),
        ("2.eval", False, None, ("2",)),
        ("2.original", True, None, ("2",)),
    ]
    assert len([job for job in made.jobs if job.shared]) == 2, "each task of the base model"
    same = plan(folder, original_task={"source": "test.jsonl"})
    assert len([job for job in same.jobs if job.shared]) == 1, "the same questions are asked once"
    alone = plan(folder, evaluation=None, original_task=ORIGINAL | {"compare_with_base": False})
    assert asked(alone) == [("1.original", True, None, ("1",))]
    with pytest.raises(SpecError, match="without data nothing is trained"):
        plan(folder, data=None, original_task=ORIGINAL)


def test_a_training_that_goes_on_is_measured_against_the_earlier_adapter(folder: Path) -> None:
    grid = {"grid": {"lora.r": [8, 16]}}
    made = plan(
        folder, evaluation=None, original_task=ORIGINAL, from_adapter="/on/a/worker", sweep=grid, workers_are_here=False
    )
    assert asked(made) == [
        ("1.before", False, "/on/a/worker", ()),
        ("1.original", True, None, ("1",)),
        ("2.original", True, None, ("2",)),
    ]
    assert [job.id for job in made.jobs if job.shared] == []


def advised(folder: Path, **changes: object) -> tuple[str, ...]:
    many = folder / "many.jsonl"
    many.write_text("".join(json.dumps({**ROW, "question": f"{number}?"}) + "\n" for number in range(400)))
    return plan(folder, **{"data": {"source": "many.jsonl"}, "training": {"max_steps": 50}} | changes).advice


def test_what_is_unusual_is_said_once_for_a_batch(folder: Path) -> None:
    assert advised(folder) == ()
    rates = [1e-4, 2e-4, 0.01]
    steps = [50, 900]
    long, fast = advised(folder, sweep={"grid": {"training.learning_rate": rates, "training.max_steps": steps}})
    assert long.startswith("18 epochs: after 3 a model mostly learns its rows by heart; early_stopping_patience stops")
    assert long.endswith(" (3 of 6 trials)")
    assert fast == "learning_rate 0.01 is above the usual range for method qlora (5e-06 to 0.0005) (2 of 6 trials)"
    assert advised(folder, training={"learning_rate": 0.01}, sweep={"grid": {"lora.r": [8, 16]}})[0].endswith("0.0005)")
    assert advised(folder, training={"max_steps": 10}) == ("10 steps of 8 see 80 of 400 rows",)
    wild = [round(0.01 * n, 2) for n in range(1, 21)]
    assert advised(folder, sweep={"grid": {"training.learning_rate": wild}})[-1] == "and 12 more of that kind"


def test_what_a_training_sees_is_counted_as_it_will_be(folder: Path) -> None:
    data = {"source": "many.jsonl", "replay": {"source": "train.jsonl", "fraction": 0.5}}
    assert advised(folder, data=data, training={"max_steps": 10}) == ("10 steps of 8 see 80 of 401 rows",)
    doubled = plan(folder, data={"source": "test.jsonl"}).advice
    assert "1 of 2 rows read the same as an earlier one" in doubled
    assert "2 rows are few: some hundreds are usual" in doubled
    hub = {"source": "owner/rows", "replay": {"source": "owner/others"}}
    assert plan(folder, data=hub, training={"max_steps": 10}).advice == (), "nobody here knows how many rows there are"
    assert plan(folder, data=hub, training={"num_train_epochs": 9.0}).advice[0].startswith("9 epochs")


def test_a_training_that_goes_on_from_an_adapter_may_forget(folder: Path) -> None:
    goes_on = {"from_adapter": "owner/adapter", "workers_are_here": False}
    words = "from_adapter may forget what it was trained on: ewc or data.replay hold on to that; original_task shows it"
    assert advised(folder, **goes_on) == (words,)
    assert advised(folder, **goes_on, ewc={"ewc_lambda": 1.0, "data": {"source": "train.jsonl"}}) == ()


def test_a_file_that_a_judge_is_asked_about_is_read_once(folder: Path) -> None:
    with (folder / "test.jsonl").open("a") as rows:
        rows.write('{"question": "?"}\n')
    made = plan(folder, evaluation={"source": "test.jsonl", "metrics": ["generated"], "judge": {"model": "grader"}})
    assert len([warning for warning in made.warnings if "cannot be used" in warning]) == 1
