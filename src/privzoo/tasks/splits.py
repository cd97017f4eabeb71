"""Training and validation rows, which must not be the same: scores are published without noise."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from privzoo.errors import UserError

NUMBERS = ("row", "question")  # of a row within its split, and no content
_SLICE = re.compile(r"(?P<split>[\w.-]+)\[(?:(?P<start>\d+)(?P<unit>%?))?:(?:(?P<end>\d+)(?P<unit_of_end>%?))?\]")


def refuse_same_rows(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> None:
    """Refuse validation rows that are the training split, row for row, or that begin or end with it (a further split that
    is scored beside validation stands behind its rows).

    Raises:
        UserError: if they are, such as one file under two names.
    """
    if len(validation) < len(train):
        return
    for start in {0, len(validation) - len(train)}:
        if all(_alike(train[i], validation[start + i]) for i in range(len(train))):  # seldom beyond i = 0
            raise UserError(
                f"train and validation are the same {len(train)} rows: scores on training rows would be published without "
                "noise; put other rows into the validation split."
            )


def _alike(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    content = {name: value for name, value in row.items() if name not in NUMBERS}
    return all(name in other and np.array_equal(value, other[name]) for name, value in content.items())


def may_meet(one: str, other: str) -> bool:
    """Whether two split names of the hub may hold a row in common.

    >>> may_meet("train", "validation"), may_meet("train", "train+test"), may_meet("train", "train[:10%]")
    (False, True, True)
    >>> may_meet("train[:90%]", "train[90%:]"), may_meet("train[:90%]", "train[80%:]"), may_meet("train[:90%]", "train[-9:]")
    (False, True, True)
    """
    return any(_parts_meet(a.strip(), b.strip()) for a in one.split("+") for b in other.split("+"))


def _parts_meet(one: str, other: str) -> bool:
    if one.partition("[")[0] != other.partition("[")[0]:
        return False
    a, b = _bounds(one), _bounds(other)
    if a is None or b is None or a[2] != b[2]:
        return True
    return max(a[0], b[0]) < min(a[1], b[1])


def _bounds(name: str) -> tuple[float, float, str] | None:
    """Start, end and unit of a slice; None for what is no slice, or counts from the end."""
    found = _SLICE.fullmatch(name)
    if found is None:
        return None
    units = {unit for unit in (found["unit"], found["unit_of_end"]) if unit is not None}
    if len(units) != 1:
        return None
    return float(found["start"] or 0), float(found["end"] or math.inf), units.pop()
