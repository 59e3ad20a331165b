"""Which cards are trusted with a job; pure."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from gpu_worker.gpu import CardError, Reading
from gpu_worker.health import FAINT_S, NEEDS_RESET, NO_FAULT_OF_THE_CARD, QUIET_S, Health, Ours
from jobqueue.memory import GIB

NOW = time.mktime((2026, 11, 25, 12, 3, 0, 0, 0, -1))
TOTAL = 80 * GIB
NOBODY = Ours({}, False)


def reading(**changes: object) -> Reading:
    fields: dict[str, object] = {"total_bytes": TOTAL, "free_bytes": TOTAL, "held": {}, **changes}
    return Reading(**fields)  # type: ignore[arg-type]


WELL = Health().after(reading(), NOBODY, NOW - 60)
ASKABLE = Health().after(reading(recovery=""), NOBODY, NOW - 60)


@pytest.mark.parametrize("xid", sorted(NO_FAULT_OF_THE_CARD))
def test_what_a_program_did_wrong_is_not_held_against_the_card(xid: int) -> None:
    assert WELL.after(reading(xids=(xid,)), NOBODY, NOW).note == ""


def test_an_xid_of_the_cards_stops_it_until_a_reset() -> None:
    sick = WELL.after(reading(xids=(79,)), NOBODY, NOW)

    assert sick.note == "sick: Xid 79 at 12:03, GPU has fallen off the bus; it needs a reset"
    assert sick.ends_jobs
    assert sick.after(reading(), NOBODY, NOW + 10 * QUIET_S).sick, "time alone does not mend it"
    lost = sick.after(CardError("GPU is lost", lost=True), NOBODY, NOW + 5)
    assert lost.after(reading(), NOBODY, NOW + 60).note == "", "it was lost and answers again: somebody reset it"


def test_the_word_of_the_driver_goes_before_the_table() -> None:
    sick = ASKABLE.after(reading(xids=(95,), recovery="to be drained and reset"), NOBODY, NOW)
    assert sick.sick == "Xid 95 at 12:03, uncontained ECC error; it needs to be drained and reset"
    assert sick.ends_jobs

    mended = sick.after(reading(recovery=""), NOBODY, NOW + QUIET_S + 1)
    assert (mended.note, mended.ends_jobs) == ("", False)
    told = ASKABLE.after(reading(recovery="a reboot"), NOBODY, NOW)
    assert told.sick == "the driver reports a fault; it needs a reboot"


def test_an_xid_that_nobody_knows_lets_the_card_rest_and_what_runs_go_on() -> None:
    sick = WELL.after(reading(xids=(200,)), NOBODY, NOW)

    assert (sick.note, sick.ends_jobs) == ("sick: Xid 200 at 12:03; it rests until 12:08", False)
    assert sick.after(reading(), NOBODY, NOW + QUIET_S - 1).sick
    assert not sick.after(reading(), NOBODY, NOW + QUIET_S + 1).sick


def test_a_new_ecc_error_stops_a_card_until_its_count_begins_again() -> None:
    sick = WELL.after(reading(uncorrected=1), NOBODY, NOW)

    assert sick.sick.startswith("ECC error that could not be corrected, at 12:03")
    assert sick.after(reading(uncorrected=1), NOBODY, NOW + 2 * QUIET_S).ends_jobs
    assert not sick.after(reading(), NOBODY, NOW + 60).note


def test_an_old_ecc_error_stops_a_card_unless_the_driver_says_that_nothing_is_due() -> None:
    assert Health().after(reading(uncorrected=2), NOBODY, NOW).ends_jobs
    assert not Health().after(reading(uncorrected=2, recovery=""), NOBODY, NOW).note


def test_a_lost_card_ends_its_jobs_at_once_and_one_that_falters_after_a_while() -> None:
    assert WELL.after(CardError("GPU is lost", lost=True), NOBODY, NOW).ends_jobs

    faint = WELL.after(CardError("Unknown Error", lost=False), NOBODY, NOW)
    assert (faint.sick, faint.ends_jobs) == ("it does not answer since 12:03: Unknown Error", False)
    assert faint.after(CardError("Unknown Error", lost=False), NOBODY, NOW + FAINT_S).ends_jobs
    assert not faint.after(reading(), NOBODY, NOW + 2).note


def test_memory_of_others_makes_the_card_smaller_and_is_named() -> None:
    mine, other = os.getpid(), os.getppid()
    seen = reading(free_bytes=50 * GIB, held={mine: 10 * GIB, other: 20 * GIB})

    health = WELL.after(seen, Ours({mine: 10 * GIB}, True), NOW)

    assert health.usable_bytes == int(60 * GIB - 0.02 * TOTAL), "what nobody holds, and what our trainers do"
    assert health.note.startswith(f"20.0 GiB held by other processes (pid {other} ")
    assert not health.sick


def test_the_mps_server_of_the_worker_itself_is_nobody_else() -> None:
    mine, server = os.getpid(), os.getppid()
    held = {mine: 10 * GIB, server: 2 * GIB}
    ours = Ours({mine: 10 * GIB}, True, {server})

    alone = WELL.after(reading(free_bytes=TOTAL - 12 * GIB, held=held), ours, NOW)
    beside = WELL.after(reading(free_bytes=TOTAL - 15 * GIB, held=held | {1: 3 * GIB}), ours, NOW)

    assert alone.note == ""
    assert alone.usable_bytes == int(TOTAL - 2 * GIB - 0.02 * TOTAL), "but no job can have its memory"
    assert beside.note.startswith("3.0 GiB held by other processes (pid 1 ")


def test_the_log_says_when_others_come_and_go_and_not_every_change_of_theirs() -> None:
    few, more, many = (WELL.after(reading(free_bytes=TOTAL - held * GIB, held={1: held * GIB}), NOBODY, NOW)
                       for held in (10, 15, 25))  # fmt: skip

    assert few.is_news_after(WELL)
    assert not few.is_news_after(few)
    assert not more.is_news_after(few)
    assert many.is_news_after(few)
    assert WELL.is_news_after(many)
    sick = replace(more, sick="Xid 79")
    assert sick.is_news_after(few)
    assert few.is_news_after(sick)
    assert not replace(WELL, sick="Xid 79").is_news_after(sick), "the same would be said again"


def test_a_desktop_and_what_the_driver_keeps_are_not_worth_a_word() -> None:
    seen = reading(free_bytes=int(TOTAL - 0.9 * GIB), reserved_bytes=GIB // 2, held={1: GIB // 3})

    assert WELL.after(seen, NOBODY, NOW).note == ""


def test_where_nvml_names_no_process_what_our_trainers_hold_is_not_taken_for_others() -> None:
    seen = reading(free_bytes=20 * GIB)

    assert WELL.after(seen, Ours({}, alive=True), NOW) == WELL
    named = reading(free_bytes=20 * GIB, held={1: 60 * GIB})
    assert WELL.after(named, Ours({}, alive=True), NOW).foreign.startswith("60.0 GiB held by other processes (pid 1 ")
    assert WELL.after(seen, NOBODY, NOW).foreign == "60.0 GiB held by other processes"


def test_no_xid_is_in_both_tables() -> None:
    assert not NEEDS_RESET.keys() & NO_FAULT_OF_THE_CARD
