"""The parser of sweep files: what it understands, and that it reports every problem at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobqueue import sweep as sweep_module
from jobqueue.errors import SpecError
from jobqueue.sweep import Sweep, read_sweep

HEAD = "name: medqa\nbase_model: org/model\n"
TRACKERS = "'none', 'all', 'tensorboard', 'wandb', 'mlflow', 'trackio', 'comet_ml' or 'swanlab'"
GOOD = HEAD + "data: {source: rows.jsonl}\n"

Read = Callable[..., Sweep]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_text(text: str, *sets: str) -> Sweep:
        file = tmp_path / "sweep.yaml"
        file.write_text(text, encoding="utf-8")
        return read_sweep(file, sets)

    return read_text


@pytest.fixture
def problems(read: Read) -> Callable[..., list[tuple[int | None, str, str]]]:
    """(line, key, message) of everything that is wrong with a file."""

    def of(text: str, *sets: str) -> list[tuple[int | None, str, str]]:
        with pytest.raises(SpecError) as caught:
            read(text, *sets)
        return [(problem.line, problem.path, problem.message) for problem in caught.value.problems]

    return of


Problems = Callable[..., list[tuple[int | None, str, str]]]


def values(read_sweep: Sweep, key: str) -> list[Any]:
    """The value of a dotted key in each trial."""
    found = []
    for trial in read_sweep.trials:
        value: Any = trial.run
        for part in key.split("."):
            value = getattr(value, part)
        found.append(value)
    return found


# --- What is understood


def test_defaults_are_those_of_the_notebook(read: Read) -> None:
    (trial,) = read(GOOD).trials

    assert (trial.label, trial.differs) == ("", {})
    assert (trial.run.method, trial.run.lora.r, trial.run.training.learning_rate) == ("qlora", 16, 2e-4)
    assert (trial.run.training.steps, trial.run.training.effective_batch) == (200, 8)


def test_a_dtype_is_one_of_two_and_null_as_the_notebook_has_it(read: Read) -> None:
    assert values(read(GOOD), "dtype") == values(read(GOOD + "dtype: null\n"), "dtype") == [None]
    swept = read(GOOD + "sweep: {grid: {dtype: [null, bfloat16, float16]}}\n")
    assert values(swept, "dtype") == [None, "bfloat16", "float16"]
    assert [trial.label for trial in swept.trials][1:] == ["dtype=bfloat16", "dtype=float16"]


def test_grid_makes_every_combination_in_order(read: Read) -> None:
    found = read(GOOD + "sweep:\n  grid: {training.learning_rate: [1e-4, 2e-4], lora.r: [8, 16]}\n")

    assert [trial.label for trial in found.trials] == [
        "learning_rate=0.0001 r=8",
        "learning_rate=0.0001 r=16",
        "learning_rate=0.0002 r=8",
        "learning_rate=0.0002 r=16",
    ]
    assert values(found, "training.learning_rate") == [1e-4, 1e-4, 2e-4, 2e-4]
    assert values(found, "lora.r") == [8, 16, 8, 16]


def test_list_sets_keys_together(read: Read) -> None:
    found = read(GOOD + "sweep:\n  list:\n  - {lora.r: 8, lora.lora_alpha: 16}\n  - {lora.r: 32}\n")

    assert [trial.label for trial in found.trials] == ["r=8 lora_alpha=16", "r=32"]
    assert values(found, "lora.lora_alpha") == [16, 16]


def test_grid_is_repeated_for_each_entry_of_the_list(read: Read) -> None:
    found = read(GOOD + "sweep:\n  list: [{lora.r: 8}, {lora.r: 16}]\n  grid: {training.seed: [1, 2, 3]}\n")

    assert [trial.label for trial in found.trials] == [f"r={r} seed={seed}" for r in (8, 16) for seed in (1, 2, 3)]


def test_label_names_the_whole_key_where_the_last_part_is_ambiguous(read: Read) -> None:
    text = (
        HEAD
        + "data: {source: a}\nevaluation: {source: b}\n"
        + "sweep: {grid: {data.limit: [1], evaluation.limit: [2], method: [lora]}}\n"
    )

    assert [trial.label for trial in read(text).trials] == ["data.limit=1 evaluation.limit=2 method=lora"]


def test_section_that_the_file_leaves_out_can_be_varied(read: Read) -> None:
    found = read(GOOD + "sweep: {grid: {evaluation: [null, {source: q.jsonl}]}}\n")

    assert [run.evaluation is None for run in (trial.run for trial in found.trials)] == [True, False]


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", ".0002", "2.0e-4"])
def test_numbers_with_exponents_are_numbers(read: Read, text: str) -> None:
    """YAML 1.1 reads 2e-4 as text."""
    assert values(read(GOOD + f"training: {{learning_rate: {text}}}\n"), "training.learning_rate") == [2e-4]


@pytest.mark.parametrize("text", ["no", "on", "off", "yes", "y", "n", "2024-01-01", "0o17x", "12:30:45"])
def test_words_that_older_yaml_reads_as_something_else_are_text(read: Read, text: str) -> None:
    assert values(read(HEAD + f"data: {{source: {text}}}\n"), "data.source") == [text]


@pytest.mark.parametrize("text", ["no", "off", '"false"', "0"])
def test_only_true_and_false_are_booleans(problems: Problems, text: str) -> None:
    ((line, key, message),) = problems(GOOD + f"training:\n  packing: {text}\n")

    assert (line, key) == (5, "training.packing")
    assert "must be true or false" in message


def test_whole_number_is_a_float_where_one_is_needed(read: Read) -> None:
    assert values(read(GOOD + "training: {num_train_epochs: 3}\n"), "training.num_train_epochs") == [3.0]


@pytest.mark.parametrize(("text", "gib"), [("12", 12), ("12GiB", 12), ("0.5", 0.5), ('"8"', 8), ("1024MiB", 1)])
def test_memory_is_in_gib_unless_it_says(read: Read, text: str, gib: float) -> None:
    assert values(read(GOOD + f"resources: {{memory: {text}}}\n"), "resources.memory") == [gib * 2**30]


def test_utf8_byte_order_mark_anchors_and_comments(read: Read) -> None:
    found = read(
        "\ufeff# a comment\n"
        + GOOD.replace("{source: rows.jsonl}", "&rows {source: ärzte.jsonl}")
        + "evaluation: *rows\n"
    )

    assert values(found, "evaluation.source") == ["ärzte.jsonl"]
    assert values(found, "evaluation.split") == ["test"]


# --- --set


def test_set_overrides_the_file_and_its_types_are_those_of_yaml(read: Read) -> None:
    found = read(
        GOOD, "training.learning_rate=3e-4", "lora.r=4", "training.logging_steps=3", "name=other", "data.source=a=b"
    )

    assert found.name == "other"
    assert values(found, "training.learning_rate") == [3e-4]
    assert values(found, "lora.r") == [4]
    assert values(found, "training.logging_steps") == [3]
    assert values(found, "data.source") == ["a=b"]


def test_set_of_a_list_and_of_a_sweep(read: Read) -> None:
    found = read(GOOD, "sweep.grid={lora.r: [1, 2]}", "lora.target_modules=[q_proj]")

    assert values(found, "lora.r") == [1, 2]
    assert values(found, "lora.target_modules") == [("q_proj",)] * 2


def test_values_are_repeated_as_they_are_written_and_a_long_one_only_in_part(problems: Problems) -> None:
    text = "base_model: m\nmethod:\nlora: {r: true}\nsweep: {grid: {training.seed: }}\n"
    found = {key: message for _, key, message in problems(f"name: {'x' * 300}\n{text}")}

    assert found["lora.r"] == "must be an integer, not true"
    assert found["sweep.grid.training.seed"] == "must be a list, not null"
    assert found["method"].endswith(", not null")
    assert found["name"].startswith("must have at most 80 characters, not 'xxx")
    assert len(found["name"]) < 150


DRAWN = f"{GOOD}sweep: {{random: {{samples: 2, parameters: {{lora.r: {{min: 8, max: 64}}}}}}}}\n"


def test_set_of_a_key_that_is_varied_keeps_its_dots(read: Read) -> None:
    assert values(read(GOOD, "sweep.grid.lora.r=[1, 2]"), "lora.r") == [1, 2]
    assert values(read(DRAWN, "sweep.grid.training.seed=[5]"), "training.seed") == [5, 5]
    assert values(read(DRAWN, "sweep.random.parameters.lora.lora_alpha=[4]"), "lora.lora_alpha") == [4, 4]
    narrow = read(DRAWN, "sweep.random.parameters.lora.r.max=9", "sweep.random.seed=1")
    assert set(values(narrow, "lora.r")) == {8, 9}


def test_a_wrong_set_of_a_key_that_is_varied_is_told_by_that_key(problems: Problems) -> None:
    wrong = ["sweep.grid.lora.r=[0]", "sweep.grid.lora.rr=[8]", "sweep.grid.training.seed=5"]

    found = {(line, key) for line, key, _ in problems(GOOD, *wrong)}
    assert found == {(None, item.partition("=")[0]) for item in wrong}
    assert problems(f"{GOOD}sweep: {{grid: 5}}\n", "sweep.grid.lora.r=[8]")


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ("grid: {lora.r: [8, 16]}", True),
        ("random: {samples: 2, parameters: {lora.r: [8, 16]}}", True),
        ("list: [{lora.r: 8}, {lora.r: 16}]", True),
        ("list: [{lora.r: 8}, {lora.lora_alpha: 16}]", False),
    ],
)
def test_set_of_a_key_that_every_configuration_has_its_own_value_of_is_a_problem(
    problems: Problems, read: Read, sweep: str, told: bool
) -> None:
    """It looked as if it had worked, and changed nothing."""
    text = f"{GOOD}sweep: {{{sweep}}}\n"

    if told:
        [(line, key, message)] = problems(text, "lora.r=4")
        assert (line, key, message.partition(":")[0]) == (None, "lora.r", "has no effect")
        assert len(problems(text, "lora.r=4", "training.seed=x")) == 2
    else:
        assert values(read(text, "lora.r=4"), "lora.r") == [8, 4]


def test_wrong_sets_are_problems_without_a_line(problems: Problems) -> None:
    found = problems(GOOD, "lora.r=0", "lora.rank=8", "training", "lora.r.x=1", "data.source=[")

    assert {line for line, _, _ in found} == {None}
    text = "\n".join(f"{key}: {message}" for _, key, message in found)
    assert "lora.r: " in text
    assert "unknown key 'rank'" in text
    assert "'training' must look like key=value" in text
    assert "'lora.r.x' goes into something that is no section" in text
    assert "'[' is not valid YAML" in text


def test_set_mends_what_the_file_has_wrong(read: Read) -> None:
    assert values(read(GOOD + "lora: {r: 0}\n", "lora.r=8"), "lora.r") == [8]


def test_set_of_a_key_in_a_wrong_section_is_told_apart_from_the_file(problems: Problems) -> None:
    found = problems(GOOD + "training:\n  seed: x\n", "training.max_steps=y")

    assert [(line, key) for line, key, _ in found] == [(None, "training.max_steps"), (5, "training.seed")]


# --- What is wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {use_gradient_checkpointing: maybe}", "must be true or false or 'unsloth' or 'auto', not 'maybe'"),
        ("dtype: float32", "must be 'bfloat16' or 'float16', not 'float32'"),
        ("lora: {target_modules: q_proj}", "must be a list or 'all-linear', not 'q_proj'"),
        ("lora: {r: [8, 16]}", "must be an integer; several values to try belong under sweep.grid"),
        (
            "lora: {bias: [none, all]}",
            "must be 'none', 'all' or 'lora_only'; several values to try belong under sweep.grid",
        ),
        ("resources: {memory: lots}", "must be a size such as 12GiB, not 'lots'"),
        ("evaluation: {source: q, metrics: [x]}", "must be 'likelihood', 'generated', 'perplexity' or 'bleu', not 'x'"),
        ("lora: 8", "must be a section, not 8"),
        ("training: {report_to: 3}", f"must be {TRACKERS} or a list, not 3"),
        ("training: {learning_rate: '2e-4'}", "must be a number, not '2e-4'"),
        ("training: {neftune_noise_alpha: 0}", "must be greater than 0, not 0"),
        ("training: {neftune_noise_alpha: five}", "must be a number, not 'five'"),
        ("training: {max_grad_norm: -1}", "must be greater than or equal to 0, not -1"),
        ("evaluation: {source: q, metrics: []}", "must have at least 1 value"),
        ("ensembles: [{name: a, method: vote, trials: [7]}]", "must have at least 2 values"),
        ("ensembles: [{name: a, method: vote, trials: [1, x]}]", "must be an integer, not 'x'"),
        (
            "ensembles: [{name: a, method: vote, trials: best}]",
            "must be 'all' or match '^best:[1-9][0-9]*$' or a list, not 'best'",
        ),
    ],
)
def test_one_plain_message_per_value(problems: Problems, text: str, message: str) -> None:
    assert [found for _, _, found in problems(GOOD + text + "\n")] == [message]


def test_mistake_in_a_merged_section_is_placed_at_the_section(problems: Problems) -> None:
    text = HEAD + "data: &rows {source: a, bad: 1}\nevaluation:\n  <<: *rows\n  split: test\n"

    assert [(line, key) for line, key, _ in problems(text)] == [(3, "data.bad"), (4, "evaluation.bad")]


def test_key_missing_in_a_section_of_a_set(problems: Problems) -> None:
    for item in ("evaluation.split=test", "evaluation={split: test}"):
        assert problems(GOOD, item) == [(None, "evaluation.source", "is missing")]


def test_tags_run_nothing(read: Read) -> None:
    assert values(read(GOOD + "lora: !!python/object/apply:os._exit {r: 8}\n"), "lora.r") == [8]


def test_every_problem_is_reported_at_once_in_the_order_of_the_file(problems: Problems) -> None:
    found = problems(
        "name: bad name!\n"
        "base_model: 7\n"
        "data: {splt: train}\n"
        "lora:\n"
        '  r: "16"\n'
        "  bias: some\n"
        "training:\n"
        "  learning_rate: -1\n"
        "evaluation: {source: q, metrics: [likelihood, generatd]}\n"
        "resorces: {}\n"
    )

    assert [(line, key) for line, key, _ in found] == [
        (1, "name"),
        (2, "base_model"),
        (3, "data.source"),
        (3, "data.splt"),
        (5, "lora.r"),
        (6, "lora.bias"),
        (8, "training.learning_rate"),
        (9, "evaluation.metrics.1"),
        (10, "resorces"),
    ]
    messages = {key: message for _, key, message in found}
    assert messages["data.source"] == "is missing"
    assert messages["data.splt"] == "unknown key 'splt'; did you mean split?"
    assert messages["resorces"] == "unknown key 'resorces'; did you mean resources?"
    assert "not '16'" in messages["lora.r"]
    assert "'generated'" in messages["evaluation.metrics.1"]


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("max_steps: 20", "max_steps", "training.max_steps"),
        ("lora: {learning_rate: 1e-4}", "lora.learning_rate", "training.learning_rate"),
        ("sweep: {grid: {r: [8, 16]}}", "sweep.grid.r", "lora.r"),
        ("grid: {lora.r: [8]}", "grid", "sweep.grid"),
        ("source: x.csv", "source", "data.source or evaluation.source or original_task.source"),
    ],
)
def test_a_key_in_the_wrong_section_is_answered_with_the_right_one(
    problems: Problems, text: str, key: str, meant: str
) -> None:
    ((_, where, message),) = problems(f"{GOOD}{text}\n")

    assert (where, message) == (key, f"unknown key {key.rpartition('.')[2]!r}; did you mean {meant}?")


def test_error_says_file_line_and_what_to_do(read: Read) -> None:
    with pytest.raises(SpecError) as caught:
        read(GOOD + "lora: {rank: 8}\n")

    assert "sweep.yaml:4: lora.rank: unknown key 'rank'; " in caught.value.what
    assert "nothing was submitted" in caught.value.do
    assert caught.value.exit_code == 3


def test_unknown_key_without_a_likeness_lists_what_is_known(problems: Problems) -> None:
    ((_, _, message),) = problems(GOOD + "lora: {zzzzzz: 8}\n")

    assert "known here: bias, loftq_config, lora_alpha" in message


def test_both_lengths_of_training(problems: Problems) -> None:
    ((line, key, message),) = problems(GOOD + "training:\n  max_steps: 20\n  num_train_epochs: 2\n")

    assert (line, key) == (5, "training.max_steps")
    assert "and num_train_epochs are both set" in message


def test_both_lengths_by_way_of_the_sweep(problems: Problems) -> None:
    found = problems(GOOD + "training: {num_train_epochs: 2}\nsweep:\n  grid:\n    training.max_steps: [10, -1]\n")

    assert [(line, key) for line, key, _ in found] == [(7, "sweep.grid.training.max_steps")]


def test_all_that_does_not_go_together_is_told_at_once_each_in_its_line(problems: Problems) -> None:
    text = HEAD + "evaluation: {source: a/b}\nfrom_adapter: b/1\nmethod: full\nexport: {}\nlora:\n  loftq_config: {}\n"
    found = problems(text + "training:\n  eval_steps: 5\noriginal_task:\n  source: a/b\n  judge: {model: m}\n")
    assert {(line, key) for line, key, _ in found} == {
        (4, "from_adapter"),
        (6, "export"),
        (8, "lora.loftq_config"),
        (10, "training.eval_steps"),
        (11, "original_task"),
        (13, "original_task.judge"),
    }
    assert [message.split(", and ")[1] for _, key, message in found if key == "from_adapter"] == [
        "without data nothing is trained",
        "method full trains none",
        "lora.loftq_config initialises a fresh one",
    ]


def test_what_one_key_needs_may_be_among_what_is_varied(read: Read) -> None:
    text = "name: medqa\ndata: {source: q, validation_split: 0.1}\ntraining: {early_stopping_patience: 3}\n"
    trials = read(text + "sweep: {grid: {base_model: [a/b, c/d], training.eval_steps: [5]}}\n").trials

    assert [(trial.run.base_model, trial.run.training.eval_steps) for trial in trials] == [("a/b", 5), ("c/d", 5)]


def test_a_wrong_key_of_a_grid_is_told_together_with_what_else_is_wrong(problems: Problems) -> None:
    found = problems(GOOD + "training: {max_step: 3}\nsweep:\n  grid:\n    lora.rr: [8]\n")

    assert [(line, key) for line, key, _ in found] == [(4, "training.max_step"), (7, "sweep.grid.lora.rr")]


def test_nothing_to_do(problems: Problems) -> None:
    ((_, _, message),) = problems(HEAD)

    assert "neither data nor evaluation is set" in message


@pytest.mark.parametrize(
    ("sweep", "line", "key", "words"),
    [
        ("  grid: {lora.r: [8, 0]}", 5, "sweep.grid.lora.r", "greater than 0"),
        ("  grid: {lora.foo: [1]}", 5, "sweep.grid.lora.foo", "unknown key 'foo'"),
        ("  grid: {lora: [8]}", 5, "sweep.grid.lora", "not 8"),
        ("  grid: {name: [a, b]}", 5, "sweep.grid.name", "cannot be varied"),
        ("  grid: {sweep.grid: [a]}", 5, "sweep.grid.sweep.grid", ""),
        ("  grid: {lora.r.x: [1]}", 5, "sweep.grid.lora.r.x", ""),
        ("  grid: {lora.r: 8}", 5, "sweep.grid.lora.r", "must be a list, not 8"),
        ("  grid: {lora.r: []}", 5, "sweep.grid.lora.r", "at least 1"),
        ("  list: [{lora.r: 8}, {lora.r: x}]", 5, "sweep.list.1.lora.r", "integer"),
        ("  gird: {lora.r: [8]}", 5, "sweep.gird", "did you mean grid?"),
        ("  list:\n  - lora.r: 8\n  - data.limit: -3", 7, "sweep.list.1.data.limit", "greater than 0"),
        ("  grid: {lora.r: [8, 16], training.seed: [-1]}", 5, "sweep.grid.training.seed", "greater than or equal to 0"),
    ],
)
def test_mistakes_in_a_sweep(problems: Problems, sweep: str, line: int, key: str, words: str) -> None:
    found = problems(GOOD.replace("}\n", "}\nlora: {r: 16}\n").replace("lora: {r: 16}\n", "") + f"sweep:\n{sweep}\n")

    assert [(at, path) for at, path, _ in found] == [(line, key)]
    assert words in found[0][2]


def test_a_part_of_the_sweep_that_cannot_be_read_hides_no_other_mistake(problems: Problems) -> None:
    found = problems(
        HEAD
        + """dta: {source: rows.jsonl}
