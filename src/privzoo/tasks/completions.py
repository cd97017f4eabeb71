"""What a causal language model makes of a prompt, and how good that is beside reference texts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.text import squad
from transformers import GenerationConfig

from privzoo.errors import UserError


@dataclass(frozen=True)
class Completions:
    """Greedy completions, scored as SQuAD v1.1 scores answers (Rajpurkar et al. 2016), by torchmetrics.

    exact_match is the share of completions that equal one of their references, f1 the mean of the best overlap of words
    with a reference, both in 0..1 and after the official normalisation: lower case, without punctuation, without the
    articles a, an, the. Where nothing is left of both, they are equal and f1 is 1.

    Args:
        references: name of the column of reference texts.
        max_new_tokens: the end of a completion that has not come to its end token.
    """

    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    references: str
    max_new_tokens: int

    def room(self, max_length: int) -> int:
        """Tokens that are left for a prompt, at least 1.

        Raises:
            UserError: a row of `max_length` tokens has no room for a prompt and a completion.
        """
        if type(self.max_new_tokens) is not int or not 1 <= self.max_new_tokens < max_length:
            raise UserError(
                f"task.completions.max_new_tokens={self.max_new_tokens}, expected a whole number from 1 to "
                f"{max_length - 1}, below task.max_length={max_length}: correct one of them."
            )
        return max_length - self.max_new_tokens

    def made(self, model: torch.nn.Module, processor, prompts: Sequence[list[int]]) -> list[str]:
        """The completion of each prompt, the likeliest token after the other, without special tokens and outer blanks.

        Nothing of the model's own generation settings takes part, and what others are in the batch changes nothing but
        rounding. The model must take as many tokens as the longest prompt and `max_new_tokens` together have.
        """
        end = processor.eos_token_id
        blank = processor.pad_token_id if processor.pad_token_id is not None else end
        kept = [prompt or [blank] for prompt in prompts]  # without any token there is nothing to go on from
        longest = max(map(len, kept))
        device = next(model.parameters()).device
        ids = torch.tensor([[blank] * (longest - len(prompt)) + prompt for prompt in kept], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in kept], device=device)
        greedy = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, pad_token_id=blank, eos_token_id=end
        )
        with _settings(model, greedy):
            made: Tensor = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
        return [text.strip() for text in processor.batch_decode(made[:, longest:], skip_special_tokens=True)]

    def scores(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """f1 and exact_match, each against the reference that suits it best.

        >>> Completions("answers", 8).scores(["the Normans !", "in 1066"], [["Normans"], ["1067", "year 1066"]])
        {'f1': 0.75, 'exact_match': 0.5}
        """
        said, true = [], []
        for number, (text, texts) in enumerate(zip(completions, references, strict=True)):
            said.append({"prediction_text": text, "id": str(number)})
            true.append({"answers": {"text": list(texts), "answer_start": [0] * len(texts)}, "id": str(number)})
        found = squad(said, true)  # type: ignore[arg-type]  # its annotation forbids what its documentation shows
        return {name: found[name].item() / 100 for name in self.metrics}


@contextmanager
def _settings(model: torch.nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Meanwhile the model generates by these settings alone: given to `generate`, they would be filled up with its own, such
    as a penalty on repetition. An adapter's wrapper has a copy of its base's."""
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    own = [module.generation_config for module in holders]
    for module in holders:
        module.generation_config = settings  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kept in zip(holders, own, strict=True):
            module.generation_config = kept
