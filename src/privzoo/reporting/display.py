"""Tables for the terminal: one run at its end, or all runs below a folder.

python -m privzoo.reporting.display <folder>
"""

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from privzoo.errors import UserError
from privzoo.results import RunRecord, read_record, run_folders

NOT_PRIVATE = "NOT PRIVATE"


def final_table(record: RunRecord, folder: str | Path | None = None) -> Table:
    """What a user wants to see at the end of a run, a line per figure.

    Args:
        record: of the run.
        folder: where the run is; its name alone is shown if None.
    """
    table = Table(box=box.SIMPLE, show_header=False, title=_title(record), title_justify="left", pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    names = [record.headline, *(name for name in record.metrics if name != record.headline)]
    for name in names:
        direction = "" if name != record.headline else f", {'higher' if record.higher_is_better else 'lower'} is better"
        untrained = f"  (untrained {number(record.untrained[name])}{direction})" if name in record.untrained else ""
        table.add_row(name, Text(number(record.metrics.get(name)), style="bold") + Text(untrained))
    table.add_row("ε", _guarantee(record))
    table.add_row("δ", f"{number(record.delta)}  (N = {record.num_examples:,}, δ·N = {_product(record)})")
    table.add_row("σ", f"{number(record.noise_multiplier)}  (clip norm {_bound(record.clip_norm)})")
    planned = "" if record.steps == record.steps_planned else f" of {record.steps_planned:,}"
    table.add_row("steps", f"{record.steps:,}{planned}  (batch {record.batch_size:,}, q = {number(record.sample_rate)})")
    speed = "" if record.examples_per_s is None else f"  ({record.examples_per_s:,.0f} examples/s)"
    table.add_row("time", duration(record.wall_s) + speed)
    table.add_row("memory", f"{memory(record.peak_memory_bytes)} peak  ({record.devices} × {record.device})")
    if record.state != "finished":
        table.add_row("state", record.state.replace("_", " "))
    if record.note:
        table.add_row("note", record.note)
    table.add_row("run", str(folder or record.run_folder))
    return table


def runs_table(folders: Iterable[str | Path], strict: bool = False) -> Table:
    """One row per run, sorted by task, method, model and ε (∞ last); runs that differ in their seed alone share a row.

    A shared row shows mean ± sample standard deviation and, in a column runs, how many are behind it. Only runs with
    one group_id and different seeds are joined, and only finished ones. What all rows have in common (task, model, δ,
    state) is said once above the table, so that it fits a terminal. A folder whose record is unreadable is named below.

    Raises:
        UserError: with `strict`, if a record is unreadable.
    """
    records, notes = [], []
    for folder in folders:
        try:
            records.append(read_record(folder))
        except UserError as error:
            if strict:
                raise
            notes.append(Text(f"Left out: {error}"))
    groups = sorted(_groups(records), key=lambda group: _order(group[0]))
    for reason in dict.fromkeys(group[0].not_private_reason for group in groups):
        if reason:
            notes.insert(0, Text(f"{NOT_PRIVATE}: {reason}", style="bold red"))
    columns = _columns(groups)
    common = [c for c in columns if c.common is not None and c.is_common()]
    said = " · ".join(f"{c.common}{c.cells[0]}" for c in common if c.header != "runs")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title_justify="left", caption_justify="left")
    table.title, table.title_style = said or None, ""
    table.caption, table.caption_style = (Text("\n").join(notes) if notes else None), ""
    shown = [c for c in columns if c not in common]
    for c in shown:
        table.add_column(c.header, justify="right" if c.numeric else "left", no_wrap=c.numeric, overflow="fold")
    for row in zip(*(c.cells for c in shown), strict=True):
        table.add_row(*row)
    return table


@dataclass(frozen=True, eq=False)
class _Column:
    header: str
    cells: Sequence[str | Text]
    numeric: bool = True
    common: str | None = None  # not None: left out if all rows agree, and said above the table after this word

    def is_common(self) -> bool:
        return len({str(cell) for cell in self.cells}) == 1

    def over(self, other: "_Column") -> "_Column":
        """One column with the cells of `other` below those of this one."""
        cells = [f"{upper}\n{lower}" for upper, lower in zip(self.cells, other.cells, strict=True)]
        return _Column(f"{self.header}\n{other.header}", cells, numeric=self.numeric)


def _columns(groups: Sequence[Sequence[RunRecord]]) -> list[_Column]:
    """The columns of the table: one line a row if one model, metric and state are shown, else two lines a row."""
    firsts = [group[0] for group in groups]
    tasks = _Column("task", [r.task for r in firsts], numeric=False, common="task ")
    methods = _Column("method", [r.method for r in firsts], numeric=False)
    models = _Column("model", [_short(r.model) for r in firsts], numeric=False, common="model ")
    deltas = _Column("δ", [number(r.delta) for r in firsts], common="δ ")
    sizes = _Column("N", [f"{r.num_examples:,}" for r in firsts], common="N ")
    products = _Column("δ·N", [_product(r) for r in firsts], common="δ·N ")
    metrics = _Column("metric", [r.headline for r in firsts])
    scores = _Column("value", [_spread([r.metrics.get(r.headline) for r in group]) for group in groups])
    untrained = _Column("un-\ntrained", [_spread([r.untrained.get(r.headline) for r in group]) for group in groups])
    runs = _Column("runs", [str(len(group)) for group in groups], common="" if all(len(g) == 1 for g in groups) else None)
    steps = _Column("steps", [_steps(r) for r in firsts])
    states = _Column("state", [r.state.replace("_", " ") for r in firsts], numeric=False, common="")
    times = _Column("time", [duration(statistics.fmean(r.wall_s for r in group)) for group in groups])
    memories = _Column("memory", [memory(max(r.peak_memory_bytes or 0 for r in group) or None) for group in groups])
    guarantee = [
        _Column("ε\ntarget", [_epsilon(r.epsilon_target) for r in firsts]),
        _Column("ε\nspent", [_spent(group) for group in groups]),
        deltas,
        sizes,
        products,
        _Column("σ", [number(r.noise_multiplier) for r in firsts]),
    ]
    if all(column.is_common() for column in (models, metrics, states)):
        scores = replace(scores, header=firsts[0].headline)
        return [tasks, methods, models, *guarantee, scores, untrained, runs, steps, times, memories, states]
    pairs = [methods.over(models), *guarantee, metrics.over(scores), untrained, runs, steps.over(states)]
    return [tasks, *pairs, times.over(memories)]


