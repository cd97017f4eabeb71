import csv
import math
import os
import subprocess
import sys

import pytest

from privzoo.errors import UserError
from privzoo.metrics_file import MetricsFile


def lines(path):
    return path.read_text().splitlines()


def test_rows_are_wide_and_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsFile(path)
    table.add(1, {"loss": 0.5, "epsilon": 1})
    assert lines(path) == ["step,loss,epsilon", "1,0.5,1"]
    table.add(2, {"epsilon": 1.25})
    assert lines(path) == ["step,loss,epsilon", "1,0.5,1", "2,,1.25"]


def test_a_new_column_reaches_every_row_and_one_step_is_one_row(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsFile(path)
    table.add(1, {"lr": 0.1})
    table.add(2, {"lr": 0.2})
    table.add(2, {"accuracy, top 1": 0.75})  # a comma in a name is quoted
    table.add(2, {"lr": 0.25})  # the same length or longer: written over the row
    table.add(2, {"lr": 3.0})  # shorter than before: nothing of the longer row is left
    table.add(3, {"lr": 0.3, "accuracy, top 1": 1.0})
    with path.open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["step", "lr", "accuracy, top 1"],
            ["1", "0.1", ""],
            ["2", "3.0", "0.75"],
            ["3", "0.3", "1.0"],
        ]


def test_a_late_point_is_put_where_it_belongs(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsFile(path)
    for step in (1, 3):
        table.add(step, {"lr": float(step)})
    table.add(2, {"lr": 2.0})
    table.add(1, {"lr": 9.0})
    table.add(4, {"lr": 4.0})
    assert lines(path) == ["step,lr", "1,9.0", "2,2.0", "3,3.0", "4,4.0"]


def run(table, steps):
    for step in steps:
        table.add(step, {"lr": 1 / step, "epsilon": 0.1 * step})
        if step % 3 == 0:
            table.add(step, {"accuracy": step / 10})
        if step % 4 == 0:
            table.add(step, {"f1": step / 10})


@pytest.mark.parametrize(("resumed_at", "killed_after"), [(r, k) for r in (0, 2, 3, 5, 12) for k in range(r or 1, 13)])
def test_killed_and_resumed_at_any_step_equals_the_straight_run(tmp_path, killed_after, resumed_at):
    straight = MetricsFile(tmp_path / "straight.csv")
    run(straight, range(1, 13))
    path = tmp_path / "metrics.csv"
    run(MetricsFile(path), range(1, killed_after + 1))
    resumed = MetricsFile(path, resume_step=resumed_at)
    assert len(lines(path)) == 1 + resumed_at  # the header and the rows that the checkpoint stands for
    run(resumed, range(resumed_at + 1, 13))
    assert path.read_bytes() == (tmp_path / "straight.csv").read_bytes()


def test_a_column_of_dropped_rows_alone_is_dropped_with_them(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsFile(path)
    table.add(1, {"lr": 0.1})
    table.add(2, {"validated": 0.5})  # the resumed run validates less often
    MetricsFile(path, resume_step=1).add(2, {"lr": 0.2, "other": 1.0})
    assert lines(path) == ["step,lr,other", "1,0.1,", "2,0.2,1.0"]


def test_without_a_resume_step_nothing_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    run(MetricsFile(path), range(1, 5))
    before = path.read_bytes()
    MetricsFile(path)
    assert path.read_bytes() == before


def test_every_cut_of_the_file_keeps_the_whole_rows_before_it(tmp_path):
    path = tmp_path / "metrics.csv"
    run(MetricsFile(path), range(1, 5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        MetricsFile(path).add(9, {"lr": 0.0})
        complete = max(0, whole[:length].count(b"\n") - 1)
        kept = [row.split(",")[:2] for row in lines(path)[1:-1]]
        assert kept == [row.split(",")[:2] for row in whole.decode().splitlines()[1 : 1 + complete]]
        assert lines(path)[-1].startswith("9,")


def test_the_rest_of_a_replaced_row_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,lr\n1,0.1\n2,3.0\n25\n")  # killed after "2,3.0" went over "2,0.125" and before the cut
    MetricsFile(path).add(3, {"lr": 0.5})
    assert lines(path) == ["step,lr", "1,0.1", "2,3.0", "3,0.5"]


def test_what_is_not_such_a_table_is_told(tmp_path):
    path = tmp_path / "metrics.csv"
    for text, words in (("step,lr\n1\n2,0.1\n", "line 2"), ("epoch,lr\n1,2\n2,3\n", "column step")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            MetricsFile(path)
        assert path.read_text() == text


def test_values_survive_the_way_through_the_file(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsFile(path).add(1, {"a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": 10**12})
    row = lines(path)[1].split(",")
    assert float(row[1]) == 0.1 + 0.2
    assert row[2:] == ["nan", "inf", "1000000000000"]


_LIMITED = """
import resource, sys
from pathlib import Path
from privzoo.errors import RunLost
from privzoo.metrics_file import MetricsFile
table = MetricsFile(Path(sys.argv[1]))
table.add(1, {"a" * 40: 1.0, "b": 1.0})
size = Path(sys.argv[1]).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
try:
    if sys.argv[2] == "append":
        table.add(2, {"b": 0.12345678912345})
    elif sys.argv[2] == "replace":
        table.add(1, {"a" * 40: 0.12345678912345, "b": 0.12345678912345})
    else:
        table.add(1, {"c" * 50: 1.0})
except RunLost as lost:
    print(lost)
"""


@pytest.mark.parametrize("kind", ["append", "replace", "new column"])
def test_a_full_disk_keeps_the_rows_there_were(tmp_path, kind):
    path = tmp_path / "metrics.csv"
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(path), kind], capture_output=True, text=True, check=True)
    assert "Could not write" in done.stdout
    assert lines(path) == ["step," + "a" * 40 + ",b", "1,1.0,1.0"]
    assert path.read_bytes().endswith(b"1,1.0,1.0\n")
    assert os.listdir(tmp_path) == ["metrics.csv"]
