"""The ladder of micro-batches, and which rung an attempt takes; pure."""

from __future__ import annotations

from typing import Any

import pytest

from jobqueue.data_spec import DataSpec
from jobqueue.job_spec import TrainSpec
from jobqueue.memory import GIB, training_peak
from jobqueue.microbatch import MOST_TOKENS, OVER_ESTIMATE, choose, ladder, limit
from jobqueue.spec import LoraSpec, ResourcesSpec, TrainingSpec

LLAMA_1B: dict[str, Any] = {
    "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
ROW = 350
BIG: Any = {"config": LLAMA_1B, "budget_bytes": 1000 * GIB}


def train(checkpointing: Any = "auto", **training: Any) -> TrainSpec:
    return TrainSpec(
        base_model="m",
        method="qlora",
        data=DataSpec(source="s"),
        lora=LoraSpec(use_gradient_checkpointing=checkpointing),
        training=TrainingSpec(**training),
        resources=ResourcesSpec(),
    )


def steps(spec: TrainSpec, row_tokens: int = ROW) -> list[tuple[int, int, Any]]:
    return [
        (
            s.per_device_train_batch_size,
            s.gradient_accumulation_steps,
            "of long ones" if s.spares_short else s.use_gradient_checkpointing,
        )
        for s in ladder(spec, [row_tokens], "padded")
    ]


def test_the_article_s_batch_is_done_at_once_and_without_recomputation_first() -> None:
    assert steps(train()) == [
        (8, 1, False), (8, 1, "of long ones"), (8, 1, "unsloth"),
        (4, 2, "unsloth"), (2, 4, "unsloth"), (1, 8, "unsloth"),
    ]  # fmt: skip


@pytest.mark.parametrize("asked", [True, False, "unsloth"])
def test_what_the_user_says_of_checkpointing_stays(asked: Any) -> None:
    assert {checkpointing for _, _, checkpointing in steps(train(asked))} == {asked}


def test_a_split_that_is_to_be_kept_only_gets_smaller() -> None:
    spec = train("unsloth", auto_find_batch_size=False, per_device_train_batch_size=2, gradient_accumulation_steps=4)

    assert steps(spec) == [(2, 4, "unsloth"), (1, 8, "unsloth")]


@pytest.mark.parametrize("effective", [(1, 1), (3, 5), (7, 1), (6, 4), (128, 2)])
@pytest.mark.parametrize("row_tokens", [10, 350, 2048, 100_000])
def test_every_split_keeps_the_rows_of_a_step_and_none_comes_twice(effective: tuple[int, int], row_tokens: int) -> None:
    micro, accumulation = effective
    found = steps(train(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation), row_tokens)

    assert {size * times for size, times, _ in found} == {micro * accumulation}
    assert len(set(found)) == len(found)
    assert found[-1][0] == 1
    assert found[0][0] * row_tokens <= MOST_TOKENS or found[0][0] == 1


def test_the_fastest_that_fits_is_taken() -> None:
    spec = train()
    for rung, split in enumerate(ladder(spec, [2048], "padded")):
        if split.spares_short:  # all rows are equally long
            continue
        budget = training_peak(LLAMA_1B, split.of(spec), split.per_device_train_batch_size * 2048, "padded")
        choice = choose(spec, [2048], 0, config=LLAMA_1B, budget_bytes=budget)
        assert choice is not None
        assert (choice.rung, choice.estimated_bytes) == (rung, budget)


def test_where_only_the_longest_micro_batches_do_not_fit_the_others_are_not_recomputed() -> None:
    spec, lengths = train(), [250] * 1000 + [900] * 8
    without, split = ladder(spec, lengths, "flat")[:2]
    short = training_peak(LLAMA_1B, without.of(spec), 2600)
    assert short < training_peak(LLAMA_1B, without.of(spec), 8 * 900)

    choice = choose(spec, lengths, 0, layout="flat", config=LLAMA_1B, budget_bytes=short)

    assert choice is not None
    assert (choice.rung, choice.split, choice.tokens, choice.spared_tokens) == (1, split, 7200, 2600)
    assert choice.estimated_bytes == short, "more than the longest takes with checkpointing"
    smaller = training_peak(LLAMA_1B, without.of(spec), 8 * 250)
    hardly = choose(spec, lengths, 0, layout="flat", config=LLAMA_1B, budget_bytes=smaller)
    again = choose(spec, lengths, choice.rung + 1, layout="flat", config=LLAMA_1B, budget_bytes=short)
    for other in (hardly, again):  # it would be used for the shortest of all only; it has run out of memory
        assert other is not None
        assert (other.rung, other.spared_tokens) == (2, 0)


def test_rows_end_to_end_count_with_their_own_tokens_the_longest_that_can_meet() -> None:
    spec = train(per_device_train_batch_size=8, gradient_accumulation_steps=16)
    lengths = [100] * 900 + [2000] * 4

    padded, flat = (choose(spec, lengths, 0, layout=layout, **BIG) for layout in ("padded", "flat"))

    assert padded is not None
    assert flat is not None
    assert (padded.split.per_device_train_batch_size, padded.tokens) == (8, 8 * 2000)
    assert (flat.split.per_device_train_batch_size, flat.tokens) == (64, 4 * 2000 + 60 * 100)
    assert padded.tokens <= MOST_TOKENS
    assert flat.tokens <= MOST_TOKENS


def test_a_mask_of_all_tokens_is_part_of_the_estimate() -> None:
    flat, masked = (choose(train(), [2000] * 8, 0, layout=layout, **BIG) for layout in ("flat", "masked"))

    assert flat is not None
    assert masked is not None
    assert flat.split == masked.split
    assert masked.estimated_bytes - flat.estimated_bytes > masked.tokens**2


def test_where_nothing_is_thought_to_fit_the_smallest_is_tried() -> None:
    choice = choose(train(), [ROW], 0, config=LLAMA_1B, budget_bytes=GIB // 2)

    assert choice is not None
    assert choice.last
    assert choice.split.per_device_train_batch_size == 1


def test_an_attempt_after_one_that_ran_out_of_memory_begins_further_down() -> None:
    first = choose(train(), [ROW], 0, config=LLAMA_1B, budget_bytes=80 * GIB)
    assert first is not None
    second = choose(train(), [ROW], first.rung + 1, config=LLAMA_1B, budget_bytes=80 * GIB)
    assert second is not None
    assert second.split != first.split
    assert second.estimated_bytes < first.estimated_bytes


def test_below_the_last_rung_there_is_nothing() -> None:
    assert choose(train(), [ROW], len(ladder(train(), [ROW], "padded")), config=LLAMA_1B, budget_bytes=80 * GIB) is None


def test_what_was_measured_of_such_jobs_counts() -> None:
    budget = training_peak(LLAMA_1B, ladder(train(), [ROW], "padded")[0].of(train()), 8 * ROW, "padded")

    corrected = choose(train(), [ROW], 0, config=LLAMA_1B, budget_bytes=budget, correction=1.2)

    assert corrected is not None
    assert corrected.rung == 2


@pytest.mark.parametrize(
    "known", [{}, {"config": LLAMA_1B}, {"config": {"model_type": "other"}, "budget_bytes": 80 * GIB}]
)
@pytest.mark.parametrize("checkpointing", ["auto", "unsloth", False])
def test_without_config_or_budget_the_split_is_the_user_s_own(known: dict[str, Any], checkpointing: Any) -> None:
    choice = choose(train(checkpointing), [ROW], 0, **known)

    assert choice is not None
    assert choice.split.per_device_train_batch_size == 2
    assert choice.split.use_gradient_checkpointing == ("unsloth" if checkpointing == "auto" else checkpointing)


def test_a_job_leaves_to_others_what_its_estimate_does_not_ask_for_until_the_estimate_was_wrong() -> None:
    choice = choose(train(), [ROW], 0, config=LLAMA_1B, budget_bytes=70 * GIB)
    assert choice is not None

    assert limit(choice.estimated_bytes, 70 * GIB, ran_out=False) == int(choice.estimated_bytes * OVER_ESTIMATE)
    assert limit(choice.estimated_bytes, 70 * GIB, ran_out=True) == 70 * GIB
    assert limit(choice.estimated_bytes, 1, ran_out=False) == 1
    assert limit(choice.estimated_bytes, None, ran_out=True) is None, "on a machine that cannot tell"
