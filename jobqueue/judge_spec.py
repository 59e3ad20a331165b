"""The part of the schema that says how a language model rates written answers; see spec.py for the whole."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from jobqueue.data_spec import Part

OPENAI = "https://api.openai.com/v1"
ModelName = Annotated[str, Field(min_length=1)]


class JudgeSpec(Part):
    """A language model that rates written answers from 1 to 5, behind an endpoint that speaks OpenAI's protocol."""

    model: ModelName | Annotated[list[ModelName], Field(min_length=1)]
    """By the endpoint's name; of several, each rates every answer."""
    base_url: Annotated[str, Field(pattern=r"^https?://")] = OPENAI
    """One that the workers' `LORAQ_JUDGE_URLS` allows: questions and answers are sent there."""
    api_key_env: Annotated[str, Field(pattern=r"^([A-Z0-9_]+_)?API_KEY$")] | None = "OPENAI_API_KEY"
    """The variable in the control workers' environment that holds the key; `null`: the endpoint wants none."""
    rubric: Annotated[str, Field(min_length=1)] | None = None
    """What the judge is told besides, in your words."""
    limit: PositiveInt | None = 100
    """Answers of each model, to the same questions, drawn by `seed`; `null`: all."""
    samples: Annotated[int, Field(ge=1, le=10)] = 2
    """How often each answer is rated, with the criteria in another order each time."""
    seed: NonNegativeInt = 3407
    """Another seed draws other questions."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    """`null`: not sent, for models that refuse it."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 8
    """Requests at a time."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """For one request, in seconds."""
    max_retries: NonNegativeInt = 6
    """Of one request, after 429, 5xx, or no answer in time."""
    price_per_million_input_tokens: NonNegativeFloat | dict[str, NonNegativeFloat] | None = None
    """For all models, or by model; with both prices the results show what the judge cost."""
    price_per_million_output_tokens: NonNegativeFloat | dict[str, NonNegativeFloat] | None = None
    """As for input."""

    @field_validator("base_url")
    @classmethod
    def _one_form(cls, url: str) -> str:
        return url.rstrip("/")

    @field_validator("model")
    @classmethod
    def _once_each(cls, model: str | list[str]) -> str | list[str]:
        if isinstance(model, list) and len(set(model)) < len(model):
            raise ValueError("a model is named twice; samples says how often each rates an answer")
        return model

    @property
    def models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else self.model

    def cost(self, model: str, input_tokens: int, output_tokens: int) -> float | None:
        """In the currency of the prices; None where one of them is not known for that model."""
        prices = [
            price.get(model) if isinstance(price, dict) else price
            for price in (self.price_per_million_input_tokens, self.price_per_million_output_tokens)
        ]
        if None in prices:
            return None
        return sum((price or 0.0) * n / 1e6 for price, n in zip(prices, (input_tokens, output_tokens), strict=True))
