"""Training rows must not be scored under the name of validation."""

import numpy as np
import pytest

from privzoo.errors import UserError
from privzoo.tasks.data import HubData
from privzoo.tasks.splits import may_meet, refuse_same_rows

MEET = ["train", "train[:10%]", "train+validation", "test + train[5:]", "train[:10]", "train[-10%:]", "train[95:]"]


@pytest.mark.parametrize("validation", MEET)
def test_a_split_with_rows_of_the_training_split_is_refused(validation):
    with pytest.raises(UserError, match=r"has the same rows under two names .* slices that do not meet"):
        HubData("some/set", None, "set", {"train": "train[:90%]", "validation": validation})


@pytest.mark.parametrize(
    "validation", ["validation", "train[90%:]", "validation[:10%]", "train[95%:97%]", "test+validation"]
)
def test_other_splits_and_slices_that_do_not_meet_pass(validation):
    HubData("some/set", None, "set", {"train": "train[:90%]", "validation": validation})


@pytest.mark.parametrize(("one", "other"), [("train[:100]", "train[90%:]"), ("train[5%:]", "train[:5]"), ("a[:]", "a[1:]")])
def test_what_cannot_be_told_may_meet(one, other):
    assert may_meet(one, other)
    assert may_meet(other, one)


def test_the_same_rows_under_two_names_are_refused():
    rows = [{"input_ids": np.array([1, 2]), "label": 1}, {"input_ids": np.array([3]), "label": 0}]
    with pytest.raises(UserError, match="train and validation are the same 2 rows"):
        refuse_same_rows(rows, [{**row, "row": i} for i, row in enumerate(rows)])
    other = {"input_ids": np.array([7]), "label": 0}
    for further in ([*rows, other], [other, other, *rows]):  # such as MNLI's mismatched rows behind the matched ones
        with pytest.raises(UserError, match="train and validation are the same 2 rows"):
            refuse_same_rows(rows, further)
    refuse_same_rows(rows, [rows[0], other, rows[1]])
    refuse_same_rows(rows, rows[:1])
    refuse_same_rows(rows, [rows[0], {"input_ids": np.array([4]), "label": 0}])
    refuse_same_rows(rows, [rows[0], {"label": 0}])