data: {source: rows.jsonl}
sweep:
  grid:
    training.learning_rate: 1e-4
    lora.rr: [8, 16]
    lora.lora_alpha: [8, sixteen]
    lora.r: []
  list:
  - {lora.lora_dropout: 0.1}
  - 7
  - {training.sed: 1}
"""
    )

    assert [(line, path) for line, path, _ in found] == [
        (3, "dta"),
        (7, "sweep.grid.training.learning_rate"),
        (8, "sweep.grid.lora.rr"),
        (9, "sweep.grid.lora.lora_alpha"),
        (10, "sweep.grid.lora.r"),
        (13, "sweep.list.1"),
        (14, "sweep.list.2.training.sed"),
    ]


def test_a_grid_below_what_is_no_section_is_told_with_the_line_of_either(problems: Problems) -> None:
    found = problems(GOOD + "lora: 7\nsweep:\n  grid:\n    lora.r: [8]\n")

    assert [(line, key) for line, key, _ in found] == [(4, "lora"), (7, "sweep.grid.lora.r")]


def test_a_sweep_of_too_many(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "MAX_TRIALS", 5)

    ((line, key, message),) = problems(GOOD + "sweep: {grid: {lora.r: [1, 2, 3], training.seed: [1, 2]}}\n")

    assert (line, key) == (4, "sweep")
    assert "6" in message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "must be a mapping"),
        ("- a\n- b\n", 1, "must be a mapping"),
        ("just words\n", 1, "must be a mapping"),
        (GOOD + "lora: {r: 8\n", None, "not valid YAML"),
        (GOOD + "lora:\n\tr: 8\n", 5, "not valid YAML"),
        (GOOD + "name: again\n", 4, "not valid YAML"),
        (GOOD + "lora:\n  r: 8\n  r: 16\n", 6, "not valid YAML"),
        (GOOD + "lora: *nowhere\n", 4, "not valid YAML"),
        (GOOD + "---\nname: second\n", None, "not valid YAML"),
    ],
)
def test_text_that_cannot_be_read(problems: Problems, text: str, line: int | None, words: str) -> None:
    found = problems(text)

    assert words in found[0][2]
    if line is not None:
        assert found[0][0] == line


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothere\.yaml: there is no such file"):
        read_sweep(tmp_path / "nothere.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"name: \xe9\n"])
def test_file_that_is_no_utf8(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.yaml").write_bytes(content)

    with pytest.raises(SpecError, match="cannot be read"):
        read_sweep(tmp_path / "sweep.yaml")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "1: x\n",
        GOOD + "training: {learning_rate: .nan}\n",
        GOOD + "training: {learning_rate: .inf}\n",
        GOOD + "lora: 8\n",
        GOOD + "lora: [8]\n",
        GOOD + "sweep: 3\n",
        GOOD + "sweep: {list: [3]}\n",
        GOOD + "sweep: {grid: {1: [2]}}\n",
        GOOD + "data:\n",
        GOOD.replace("{source: rows.jsonl}", "[rows.jsonl]"),
        GOOD + "? {a: b}\n: c\n",
        GOOD + "evaluation: {source: q, metrics: []}\n",
        "name: ~\nbase_model: ''\ndata: {source: x}\n",
    ],
)
def test_odd_values_are_problems_and_no_crash(problems: Problems, text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize("item", ["=3", "a..b=1", ".=1", "lora.=1", "sweep.grid=3", "sweep=x", "data=~"])
def test_odd_sets_are_problems_and_no_crash(problems: Problems, item: str) -> None:
    assert problems(GOOD, item)


def test_a_grid_with_a_value_twice_or_with_a_key_of_the_list_is_refused(problems: Problems) -> None:
    twice = problems(GOOD + "sweep: {grid: {lora.r: [8, 8]}}\n")
    both = problems(GOOD + "sweep: {grid: {lora.r: [8, 16]}, list: [{lora.r: 4}]}\n")

    assert [message for _, _, message in twice] == ["has a value twice"]
    assert [message for _, _, message in both] == ["is varied by the grid too"]


def test_packing_without_rows_end_to_end_is_refused(problems: Problems) -> None:
    message = problems(GOOD + "training: {packing: true, padding_free: false}\n")[0][2]

    assert "padding_free is false; leave one of them out" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{source: d.csv, template: {user: "{{ q"}}', "data.template.user: is no valid Jinja template"),
        ('{source: d.csv, template: {user: "{{ q }}"}}', "data.template: needs user and assistant"),
        ('{source: d.csv, template: {text: "{{ q }}", system: x}}', "data.template: needs user and assistant"),
        ("{source: d.csv, template: {asks: x}}", "data.template.asks: unknown key 'asks'"),
        ('{source: d.csv, format: text, template: {text: "{{ q }}"}}', "data.template: says how a row is read"),
        ("{source: d.csv, validation_split: 1}", "data.validation_split: must be less than 1"),
        ("{source: d.csv, revison: main}", "data.revison: unknown key 'revison'; did you mean revision?"),
    ],
)
def test_mistakes_of_the_data_are_told_by_their_key(read: Read, data: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        read(HEAD + f"data: {data}\n")
    assert message in str(error.value.problems[0])


def test_a_validation_loss_needs_rows_to_validate_on(problems: Problems, read: Read) -> None:
    ((_, key, message),) = problems(GOOD + "training: {eval_steps: 10}\n")
    assert (key, message) == ("training.eval_steps", "needs rows to validate on: set data.validation_split")
    assert read(HEAD + "data: {source: a/b, validation_split: 0.1}\ntraining: {eval_steps: 10}\n").trials


@pytest.mark.parametrize("option", ["early_stopping_patience: 3", "load_best_model_at_end: true"])
def test_stopping_early_needs_validations_to_compare(problems: Problems, read: Read, option: str) -> None:
    data = HEAD + "data: {source: a/b, validation_split: 0.1}\n"
    ((_, key, message),) = problems(data + f"training: {{{option}}}\n")
    assert (key, message) == (
        f"training.{option.partition(':')[0]}",
        "needs validations to compare: set training.eval_steps",
    )
    assert read(data + f"training: {{{option}, eval_steps: 10}}\n").trials[0].run.training.keeps_best


def test_a_judge_needs_a_metric_that_writes_answers(problems: Problems) -> None:
    judged = GOOD + "evaluation: {source: q.jsonl, metrics: [%s], judge: {model: grader}}\n"
    [(_, path, message)] = problems(judged % "likelihood")
    assert path == "evaluation.judge"
    assert message == (
        "rates written answers, and no metric writes any: "
        "add generated (questions with options) or bleu (any rows) to metrics"
    )


def test_what_a_judge_may_not_be_is_said_with_its_place(problems: Problems) -> None:
    text = GOOD + (
        "evaluation:\n  source: q.jsonl\n  judge:\n    model: [a, a]\n    base_url: ftp://x\n"
        "    api_key_env: AWS_SECRET\n    samples: 0\n    prize: 1\n"
    )
    assert [(line, path.rpartition(".")[2]) for line, path, _ in problems(text)] == [
        (7, "model"), (8, "base_url"), (9, "api_key_env"), (10, "samples"), (11, "prize"),
    ]  # fmt: skip


def test_a_judge_is_read_with_its_defaults(read: Read) -> None:
    judged = GOOD + "evaluation: {source: q.jsonl, judge: {model: grader, limit: null, temperature: null}}\n"
    evaluation = read(judged).trials[0].run.evaluation
    assert evaluation is not None
    judge = evaluation.judge
    assert judge is not None
    assert (judge.models, judge.limit, judge.samples, judge.temperature) == (["grader"], None, 2, None)
    assert judge.cost("grader", 10, 10) is None


# --- What is drawn at random


RANDOM = """\
sweep:
  random:
    samples: {samples}
    seed: {seed}
    parameters:
      training.learning_rate: {{min: 1e-5, max: 1e-3, scale: log}}
      training.warmup_steps: {{min: 0, max: 20}}
      lora.lora_dropout: {{min: 0, max: 0.5}}
      lora.r: [8, 16, 32]
