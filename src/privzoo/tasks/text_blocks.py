"""Running text in blocks, learned by a causal language model."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.tasks.base import EncodedRows, Task, pad_right, padding_mask, scoring
from privzoo.tasks.cells import Column
from privzoo.tasks.classification import ROWS_PER_TOKENIZER_CALL, check_max_length, check_tokenizer, padding_id
from privzoo.tasks.data import HubData
from privzoo.tasks.digest import content_digest
from privzoo.tasks.language_modelling import NO_LOSS, TokenScores, row_losses
from privzoo.tasks.prompt_tokens import start_tokens
from privzoo.tasks.units import UNIT


class TextBlocks(Task):
    """The text of all rows, one after another, cut into blocks of `words` words; a block is an example, the unit of privacy.

    Blocks are counted in words (what stands between blanks), so that N does not hang on the tokenizer; the last one may be
    shorter. A row is [start token, if the tokenizer sets one] + the block's tokens; each of them but the first of the row
    carries loss, padding none. A block longer than `max_length` tokens loses its end.

    Args:
        name: as in the run record.
        data: where the text comes from.
        text: name of the text column.
        words: of a block, at least 2.
        max_length: tokens of a row, at least 2.
    Raises:
        UserError: `words` is not of this form; a split holds no word.
    """

    kind = "causal_lm"
    num_labels = None
    metrics = ("perplexity", "token_accuracy", "loss")
    higher_is_better = False

    def __init__(self, name: str, data: HubData, text: str, words: int, max_length: int):
        if type(words) is not int or words < 2:
            raise UserError(f"Expected task.words={words} to be a whole number of at least 2.")
        self.name, self.max_length, self._data, self._text, self._words = name, max_length, data, text, words
        self.selection = (
            f"An example is a block of {words} words of running text: a document of several blocks is protected block by "
            "block, not as a whole."
        )

    def load(self, data_root: str | None) -> None:
        self._tables = {split: self._blocks(split, data_root) for split in ("train", "validation")}
        self.num_examples = self._tables["train"].num_rows

    def _blocks(self, split: str, data_root: str | None) -> pa.Table:
        table = self._data.load(split, [Column(self._text, "text")], data_root)
        if UNIT in table.column_names:
            raise UserError(f"task {self.name} joins all rows to one text, so that no owner is a unit: take task.kind=text.")
        rows = table[self._text]
        words = [word for row in rows.to_pylist() for word in row.split()]
        if not words:
            raise UserError(f"task {self.name}: the {split} split holds no word in {self._text!r}: choose another data set.")
        blocks = [" ".join(words[first : first + self._words]) for first in range(0, len(words), self._words)]
        return pa.table({self._text: pa.array(blocks, pa.large_string())})

    def fingerprint(self) -> str:
        return content_digest(self._tables["train"], f"{self.kind} {self._words} {self.max_length}")

    def prepare(self, processor) -> None:
        check_tokenizer(processor, self.name)
        check_max_length(processor, self.max_length, at_least=2)
        self._pad_id = padding_id(processor)
        self.train, self.validation = (
            EncodedRows.from_batches(self._tokenised(processor, self._tables[split]), {})
            for split in ("train", "validation")
        )

    def _tokenised(self, processor, table: pa.Table) -> Iterator[Mapping[str, list[list[int]]]]:
        start = start_tokens(processor)
        for first in range(0, table.num_rows, ROWS_PER_TOKENIZER_CALL):
            texts = table[self._text].slice(first, ROWS_PER_TOKENIZER_CALL).to_pylist()
            made = processor(texts, add_special_tokens=False, verbose=False).input_ids
            yield {"input_ids": [(start + ids or [self._pad_id])[: self.max_length] for ids in made]}

    def length(self, row: dict) -> int:
        return len(row["input_ids"])

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels: (R, L), padded on the right; labels are NO_LOSS on padding."""
        ids = [np.asarray(row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_right(ids, self._pad_id),
            "attention_mask": padding_mask(ids),
            "labels": pad_right(ids, NO_LOSS),
        }

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return row_losses(model, batch)

    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """What `TokenScores` says."""
        found = TokenScores()
        with scoring(model):
            for batch in loader:
                found.add(model, batch)
        return found.scores()
