"""Multiple-choice questions as token ids, and what became of them."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_worker.trainer.failures import bad_data
from jobqueue.chat import BadTurn, Chat
from jobqueue.example import MultipleChoice

log = logging.getLogger("loraq.trainer")


@dataclass
class Question:
    """One question and what became of it."""

    index: int  # row of the file, from 0
    choice: MultipleChoice
    prompt: list[int]  # token ids, the generation prompt included
    replies: dict[str, list[int]]  # letter -> token ids of the answer that names it
    scores: dict[str, float] = field(default_factory=dict)  # letter -> natural log-probability
    text: str | None = None
    picks: dict[str, str | None] = field(default_factory=dict)  # metric -> letter
    ties: list[str] = field(default_factory=list)  # metrics whose pick another rounding might turn

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest reply."""
        return len(self.prompt) + max(map(len, self.replies.values()))

    def right(self, metric: str) -> bool:
        """By the option's text: rows exist in which two letters have the same."""
        pick, options = self.picks[metric], self.choice.options
        return pick is not None and options[pick].strip() == options[self.choice.answer].strip()

    def choose(self, tie: float) -> None:
        """Pick by the scores: their sums, and per character of the option, as lm-evaluation-harness's acc_norm.

        A pick is a tie where the best option of another text scores within a share `tie` of it.
        """
        options = self.choice.options
        normalised = {letter: score / len(options[letter]) for letter, score in self.scores.items()}
        for metric, scores in (("likelihood", self.scores), ("likelihood_normalised", normalised)):
            pick = max(scores, key=scores.__getitem__)
            others = [score for letter, score in scores.items() if options[letter] != options[pick]]
            self.picks[metric] = pick
            if others and scores[pick] - max(others) <= tie * abs(scores[pick]):
                self.ties.append(metric)

    def line(self) -> dict[str, Any]:
        scores = {letter: round(score, 6) for letter, score in self.scores.items()}
        return {
            "index": self.index, "answer": self.choice.answer, "picks": self.picks, "scores": scores, "text": self.text,
            "right": [metric for metric in self.picks if self.right(metric)], "ties": self.ties,
            "question": self.choice.question, "options": self.choice.options,
        }  # fmt: skip


def to_questions(
    chat: Chat, choices: list[tuple[int, MultipleChoice]], limit: int, new_tokens: int
) -> tuple[list[Question], int, dict[str, int]]:
    """The questions as token ids; how many exceed `limit` tokens; how many the chat template refuses, by its words.

    Raises JobFailure where no question is left.
    """
    questions: list[Question] = []
    too_long, refused = 0, Counter[str]()
    lead = None
    for index, choice in choices:
        try:
            if lead is None:
                # Some templates put a space between the prompt and the answer; the same for every question.
                reply = choice.reply(choice.answer)
                lead = chat.answer_text(choice.conversation()).removesuffix(reply)
            texts = [lead + choice.reply(letter) for letter in choice.options]
            prompt, read = chat.reply_ids(choice.conversation()[:-1], texts)
        except BadTurn as error:
            refused[str(error)] += 1
            continue
        question = Question(index, choice, prompt, dict(zip(choice.options, read, strict=True)))
        if max(question.longest, len(prompt) + new_tokens) > limit:
            too_long += 1
            continue
        questions.append(question)
    if too_long:
        log.warning("%d questions are longer than %d tokens and are left out", too_long, limit)
    for words, count in refused.items():
        log.warning("%d questions are left out: %s", count, words)
    if not questions:
        why = [f"{count} questions: {words}" for words, count in refused.items()]
        if too_long:
            why.append(f"{too_long} are longer than {limit} tokens; raise max_seq_length if the model allows it")
        raise bad_data(f"no question is left to ask: {'; '.join(why)}")
    return questions, too_long, dict(refused)


def padded(sequences: list[list[int]], width: int, left: bool, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each (sequences, width)."""
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask
