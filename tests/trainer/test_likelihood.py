"""Replies scored with their prompt computed once, against each reply alone with its whole prompt."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_worker.trainer import likelihood
from gpu_worker.trainer.likelihood import score
from gpu_worker.trainer.questions import Question
from gpu_worker.trainer.shared_prompts import Layout, Row, Tree
from jobqueue.example import MultipleChoice

VOCABULARY = 300
COMMON_PROMPT = [11, 12, 13, 14]
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
SHARING: dict[str, dict[str, Any]] = {
    "llama": COMMON, "qwen2": COMMON, "qwen3": COMMON, "mistral": COMMON, "phi3": COMMON,
    "gemma2": COMMON | {"sliding_window": 512, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": COMMON | {"sliding_window": 512},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 4},
}  # fmt: skip
NOT_SHARING: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 4},  # a state
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": 4},  # ALiBi
}


def make(kind: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, large enough that its answers differ."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_questions(count: int = 40, longest: int = 120) -> list[Question]:
    """Of 2 to 6 options; prompts begin alike; replies begin alike and end alike, and some are one token long."""
    chance = random.Random(1)

    def tokens(least: int, most: int) -> list[int]:
        return [chance.randrange(1, VOCABULARY) for _ in range(chance.randint(least, most))]

    questions = []
    for index in range(count):
        letters = "ABCDEF"[: chance.randint(2, 6)]
        choice = MultipleChoice("?", {letter: letter * chance.randint(1, 9) for letter in letters}, "A")
        replies = {letter: [5, 6, 7, *tokens(1, 9), 8] for letter in letters}
        if index % 10 == 3:
            replies = {letter: tokens(1, 1) for letter in letters}
        questions.append(Question(index, choice, [*COMMON_PROMPT, *tokens(1, longest)], replies))
    return questions


def expected(model: Any, question: Question) -> dict[str, float]:
    """One sequence at a time: no padding, no mask, all logits."""
    found = {}
    for letter, reply in question.replies.items():
        with torch.no_grad():
            logits = model(torch.tensor([question.prompt + reply])).logits[0].float().log_softmax(-1)
        start = len(question.prompt) - 1
        found[letter] = sum(logits[start + place, token].item() for place, token in enumerate(reply))
    return found


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("kind", SHARING)
def test_shared_scores_are_those_of_each_reply_alone(kind: str, batch: int) -> None:
    model, questions = make(kind, SHARING[kind]), make_questions()
    assert score(model, questions, batch, lambda _: None) is None
    for question in questions:
        alone = expected(model, question)
        assert list(question.scores) == list(question.choice.options)
        assert question.scores == pytest.approx(alone, abs=1e-4)
        assert max(question.scores, key=question.scores.__getitem__) == max(alone, key=alone.__getitem__)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_rounding_to_16_bits_is_not_taken_for_a_disagreement(kind: str) -> None:
    model, questions = make(kind, SHARING[kind], torch.bfloat16), make_questions()
    assert score(model, questions, 16, lambda _: None) is None
    for question in questions:
        assert question.scores == pytest.approx(expected(model, question), rel=0.1, abs=0.5)


@pytest.mark.parametrize("kind", NOT_SHARING)
def test_a_disagreement_is_not_taken_for_rounding_to_16_bits(kind: str) -> None:
    assert score(make(kind, NOT_SHARING[kind], torch.bfloat16), make_questions(12), 7, lambda _: None)


@pytest.mark.parametrize("kind", NOT_SHARING)
def test_a_model_that_cannot_share_is_scored_plainly_and_says_why(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, questions = make(kind, NOT_SHARING[kind]), make_questions(12)
    caplog.set_level("INFO")
    reason = score(model, questions, 7, lambda _: None)
    assert reason
    assert reason in caplog.text
    for question in questions:
        assert question.scores == pytest.approx(expected(model, question), abs=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_questions_beyond_the_attention_window_are_scored_plainly(kind: str) -> None:
    config = SHARING[kind] | {"sliding_window": 60}
    model, questions = make(kind, config), make_questions()
    lengths = [question.longest for question in questions]
    assert min(lengths) < 60 < max(lengths)
    reason = score(model, questions, 7, lambda _: None)
    assert (
        reason == f"{sum(length > 60 for length in lengths)} questions are longer than the model's attention window, 60"
    )
    for question in questions:
        assert question.scores == pytest.approx(expected(model, question), abs=1e-4)


def test_no_batch_takes_more_than_its_bytes_and_the_scores_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions, same = make("llama", COMMON), make_questions(), make_questions()
    score(model, same, 64, lambda _: None)
    sizes: list[int] = []
    forward = model.forward

    def watched(**options: Any) -> Any:
        found = forward(**options)
        sizes.append(found.logits.nbytes)
        return found

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(likelihood, "LOGIT_BYTES", 2**18)
    score(model, questions, 64, lambda _: None)
    assert max(sizes) <= 2**18
    assert [q.scores for q in questions] == [pytest.approx(q.scores, abs=1e-4) for q in same]


def test_what_replies_begin_with_is_in_the_tree_once_and_their_last_token_is_not() -> None:
    tree = Tree.of({"A": [5, 6, 7], "B": [5, 6, 8, 9], "C": [5, 6], "D": [4]})
    assert tree.tokens == [-1, 5, 6, 8]
    assert tree.depths == [0, 1, 2, 3]
    assert tree.sees().tolist() == [
        [True, False, False, False], [True, True, False, False], [True, True, True, False], [True, True, True, True],
    ]  # fmt: skip
    assert {letter: len(edges) for letter, edges in tree.replies.items()} == {"A": 3, "B": 4, "C": 2, "D": 1}
    assert len(tree.edges) == 6


def test_a_batch_is_computed_without_padding_and_what_its_prompts_begin_with_once() -> None:
    questions = make_questions(9)
    rows = [Row(question.prompt, Tree.of(question.replies), question) for question in questions]
    layout = Layout.of(rows)
    assert len(layout.ids) == sum(map(len, rows)) - 8 * len(COMMON_PROMPT)
    for number, row in enumerate(rows):
        read = layout.ids[layout.sources[number, layout.starts[number] :]].tolist()
        assert read == row.prompt + row.tree.tokens[1:]
    assert len(set(layout.places.tolist())) == len(layout.ids)


def test_prompts_that_begin_differently_or_are_one_token_long_are_scored_too() -> None:
    model, questions = make("llama", COMMON), make_questions(6)
    questions[2].prompt = [7]
    questions[4].prompt = COMMON_PROMPT[:1]
    assert score(model, questions, 64, lambda _: None) is None
    for question in questions:
        assert question.scores == pytest.approx(expected(model, question), abs=1e-4)


def test_the_model_s_own_attention_is_back_afterwards() -> None:
    for kind, implementation in (("llama", "eager"), ("llama", "sdpa"), ("bloom", None)):
        model = make(kind, (SHARING | NOT_SHARING)[kind])
        if implementation:
            model.set_attn_implementation(implementation)
        before = model.config._attn_implementation
        reason = score(model, make_questions(6), 4, lambda _: None)
        assert (reason is None) == (implementation is not None)
        assert model.config._attn_implementation == before


def test_progress_ends_at_the_number_of_questions() -> None:
    seen: list[int] = []
    score(make("llama", COMMON), make_questions(10), 4, seen.append)
    assert seen == [4, 8, 10]


def asked(options: dict[str, str], scores: dict[str, float]) -> Question:
    return Question(0, MultipleChoice("?", options, "A"), [], {}, scores)


def test_scores_nearer_than_rounding_are_a_tie_unless_the_options_read_the_same() -> None:
    near = asked({"A": "trout", "B": "salmon"}, {"A": -10.0, "B": -10.05})
    near.choose(2**-7)
    assert (near.picks["likelihood"], near.ties) == ("A", ["likelihood"])  # normalised, B is ahead by far
    assert near.picks["likelihood_normalised"] == "B"
    far = asked({"A": "trout", "B": "salmon"}, {"A": -10.0, "B": -10.2})
    far.choose(2**-7)
    assert "likelihood" not in far.ties
    same = asked({"A": "trout", "B": "trout", "C": "cod"}, {"A": -10.0, "B": -10.0, "C": -20.0})
    same.choose(2**-7)
    assert same.ties == []
