"""What a failure leads to; pure."""

from __future__ import annotations

import pytest

from jobqueue.job import FailureReason, JobState
from jobqueue.retry import TABLE, after_failure, decide

# The second ends with its micro-batches, the others after so many in a row.
FREE = (FailureReason.PREEMPTED, FailureReason.OUT_OF_MEMORY, FailureReason.DEVICE, FailureReason.CUT_OFF)


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


def test_a_job_whose_host_loses_the_server_each_time_it_runs_ends_all_the_same() -> None:
    before: list[str] = ["crashed"]
    while (end := after_failure(FailureReason.CUT_OFF, "", 0, 3, before)).state is JobState.QUEUED:
        assert not end.counts
        before.append(end.reason)

    assert before.count("cut_off") == 4
    end = after_failure(FailureReason.CUT_OFF, "", 0, 3, [*before, "preempted"])
    assert end.state is JobState.QUEUED, "it has got further in between"


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
