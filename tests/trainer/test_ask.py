"""Prompts answered by the base model and by an adapter, told as they are written: transformers and PEFT agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from trainer_child import DEMO, Child, Done, ask_spec, evaluate_spec, train_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "Which word is the opposite of dirty?\n\nOptions:\nA. win\nB. clean\n\nPlease choose the correct answer.",
    "Tell me a story",
)


@pytest.fixture(scope="module")
def trained(child: Child) -> Done:
    return child.run(train_spec(training={"max_steps": 12, "learning_rate": 2e-2}))


def written(model: Any, prompt: str, system: str | None = None, new_tokens: int = 24) -> str:
    """The greedy answer, by transformers' own means."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    turns = [{"role": "system", "content": system}] if system else []
    ids = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()


def expected(adapter: Path, prompt: str, system: str | None = None) -> tuple[str, str]:
    base = written(base_model(), prompt, system)
    return base, written(PeftModel.from_pretrained(base_model(), adapter).eval(), prompt, system)


def pairs(done: Done) -> list[tuple[str, str]]:
    return [(answer["base"]["text"], answer["adapter"]["text"]) for answer in done.outcome["answers"]]


def test_both_answer_as_transformers_and_peft_do_and_are_heard_while_they_write(child: Child, trained: Done) -> None:
    done = child.run(ask_spec(*QUESTIONS), adapter=trained.folder / "adapter")
    assert pairs(done) == [expected(trained.folder / "adapter", prompt) for prompt in QUESTIONS]
    assert any(base != tuned for base, tuned in pairs(done)), "else nothing here tells them apart"
    assert [answer["prompt"] for answer in done.outcome["answers"]] == list(QUESTIONS)
    whole = [(answer.prompt, answer.by, answer.text) for answer in done.answers if answer.done]
    assert whole == [
        (number, by, text)
        for number, texts in enumerate(pairs(done))
        for by, text in zip(("base", "adapter"), texts, strict=True)
    ]
    for number, by, text in whole:
        pieces = [a.text for a in done.answers if (a.prompt, a.by, a.done) == (number, by, False)]
        assert pieces, "it was heard before its end"
        assert text.startswith("".join(pieces))
    assert not list(done.folder.iterdir()), "nothing is left behind"


def test_the_second_question_finds_the_base_model_loaded(child: Child, trained: Done) -> None:
    child.run(ask_spec(QUESTIONS[0]), adapter=trained.folder / "adapter")
    before = child.log.read_text().count("still loaded")
    again = child.run(ask_spec(QUESTIONS[1]), adapter=trained.folder / "adapter")
    assert child.log.read_text().count("still loaded") == before + 1
    assert pairs(again) == [expected(trained.folder / "adapter", QUESTIONS[1])]


def test_a_system_prompt_and_a_limit_count_for_both(child: Child, trained: Done) -> None:
    done = child.run(ask_spec(QUESTIONS[0], system_prompt="Be kind."), adapter=trained.folder / "adapter")
    assert pairs(done) == [expected(trained.folder / "adapter", QUESTIONS[0], "Be kind.")]
    short = child.run(ask_spec(QUESTIONS[0], max_new_tokens=2, asked=["base"])).outcome["answers"][0]
    assert short == {
        "prompt": QUESTIONS[0],
        "base": {"text": written(base_model(), QUESTIONS[0], None, 2), "cut": True},
    }


def test_a_temperature_draws_the_same_with_the_same_seed(child: Child) -> None:
    def drawn(seed: int) -> str:
        spec = ask_spec(QUESTIONS[0], temperature=1.5, seed=seed, asked=["base"])
        return str(child.run(spec).outcome["answers"][0]["base"]["text"])

    assert drawn(1) == drawn(1) != drawn(2)


def test_where_the_base_model_is_not_under_the_adapter_it_is_loaded_by_itself(child: Child) -> None:
    """Biases that were trained stay when an adapter is switched off, and `full` leaves another model altogether."""
    biased = child.run(train_spec(lora={"bias": "lora_only"}, training={"max_steps": 12, "learning_rate": 2e-2}))
    whole = child.run(train_spec(method="full", training={"max_steps": 12, "learning_rate": 2e-2}))
    base = written(base_model(), QUESTIONS[0])
    full = AutoModelForCausalLM.from_pretrained(whole.folder / "adapter", dtype=torch.float32).eval()
    tuned = {"lora": expected(biased.folder / "adapter", QUESTIONS[0])[1], "full": written(full, QUESTIONS[0])}
    for method, trained in (("lora", biased), ("full", whole)):
        done = child.run(ask_spec(QUESTIONS[0], method=method), adapter=trained.folder / "adapter")
        assert pairs(done) == [(base, tuned[method])]
        assert [answer.by for answer in done.answers if answer.done] == ["base", "adapter"]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(child: Child, trained: Done) -> None:
    failure = child.run(ask_spec("short?", "long " * 5_000), adapter=trained.folder / "adapter").failure
    assert failure.reason == "bad_data"
    assert failure.message.startswith("prompt 2 has ")


def test_a_model_that_knows_no_token_that_ends_answers_is_asked_all_the_same(child: Child, tmp_path: Path) -> None:
    """Neither its tokenizer nor its chat template has one."""
    base = Path(shutil.copytree(DEMO / "model", tmp_path / "model"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((base / name).read_text())
        kept = {key: value for key, value in settings.items() if key[:4] not in ("bos_", "eos_", "pad_")}
        none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} if name == "config.json" else {}
        (base / name).write_text(json.dumps(kept | none))
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    same = {"base_model": str(base), "chat_template": template}
    asked = child.run(ask_spec(QUESTIONS[0], **same, asked=["base"], max_new_tokens=5)).outcome
    assert asked["answers"][0]["base"]["cut"]
    scored = child.run(evaluate_spec(**same, evaluation={"limit": 4, "metrics": ["generated"], "max_new_tokens": 5}))
    assert len((scored.folder / "questions.jsonl").read_text().splitlines()) == 4
