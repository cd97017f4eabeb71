"""Question answering by encoders: the answer is a span of the context."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from privzoo.errors import UserError
from privzoo.tasks.base import EncodedRows, Task, at_least_float32, pad_right, padding_mask, scoring
from privzoo.tasks.cells import Column
from privzoo.tasks.classification import ROWS_PER_TOKENIZER_CALL, check_max_length, check_tokenizer, padding_id
from privzoo.tasks.columns import starts_of
from privzoo.tasks.data import HubData
from privzoo.tasks.digest import content_digest
from privzoo.tasks.text_scores import SquadScores
from privzoo.tasks.units import RowsOfUnits

OUTSIDE = 0  # where start and end stand if a window does not hold the answer: its first token


class SpanAnswers(Task):
    """A question, a context, and the places of its answers in the context.

    A context that is too long for a row is read in windows that overlap. **The windows of one question are one unit of
    privacy**: their gradients are added up before they are clipped. A window's loss is the mean of the cross-entropies of
    where its answer starts and ends over its own tokens (its first token, where the answer is not whole in it). The first
    answer of a training row is learned; a prediction is the likeliest span of all windows and is held against all answers.

    Args:
        name: as in the run record.
        data: where the rows come from.
        question, context: names of text columns.
        answers: name of the column of {text: [...], answer_start: [...]}, places counted in characters.
        max_length: tokens of a row, question and special tokens included.
        stride: tokens that neighbouring windows have in common.
        question_tokens: of a question at most; the rest of a longer one is cut.
        answer_tokens: of a predicted answer, at most.
    Raises:
        UserError: an argument is not of this form.
    """

    kind = "question_answering"
    num_labels = None
    metrics = ("f1", "exact_match", "loss")
    higher_is_better = True

    def __init__(
        self,
        name: str,
        data: HubData,
        question: str,
        context: str,
        answers: str,
        max_length: int,
        stride: int = 128,
        question_tokens: int = 64,
        answer_tokens: int = 30,
    ):
        for what, value in (("stride", stride), ("question_tokens", question_tokens), ("answer_tokens", answer_tokens)):
            if type(value) is not int or value < 1:
                raise UserError(f"Expected task.{what}={value} to be a whole number of at least 1.")
        self.name, self.max_length, self._data = name, max_length, data
        self._question, self._context, self._answers = question, context, answers
        self._stride, self._question_tokens, self._answer_tokens = stride, question_tokens, answer_tokens

    def load(self, data_root: str | None) -> None:
        columns = [
            Column(self._question, "text"),
            Column(self._context, "text"),
            Column(self._answers, "spans", within=self._context),
        ]
        self._tables = {split: self._data.load(split, columns, data_root) for split in ("train", "validation")}
        self.num_examples = self._tables["train"].num_rows
        self.selection = self._data.selection

    def fingerprint(self) -> str:
        return content_digest(self._tables["train"], f"{self.kind} {self.max_length} {self._stride} {self._question_tokens}")

    def prepare(self, processor) -> None:
        check_tokenizer(processor, self.name)
        specials = processor.num_special_tokens_to_add(pair=True)
        check_max_length(processor, self.max_length, at_least=specials + self._question_tokens + self._stride + 1)
        if not processor.is_fast:
            raise UserError(
                f"task {self.name} needs a tokenizer that tells where tokens stand (a fast one): take another model."
            )
        self._pad_id = padding_id(processor)
        encoded = {split: self._encoded(processor, table) for split, table in self._tables.items()}
        self.train, self.validation = encoded["train"][0], encoded["validation"][0]
        self.rows_of_unit = RowsOfUnits(encoded["train"][1])

    def _encoded(self, processor, table: pa.Table) -> tuple[EncodedRows, np.ndarray]:
        """The windows, and the question of each."""
        scalars: dict[str, list[int]] = {name: [] for name in ("question", "start", "end")}
        batches = list(self._windows(processor, table, scalars))
        rows: dict[str, np.ndarray] = {name: np.asarray(values) for name, values in scalars.items()}
        rows["row"] = np.arange(len(rows["question"]))
        return EncodedRows.from_batches(batches, rows), rows["question"]

    def _windows(self, processor, table: pa.Table, scalars: dict[str, list[int]]) -> Iterator[Mapping[str, list[list[int]]]]:
        """Tokens of windows; `from` and `to` are the characters of a context's token, -1 of others."""
        for first in range(0, table.num_rows, ROWS_PER_TOKENIZER_CALL):
            part = table.slice(first, ROWS_PER_TOKENIZER_CALL)
            asked = part[self._question].to_pylist()
            questions = [_shortened(processor, question, self._question_tokens) for question in asked]
            texts, starts = part[self._answers].to_pylist(), part[starts_of(self._answers)].to_pylist()
            made = processor(
                questions, part[self._context].to_pylist(), truncation="only_second", max_length=self.max_length,
                stride=self._stride, return_overflowing_tokens=True, return_offsets_mapping=True,
                return_attention_mask=False,
            )  # fmt: skip
            places = []
            for window, row in enumerate(made["overflow_to_sample_mapping"]):
                own = [part == 1 for part in made.sequence_ids(window)]
                place = [c if mine else (-1, -1) for c, mine in zip(made["offset_mapping"][window], own, strict=True)]
                begin = starts[row][0]
                start, end = span_of(place, begin, begin + len(texts[row][0]))
                scalars["question"].append(first + row)
                scalars["start"].append(start)
                scalars["end"].append(end)
                places.append(place)
            kept = {name: made[name] for name in ("input_ids", "token_type_ids") if name in made}
            yield kept | {
                "from": [[c[0] for c in place] for place in places],
                "to": [[c[1] for c in place] for place in places],
            }

    def length(self, row: dict) -> int:
        return len(row["input_ids"])

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """input_ids, attention_mask (and token_type_ids where the tokenizer makes them), in_context: (R, L); start, end:
        (R,), places of the answer's first and last token; row: (R,), the window's number."""
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": pad_right(ids, self._pad_id), "attention_mask": padding_mask(ids)}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = pad_right([row["token_type_ids"] for row in rows], 0)
        batch["in_context"] = pad_right([(row["from"] >= 0).astype(np.int64) for row in rows], 0)
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in ("start", "end", "row")}

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        start, end = self._logits(model, batch)
        return span_losses(start, end, batch)

    def _logits(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of start and end, (R, L); -inf on padding, which so weighs nothing however much of it there is."""
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
        found = model(**{name: batch[name] for name in names})
        padding = batch["attention_mask"] == 0
        start, end = (
            at_least_float32(each).masked_fill(padding, -torch.inf) for each in (found.start_logits, found.end_logits)
        )
        return start, end

    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """f1 and exact_match as SQuAD v1.1 scores them, in 0..1, over questions; the mean loss of a window. The rows must be
        of the validation split, all windows of their questions."""
        best: dict[int, tuple[float, int, int]] = {}  # by question: score, and the characters of its answer
        total, count = 0.0, 0
        with scoring(model):
            for batch in loader:
                start, end = self._logits(model, batch)
                total += span_losses(start, end, batch).sum().item()
                count += len(start)
                scores, first, last = best_spans(start, end, batch["in_context"], self._answer_tokens)
                for number, found in zip(batch["row"].tolist(), zip(scores, first, last, strict=True), strict=True):
                    row = self.validation[number]
                    at = (found[0], int(row["from"][found[1]]), int(row["to"][found[2]]))
                    best[row["question"]] = max(best.get(row["question"], at), at)
        assert count, "evaluate was given no micro-batch"
        table = self._tables["validation"].take(list(best))
        places = [(begin, end) for _, begin, end in best.values()]
        said = [text[begin:end] for text, (begin, end) in zip(table[self._context].to_pylist(), places, strict=True)]
        return SquadScores()(said, table[self._answers].to_pylist()) | {"loss": total / count}


def _shortened(processor, question: str, tokens: int) -> str:
    """As much of a question as its first `tokens` tokens say."""
    places = processor(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return question if len(places) <= tokens else question[: places[tokens - 1][1]]


def span_of(places: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters begin..end, or `OUTSIDE` twice where they are not all there.

    Args:
        places: the characters of each token; -1 of tokens that are not of the context.

    >>> span_of([(-1, -1), (0, 3), (4, 9), (10, 12)], 4, 12), span_of([(-1, -1), (4, 9)], 4, 12)
    ((2, 3), (0, 0))
    """
    holding = [token for token, (first, last) in enumerate(places) if first >= 0 and last > begin and first < end]
    if not holding or places[holding[0]][0] > begin or places[holding[-1]][1] < end:
        return OUTSIDE, OUTSIDE
    return holding[0], holding[-1]


def span_losses(start: Tensor, end: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the two cross-entropies of each window, (R,)."""
    both = (functional.cross_entropy(start, batch["start"], reduction="none"),
            functional.cross_entropy(end, batch["end"], reduction="none"))  # fmt: skip
    return (both[0] + both[1]) / 2


def best_spans(start: Tensor, end: Tensor, allowed: Tensor, tokens: int) -> tuple[list[float], list[int], list[int]]:
    """Of each row the score, first and last token of its best span: the highest start + end with first <= last, at most
    `tokens` long, both allowed.

    Args:
        start, end: (R, L).
        allowed: (R, L), 1 where a token may be of the answer, at least one a row.
    """
    start, end = (each.masked_fill(allowed == 0, -torch.inf) for each in (start, end))
    width = start.shape[1]
    band = torch.ones(width, width, dtype=torch.bool, device=start.device).triu().tril(tokens - 1)
    both = (start[:, :, None] + end[:, None, :]).masked_fill(~band, -torch.inf).flatten(1)
    scores, places = both.max(dim=1)
    return scores.tolist(), (places // width).tolist(), (places % width).tolist()
