"""A chart of judges' grades, run beside run: `python -m privzoo.reporting.grades runs=<folder>,<folder> out=grades.png`."""

import json
import sys
from pathlib import Path
from typing import Any

from privzoo.cli import exit_on_error, read_arguments
from privzoo.errors import UserError, first_line
from privzoo.results import read_record

ARGUMENTS = {"runs": "run folders that judge has graded, with commas between them", "out": "the PNG file to write"}
GRADES = ("correctness", "similarity")


def chart(runs: list[str], out: str) -> Path:
    """Writes the share of answers that got each grade from 1 to 5, the runs beside each other, and returns the file.

    Raises:
        UserError: a run has no grades, or matplotlib is not installed.
    """
    shown = [(_label(Path(run)), _rows(Path(run))) for run in runs]
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("A chart needs matplotlib, which is not installed: pip install 'privzoo[charts]'.") from error
    figure, axes = pyplot.subplots(1, len(GRADES), figsize=(4.5 * len(GRADES), 3.6), sharey=True)
    width = 0.8 / len(shown)
    for axis, name in zip(axes, GRADES, strict=True):
        for number, (label, rows) in enumerate(shown):
            given = [row[name] for row in rows if row[name] is not None]
            shares = [100 * given.count(grade) / len(given) for grade in range(1, 6)]
            places = [grade + (number - (len(shown) - 1) / 2) * width for grade in range(1, 6)]
            axis.bar(places, shares, width, label=f"{label}: mean {sum(given) / len(given):.2f} of {len(given)}")
        axis.set_title(name)
        axis.set_xlabel("grade")
        axis.set_xticks(range(1, 6))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("% of answers")
    figure.tight_layout()
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f"out={out} cannot be written ({first_line(error)}): name a .png file in a folder that exists."
        ) from error
    finally:
        pyplot.close(figure)
    return Path(out)


def _label(run: Path) -> str:
    record = read_record(run)
    budget = f"ε = {record.epsilon_spent:.3g}" if record.private and record.epsilon_spent is not None else "not private"
    return f"{record.method}, {budget}"


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / "judge.json"
    if not path.is_file():
        raise UserError(f"{run} has no judge.json: grade it first, python -m privzoo.judge run={run} model=<judge>.")
    rows = json.loads(path.read_text())["rows"]
    if not any(row[name] is not None for row in rows for name in GRADES):
        raise UserError(f"{path} holds no grade: the judge's replies are in it; take another judge.")
    return rows


def main() -> None:
    """Entry point of `privzoo-grades`."""
    with exit_on_error():
        given = read_arguments(sys.argv[1:], ARGUMENTS, required=["runs", "out"])
        print(f"written to {chart(given['runs'].split(','), given['out'])}")


if __name__ == "__main__":
    main()