def _product(record: RunRecord) -> str:
    """delta times N: at 1 a mechanism may publish somebody's record, so small is good."""
    return "–" if record.delta is None else f"{record.delta * record.num_examples:.2g}"


def _steps(record: RunRecord) -> str:
    done = f"{record.steps:,}"
    return done if record.steps == record.steps_planned else f"{done}/{record.steps_planned:,}"


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else number(value)


def _spent(group: Sequence[RunRecord]) -> str | Text:
    """The largest ε spent of the runs of a row; in red words if it is no guarantee."""
    if group[0].not_private_reason:
        return Text(NOT_PRIVATE.replace(" ", "\n"), style="bold red")
    spent = [r.epsilon_spent for r in group if r.epsilon_spent is not None]
    return _epsilon(max(spent) if spent else None)


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints to the terminal, or, where there is none, without colour and as wide as the table wants to be."""
    console = console or Console()
    if not console.is_terminal:
        wanted = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.width = max(console.width, wanted)
    console.print(table)


def _title(record: RunRecord) -> Text:
    return Text(f"{record.task} · {record.method} · {_short(record.model)} · seed {record.seed}", style="bold")


def _guarantee(record: RunRecord) -> Text:
    if record.not_private_reason:
        spent = number(record.epsilon_spent)
        return Text(f"{NOT_PRIVATE}: {record.not_private_reason}", style="bold red") + Text(f"  (nominal {spent})")
    if record.epsilon_target is None:
        return Text("∞  (no clipping, no noise, no guarantee)")
    return Text(f"{number(record.epsilon_spent)} spent of {number(record.epsilon_target)}")


def _groups(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The rows of the table: records that are seeds of one cell together, every other one by itself."""
    groups: dict[object, list[RunRecord]] = {}
    for index, record in enumerate(records):
        joinable = record.group_id is not None and record.state == "finished"
        # Besides the configuration, the guarantee must agree: a run marked NOT PRIVATE is no seed of a private cell.
        key = (record.group_id, record.private, record.not_private_reason) if joinable else index
        groups.setdefault(key, []).append(record)
    rows: list[list[RunRecord]] = []
    for group in groups.values():
        distinct = len({record.seed for record in group}) == len(group)
        rows += [sorted(group, key=lambda record: record.seed)] if distinct else [[record] for record in group]
    return rows


def _order(record: RunRecord) -> tuple[object, ...]:
    epsilon = math.inf if record.epsilon_target is None else record.epsilon_target
    return (record.task, record.method, record.model, epsilon, record.seed, record.created, record.run_folder)


def _spread(values: Sequence[float | None]) -> str:
    """Mean±sample standard deviation, rounded to where the deviation has its first digit.

    "–" if a value is missing: the mean over the other ones would flatter.

    >>> _spread([0.871, 0.88, 0.8655]), _spread([0.25, 0.25]), _spread([0.9]), _spread([0.9, None])
    ('0.872±0.007', '0.25±0', '0.9', '–')
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean = statistics.fmean(known)
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    if deviation == 0.0:
        return number(mean) + ("±0" if len(known) > 1 else "")
    digits = max(0, -math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f}±{deviation:.{digits}f}"


def number(value: float | None) -> str:
    """Four significant digits without trailing zeros; "–" for None.

    >>> [number(v) for v in (0.87512, 8.0, 1e-05, 0.0, 1234.56, None)]
    ['0.8751', '8', '1e-5', '0', '1235', '–']
    """
    if value is None:
        return "–"
    text = f"{value:.4g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def duration(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> [duration(s) for s in (0.42, 12, 61, 7325, 200_000)]
    ['0.4s', '12s', '1m01s', '2h02m', '2d07h']
    """
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part_size:02d}{part}"
    return f"{whole}s"


def memory(amount: int | None) -> str:
    """Bytes in binary units; "–" for None.

    >>> [memory(b) for b in (700 * 2**20, 3 * 2**30, None)]
    ['700 MiB', '3.0 GiB', '–']
    """
    if amount is None:
        return "–"
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"


def _bound(clip_norm: float | None) -> str:
    return "∞" if clip_norm is None else number(clip_norm)


def _short(model: str) -> str:
    """The last part of a path or hub name: that is what tells models apart."""
    return model.rstrip("/").rpartition("/")[2] or model


def main(arguments: Sequence[str]) -> int:
    """Prints the table of all runs below the one folder in `arguments`; returns the exit code."""
    try:
        if len(arguments) != 1:
            raise UserError(
                f"Expected one folder, got {len(arguments)} arguments: python -m privzoo.reporting.display <folder>."
            )
        folders = run_folders(arguments[0])
        if not folders:
            raise UserError(f"There is no run folder below {arguments[0]}; name a folder that train wrote runs into.")
    except UserError as error:
        print(f"privzoo: {error}", file=sys.stderr)
        return 2
    print_table(runs_table(folders))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
