"""Text that continues a prompt, learned by a causal language model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from privzoo.errors import UserError
from privzoo.tasks.base import EncodedRows, Task, at_least_float32, pad_right, padding_mask, scoring
from privzoo.tasks.cells import Column
from privzoo.tasks.classification import ROWS_PER_TOKENIZER_CALL, check_max_length, check_tokenizer, padding_id
from privzoo.tasks.completions import Completions
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.digest import content_digest
from privzoo.tasks.few_shot import FewShot
from privzoo.tasks.own_data import OwnData
from privzoo.tasks.prompt_tokens import cut_to, joined, shortened, start_tokens, template_ids
from privzoo.tasks.templates import filled, parsed

NO_LOSS = -100  # the label of a token that carries no loss


class Question(NamedTuple):
    """A prompt as tokens and in words, and what should come after it."""

    ids: list[int]
    text: str
    reference: str


class PromptCompletion(Task):
    """A target text after a prompt; only the target's tokens and the end token after it carry loss.

    `prompt` and `target` are templates with columns in braces: "Sentence : {sentence} Label :". A row is [start token,
    if the tokenizer sets one] + prompt + target + end token. Prompt and target are tokenised apart, as they are when
    text is generated from the prompt alone, so a space between them belongs to the target's template.
    A row longer than `max_length` loses the end of its `cut` column, and then the beginning of its prompt; a target that
    alone is too long loses its end.
    The loss of a row is the mean over its own target tokens, so that a long target weighs no more than a short one;
    a row of which no target token is left has the loss 0 and the gradient 0.

    Args:
        name: as in the run record.
        data: where the rows come from.
        prompt, target: templates, each with at least one text column, but that a prompt may be empty; a brace itself is
            written twice. Of a column of several texts a row (the references of `completions`) the first is taken.
        max_length: tokens of a row, at least 2.
        cut: the column of the prompt that is shortened where a row is too long; None: there is none.
        completions: how validation prompts are completed and scored; its first metric is the headline then. None: the
            perplexity of the targets is.
    Raises:
        UserError: a template is not of this form.
    """

    kind = "causal_lm"
    num_labels = None
    metrics: tuple[str, ...] = ("perplexity", "token_accuracy", "loss")
    higher_is_better = False

    def __init__(
        self,
        name: str,
        data: HubData | ToyData | FewShot | OwnData,
        prompt: str,
        target: str,
        max_length: int,
        completions: Completions | None = None,
        cut: str | None = None,
    ):
        self.name, self.max_length = name, max_length
        self._completions = completions
        if completions is not None:
            completions.room(max_length)
            completions.scores.check()
            self.metrics, self.higher_is_better = (*completions.metrics, *self.metrics), True
            missing = completions.scores.missing()
            self.note = "; ".join(f"{name} was not computed: {why}" for name, why in missing.items()) or None
        self._data = data
        self._templates = {"prompt": prompt, "target": target}
        self._parts = {"prompt": parsed(prompt, "prompt", may_be_empty=True), "target": parsed(target, "target")}
        if cut is not None and cut not in [name for _, name in self._parts["prompt"]]:
            raise UserError(f"Expected task.cut={cut} to be a column of task.prompt={prompt!r}.")
        self._cut = cut

    def load(self, data_root: str | None) -> None:
        """The columns of the templates and of the references; a blank target is an error."""
        named = {role: [name for _, name in parts if name is not None] for role, parts in self._parts.items()}
        asked = self._completions
        references = [asked.references] if asked is not None else []
        many = [] if asked is None or asked.one_text else references
        names = dict.fromkeys(named["prompt"] + named["target"] + references)
        columns = [Column(name, "texts" if name in many else "text", empty=name not in named["target"]) for name in names]
        self._tables = {split: self._data.load(split, columns, data_root) for split in ("train", "validation")}
        self.count(self._tables["train"])
        self.selection = self._data.selection

    def fingerprint(self) -> str:
        return content_digest(self._tables["train"], f"{self.kind} {self._templates} {self.max_length} {self._cut}")

    def prepare(self, processor) -> None:
        """Rows as tokens; raises UserError for a tokenizer without an end token, and a `max_length` that the model lacks."""
        check_tokenizer(processor, self.name)
        check_max_length(processor, self.max_length, at_least=2)
        if processor.eos_token_id is None:
            raise UserError(
                f"the model's tokenizer has no end token, but task {self.name} trains one: set eos_token in "
                f"tokenizer_config.json, or choose another model."
            )
        self._pad_id = padding_id(processor)
        self._processor = processor
        self.train, self.validation = (self._encoded(processor, self._tables[s]) for s in ("train", "validation"))
        if self._completions is not None:
            self._prompts = self._encoded_prompts(processor, self._completions.room(self.max_length))
            self._rows_of_prompt = self._asked(self._completions.pooled)

    def _asked(self, pooled: bool) -> dict[int, list[int]]:
        """The validation rows that are completed, each with those whose references it is scored by."""
        if not pooled:
            return {row: [row] for row in range(len(self.validation))}
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(filled(self._parts["prompt"], self._tables["validation"])):
            rows.setdefault(prompt, []).append(row)
        return {those[0]: those for those in rows.values()}

    def _encoded_prompts(self, processor, room: int) -> EncodedRows:
        """Validation prompts as a model is asked to go on from them: in `room` tokens, whatever their targets are."""
        start = start_tokens(processor)
        table = self._tables["validation"]
        parts = (table.slice(first, ROWS_PER_TOKENIZER_CALL) for first in range(0, table.num_rows, ROWS_PER_TOKENIZER_CALL))
        batches = (
            {
                "input_ids": [
                    shortened(start, prompt, room)
                    for prompt in self._prompt_ids(processor, part, [room - len(start)] * part.num_rows)
                ]
            }
            for part in parts
        )
        return EncodedRows.from_batches(batches, {})

    def _encoded(self, processor, table: pa.Table) -> EncodedRows:
        context: list[int] = []  # tokens before the target, of each row
        scalars: dict[str, list[int] | np.ndarray] = {"context": context, "row": np.arange(table.num_rows)}
        return EncodedRows.from_batches(self._tokenised(processor, table, context), scalars)

    def _tokenised(self, processor, table: pa.Table, context: list[int]) -> Iterator[Mapping[str, list[list[int]]]]:
        start, end = start_tokens(processor), [processor.eos_token_id]
        for first in range(0, table.num_rows, ROWS_PER_TOKENIZER_CALL):
            part = table.slice(first, ROWS_PER_TOKENIZER_CALL)
            targets = template_ids(processor, self._parts["target"], part)
            rooms = [self.max_length - len(start) - len(target) - len(end) for target in targets]
            prompts = self._prompt_ids(processor, part, rooms)
            rows = [joined(start, p, t + end, self.max_length) for p, t in zip(prompts, targets, strict=True)]
            context.extend(before for _, before in rows)
            yield {"input_ids": [ids for ids, _ in rows]}

    def _prompt_ids(self, processor, part: pa.Table, rooms: list[int]) -> list[list[int]]:
        """Ids of each row's prompt, with `cut` shortened where they do not fit."""
        prompts = template_ids(processor, self._parts["prompt"], part)
        if self._cut is None:
            return prompts
        for row, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            if len(prompt) > room:
                cells = {name: part[name][row].as_py() for _, name in self._parts["prompt"] if name is not None}
                prompts[row] = cut_to(processor, self._parts["prompt"], cells, self._cut, max(room, 0))
        return prompts

    def questions(self, max_new_tokens: int) -> list[Question]:
        """The validation prompts, with room for so many new tokens; after `prepare`."""
        start, table = start_tokens(self._processor), self._tables["validation"]
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(f"Expected max_new_tokens={max_new_tokens} to be below task.max_length={self.max_length}.")
        ids = self._prompt_ids(self._processor, table, [max(0, room - len(start))] * table.num_rows)
        texts, targets = (filled(self._parts[role], table) for role in ("prompt", "target"))
        return [
            Question(shortened(start, own, room), text, target.strip())
            for own, text, target in zip(ids, texts, targets, strict=True)
        ]

    def in_template(self, prompt: str) -> str:
        """The text in the place of the template's one column; as it is where there are several."""
        names = [name for _, name in self._parts["prompt"] if name is not None]
        return "".join(lit + (prompt if name else "") for lit, name in self._parts["prompt"]) if len(names) == 1 else prompt

    def length(self, row: dict) -> int:
        return len(row["input_ids"])

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels: (R, L), padded on the right. labels[r, t] is input_ids[r, t] on target
        tokens, NO_LOSS elsewhere; the model's logits at t - 1 are held against it. row: (R,), its number in its split."""
        ids = [row["input_ids"] for row in rows]
        labels = [np.where(np.arange(len(i)) < row["context"], NO_LOSS, i) for i, row in zip(ids, rows, strict=True)]
        return {
            "input_ids": pad_right(ids, self._pad_id),
            "attention_mask": padding_mask(ids),
            "labels": pad_right(labels, NO_LOSS),
            "row": torch.tensor([row["row"] for row in rows]),
        }

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return row_losses(model, batch)

    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """What `TokenScores` says; before it the scores of the completions, where they are asked for. The rows must be of
        the validation split."""
        found = TokenScores()
        texts: dict[int, str] = {}
        with scoring(model):
            for batch in loader:
                found.add(model, batch)
                if self._completions is not None:
                    numbers = [number for number in batch["row"].tolist() if number in self._rows_of_prompt]
                    prompts = [self._prompts[number]["input_ids"].tolist() for number in numbers]
                    made = self._completions.made(model, self._processor, prompts) if prompts else []
                    texts |= dict(zip(numbers, made, strict=True))
        scores = found.scores()
        if self._completions is None:
            return scores
        return self._completions.scores(list(texts.values()), [self._references(number) for number in texts]) | scores

    def _references(self, number: int) -> list[str]:
        """The reference texts of a validation row that was completed."""
        assert self._completions is not None
        column = self._tables["validation"][self._completions.references]
        found = [column[row].as_py() for row in self._rows_of_prompt[number]]
        return found if self._completions.one_text else [text for texts in found for text in texts]


