"""Classification of one text, or of a pair of texts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from privzoo.errors import UserError
from privzoo.tasks.base import EncodedRows, Task, at_least_float32, pad_right, padding_mask, scoring
from privzoo.tasks.columns import Column, content_digest
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.few_shot import FewShot

ROWS_PER_TOKENIZER_CALL = 2_000


class Classification(Task):
    """A label for one text (`text` names one column) or for a pair of texts (two columns).

    A row longer than `max_length` tokens is cut as its tokenizer does it (of a pair, the longer text first). How many
    rows were cut is a private number and is kept nowhere.

    Args:
        name: as in the run record.
        data: where the rows come from.
        text: one or two names of text columns.
        label: name of the label column, integers in 0..num_labels-1.
        num_labels: number of classes, at least 2.
        max_length: tokens of a row, special tokens included.
        label_names: the classes in words, in the order of the labels.
    Raises:
        UserError: an argument is not of this form.
    """

    kind = "sequence_classification"
    num_labels: int
    metrics = ("accuracy", "loss")
    higher_is_better = True

    def __init__(
        self,
        name: str,
        data: HubData | ToyData | FewShot,
        text: Sequence[str],
        label: str,
        num_labels: int,
        max_length: int,
        label_names: Sequence[str] | None = None,
    ):
        text = [text] if isinstance(text, str) else list(text)
        if len(text) not in (1, 2):
            raise UserError(f"task.text names {len(text)} columns, expected one or two: correct the task's yaml.")
        if num_labels < 2:
            raise UserError(f"task.num_labels={num_labels}, expected at least 2: correct the task's yaml.")
        if label_names is not None and len(label_names) != num_labels:
            raise UserError(
                f"task.label_names has {len(label_names)} names, expected num_labels={num_labels}: add or drop names."
            )
        self.name, self.num_labels, self.max_length = name, num_labels, max_length
        self.label_names = list(label_names) if label_names is not None else None
        self._data, self._text, self._label = data, text, label
        self.selection = data.selection if isinstance(data, FewShot) else None

    def load(self, data_root: str | None) -> None:
        columns = [Column(name, "text") for name in self._text] + [Column(self._label, "label", self.num_labels)]
        self._tables = {split: self._data.load(split, columns, data_root) for split in ("train", "validation")}
        self.num_examples = self._tables["train"].num_rows

    def fingerprint(self) -> str:
        return content_digest(self._tables["train"], f"{self.kind} {self._text} {self._label} {self.max_length}")

    def prepare(self, processor) -> None:
        check_tokenizer(processor, self.name)
        specials = processor.num_special_tokens_to_add(pair=len(self._text) == 2)
        check_max_length(processor, self.max_length, at_least=specials + 1)
        self._pad_id = padding_id(processor)
        self.train, self.validation = (self._encoded(processor, self._tables[s]) for s in ("train", "validation"))

    def _encoded(self, processor, table: pa.Table) -> EncodedRows:
        labels = table[self._label].to_numpy()
        return EncodedRows.from_batches(self._tokenised(processor, table), {"label": labels})

    def _tokenised(self, processor, table: pa.Table) -> Iterator[Mapping[str, list[list[int]]]]:
        for start in range(0, table.num_rows, ROWS_PER_TOKENIZER_CALL):
            texts = [table[name].slice(start, ROWS_PER_TOKENIZER_CALL).to_pylist() for name in self._text]
            encoded = processor(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
            # A row without any token (an empty text, and no special tokens) still needs one to classify.
            fields = {"input_ids": self._pad_id, "token_type_ids": 0}
            yield {f: [ids or [blank] for ids in encoded[f]] for f, blank in fields.items() if f in encoded}

    def length(self, row: dict) -> int:
        return len(row["input_ids"])

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """input_ids, attention_mask (and token_type_ids where the tokenizer makes them): (R, L); labels: (R,)."""
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": pad_right(ids, self._pad_id), "attention_mask": padding_mask(ids)}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = pad_right([row["token_type_ids"] for row in rows], 0)
        return batch | {"labels": torch.tensor([row["label"] for row in rows])}

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return class_losses(class_logits(model, batch), batch)

    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """accuracy, and the mean loss of a row."""
        return evaluate_classes(model, loader)


def class_logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits, (R, classes); it sees all of the batch but the labels."""
    return at_least_float32(model(**{name: values for name, values in batch.items() if name != "labels"}).logits)


def class_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each row, (R,)."""
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def evaluate_classes(model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Accuracy and mean loss over rows, not over micro-batches."""
    rows, right, loss = 0, 0, 0.0
    with scoring(model):
        for batch in loader:
            logits = class_logits(model, batch)
            rows += len(logits)
            right += int((logits.argmax(dim=-1) == batch["labels"]).sum())
            loss += class_losses(logits, batch).sum().item()
    assert rows, "evaluate was given no micro-batch"
    return {"accuracy": right / rows, "loss": loss / rows}


def check_tokenizer(processor, task: str) -> None:
    """Raises UserError where the model came without a tokenizer."""
    if processor is None:
        raise UserError(
            f"the model has no tokenizer, but task {task} reads text: put its tokenizer files beside the model, "
            f"or choose another model."
        )


def check_max_length(processor, max_length: int, at_least: int) -> None:
    """Raises UserError where `max_length` leaves no room for text, or is more than the model takes."""
    if type(max_length) is not int or max_length < at_least:
        raise UserError(f"Expected task.max_length={max_length} to be a whole number of at least {at_least}.")
    if max_length > processor.model_max_length:
        raise UserError(
            f"task.max_length={max_length}, but the model takes at most {processor.model_max_length} tokens: "
            f"set task.max_length={processor.model_max_length}, or choose another model."
        )


def padding_id(processor) -> int:
    """The id that fills a row up; any id would do, because the attention mask hides it."""
    for token in (processor.pad_token_id, processor.eos_token_id):
        if token is not None:
            return token
    return 0
