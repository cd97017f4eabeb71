"""What a causal language model makes of prompts: a batch at a time, padded on the left, by the asked settings alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)


def generated(
    model: torch.nn.Module,
    processor,
    prompts: Sequence[list[int]],
    stop: str | None = None,
    stream: bool = False,
    once: int = 0,
    **settings,
) -> list[list[int]]:
    """The new tokens of each prompt, up to its end token (left out) or `max_new_tokens`.

    Nothing of the model's own generation settings takes part, and what others are in the batch changes nothing but
    rounding. The model must take as many tokens as the longest prompt and `max_new_tokens` together have.

    Args:
        prompts: token ids; one without any begins with the padding token, as there must be something to go on from.
        stop: no further tokens once this text has been said.
        stream: print what a single prompt is completed by as it comes.
        once: so many new tokens in a row come once; 0: they may come again.
        settings: of a GenerationConfig, max_new_tokens among them; greedy unless do_sample or num_beams say otherwise.
    """
    end = processor.eos_token_id
    blank = processor.pad_token_id if processor.pad_token_id is not None else end
    kept = [prompt or [blank] for prompt in prompts]
    longest = max(map(len, kept))
    device = next(model.parameters()).device
    ids = torch.tensor([[blank] * (longest - len(prompt)) + prompt for prompt in kept], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in kept], device=device)
    asked = GenerationConfig(
        **{"do_sample": False, "num_beams": 1, **settings}, pad_token_id=blank, eos_token_id=end
    )  # fmt: skip
    streamer = _Printed(processor, kept[0]) if stream else None
    stops = StoppingCriteriaList([] if stop is None else [_Said(stop, processor, longest)])
    once_only = LogitsProcessorList([_Once(once, longest)] if once else [])
    with _settings(model, asked), torch.no_grad():
        made: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            streamer=streamer,
            stopping_criteria=stops,
            logits_processor=once_only,
        )
    return [_up_to(end, row) for row in made[:, longest:].tolist()]


def continued(processor, prompt: list[int], ids: list[int]) -> str:
    """What the tokens `ids` say after a prompt's. Alone some tokenizers would leave out the blank that they begin with."""
    before, both, alone = (str(processor.decode(each, skip_special_tokens=True)) for each in (prompt, prompt + ids, ids))
    return both[len(before) :] if both.startswith(before) else alone


class _Printed(TextStreamer):
    """New text on the terminal as it comes, with the blank that it may begin with (see `continued`)."""

    def __init__(self, processor, prompt: list[int]) -> None:
        super().__init__(processor, skip_prompt=True, skip_special_tokens=True)
        self._prompt, self._begun, self._lead = prompt, False, ""

    def put(self, value) -> None:
        if not self.next_tokens_are_prompt and not self._begun:
            first, self._begun = value.reshape(-1).tolist(), True
            alone = str(self.tokenizer.decode(first, skip_special_tokens=True))
            both = continued(self.tokenizer, self._prompt, first)
            self._lead = " " if both.startswith(" ") and not alone.startswith(" ") else ""
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            text, self._lead = self._lead + text, ""
        super().on_finalized_text(text, stream_end)


def _up_to(end: int | None, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


class _Once(NoRepeatNGramLogitsProcessor):
    """No n-gram twice. transformers' own counts the prompt's, so that a summary could not say what its article says."""

    def __init__(self, size: int, start: int) -> None:
        super().__init__(size)
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids[:, self.start :], scores)


class _Said(StoppingCriteria):
    """Which rows have said a text. transformers' own looks for it token by token, which not every tokenizer allows."""

    def __init__(self, text: str, processor, start: int) -> None:
        self.text, self.processor, self.start = text, processor, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        said = self.processor.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([self.text in text for text in said], device=input_ids.device)


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
