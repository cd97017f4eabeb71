"""What a causal language model makes of a prompt, and how good that is beside reference texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.text import squad

from privzoo.errors import UserError


@dataclass(frozen=True)
class Completions:
    """Greedy completions, scored as SQuAD v1.1 scores answers (Rajpurkar et al. 2016).

    exact_match is the share of completions that equal one of their references, f1 the mean of the best overlap of words
    with a reference, both in 0..1 and after the official normalisation: lower case, without punctuation, without the
    articles a, an, the.

    Args:
        references: name of the column of reference texts.
        max_new_tokens: the end of a completion that has not come to its end token.
    """

    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    references: str
    max_new_tokens: int

    def check(self, max_length: int) -> None:
        """Raises UserError where a row of `max_length` tokens has no room for a prompt and a completion."""
        if not 1 <= self.max_new_tokens < max_length:
            raise UserError(
                f"task.completions.max_new_tokens={self.max_new_tokens}, expected 1 to {max_length - 1}, "
                f"below task.max_length={max_length}: correct one of them."
            )

    def made(self, model: torch.nn.Module, processor, prompts: Sequence[list[int]], max_length: int) -> list[str]:
        """The completion of each prompt, without special tokens and outer blanks.

        A prompt that leaves too little of `max_length` loses its beginning. What others are in the batch changes nothing
        but rounding.
        """
        blank = processor.pad_token_id if processor.pad_token_id is not None else processor.eos_token_id
        # Without any token there is nothing to go on from: the blank then stands for a beginning.
        kept = [prompt[-(max_length - self.max_new_tokens) :] or [blank] for prompt in prompts]
        longest = max(map(len, kept))
        device = next(model.parameters()).device
        ids = torch.tensor([[blank] * (longest - len(prompt)) + prompt for prompt in kept], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in kept], device=device)
        made: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
            pad_token_id=blank, eos_token_id=processor.eos_token_id,
        )  # fmt: skip
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
