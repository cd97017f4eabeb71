"""Print the kept results and write them as Markdown: `python -m privzoo.tables`, which is what `make tables` calls."""

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
    if not folder.is_dir():
        raise UserError(f"folder={folder} is not a folder: name one that holds folders of run records.")
    found = {place: run_folders(place) for place in sorted(folder.iterdir()) if place.is_dir()}
    found = {place: runs for place, runs in found.items() if runs}
    if not found:
        raise UserError(
            f"No folder in {folder} holds a run record: copy result.json of a finished run to "
            f"{folder}/<table>/<run>/result.json."
        )
    made = {place.with_suffix(".md"): runs_table(runs, strict=True) for place, runs in found.items()}
    for path, table in made.items():
        print_table(table)
        write_text(path, markdown(table))
    return list(made)


def main() -> None:
    """Entry point of `privzoo-tables`."""
    with exit_on_error():
        arguments = read_arguments(sys.argv[1:], ARGUMENTS)
        for path in tables(arguments.get("folder", "paper_tables")):
            print(f"privzoo: wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
