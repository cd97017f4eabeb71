"""metrics.csv: the curves of a run as one wide table, a row per step, kept correct through kills and resumes."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from privzoo.errors import RunLost, UserError
from privzoo.files import write_text

METRICS_NAME = "metrics.csv"


class MetricsFile:
    """The file metrics.csv, header `step,...`, steps ascending, an empty cell where nothing was logged.

    Guarantees:
        - What `add` returned from survives a kill of the process (not a loss of power: nothing is fsynced per row).
        - Whatever moment the process is killed at, earlier rows are whole.
        - After a resume at step t and the same `add` calls from there on, the file equals the one of an uninterrupted
          run. A column that only dropped rows had used is dropped too, so that even the order of columns agrees.

    Args:
        path: the file; it may exist.
        resume_step: the last step to keep; later rows are dropped now. None keeps all.
    Raises:
        UserError: the existing file is not such a table (a cut last line is no error: it is dropped).
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = path
        self._columns = ["step"]
        self._rows: list[dict[str, str]] = []
        self._last_row_at = 0  # byte offset of the last row
        if path.exists() and self._read():
            kept = [row for row in self._rows if resume_step is None or int(row["step"]) <= resume_step]
            self._columns = [c for c in self._columns if c == "step" or any(row.get(c) for row in kept)]
            self._rows = kept
            self._rewrite()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Puts `values` into the row of `step`; calls for one step share it, a later value wins.

        Raises:
            RunLost: the disk is full; the file keeps the rows it had.
        """
        cells = {name: _cell(value) for name, value in values.items()}
        new_columns = [name for name in cells if name not in self._columns]
        last = int(self._rows[-1]["step"]) if self._rows else -1
        if new_columns or step < last:
            self._columns += new_columns
            self._row(step).update(cells)
            self._rewrite()
        elif step == last:
            self._rows[-1].update(cells)
            self._write_last_row(self._last_row_at)
        else:
            self._rows.append({"step": str(step), **cells})
            self._write_last_row(self.path.stat().st_size)

    def _row(self, step: int) -> dict[str, str]:
        for row in self._rows:
            if int(row["step"]) == step:
                return row
        self._rows.append({"step": str(step)})
        self._rows.sort(key=lambda row: int(row["step"]))
        return next(row for row in self._rows if int(row["step"]) == step)

    def _read(self) -> bool:
        """Reads the file; False if not even its header is whole."""
        text = self.path.read_text(encoding="utf-8")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))  # a cut last line is dropped
        if not lines:
            return False
        self._columns = lines[0]
        for number, line in enumerate(lines[1:], start=2):
            if len(line) != len(self._columns) or not line[0].isdigit():
                if number == len(lines):
                    break  # the rest of a row that was being replaced by a shorter one when the process was killed
                raise UserError(f"{self.path} is damaged in line {number}; move the file away and resume the run.")
            self._rows.append(dict(zip(self._columns, line, strict=True)))
        if self._columns[0] != "step":
            raise UserError(f"{self.path} does not start with a column step; move the file away and resume the run.")
        return True

    def _line(self, cells: list[str]) -> bytes:
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue().encode()

    def _rewrite(self) -> None:
        lines = [self._line(self._columns)]
        lines += [self._line([row.get(name, "") for name in self._columns]) for row in self._rows]
        write_text(self.path, b"".join(lines).decode())
        self._last_row_at = sum(map(len, lines[:-1]))

    def _write_last_row(self, offset: int) -> None:
        """Writes the last row at `offset`, over what is there; puts back what was there if the disk is full."""
        line = self._line([self._rows[-1].get(name, "") for name in self._columns])
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            former = os.pread(descriptor, 2**24, offset)
            try:
                _write_all(descriptor, line, offset)
            except OSError as error:
                _write_all(descriptor, former, offset)
                os.ftruncate(descriptor, offset + len(former))
                raise RunLost(
                    f"Could not write {self.path} ({error.strerror}): its former rows are kept; make room and resume."
                ) from error
            os.ftruncate(descriptor, offset + len(line))
        finally:
            os.close(descriptor)
        self._last_row_at = offset


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:  # a nearly full disk takes a part first and refuses with the next call
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _cell(value: float) -> str:
    return str(int(value)) if isinstance(value, int) else repr(float(value))