"""


def drawn(read: Read, samples: int = 200, seed: int = 1) -> list[tuple[Any, ...]]:
    found = read(GOOD + RANDOM.format(samples=samples, seed=seed))
    return [tuple(trial.differs.values()) for trial in found.trials]


def test_random_configurations_are_within_their_bounds_and_no_two_the_same(read: Read) -> None:
    found = read(GOOD + RANDOM.format(samples=200, seed=1))

    rates, dropouts = values(found, "training.learning_rate"), values(found, "lora.lora_dropout")
    assert 80 < sum(rate < 1e-4 for rate in rates) < 120, "half of the logarithms"
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 80 < sum(dropout < 0.25 for dropout in dropouts) < 120
    assert set(values(found, "training.warmup_steps")) == set(range(21))
    assert set(values(found, "lora.r")) == {8, 16, 32}
    assert len({trial.label for trial in found.trials}) == len(found.trials) == 200


def test_the_same_seed_draws_the_same_and_more_samples_only_add_to_them(read: Read) -> None:
    assert drawn(read) == drawn(read)
    assert drawn(read, samples=12) == drawn(read)[:12]
    assert drawn(read, seed=2)[0] != drawn(read)[0]


def test_what_was_drawn_can_be_copied_from_its_label(read: Read) -> None:
    trial = read(GOOD + RANDOM.format(samples=1, seed=1)).trials[0]
    given = dict(word.split("=") for word in trial.label.split())

    again = read(GOOD, *(f"training.{key}={given[key]}" for key in ("learning_rate", "warmup_steps")))
    assert again.trials[0].run.training == trial.run.training


def test_every_combination_of_a_grid_is_tried_with_each_that_was_drawn(read: Read) -> None:
    text = "sweep: {grid: {training.seed: [1, 2]}, random: {samples: 3, parameters: {lora.r: [4, 8, 16]}}}\n"
    found = read(GOOD + text)

    assert sorted(values(found, "lora.r")) == [4, 4, 8, 8, 16, 16]
    assert values(found, "training.seed") == [1, 2] * 3


def test_whole_numbers_are_drawn_evenly_to_their_ends(read: Read) -> None:
    text = "sweep: {random: {samples: 64, parameters: {lora.r: {min: 1, max: 64, scale: log}}}}\n"
    assert sorted(values(read(GOOD + text), "lora.r")) == list(range(1, 65))


def test_every_mistake_of_what_is_drawn_is_told_at_once(problems: Problems) -> None:
    text = """\
