"""A terminal's table as Markdown, for the files that `make tables` writes."""

from rich.table import Table


def markdown(table: Table) -> str:
    """The table with its title above and its caption below, a line a row; columns of figures are set to the right.

    >>> table = Table(title="task sst2")
    >>> table.add_column("ε\\ntarget", justify="right")
    >>> table.add_row("8")
    >>> print(markdown(table), end="")
    task sst2
    <BLANKLINE>
    | ε target |
    |---:|
    | 8 |
    """
    columns = [[_cell(column.header), *map(_cell, column.cells)] for column in table.columns]
    rows = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    rule = "".join("|---:" if column.justify == "right" else "|---" for column in table.columns) + "|"
    above = [str(table.title), ""] if table.title else []
    below = ["", *str(table.caption).splitlines()] if table.caption else []
    return "\n".join([*above, rows[0], rule, *rows[1:], *below]) + "\n"


def _cell(content: object) -> str:
    return " ".join(str(content).replace("-\n", "").split()).replace("|", "\\|")
