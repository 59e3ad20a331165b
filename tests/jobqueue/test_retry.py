"""What a failure leads to; pure."""

from __future__ import annotations

import pytest

from jobqueue.job import FailureReason
from jobqueue.retry import TABLE, decide, with_less_memory

# The second ends with its micro-batches, the third after so many in a row.
FREE = (FailureReason.PREEMPTED, FailureReason.OUT_OF_MEMORY, FailureReason.DEVICE)


def failures_until_the_end(reason: FailureReason, cap: int) -> int:
    """How often a job that always fails for that reason is run."""
    failures = 0
    while decide(reason, failures, cap).again:
        failures += 1
        assert failures < 100, "it is tried again without end"
    return failures + 1


def test_every_reason_has_a_rule() -> None:
    assert set(TABLE) == set(FailureReason)


@pytest.mark.parametrize("reason", ["bad_spec", "bad_data", "nan_loss", "dependency"])
def test_what_can_never_work_is_not_tried_again(reason: str) -> None:
    assert not decide(FailureReason(reason), 0, 100).again


@pytest.mark.parametrize("reason", [r for r in FailureReason if TABLE[r].counts])
def test_a_poison_job_ends_whatever_kills_it(reason: FailureReason) -> None:
    assert failures_until_the_end(reason, 100) == TABLE[reason].failures


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_the_users_cap_goes_before_the_tables(cap: int) -> None:
    assert failures_until_the_end(FailureReason.STORAGE, cap) == cap
    assert failures_until_the_end(FailureReason.CRASHED, cap) == cap


def test_a_drain_is_tried_again_for_ever_at_once_and_costs_nothing() -> None:
    for failures in (0, 2, 99):
        decision = decide(FailureReason.PREEMPTED, failures, 1)
        assert (decision.again, decision.counts, decision.delay_s) == (True, False, 0)


def test_a_failed_gpu_costs_nothing_but_a_job_under_which_one_after_the_other_fails_is_to_blame() -> None:
    decisions = [decide(FailureReason.DEVICE, 2, 3, in_a_row=count) for count in (1, 2, 3)]

    assert [(decision.again, decision.counts) for decision in decisions] == [
        (True, False),
        (True, False),
        (False, False),
    ]


def test_every_other_failure_counts() -> None:
    assert all(decide(reason, 0, 3).counts for reason in FailureReason if reason not in FREE)


def test_the_delay_doubles_with_each_failure() -> None:
    delays = [decide(FailureReason.STORAGE, failures, 100, jitter=0.5).delay_s for failures in range(4)]

    assert delays == [30, 60, 120, 240]


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    delays = {decide(FailureReason.CRASHED, 0, 3).delay_s for _ in range(50)}

    assert len(delays) > 10
    assert all(2.5 <= delay <= 7.5 for delay in delays)
    assert decide(FailureReason.CRASHED, 0, 3, jitter=0).delay_s == 2.5


@pytest.mark.parametrize(
    ("micro", "steps", "splits"),
    [
        (8, 1, [(8, 1), (4, 2), (2, 4), (1, 8)]),
        (2, 4, [(2, 4), (1, 8)]),
        (6, 1, [(6, 1), (3, 2), (1, 6)]),
        (5, 2, [(5, 2), (2, 5), (1, 10)]),
        (1, 16, [(1, 16)]),
    ],
)
def test_out_of_memory_makes_the_micro_batch_smaller_and_keeps_the_effective_batch(
    micro: int, steps: int, splits: list[tuple[int, int]]
) -> None:
    training = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps, "seed": 1}
    spec = {"kind": "train", "training": training, "lora": {"r": 8}}

    found = [with_less_memory(spec, times) for times in range(len(splits) + 1)]

    assert found.pop() is None, "never the same split twice"
    assert [tuple(s["training"].values()) for s in found if s] == [(*split, 1) for split in splits]
    assert all(s is not None and s["lora"] == {"r": 8} for s in found)
    assert spec["training"] == training, "the spec itself stays as it was"


def test_an_evaluation_that_ran_out_of_memory_asks_half_as_many_at_a_time() -> None:
    spec = {"kind": "evaluate", "evaluation": {"per_device_eval_batch_size": 5}}

    found = [with_less_memory(spec, times) for times in range(4)]

    assert [s and s["evaluation"]["per_device_eval_batch_size"] for s in found] == [5, 2, 1, None]
