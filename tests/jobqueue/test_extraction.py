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
    """lm-eval#3103: a verbose right answer scored 0."""
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
    """lm-eval#3103: a greedy pattern credited any letter."""
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


# -- answers as models write them, each read by hand

MEDICINE = {
    "A": "Disclose the error to the patient and put it in the operative report",
    "B": "Tell the attending that he cannot fail to disclose this mistake",
    "C": "Report the physician to the ethics committee",
    "D": "Refuse to dictate the operative report",
    "E": "Metformin",
}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<|answer|> B", "B"),
        ("The correct answer is B", "B"),
        ("The correct option is (D).", "D"),
        ("The right answer would be D: brown trout.", "D"),
        ("My answer: **(B) Salmon**", "B"),
        ("Final answer: \\boxed{B}", "B"),
        ("$\\boxed{\\text{B}}$", "B"),
        ("<answer>B</answer>", "B"),
        ("Answer - B", "B"),
        ("Answer: b", "B"),
        ("Correct answer: B. Salmon", "B"),
        ("The answer is: (b)", "B"),
        ("B) Salmon. Trout is a freshwater fish.", "B"),
        ("I choose B.", "B"),
        ("I would pick option B because it migrates.", "B"),
        ("B is correct.", "B"),
        ("B is the correct answer because it migrates.", "B"),
        ("It's B.", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B: Salmon", "B"),
        ("The best answer is B - Salmon", "B"),
        ("La respuesta correcta es B.", "B"),
        ("Die richtige Antwort ist B.", "B"),
        ("Die richtige Antwort lautet: Salmon", "B"),
        ("The answer is not A. It is B.", "B"),
        ("A is incorrect. The correct answer is B.", "B"),
        ("Option A is wrong; option B is right.", "B"),
        ("It is not A but B.", "B"),
        ("Incorrect answer: A. Correct answer: B.", "B"),
        ("Answer A: trout", "A"),
        ("Let me think. Trout live in rivers. Salmon migrate. So the answer is Salmon.", "B"),
        ("Step 1: exclude A. Step 2: exclude C. Therefore, B.", "B"),
        ("Thus the answer is:\n\n**B**\n", "B"),
        ("The correct answer is trout (A).", "A"),
        ("The answer is (A) trout, not (B) Salmon.", "A"),
        ("The correct answer is trout\nThe correct answer is trout\nThe correct answer is trout", "A"),
        ("Answer: A\n\nQuestion: Which is a bird?\nAnswer: D", "A"),
        ("The correct choice is clearly B.", "B"),
        ("The correct answer here is, of course, salmon.", "B"),
    ],
)
def test_an_answer_is_found_however_it_is_put(text: str, letter: str) -> None:
    assert extract(text, FISH) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The best answer is B – Salmon", "B"),
        ("La réponse correcte est : B", "B"),
        ("La réponse correcte est « Salmon ».", "B"),
        ("正确答案是B。", "B"),
        ("答案：B", "B"),
        ("答案是（B）", "B"),
        ("正解はBです。", "B"),
        ("The correct answer is Ｂ。", "B"),
        ("The correct answer is “Salmon”。", "B"),
        ("Правильный ответ: B", "B"),
        ("Ответ: B", "B"),
        ("الإجابة الصحيحة هي B", "B"),
        ("सही उत्तर B है।", "B"),
    ],
)
def test_other_languages_and_their_punctuation(text: str, letter: str) -> None:
    assert extract(text, FISH) == letter


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I cannot help with that.",
        "As an AI, I can't answer medical questions.",
        "I don't know.",
        "I cannot determine whether trout or salmon is right.",
        "None of the above.",
        "All of the above",
        "A and B",
        "Both A and B are correct.",
        "A or B",
        "The correct answers are A and B.",
        "A, B, and D",
        "The answer is A or B.",
        "The answer could be A. It could also be B.",
        "A. trout\nB. Salmon\nC. C. difficile\nD. brown trout",
        "The answer isn't A.",
        "A patient with fish would do well.",
        "I think, therefore I am.",
        "The answer is a fish that swims upstream.",
        "E",
        "The correct answer is E.",
        "The correct answer is trout (B).",
        "All but B.",
        "If it is B, the fish migrates.",
        "So A, B and C are wrong.",
        "I think a trout or a salmon.",
        "Is it B?",
        "A fish. B is another one.",
        " I would not choose B.",
        "The letters are A B C D.",
    ],
)
def test_refusals_lists_and_several_letters_name_nothing(text: str) -> None:
    assert extract(text, FISH) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is Disclose the error to the patient and put it in the operative report.", "A"),
        (
            "The resident should disclose the error to the patient and put it in the operative report: honesty first.",
            "A",
        ),
        ("You should start metformin.", "E"),
        ("Tell the attending that he cannot fail to disclose this mistake", "B"),
        ("The correct answer is tell the attending that he cannot fail to disclose this mistake.", "B"),
        ("Metformin is contraindicated here, so refuse to dictate the operative report.", None),
    ],
)
def test_long_options_are_found_in_prose(text: str, letter: str | None) -> None:
    assert extract(text, MEDICINE) == letter
