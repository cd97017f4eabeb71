"""Templates: text with the names of columns in braces."""

import string

import pyarrow as pa

from privzoo.errors import UserError

Template = list[tuple[str, str | None]]  # literal text, and the name of the column after it or None


def parsed(template: str, role: str, may_be_empty: bool = False) -> Template:
    """A template as pairs (literal text, name of the column after it or None).

    Args:
        role: what the configuration calls it, below `task`.
        may_be_empty: whether a template of no text at all will do.
    Raises:
        UserError: it is none, or names no column.

    >>> parsed("Q: {question} A:", "prompt")
    [('Q: ', 'question'), (' A:', None)]
    """
    try:
        parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"task.{role}={template!r} is not a template ({error}): write a brace itself twice.") from error
    if not any(name for _, name in parts) and (template or not may_be_empty):
        raise UserError(f"task.{role}={template!r} names no column, expected one in braces, as in '{{question}}'.")
    return parts


def filled(parts: Template, table: pa.Table) -> list[str]:
    """The template of every row. Not str.format, which would look into a column's name for dots and brackets."""
    cells = {name: table[name].to_pylist() for _, name in parts if name is not None}
    return [
        "".join(literal + (_first(cells[name][row]) if name is not None else "") for literal, name in parts)
        for row in range(table.num_rows)
    ]


def _first(cell: str | list[str]) -> str:
    return cell if isinstance(cell, str) else cell[0]
