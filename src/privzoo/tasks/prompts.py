"""Classification in words: a language model fills the blank of a template, and each class has a word.

Source: Schick and Schütze 2021 (pattern and verbaliser); Gao et al. 2021 (prompt-based fine-tuning), whose templates for
masked language models DP-BiTFiT and DPZero take.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.tasks.base import at_least_float32
from privzoo.tasks.templates import Template, parsed

BLANK = "mask"  # the name of the blank in a template


@dataclass(frozen=True)
class Prompt:
    """A template and a word for each class.

    Args:
        template: columns and `{mask}` in braces, as in "{sentence} It was {mask}.".
        words: one a class, in the order of the labels.
        causal: template for models that see only what stands before: what comes after its blank is never read. None: that
            of the others, which must then end with its blank.
        causal_words: the words that go with it; None: those of the others.
    """

    template: str
    words: Sequence[str]
    causal: str | None = None
    causal_words: Sequence[str] | None = None

    def made_for(self, processor, columns: Sequence[str], num_labels: int, max_length: int) -> "FilledPrompt":
        """The prompt as this tokenizer's model reads it: with a blank where it has a mask token, before one otherwise.

        Raises:
            UserError: a template without its columns or its blank, or words that the model cannot say in one token.
        """
        masked = processor.mask_token is not None
        template = self.template if masked else self.causal or self.template
        words = self.words if masked else self.causal_words or self.words
        parts = parsed(template, "prompt.template" if masked else "prompt.causal")
        names = [name for _, name in parts if name is not None]
        if sorted(names) != sorted([*columns, BLANK]):
            raise UserError(
                f"task.prompt {template!r} names {', '.join(names)}, expected each of {', '.join([*columns, BLANK])} once."
            )
        if not masked and names[-1] != BLANK:
            raise UserError(
                f"task.prompt.template={template!r} goes on after its blank with {{{names[-1]}}}, which a causal language "
                "model does not see: give task.prompt.causal, a template that ends with {mask}."
            )
        if len(words) != num_labels:
            raise UserError(f"task.prompt.words has {len(words)} words, expected one for each of {num_labels} classes.")
        return FilledPrompt(processor, parts, words, max_length)


class FilledPrompt:
    """Rows of a template for one tokenizer, and what its model says in the blank.

    A row that is too long loses the end of its texts, the longest first, and never a part of the template.

    Args:
        processor: a fast tokenizer.
        parts: of the template.
        words: of the classes.
        max_length: tokens of a row.
    """

    def __init__(self, processor, parts: Template, words: Sequence[str], max_length: int) -> None:
        self._processor, self._max_length = processor, max_length
        self._masked = processor.mask_token is not None
        place = [name for _, name in parts].index(BLANK)
        before = parts[place][0]
        if self._masked:
            self._parts = parts
        else:
            self._parts = [*parts[:place], (before.rstrip(), None)]
        self.words = [self._id_of(word, before) for word in words]
        if len(set(self.words)) < len(words):
            raise UserError(f"task.prompt.words={list(words)} begin alike for this model: choose words that do not.")
        if len(self._ids(dict.fromkeys(self._columns(), ""))) >= max_length:
            raise UserError(f"task.max_length={max_length} leaves no room beside the template: set a larger one.")

    def _columns(self) -> list[str]:
        return [name for _, name in self._parts if name is not None and name != BLANK]

    def _id_of(self, word: str, before: str) -> int:
        """The one token of a word in the blank; of a causal model, the first of them."""
        ids = self._processor
        if self._masked:
            found = ids((" " if before[-1:].isspace() else "") + word, add_special_tokens=False).input_ids
            fits = len(found) == 1
        else:
            lead = before.strip() or "."
            start = ids(lead, add_special_tokens=False).input_ids
            found = ids(f"{lead} {word}", add_special_tokens=False).input_ids
            fits = found[: len(start)] == start and len(found) > len(start)
            found = found[len(start) :]
        if not fits or found[0] == ids.unk_token_id:
            said = "unknown to the tokenizer" if fits else f"{len(found)} tokens"
            raise UserError(f"task.prompt.words: {word!r} is {said}, expected one token that it knows: choose another word.")
        return int(found[0])

    def rows(self, table: pa.Table, blanks: list[int]) -> list[list[int]]:
        """Ids of each row, with special tokens; `blanks` gets the place that is read in each."""
        texts = [self._free_of_blanks(table[name].to_pylist()) for name in self._columns()]
        filled = [dict(zip(self._columns(), row, strict=True)) for row in zip(*texts, strict=True)]
        made = self._processor([self._text(row) for row in filled], verbose=False).input_ids
        for i, ids in enumerate(made):
            if len(ids) > self._max_length:
                made[i] = self._shortened(filled[i])
        blanks.extend(ids.index(self._processor.mask_token_id) if self._masked else len(ids) - 1 for ids in made)
        return made

    def _free_of_blanks(self, texts: list[str]) -> list[str]:
        """A text that names the mask token itself would have a blank of its own."""
        return [without(text, self._processor.mask_token) for text in texts] if self._masked else texts

    def _text(self, row: Mapping[str, str]) -> str:
        values = {**row, BLANK: self._processor.mask_token}
        return "".join(literal + (values[name] if name is not None else "") for literal, name in self._parts)

    def _ids(self, row: Mapping[str, str]) -> list[int]:
        return self._processor(self._text(row), verbose=False).input_ids

    def _shortened(self, row: dict[str, str]) -> list[int]:
        ids = self._ids(row)
        while (excess := len(ids) - self._max_length) > 0:
            ends = {name: self._ends(text) for name, text in row.items()}  # of each token, in characters
            first, *others = sorted(ends, key=lambda name: -len(ends[name]))
            lead = len(ends[first]) - max((len(ends[name]) for name in others), default=0)
            kept = len(ends[first]) - (min(excess, lead) or -(-excess // len(ends)))
            row[first] = row[first][: ends[first][kept - 1]] if kept > 0 else ""
            ids = self._ids(row)
        return ids

    def _ends(self, text: str) -> list[int]:
        found = self._processor(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in found.offset_mapping]

    def logits(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says in the blank of each row, (R, classes)."""
        seen = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "token_type_ids")}
        every = model(**seen).logits
        at = every[torch.arange(len(every), device=every.device), batch["blank"]]
        return at_least_float32(at[:, torch.tensor(self.words, device=at.device)])


def without(text: str, token: str) -> str:
    """The text without a token, and without one that what is left would make.

    >>> without("a [MA[MASK]SK] b", "[MASK]")
    'a  b'
    """
    while token in text:
        text = text.replace(token, "")
    return text


def batches(filled: FilledPrompt, table: pa.Table, blanks: list[int], size: int) -> Iterator[dict[str, list[list[int]]]]:
    """The rows of a table, `size` at a time."""
    for start in range(0, table.num_rows, size):
        yield {"input_ids": filled.rows(table.slice(start, size), blanks)}
