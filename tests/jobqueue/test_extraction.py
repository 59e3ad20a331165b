"""Which option a generated answer names."""

from __future__ import annotations

import pytest

from jobqueue.extraction import extract, has_asked_form

FISH = {"A": "trout", "B": "Salmon", "C": "C. difficile", "D": "brown trout"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is trout.", "A"),
        ("The correct answer is Salmon", "B"),
        ("the correct answer is: salmon.", "B"),
        ("The correct answer is brown trout.", "D"),
        ("The correct answer is C. difficile.", "C"),
        ("The correct answer is trout. Salmon is wrong, because it is pink.", "A"),
    ],
)
def test_the_asked_form_names_its_option(text: str, letter: str) -> None:
    assert extract(text, FISH) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B)", "B"), ("Answer: B", "B"), ("**B**", "B"), ("B. Salmon", "B"),
        ("The answer is B, since it swims.", "B"), ("Option D is right.", "D"), ("The best choice is:\nB", "B"),
        ("I would go with (B) here", "B"), ("A", "A"), ("A. trout", "A"), ("a) trout", "A"),
        ("The correct answer is option B.", "B"), ("The correct answer is (A) trout.", "A"),
    ],
)  # fmt: skip
def test_a_letter_names_its_option(text: str, letter: str) -> None:
    assert extract(text, FISH) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Among the fish given, salmon is by far the best choice for this river.", "B"),
        ("I think it must be brown trout because of its colour.", "D"),
        ("Salmon is the correct answer.", "B"),
    ],
)
def test_a_verbose_right_answer_counts(text: str, letter: str) -> None:
    assert extract(text, FISH) == letter


@pytest.mark.parametrize(
    "text",
    [
        "", "It depends.", "trout or salmon", "The correct answer is trout or Salmon.", "The correct answer is pike.",
        "The correct answer is B. trout", "A. trout\n\nThe correct answer is B. Salmon.",
        "The correct answer is trout. Wait. The correct answer is Salmon.",
    ],
)  # fmt: skip
def test_an_answer_that_names_none_or_two_does_not_count(text: str) -> None:
    assert extract(text, FISH) is None


@pytest.mark.parametrize("text", ["A fish lives in water.", "The answer is A fish", "A quick look tells nothing"])
def test_the_article_is_not_the_letter_a(text: str) -> None:
    assert extract(text, FISH) is None


@pytest.mark.parametrize("text", ["Not trout", "It cannot be trout.", "The correct answer is not trout"])
def test_a_denied_option_is_not_named(text: str) -> None:
    assert extract(text, FISH) is None


def test_a_short_option_is_named_by_a_claim_only() -> None:
    numbers = {"A": "5", "B": "15"}
    assert extract("The correct answer is 5.", numbers) == "A"
    assert extract("After 5 days nothing had changed", numbers) is None


def test_an_option_whose_text_is_a_letter_is_named_by_its_text() -> None:
    assert extract("The correct answer is A.", {"A": "B", "B": "A"}) == "B"


def test_an_option_that_another_one_begins_with_is_told_apart() -> None:
    assert extract("The correct answer is vitamin B12.", {"A": "vitamin B", "B": "vitamin B12"}) == "B"


def test_an_option_of_two_sentences_is_read_to_its_end() -> None:
    options = {"A": "The pH rises. Potassium falls.", "B": "Potassium falls."}
    assert extract("The correct answer is The pH rises. Potassium falls.", options) == "A"


def test_options_that_read_the_same_are_one_answer() -> None:
    assert extract("The correct answer is trout.", {"A": "trout", "B": "trout", "C": "cod"}) == "A"


def test_the_asked_form_is_told_from_a_right_answer_in_another_form() -> None:
    assert has_asked_form("The correct answer is trout.")
    assert not has_asked_form("A. trout")
