"""Answer prompts, as the base model and as a trial's adapter answer them; what is written is told as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from gpu_worker.trainer import model as models  # first: it imports Unsloth

# isort: split
import torch
from peft import PeftConfig
from transformers import TextStreamer

from gpu_worker.protocol import Answer, Progress, Request
from gpu_worker.trainer import usage
from gpu_worker.trainer.clock import Clock
from gpu_worker.trainer.data import chat_of, end_ids
from gpu_worker.trainer.failures import bad_data
from gpu_worker.trainer.greedy import pad_of
from gpu_worker.trainer.parked import comes_off, loaded_for_asking
from jobqueue.chat import BadTurn, Chat
from jobqueue.job_spec import AskSpec
from jobqueue.spec import Asked

TELL_S = 0.2  # between two pieces of an answer that are told
Tell = Callable[[Progress | Answer], None]


def ask(spec: AskSpec, request: Request, tell: Tell) -> dict[str, Any]:
    """The outcome: for each prompt, in their order, what each of those that are asked has answered.

    Raises JobFailure where a prompt is too long or the chat template refuses it, and whatever torch raises.
    """
    clock = Clock()
    answers: list[dict[str, Any]] = [{"prompt": prompt} for prompt in spec.prompts]
    tell(Progress("load"))
    for model, asked in _models(spec, request.adapter):
        chat = chat_of(model.tokenizer, spec.chat_template)
        prompts = _tokens(chat, spec, model.model)
        clock.lap("load_s")
        for number, prompt in enumerate(prompts):
            for by in asked:
                tell(Progress("answer", step=number + 1, steps=len(prompts), reserved_bytes=usage.reserved()))
                with model.without_adapter() if by == "base" else nullcontext():
                    answer = _Writer(model, chat, spec, number, by, tell).write(prompt)
                answers[number][by] = {"text": answer.text, "cut": answer.cut}
                tell(answer)
        clock.lap("answer_s")
        del model  # before the next one is loaded
    return {"answers": answers, "time": clock.report(), "versions": usage.versions()}


def _models(spec: AskSpec, adapter: str | None) -> Iterator[tuple[models.Loaded, tuple[Asked, ...]]]:
    """Models one after the other, and who is asked with each: under an adapter that comes off is the base model."""
    both = len(spec.asked) > 1 and spec.method != "full"
    if both and adapter and comes_off(PeftConfig.from_pretrained(adapter)):
        with loaded_for_asking(spec, adapter) as model:
            yield model, spec.asked
        return
    for by in spec.asked:
        with loaded_for_asking(spec, adapter if by == "adapter" else None) as model:
            yield model, (by,)
        del model
        models.free()


def _tokens(chat: Chat, spec: AskSpec, model: Any) -> list[list[int]]:
    """The prompts as token ids. Raises JobFailure where one leaves no room for an answer."""
    system = [{"role": "system", "content": spec.system_prompt}] if spec.system_prompt else []
    try:
        prompts = [chat.prompt_ids([*system, {"role": "user", "content": prompt}]) for prompt in spec.prompts]
    except BadTurn as error:
        raise bad_data(str(error)) from error
    longest, most = max(map(len, prompts)), _limit(spec, model)
    if longest >= most:
        which = f"prompt {prompts.index(max(prompts, key=len)) + 1}" if len(prompts) > 1 else "the prompt"
        raise bad_data(f"{which} has {longest} tokens; with an answer, {most} are possible")
    return prompts


def _limit(spec: AskSpec, model: Any) -> int:
    """Tokens of a prompt with its answer: as many as fit a row of the training, and an answer behind it."""
    most = spec.max_seq_length + spec.max_new_tokens
    return min(most, getattr(model.config, "max_position_embeddings", most))


class _Writer(TextStreamer):
    """Writes one answer, and tells what has come of it five times a second at most."""

    def __init__(self, model: models.Loaded, chat: Chat, spec: AskSpec, number: int, by: Asked, tell: Tell) -> None:
        super().__init__(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._model, self._spec, self._number, self._by, self._tell = model, spec, number, by, tell
        self._ends = end_ids(chat, model.model)
        self._untold, self._tell_at = "", 0.0

    def write(self, prompt: list[int]) -> Answer:
        """The whole answer to a prompt of these token ids, without its end token."""
        model, spec = self._model.model, self._spec
        drawn = {"temperature": spec.temperature, "top_k": 0, "top_p": 1.0} if spec.temperature else {}
        torch.manual_seed(spec.seed)
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(spec.max_new_tokens, _limit(spec, model) - len(prompt)),
                do_sample=bool(spec.temperature),
                num_beams=1,
                repetition_penalty=1.0,  # some models' own settings have another
                eos_token_id=self._ends or None,
                pad_token_id=pad_of(model, self.tokenizer.pad_token_id, self._ends),
                streamer=self,
                **drawn,
            )  # (1, prompt and answer)
        written = output[0, len(prompt) :].tolist()
        ended = bool(written) and written[-1] in self._ends
        text = str(self.tokenizer.decode(written[:-1] if ended else written, skip_special_tokens=True))
        return Answer(self._number, self._by, text, done=True, cut=not ended)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece that later tokens do not change any more. At the end the whole answer is told, by whoever asked."""
        self._untold += text
        if self._untold and time.monotonic() >= self._tell_at and not stream_end:
            self._tell(Answer(self._number, self._by, self._untold))
            self._untold, self._tell_at = "", time.monotonic() + TELL_S
