"""Multiple choice by a causal language model: each candidate is what would come after the prompt, the likeliest is chosen.

Source: Gao et al. 2021 (lm-evaluation-harness) and Malladi et al. 2023 (MeZO) for choosing by the mean log probability of a
candidate's tokens, and for learning the right candidate's tokens alone.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.tasks.base import Task, pad_right, padding_mask, scoring
from privzoo.tasks.cells import Column
from privzoo.tasks.classification import check_max_length, check_tokenizer, padding_id
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.digest import content_digest
from privzoo.tasks.few_shot import FewShot
from privzoo.tasks.language_modelling import NO_LOSS, row_losses
from privzoo.tasks.prompt_tokens import joined, start_tokens, template_ids
from privzoo.tasks.templates import parsed

OF_A_CANDIDATE = ("input_ids", "attention_mask", "labels")


class MultipleChoice(Task):
    """Of several candidates the one that a label names.

    A candidate is [start token, if the tokenizer sets one] + prompt + candidate, of which only the candidate's own tokens
    carry loss. Learned is the right candidate of each training row: the loss of a row is the mean over its tokens. In
    validation the candidate of the smallest such loss is the answer.

    Args:
        name: as in the run record.
        data: where the rows come from.
        prompt: template with columns in braces.
        candidates: a template for each choice, as in [" {choice1}", " {choice2}"].
        label: name of the label column, the number of the right choice from 0.
        max_length: tokens of a row; one too long loses the beginning of its prompt, and then the end of its candidate.
        words: what stands in a template for the values of a column, as in {question: {cause: because, effect: so}}; a value
            that is not among them is an error.
    Raises:
        UserError: an argument is not of this form.
    """

    kind = "causal_lm"
    num_labels = None
    metrics: tuple[str, ...] = ("accuracy", "loss")
    higher_is_better = True

    def __init__(
        self,
        name: str,
        data: HubData | ToyData | FewShot,
        prompt: str,
        candidates: Sequence[str],
        label: str,
        max_length: int,
        words: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        if len(candidates) < 2:
            raise UserError(
                f"task.candidates names {len(candidates)} choices, expected at least 2: correct the task's yaml."
            )
        self.name, self.max_length = name, max_length
        self._data, self._label, self._words = data, Column(label, "label", len(candidates)), dict(words or {})
        self._templates = [prompt, *candidates]
        self._prompt, self._candidates = parsed(prompt, "prompt"), [parsed(each, "candidates") for each in candidates]
        self._asked = {name for _, name in self._prompt if name is not None}
        self._said = {name for template in self._candidates for _, name in template if name is not None}
        unread = self._words.keys() - self._asked - self._said
        if unread:
            raise UserError(
                f"task.words names {min(unread)!r}, which no template reads: they read "
                f"{', '.join(sorted(self._asked | self._said))}."
            )

    def load(self, data_root: str | None) -> None:
        # A blank candidate would be the likeliest of all.
        texts = [
            Column(name, "text", names=tuple(self._words.get(name, ())), empty=name not in self._said)
            for name in sorted(self._asked | self._said)
        ]
        columns = [*texts, self._label]
        self._tables = {split: self._data.load(split, columns, data_root) for split in ("train", "validation")}
        self.count(self._tables["train"])
        self.selection = self._data.selection

    def fingerprint(self) -> str:
        return content_digest(
            self._tables["train"], f"{self.kind} choices {self._templates} {self._words} {self.max_length}"
        )

    def prepare(self, processor) -> None:
        check_tokenizer(processor, self.name)
        check_max_length(processor, self.max_length, at_least=2)
        self._pad_id = padding_id(processor)
        self.train, self.validation = (self._encoded(processor, split) for split in ("train", "validation"))

    def _encoded(self, processor, split: str) -> list[dict]:
        """Of each row the right candidate as tokens and how many of them come before it; in validation all others, too."""
        table = self._in_words(self._tables[split])
        start, prompts = start_tokens(processor), template_ids(processor, self._prompt, table)
        options = [template_ids(processor, template, table) for template in self._candidates]
        rows: list[dict] = []
        for prompt, right, *own in zip(prompts, table[self._label.name].to_pylist(), *options, strict=True):
            made = [joined(start, prompt, option, self.max_length) for option in own]
            if min(context for _, context in made) < 1:
                raise UserError(
                    f"{self.name} ({split} split), row {len(rows)}: its prompt has no token to go on from: give task.prompt "
                    "words of its own."
                )
            choices = [{"input_ids": np.array(ids, dtype=np.int32), "context": context} for ids, context in made]
            rows.append(choices[right] | ({} if split == "train" else {"choices": choices, "right": right}))
        return rows

    def _in_words(self, table: pa.Table) -> pa.Table:
        for name, words in self._words.items():
            column = pa.array([words[value] for value in table[name].to_pylist()], pa.large_string())
            table = table.set_column(table.column_names.index(name), name, column)
        return table

    def length(self, row: dict) -> int:
        return max(len(choice["input_ids"]) for choice in row.get("choices", [row]))

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels: (R, K, L) of K candidates, padded on the right, labels as in
        `PromptCompletion`; of training rows K is 1. right: (R,), the number of the right one, of validation rows."""
        flat = [choice for row in rows for choice in row.get("choices", [row])]
        ids = [choice["input_ids"] for choice in flat]
        labels = [np.where(np.arange(len(i)) < choice["context"], NO_LOSS, i) for i, choice in zip(ids, flat, strict=True)]
        batch = {
            "input_ids": pad_right(ids, self._pad_id),
            "attention_mask": padding_mask(ids),
            "labels": pad_right(labels, NO_LOSS),
        }
        batch = {name: values.unflatten(0, (len(rows), -1)) for name, values in batch.items()}
        right = {"right": torch.tensor([row["right"] for row in rows])} if "right" in rows[0] else {}
        return batch | right

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of training rows, which have one candidate."""
        return self._by_candidate(model, batch).mean(1)

    @staticmethod
    def _by_candidate(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of each candidate's own tokens, (R, K)."""
        shape = batch["input_ids"].shape[:2]
        return row_losses(model, {name: batch[name].flatten(0, 1) for name in OF_A_CANDIDATE}).view(shape)

    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """accuracy, and the mean loss of the right candidate."""
        rows, right, loss = 0, 0, 0.0
        with scoring(model):
            for batch in loader:
                found = self._by_candidate(model, batch)
                rows += len(found)
                right += int((found.argmin(1) == batch["right"]).sum())
                loss += found.gather(1, batch["right"][:, None]).double().sum().item()
        assert rows, "evaluate was given no micro-batch"
        return {"accuracy": right / rows, "loss": loss / rows}
