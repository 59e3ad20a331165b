"""`loraq ask`: two answers side by side, in a pipe, as JSON, and what goes wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import Command, FakeClient, make_events, make_job

from jobqueue.errors import ServerError
from jobqueue.events import Event
from jobqueue.job import FailureReason, Job, JobKind, JobState

BASE = "A urinary tract infection is treated with an antibiotic, and in pregnancy with one that is safe."
TUNED = "The correct answer is Nitrofurantoin."


def answer(prompt: int, by: str, text: str, done: bool = False, cut: bool = False) -> tuple[str, Any]:
    return "answer", {"prompt": prompt, "by": by, "text": text, "done": done, **({"cut": cut} if done else {})}


def question(*prompts: str, asked: tuple[str, ...] = ("base", "adapter"), **fields: Any) -> Job:
    spec = {"kind": "ask", "base_model": "org/tiny", "adapter_job": "medqa.2", "prompts": list(prompts)}
    spec |= {"asked": list(asked), "system_prompt": None, "max_new_tokens": 256, "temperature": 0.0, "seed": 3407}
    answers = [{"prompt": prompt, "base": {"text": BASE}, "adapter": {"text": TUNED}} for prompt in prompts]
    known = {"kind": JobKind.ASK, "batch": "", "trial": "r=8", "spec": spec, "outcome": {"answers": answers}}
    return replace(make_job("ask-0123456789ab"), **known | fields)


def told(*more: tuple[str, Any]) -> list[Event]:
    """The stream of one prompt that both answer, `more` being what comes before the whole answers."""
    begin = [("state", "running on box/gpu0"), ("progress", {"phase": "load"}), *more]
    return make_events(
        *begin, answer(0, "base", BASE, done=True), answer(0, "adapter", TUNED, done=True), ("state", "succeeded")
    )


def on_screen(output: str) -> str:
    """What a terminal shows in the end: what was written over is gone, and styles do not count."""
    last = [part for part in output.split("\x1b[2K") if TUNED in part][-1]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last)


def line_of(output: str, text: str) -> int:
    return next(number for number, line in enumerate(output.splitlines()) if text in line)


@pytest.mark.parametrize("columns", [120, 80])
def test_answers_stand_side_by_side_where_there_is_room_else_one_under_the_other(
    command: Command, client: FakeClient, columns: int
) -> None:
    client.question = question("Which drug?")
    client.streams = [told()]
    output = command("ask", "medqa/2", "Which drug?", columns=columns).stdout
    output = on_screen(output)
    titles = line_of(output, "base model tiny"), line_of(output, "medqa/2: r=8")
    texts = line_of(output, "A urinary tract infection"), line_of(output, TUNED)
    assert line_of(output, "> Which drug?") < titles[0] < texts[0]
    assert (titles[0] == titles[1], texts[0] == texts[1]) == (columns == 120, columns == 120)
    assert all(len(line.rstrip()) <= columns for line in output.splitlines())
    assert client.asked == ("medqa/2", ["Which drug?"], {"max_new_tokens": 256, "temperature": 0.0, "seed": 3407})


def test_what_is_written_is_seen_before_it_is_whole(command: Command, client: FakeClient) -> None:
    client.question = question("Which drug?")
    client.streams = [told(answer(0, "base", "A tetra"), answer(0, "base", "cycline"))]
    output = command("ask", "medqa/2", "Which drug?", columns=80).stdout
    places = [output.index(text) for text in ("loading the model", "A tetra", "A tetracycline", BASE[:60], TUNED)]
    assert places == sorted(places)


def test_a_pipe_gets_each_prompt_once_with_whole_answers(command: Command, client: FakeClient, tmp_path: Path) -> None:
    client.question = question("One?", "Two?")
    one = [answer(0, by, f"{by} 1", done=True) for by in ("base", "adapter")]
    lost = make_events(("state", "running on box/gpu0"), *one, answer(1, "base", "half"), attempt=1)
    whole = [answer(prompt, by, f"{by} {prompt + 1}", done=True) for prompt in (0, 1) for by in ("base", "adapter")]
    again = make_events(("state", "running on box/gpu1"), *whole, ("state", "succeeded"), first=10, attempt=2)
    client.streams = [lost, ServerError("no answer", ""), again]
    result = command("ask", "medqa/2", "--file", "-")
    assert result.exit_code == 4  # nothing on standard input
    (tmp_path / "prompts.txt").write_text("One?\n\nTwo?\n")
    result = command("ask", "medqa/2", "--file", str(tmp_path / "prompts.txt"))
    assert result.exit_code == 0
    expected = ["1/2 > One?", "base model tiny", "base 1", "", "medqa/2: r=8", "adapter 1", ""]
    expected += ["2/2 > Two?", "base model tiny", "base 2", "", "medqa/2: r=8", "adapter 2", ""]
    assert result.stdout.splitlines() == expected
    assert "waiting for the server" in result.stderr


def test_codes_of_a_terminal_in_an_answer_are_not_obeyed_and_a_cut_answer_is_marked(
    command: Command, client: FakeClient
) -> None:
    client.question = question("Which drug?", asked=("adapter",))
    client.streams = [make_events(answer(0, "adapter", "\x1b[2Jred", done=True, cut=True), ("state", "succeeded"))]
    output = command("ask", "medqa/2", "Which drug?", "--adapter-only").stdout
    assert "[2Jred ... (cut: --max-new-tokens)" in output
    assert "\x1b" not in output
    assert "base model" not in output
    assert client.asked[2]["asked"] == ("adapter",)


def test_json_has_what_the_record_has(command: Command, client: FakeClient) -> None:
    client.question = question("Which drug?")
    client.streams = [told()]
    document = json.loads(command("ask", "medqa/2", "Which drug?", "--json", "--system", "Be brief.").stdout)
    assert document["answers"] == [{"prompt": "Which drug?", "base": {"text": BASE}, "adapter": {"text": TUNED}}]
    assert (document["job"], document["trial"], document["seed"]) == ("ask-0123456789ab", "medqa.2", 3407)
    assert client.asked[2]["system_prompt"] == "Be brief."


def test_prompts_of_a_jsonl_file_may_have_several_lines(command: Command, client: FakeClient, tmp_path: Path) -> None:
    client.question = question("One\nline?", "Two?")
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps("One\nline?") + "\n" + json.dumps({"prompt": "Two?", "id": 7}) + "\n")
    command("ask", "medqa/2", "--file", str(file))
    assert client.asked[1] == ["One\nline?", "Two?"]
    file.write_text('"One?"\n{"question": "Two?"}\n')
    result = command("ask", "medqa/2", "--file", str(file))
    assert (result.exit_code, f"{file}:2: there is no prompt" in result.stderr) == (4, True)


def test_a_job_that_failed_says_why_and_what_to_do(command: Command, client: FakeClient) -> None:
    failed = {"state": JobState.FAILED, "reason": FailureReason.OUT_OF_MEMORY, "message": "too big", "outcome": {}}
    client.question = question("Which drug?", **failed)
    result = command("ask", "medqa/2", "Which drug?")
    assert result.exit_code == 1
    assert result.stderr.startswith("medqa/2 has not answered: ask-0123456789ab failed: too big\n")
    assert "a worker with a larger GPU" in result.stderr


def test_ctrl_c_cancels_the_job(command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client.question = question("Which drug?", state=JobState.RUNNING)

    def interrupt(*_: object) -> list[Event]:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "events", interrupt)
    result = command("ask", "medqa/2", "Which drug?")
    assert (result.exit_code, client.cancelled) == (130, ["ask-0123456789ab"])
    assert "ask-0123456789ab is cancelled." in result.stderr


def test_a_prompt_or_a_file_of_them_and_not_both(command: Command, client: FakeClient) -> None:
    assert command("ask", "medqa/2").exit_code == 2
    assert command("ask", "medqa/2", "Which?", "--file", "-").exit_code == 2


def test_of_base_and_adapter_one_alone_can_be_asked_or_both(command: Command, client: FakeClient) -> None:
    result = command("ask", "medqa/2", "Which?", "--base-only", "--adapter-only")

    assert (result.exit_code, client.asked) == (2, ())
    assert "leave nobody to ask" in result.stderr
