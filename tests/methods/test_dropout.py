"""PRIVACY lines 28 and 29: dropout whose masks are keyed by release and example bounds what one example can do."""

import pytest
import torch

from privzoo.errors import UserError
from privzoo.privacy.clipping import GhostTwoPass, Loop
from privzoo.privacy.sampling import DrawnRows, LogicalBatch


def drawn(run, numbers, release=0):
    """A draw of these examples, in one micro-batch."""
    rows = [run.batches.rows[number] for number in numbers]
    return LogicalBatch(release, (DrawnRows(run.method.task.collate(rows), len(rows), release, numbers),))


def length(sums):
    return float(torch.cat([value.flatten() for value in sums.values()]).norm())


def distance(one, other):
    return length({name: value - other[name] for name, value in one.items()})


@pytest.mark.parametrize("left_out", [0, 4, 11])
def test_one_example_less_moves_the_sum_by_at_most_c(left_out, make_run, plans, bert):
    """The others keep their masks, though they stand at other places and are padded otherwise."""
    run, numbers = make_run(plans(), model=bert(0.5)), list(range(12))
    whole = run.method.query(drawn(run, numbers))
    without = run.method.query(drawn(run, [number for number in numbers if number != left_out]))
    assert 0 < distance(whole, without) <= 0.5 * (1 + 1e-6)


def test_masks_are_others_in_another_release(make_run, plans, bert):
    run = make_run(plans(), model=bert(0.5))
    first, second = (run.method.query(drawn(run, [0, 1, 2], release)) for release in (0, 1))
    assert distance(first, second) > 0.01
    plain = make_run(plans()).method
    assert distance(plain.query(drawn(run, [0, 1, 2])), plain.query(drawn(run, [0, 1, 2], 1))) == 0


@pytest.mark.parametrize("engine", [GhostTwoPass, Loop])
@pytest.mark.parametrize("microbatch_size", [1, 3])
def test_engines_and_micro_batches_agree(engine, microbatch_size, make_run, plans, bert):
    expected = make_run(plans(), model=bert(0.5)).method
    run = make_run(plans(), model=bert(0.5), engine=engine, microbatch_size=microbatch_size)
    assert len(run.batches[0].micro_batches) > 1
    sums = run.method.query(run.batches[0])
    whole = expected.query(make_run(plans()).batches[0])
    torch.testing.assert_close(sums, whole, rtol=1e-9, atol=1e-12)


def test_preflight_and_resume(make_run, plans, tmp_path, bert):
    """A run that goes on from a checkpoint sees the masks that it would have seen."""
    whole = make_run(plans(), model=bert(0.3))
    whole.method.preflight(whole.batches.rows)
    whole.fit_and_save(2, tmp_path / "middle.ckpt")
    resumed = make_run(plans(), model=bert(0.3))
    resumed.fit(start=2, checkpoint=tmp_path / "middle.ckpt")
    assert len(whole.recorder.weights) > 2
    torch.testing.assert_close(resumed.recorder.weights[-1], whole.recorder.weights[-1], rtol=0, atol=0)
    plain = make_run(plans())
    plain.fit()
    assert distance(plain.recorder.weights[-1], whole.recorder.weights[-1]) > 1e-3


def test_both_losses_of_a_slope_see_the_same_masks(make_walk, plans, monkeypatch, bert):
    """dpzero: a slope is a difference of two losses; under other masks it would be noise divided by lambda."""
    walk = make_walk(plans(), model=bert(0.5), directions=1, smoothing=1e-6)
    walk.method.preflight(walk.batches.rows)
    walk.method.weights = "some"
    found, losses = [], walk.method.losses
    monkeypatch.setattr(walk.method, "losses", lambda rows: found.append(losses(rows)) or found[-1])
    walk.method.query(drawn(walk, [0, 1, 2, 3]))
    assert len(found) == 2
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)
    assert float((found[0] - found[0].mean()).abs().max()) > 1e-2


def test_a_draw_that_does_not_name_its_examples(make_run, plans, bert):
    run = make_run(plans(), model=bert(0.5))
    with pytest.raises(UserError, match="does not name its examples"):
        run.method.query(LogicalBatch(0, (run.method.task.collate(run.batches.rows[:3]),)))


def test_a_draw_of_too_few_names(make_run, plans, bert):
    run = make_run(plans(), model=bert(0.5))
    rows = run.method.task.collate(run.batches.rows[:3])
    with pytest.raises(UserError, match="does not name its examples"):
        run.method.query(LogicalBatch(0, (DrawnRows(rows, 3, 0, [1]),)))
