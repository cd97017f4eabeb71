"""A task over a user's own file: which kind it is, and which of the file's columns it reads."""

from collections.abc import Sequence

from privzoo.errors import UserError
from privzoo.tasks.base import Task
from privzoo.tasks.classification import Classification
from privzoo.tasks.completions import Completions
from privzoo.tasks.language_modelling import PromptCompletion
from privzoo.tasks.own_data import OwnData
from privzoo.tasks.text_scores import RougeScores, SquadScores

KINDS = ("classification", "question_answering", "instruction", "text")


def own_task(
    name: str,
    kind: str,
    data: OwnData,
    max_length: int,
    label_names: Sequence[str] | None = None,
    pair: bool = False,
    prompt: str | None = None,
    target: str | None = None,
    complete: int | None = None,
) -> Task:
    """The task of a kind; `data.columns` says what the file calls the columns that it asks for.

    "classification" reads text (text_pair) and label: a number from 0, or one of `label_names`, which are declared, never
    inferred. "question_answering" reads context, question and answer, "instruction" prompt and response, "text" text alone;
    these three are learned by a causal language model.

    Args:
        name: as in the run record.
        data: the file.
        max_length: tokens of a row.
        label_names: the classes, for "classification".
        pair: whether there is a text_pair.
        prompt, target: templates in place of the kind's own.
        complete: validation prompts are completed by so many tokens at most and scored; None: they are not.
    Raises:
        UserError: an argument is not of this form.
    """
    if kind == "classification":
        names = _checked_names(label_names)
        unread = {"prompt": prompt, "target": target, "complete": complete}
        for key, value in unread.items():
            if value is not None:
                raise UserError(
                    f"Expected task.{key}={value} to be null for task.kind=classification: nothing is said there."
                )
        columns = ["text", "text_pair"] if pair else ["text"]
        return Classification(name, data, columns, "label", len(names), max_length, names, named_labels=True)
    if kind not in KINDS:
        raise UserError(f"Unknown task.kind={kind}: expected one of {', '.join(KINDS)}.")
    if pair or label_names is not None:
        raise UserError(
            f"Expected task.pair={str(pair).lower()} to be false and task.label_names={label_names} to be null for "
            f"task.kind={kind}: they are for classification."
        )
    own_prompt, own_target, reference = {
        "question_answering": ("Context : {context} Question : {question} Answer :", " {answer}", "answer"),
        "instruction": ("{prompt}\n\n", "{response}", "response"),
        "text": ("", "{text}", None),
    }[kind]
    completions = None
    if complete is not None:
        if reference is None:
            raise UserError(f"Expected task.complete=null for task.kind={kind}: there is no prompt to complete.")
        scores = SquadScores() if kind == "question_answering" else RougeScores()
        completions = Completions(reference, complete, scores, one_text=True)
    cut = "context" if kind == "question_answering" and prompt is None else None
    return PromptCompletion(
        name, data, own_prompt if prompt is None else prompt, own_target if target is None else target, max_length,
        completions, cut,
    )  # fmt: skip


def _checked_names(label_names: object) -> list[str]:
    """The names of classes as text; numbers only as 0, 1, …: others would be one class as a name and another as a number."""
    names = [str(each) for each in label_names] if isinstance(label_names, list | tuple) else []
    numbers = [str(number) for number in range(len(names))]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"Expected task.label_names={label_names} to be a list of two or more different names of classes, such as "
            "task.label_names=[bad,good]: they are declared, never inferred from rows."
        )
    if names != numbers and any(name.strip().lstrip("-").isdecimal() for name in names):
        raise UserError(
            f"Expected task.label_names={label_names} to be words, or the numbers from 0 on in order: a number that names "
            "another class than its own is taken for either; rename the classes in the file."
        )
    return names
