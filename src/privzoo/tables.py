"""Print the kept results and write them as Markdown: `python -m privzoo.tables`, which is what `make tables` calls."""

import os
import sys
from pathlib import Path

from privzoo.cli import exit_on_error, read_arguments
from privzoo.errors import UserError
from privzoo.files import write_text
from privzoo.reporting.display import print_table, runs_table
from privzoo.reporting.markdown import markdown
from privzoo.results import run_folders

ARGUMENTS = {"folder": "where the tables are, a folder of run records each; paper_tables by default"}


def tables(folder: str | Path) -> list[Path]:
    """Prints a table for each folder of run records in `folder`, and writes it beside that folder as `<name>.md`.

    A record is a run folder, or a folder that keeps nothing but its result.json. The same records give the same bytes.

    Returns:
        The files written.
    Raises:
        UserError: there is no such folder, it holds no record, or a record cannot be read; then no file is touched.
    """
    folder = Path(folder)
    found = {place: run_folders(place) for place in _folders_in(folder)}
    found = {place: runs for place, runs in found.items() if runs}
    if not found:
        raise UserError(
            f"No folder in {folder} holds a run record: copy result.json of a finished run to "
            f"{folder}/<table>/<run>/result.json."
        )
    made = {folder / f"{place.name}.md": runs_table(runs, strict=True) for place, runs in found.items()}
    for path, table in made.items():
        print_table(table)
        write_text(path, markdown(table))
    return list(made)


def _folders_in(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted; every one of them, and itself, can be read and `folder` can be written to.

    Raises:
        UserError: naming what cannot.
    """
    if not folder.is_dir():
        raise UserError(f"folder={folder} is not a folder: name one that holds folders of run records.")
    readable = os.access(folder, os.R_OK | os.X_OK)
    places = sorted(place for place in folder.iterdir() if place.is_dir()) if readable else []
    inside = [below for place in places for below in (place, *place.rglob("*")) if below.is_dir()]
    for place in (folder, *inside):
        if not os.access(place, os.R_OK | os.X_OK):
            raise UserError(f"{place} cannot be read: its records would be left out; change its permissions.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: copy it to where the tables may be written, and name that.")
    return places


def main() -> None:
    """Entry point of `privzoo-tables`."""
    with exit_on_error():
        arguments = read_arguments(sys.argv[1:], ARGUMENTS)
        folder = arguments.get("folder", "paper_tables")
        if not folder:
            raise UserError("folder= names nothing: give a folder, or leave it out for paper_tables.")
        for path in tables(folder):
            print(f"privzoo: wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
