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


def cut_to(processor, parts: Template, cells: dict[str, str], column: str, room: int) -> list[int]:
    """Ids of a filled template, in at most `room` tokens if it can be had by taking words off the end of one column.

    Args:
        cells: the row's texts by column.
        column: the one that is shortened; the rest of the template stays as it is.
    """

    def ids_with(text: str) -> list[int]:
        whole = "".join(lit + ((text if name == column else cells[name]) if name else "") for lit, name in parts)
        return processor(whole, add_special_tokens=False, verbose=False).input_ids

    ids, own = ids_with(cells[column]), processor(cells[column], add_special_tokens=False, verbose=False).input_ids
    left = len(own)
    while len(ids) > room and left > 0:
        left = max(0, left - max(1, len(ids) - room))
        ids = ids_with(processor.decode(own[:left], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return ids
