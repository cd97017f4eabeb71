"""Classification of one text, or of a pair of texts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from privzoo.errors import UserError
from privzoo.tasks.base import EncodedRows, Task, at_least_float32, pad_right, padding_mask, scoring
from privzoo.tasks.cells import Column
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.digest import content_digest
from privzoo.tasks.few_shot import FewShot
from privzoo.tasks.own_data import OwnData
from privzoo.tasks.prompts import Prompt, batches

ROWS_PER_TOKENIZER_CALL = 2_000
NOT_SEEN = ("labels", "part")  # of a batch, by the model
KINDS = {"classifier": "sequence_classification", "prompt": "prompt"}  # of model, by head


class Classification(Task):
    """A label for one text (`text` names one column) or for a pair of texts (two columns).

    A row longer than `max_length` tokens is cut as its tokenizer does it (of a pair, the longer text first). How many
    rows were cut is a private number and is kept nowhere.

    With the head "classifier" the model gets one of its own for the classes; with "prompt" it is a language model as it was
    pretrained, masked or causal, and says the class in the blank of a template (see `Prompt`).

    Args:
        name: as in the run record.
        data: where the rows come from.
        text: one or two names of text columns.
        label: name of the label column, integers in 0..num_labels-1.
        num_labels: number of classes, at least 2.
        max_length: tokens of a row, special tokens included.
        label_names: the classes in words, in the order of the labels.
        unlabelled: a label that means "none"; such rows are left out of every split.
        also_scored: further splits of `data` that are scored beside validation, each by itself (MNLI's mismatched one).
        head: "classifier" or "prompt".
        named_labels: whether the label column may hold the names of `label_names`, too.
        prompt: the template and the words of the classes; None: the task has only the other head.
    Raises:
        UserError: an argument is not of this form.
    """

    kind: str
    num_labels: int
    metrics: tuple[str, ...] = ("accuracy", "loss")
    higher_is_better = True

    def __init__(
        self,
        name: str,
        data: HubData | ToyData | FewShot | OwnData,
        text: Sequence[str],
        label: str,
        num_labels: int,
        max_length: int,
        label_names: Sequence[str] | None = None,
        unlabelled: int | None = None,
        also_scored: Sequence[str] = (),
        head: str = "classifier",
        prompt: Prompt | None = None,
        named_labels: bool = False,
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
        if head not in KINDS or (head == "prompt" and prompt is None):
            ways = "classifier or prompt" if prompt is not None else "classifier, as the task's yaml has no prompt"
            raise UserError(f"Unknown task.head={head}: expected {ways}.")
        self.kind, self._prompt = KINDS[head], prompt if head == "prompt" else None
        self.name, self.num_labels, self.max_length, self.texts = name, num_labels, max_length, len(text)
        self.label_names = list(label_names) if label_names is not None else None
        names = tuple(label_names or ()) if named_labels else ()
        self._data, self._text, self._label = data, text, Column(label, "label", num_labels, unlabelled, names)
        self._scored = ("validation", *also_scored)
        self.metrics = ("accuracy", "loss", *(f"accuracy_{split}" for split in also_scored))

    def load(self, data_root: str | None) -> None:
        columns = [Column(name, "text") for name in self._text] + [self._label]
        self._tables = {split: self._data.load(split, columns, data_root) for split in ("train", *self._scored)}
        self.count(self._tables["train"])
        self.selection = self._data.selection

    def fingerprint(self) -> str:
        settings = f"{self.kind} {self._text} {self._label.name} {self.max_length}"
        return content_digest(self._tables["train"], settings + (f" {self._prompt}" if self._prompt else ""))

    def prepare(self, processor) -> None:
        check_tokenizer(processor, self.name)
        specials = processor.num_special_tokens_to_add(pair=len(self._text) == 2)
        check_max_length(processor, self.max_length, at_least=specials + 1)
        self._pad_id = padding_id(processor)
        if self._prompt is not None:
            self._filled = self._prompt.made_for(processor, self._text, self.num_labels, self.max_length)
        self.train = self._encoded(processor, self._tables["train"])
        scored = [self._tables[split] for split in self._scored]
        parts = np.repeat(np.arange(len(scored)), [table.num_rows for table in scored])
        self.validation = self._encoded(processor, pa.concat_tables(scored), {"part": parts} if len(scored) > 1 else {})

    def _encoded(self, processor, table: pa.Table, scalars: Mapping[str, np.ndarray] | None = None) -> EncodedRows:
        scalars = {"label": table[self._label.name].to_numpy(), **(scalars or {})}
        if self._prompt is not None:
            blanks: list[int] = []  # filled while the rows are made
            return EncodedRows.from_batches(
                batches(self._filled, table, blanks, ROWS_PER_TOKENIZER_CALL), {"blank": blanks, **scalars}
            )
        return EncodedRows.from_batches(self._tokenised(processor, table), scalars)

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
        """input_ids, attention_mask (and token_type_ids where the tokenizer makes them): (R, L); labels: (R,). Rows of
        validation have their split's place in `part`, (R,), where several are scored; rows of a prompt the place of its
        blank in `blank`, (R,)."""
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": pad_right(ids, self._pad_id), "attention_mask": padding_mask(ids)}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = pad_right([row["token_type_ids"] for row in rows], 0)
        batch |= {name: torch.tensor([row[name] for row in rows]) for name in ("part", "blank") if name in rows[0]}
        return batch | {"labels": torch.tensor([row["label"] for row in rows])}

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return class_losses(self._logits(model, batch), batch)

    def _logits(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return class_logits(model, batch) if self._prompt is None else self._filled.logits(model, batch)

    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """accuracy and the mean loss of a row of validation; the accuracy of each further split."""
        found = evaluate_classes(model, loader, self._logits, parts=len(self._scored))
        further = {f"accuracy_{split}": part["accuracy"] for split, part in zip(self._scored, found, strict=True)}
        return found[0] | {name: further[name] for name in self.metrics if name in further}


def class_logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits, (R, classes); it sees all of the batch but what it is scored by."""
    return at_least_float32(model(**{name: values for name, values in batch.items() if name not in NOT_SEEN}).logits)


def class_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each row, (R,)."""
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def evaluate_classes(
    model: torch.nn.Module,
    loader: Iterable[dict[str, Tensor]],
    logits_of: Callable[[torch.nn.Module, dict[str, Tensor]], Tensor] = class_logits,
    parts: int = 1,
) -> list[dict[str, float]]:
    """Accuracy and mean loss over rows, not over micro-batches, of each part; "part" in a batch says whose a row is."""
    sums = torch.zeros(parts, 3, dtype=torch.float64)  # rows, right ones, loss
    with scoring(model):
        for batch in loader:
            logits = logits_of(model, batch)
            right = logits.argmax(dim=-1) == batch["labels"]
            found = torch.stack([torch.ones_like(right), right, class_losses(logits, batch)], dim=1).double().cpu()
            sums.index_add_(0, batch["part"].cpu() if parts > 1 else torch.zeros(len(found), dtype=torch.long), found)
    assert bool((sums[:, 0] > 0).all()), "evaluate was given no row of a part"
    return [{"accuracy": right / rows, "loss": loss / rows} for rows, right, loss in sums.tolist()]


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
