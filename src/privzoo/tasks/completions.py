"""What a causal language model makes of a task's prompts, and how good that is beside reference texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from privzoo.errors import UserError
from privzoo.tasks.decoding import generated
from privzoo.tasks.text_scores import SquadScores, TextScores


@dataclass(frozen=True)
class Completions:
    """Completions of validation prompts, the likeliest token after the other or by beams, and their scores.

    Args:
        references: name of the column of reference texts.
        max_new_tokens: the end of a completion that has not come to its end token.
        scores: what they are scored by.
        num_beams: sequences that are followed at a time; 1 is greedy.
        one_text: whether that column holds one text a row, and not a list of them.
        pooled: whether rows with the same prompt are one to be completed, with the references of all.
        length_penalty: of beams, the exponent of a sequence's length that its log probability is divided by.
        no_repeat_ngram_size: so many tokens in a row come once in a completion, whatever its prompt says; 0: they may come
            again.
        min_new_tokens: a completion does not end before.
    """

    references: str
    max_new_tokens: int
    scores: TextScores = field(default_factory=SquadScores)
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    one_text: bool = False
    pooled: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores, the headline first."""
        return self.scores.metrics

    def room(self, max_length: int) -> int:
        """Tokens that are left for a prompt, at least 1.

        Raises:
            UserError: a row of `max_length` tokens has no room for a prompt and a completion; or a number is none.
        """
        for name, least in {"num_beams": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"Expected task.completions.{name}={value} to be a whole number of at least {least}.")
        if type(self.max_new_tokens) is not int or not 1 <= self.max_new_tokens < max_length:
            raise UserError(
                f"task.completions.max_new_tokens={self.max_new_tokens}, expected a whole number from 1 to "
                f"{max_length - 1}, below task.max_length={max_length}: correct one of them."
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"task.completions.min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}: "
                "correct one of them."
            )
        return max_length - self.max_new_tokens

    def made(self, model: torch.nn.Module, processor, prompts: Sequence[list[int]]) -> list[str]:
        """The completion of each prompt, without special tokens and outer blanks, see `generated`."""
        beams: dict[str, Any] = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        least: dict[str, Any] = {"min_new_tokens": self.min_new_tokens} if self.min_new_tokens else {}
        ids = generated(
            model,
            processor,
            prompts,
            once=self.no_repeat_ngram_size,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            **beams,
            **least,
        )
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