sweep:
  grid: {lora.lora_alpha: [8, 16]}
  random:
    samples: 40
    parameters:
      training.learning_rate: {min: 1e-3, max: 1e-5}
      lora.r: {min: 4}
      training.warmup_steps: 5
      lora.lora_alpha: [1, 2]
      training.weight_decy: {min: 0.0, max: 0.1}
      training.optim: [adamw_8bit, adam]
      lora.lora_dropout: {min: 0.0, max: 1.5}
      training.seed: {min: 0, max: 5, scale: log}
      training.max_steps: {values: [1], min: 1}
"""
    found = problems(GOOD + text)

    place = "sweep.random.parameters."
    assert sorted((line, key.removeprefix(place)) for line, key, _ in found if line) == [
        (9, "training.learning_rate.max"),
        (10, "lora.r"),
        (11, "training.warmup_steps"),
        (12, "lora.lora_alpha"),
        (13, "training.weight_decy"),
        (14, "training.optim"),
        (15, "lora.lora_dropout"),
        (16, "training.seed.min"),
        (17, "training.max_steps.min"),
    ]
    said = {key.removeprefix(place): message for _, key, message in found}
    assert said["lora.r"] == "needs values, or max"
    assert said["lora.lora_alpha"] == "is varied by the grid too"
    assert "weight_decay" in said["training.weight_decy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{samples: 5, parameters: {lora.r: [8, 16]}}", "must be at most 2: there are no more that differ"),
        ("{samples: 9, parameters: {lora.lora_dropout: {min: 0.1, max: 0.1001}}}", "must be at most 2"),
        ("{samples: 1, parameters: {}}", "must have at least 1 value"),
        ("{samples: 1, parameters: {lora.r: [8, 16, 8]}}", "has a value twice"),
        ("{samples: 0, parameters: {lora.r: [8]}}", "must be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(problems: Problems, text: str, message: str) -> None:
    ((line, _, said),) = problems(f"{GOOD}sweep:\n  random: {text}\n")
    assert (line, said.partition(",")[0]) == (5, message) or said.startswith(message)


def test_a_list_names_its_configurations_and_is_not_drawn_from(problems: Problems) -> None:
    text = "sweep:\n  list: [{lora.r: 8}]\n  random: {samples: 1, parameters: {lora.r: [8]}}\n"
    assert problems(GOOD + text) == [(6, "sweep.random", "does not go with list, which names its configurations")]


# --- Who is told of its end


def test_one_or_several_are_told(read: Read) -> None:
    assert read(GOOD).notify == ()
    assert read(GOOD + "notify: team\n").notify == ("team",)
    several = read(GOOD + "notify: [team, 'https://ci.example.org:8080/hooks/1?run=7']\n")
    assert several.notify == ("team", "https://ci.example.org:8080/hooks/1?run=7")
    assert read(GOOD, "notify=team").notify == ("team",)


@pytest.mark.parametrize(
    "wrong",
    [
        "https://user:password@ci.example.org/",
        "ftp://ci.example.org/x",
        "file:///etc/passwd",
        "https://",
        "https://ci.example.org:99999/",
        "a team",
        "https://ci.example.org/a b",
        "https://ci.example.org\\@evil.example/",
        "/bin/sh",
    ],
)
def test_what_is_no_receiver_is_refused_with_its_line(problems: Problems, wrong: str) -> None:
    [(line, key, message)] = problems(GOOD + f"notify: [team, '{wrong}']\n")

    assert (line, key) == (4, "notify.1")
    assert message == "is neither the name of a webhook nor an http(s) URL without user, password and spaces"


def test_who_is_told_is_not_varied(problems: Problems) -> None:
    [(_, key, message)] = problems(GOOD + "sweep: {grid: {notify: [a, b]}}\n")

    assert (key, message) == ("sweep.grid.notify", "cannot be varied")
