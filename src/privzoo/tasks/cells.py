"""What a column of a task's table holds, and what is said of a cell that does not.

Rows are counted from 0 in all messages. A message quotes the value that is wrong and nothing else of the row.
"""

from dataclasses import dataclass
from typing import Literal

from privzoo.errors import UserError

RAISE, SKIP = "raise", "skip"  # what to do with a row that is not what its columns say


@dataclass(frozen=True)
class Column:
    """A column of a task's table: its name, what it holds, and for a label the number of classes.

    Attributes:
        names: of the classes, where a label column may hold them in place of numbers; of a text, all that it may be.
        within: of spans, the column of texts in which each stands where it says.
        empty: whether a text may be blank.
        unlabelled: a number that stands for "nobody agreed on a label" (SNLI's -1): such a row is left out, whatever the
            others are; None: there is no such number.
    """

    name: str
    kind: Literal["text", "texts", "label", "image", "key", "spans", "flag"]
    num_labels: int = 0
    unlabelled: int | None = None
    names: tuple[str, ...] = ()
    empty: bool = True
    within: str | None = None

    def takes(self, label: int) -> bool:
        """Whether a label column may hold this integer."""
        return 0 <= label < self.num_labels or label == self.unlabelled

    def number_of(self, name: object) -> object:
        """The number of a class that is given by its name; anything else as it is."""
        return self.names.index(name) if name in self.names else name


def bad_label(where: str, row: int, value: object, column: Column) -> UserError:
    """The error for a label that is not an integer in range; to be raised by the caller."""
    ways = f"an integer from 0 to {column.num_labels - 1}"
    way_out = "set the task's num_labels"
    if column.names:
        named = ", ".join(column.names[:8]) + (", ..." if len(column.names) > 8 else "")
        ways, way_out = f"one of the declared names ({named}) or {ways}", "task.label_names"
    return UserError(
        f"{where}, row {row}: {column.name!r} is {shown(value)}, expected {ways}: correct the row, or {way_out}."
    )


def bad_flag(where: str, row: int, value: object, column: Column) -> UserError:
    """The error for a cell that is no truth value; to be raised by the caller."""
    return UserError(
        f"{where}, row {row}: {column.name!r} is {shown(value)}, expected true, false, 0 or 1: correct the row."
    )


def not_a_choice(where: str, row: int, value: object, column: Column) -> UserError:
    """The error for a text that is none of those that it may be; to be raised by the caller."""
    return UserError(
        f"{where}, row {row}: {column.name!r} is {shown(value)}, expected one of {', '.join(column.names)}: correct the "
        "row or leave it out."
    )


def bad_text(where: str, row: int, value: object, column: Column) -> UserError:
    """The error for a cell that is not text; to be raised by the caller."""
    return UserError(
        f"{where}, row {row}: {column.name!r} is {shown(value)}, expected text: correct the row or leave it out."
    )


def blank_text(where: str, row: int, column: Column) -> UserError:
    """The error for a text of blanks alone, where one is needed; to be raised by the caller."""
    return UserError(f"{where}, row {row}: {column.name!r} is blank, expected text: fill it or leave the row out.")


def bad_key(where: str, row: int, value: object, column: Column) -> UserError:
    """The error for a cell that names nobody; to be raised by the caller."""
    return UserError(
        f"{where}, row {row}: {column.name!r} is {shown(value)}, expected a text that is not empty or a whole number: "
        "correct the row or leave it out."
    )


def bad_texts(where: str, row: int, value: object, column: Column) -> UserError:
    """The error for a cell that is no list of texts; to be raised by the caller."""
    return UserError(
        f"{where}, row {row}: {column.name!r} is {shown(value)}, expected a list of texts, or such a list named text in an "
        f"object: correct the row or leave it out."
    )


def shown(value: object) -> str:
    """A value as a message shows it, at most 40 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