class TokenScores:
    """Over all rows that are added: perplexity = exp(total loss / number of target tokens) and the share of target tokens
    that are the model's first choice, both over all tokens; loss, the mean over rows of `row_losses`."""

    def __init__(self) -> None:
        self.rows, self.tokens, self.right, self.token_loss, self.row_loss = 0, 0, 0, 0.0, 0.0

    def add(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
        token_losses, is_target, is_right = _by_token(model, batch)
        targets = is_target.sum(dim=1)
        self.rows += len(targets)
        self.tokens += int(targets.sum())
        self.right += int(is_right.sum())
        self.token_loss += token_losses.sum().item()
        self.row_loss += (token_losses.sum(dim=1) / targets.clamp(min=1)).sum().item()

    def scores(self) -> dict[str, float]:
        assert self.rows, "evaluate was given no micro-batch"
        mean, tokens = torch.tensor(self.token_loss / max(self.tokens, 1), dtype=torch.float64), max(self.tokens, 1)
        return {"perplexity": mean.exp().item(), "token_accuracy": self.right / tokens, "loss": self.row_loss / self.rows}


def row_losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of each row's own target tokens, (R,); 0 where there is none."""
    token_losses, is_target, _ = _by_token(model, batch)
    return token_losses.sum(dim=1) / is_target.sum(dim=1).clamp(min=1)


def _by_token(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """For each place that predicts the next one, (R, L - 1): its loss (0 off the targets), whether that next one is a
    target, and whether the model's first choice is right (False off the targets)."""
    logits = at_least_float32(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1])
    labels = batch["labels"][:, 1:]
    token_losses = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NO_LOSS
    ).view(labels.shape)
    return token_losses, labels != NO_LOSS, logits.argmax(dim=-1) == labels
