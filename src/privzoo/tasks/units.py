"""Which rows are of one unit of privacy: an owner's, a question's windows."""

from collections.abc import Sequence

import numpy as np

UNIT = "unit of privacy"  # the column of a table that numbers its owners; no file's own: it is added after reading
OWNER = "owner"


class FirstRows(Sequence[dict]):
    """The first row of each unit: view 0 of an image, the first window of a question."""

    def __init__(self, rows: Sequence[dict], rows_of_unit: Sequence[Sequence[int]]) -> None:
        self._rows, self._rows_of_unit = rows, rows_of_unit

    def __len__(self) -> int:
        return len(self._rows_of_unit)

    def __getitem__(self, unit):
        return self._rows[int(self._rows_of_unit[unit][0])]


class RowsOfUnits(Sequence[Sequence[int]]):
    """Of each unit the numbers of its rows, ascending; two arrays, however many units there are.

    Args:
        unit_of_row: the unit of each row, (R,), counted from 0; every unit has a row.
    Raises:
        ValueError: a unit has none.

    >>> [rows.tolist() for rows in RowsOfUnits(np.array([1, 0, 1]))]
    [[1], [0, 2]]
    """

    def __init__(self, unit_of_row: np.ndarray) -> None:
        sizes = np.bincount(unit_of_row)
        if not sizes.all():
            raise ValueError(f"Expected every unit to have a row, found none of unit {int(np.argmin(sizes))}.")
        self._rows = np.argsort(unit_of_row, kind="stable")
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, unit):
        """Rows of one unit."""
        if not 0 <= unit < len(self):
            raise IndexError(f"unit {unit} of {len(self)}")
        return self._rows[self._ends[unit - 1] if unit else 0 : self._ends[unit]]
