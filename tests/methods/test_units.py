"""PRIVACY line 37: units of privacy of several rows (of an owner, windows of a question) are one contribution."""

from functools import partial

import numpy as np
import pytest
import torch

from privzoo.errors import UserError
from privzoo.privacy.clipping import BookKeeping, GhostTwoPass, Loop
from privzoo.privacy.sampling import DrawnRows, LogicalBatch

# Units 0 to 19 have two rows, which are alike: clipped apart they would move a sum by 2 C. The other twenty have one.
UNITS = [[i, 40 + i] if i < 20 else [i] for i in range(40)]


@pytest.fixture
def owners(make_run, plans):
    """`owners(engine=Loop, …)`: a run over 40 units with 60 rows."""
    return partial(make_run, plans(), units=UNITS)


def drawn(run, units):
    """A draw of these units, in one micro-batch."""
    whose = [(unit, place, row) for unit in units for place, row in enumerate(UNITS[unit])]
    rows = run.method.task.collate([run.batches.rows[row] for _, _, row in whose])
    examples, places = [unit for unit, _, _ in whose], [place for _, place, _ in whose]
    return LogicalBatch(0, (DrawnRows(rows, len(whose), 0, examples, places),))


def distance(one, other):
    return float(torch.cat([(value - other[name]).flatten() for name, value in one.items()]).norm())


@pytest.mark.parametrize("engine", [BookKeeping, GhostTwoPass, Loop], ids=lambda engine: engine.__name__)
def test_one_unit_less_moves_the_sum_by_at_most_c(engine, owners):
    run = owners(engine=engine)
    whole = run.method.query(drawn(run, [3, 5, 25, 7]))
    for gone in (3, 25):
        without = run.method.query(drawn(run, [unit for unit in (3, 5, 25, 7) if unit != gone]))
        assert 0.1 < distance(whole, without) <= 0.5 * (1 + 1e-9)


def test_one_unit_less_moves_the_slopes_by_at_most_c(make_walk, plans):
    walk = make_walk(plans(), units=UNITS, directions=3)
    whole = walk.method.query(drawn(walk, [3, 5, 25, 7]))
    for gone in (3, 25):
        without = walk.method.query(drawn(walk, [unit for unit in (3, 5, 25, 7) if unit != gone]))
        assert 0.01 < distance(whole, without) <= 0.5 * (1 + 1e-6)


def test_a_unit_counts_as_the_sum_of_its_rows(owners):
    """Without clipping in the way: the unit's norm is that of the gradient of both rows together."""
    run = owners()
    both = run.method.engine(lambda: run.method.losses(drawn(run, [3]).micro_batches[0]), 1e-3)
    one = run.method.query(drawn(run, [3]))
    assert distance(one, {name: torch.zeros_like(value) for name, value in one.items()}) == pytest.approx(0.5)
    direction = {name: value * (0.5 / 2e-3) for name, value in both.sums.items()}  # two equal rows, each clipped to 1e-3
    torch.testing.assert_close(one, direction)


@pytest.mark.parametrize("microbatch_size", [1, 3, 7])
def test_micro_batches_do_not_change_a_release(microbatch_size, owners):
    expected, run = owners(), owners(microbatch_size=microbatch_size)
    assert len(run.batches[0].micro_batches) > 1
    torch.testing.assert_close(run.method.query(run.batches[0]), expected.method.query(expected.batches[0]))


def test_rows_of_a_unit_have_masks_of_their_own(owners, bert):
    """Two equal rows of one unit: with one mask for both, the sum of the unit would be twice that of a row."""
    run = owners(model=bert(0.5))
    losses = run.method.losses(drawn(run, [3]).micro_batches[0])
    assert float(losses[0].detach()) != pytest.approx(float(losses[1].detach()))
    among_others = run.method.losses(drawn(run, [25, 3, 5]).micro_batches[0])
    torch.testing.assert_close(among_others[1:3], losses)


def test_a_micro_batch_of_unknown_owners_is_refused(owners):
    run = owners()
    rows = run.method.task.collate([run.batches.rows[3]])
    with pytest.raises(UserError, match="does not say whose its rows are"):
        run.method.query(LogicalBatch(0, (rows,)))


class Forgetful(BookKeeping):
    """Clips each row alone."""

    def __call__(self, forward, clip_norm, unit_of_row=None, into=None):
        found = super().__call__(forward, clip_norm, None, into)
        if unit_of_row is None:
            return found
        norms = found.norms.new_zeros(int(unit_of_row.max()) + 1).index_add_(0, unit_of_row, found.norms)
        return type(found)(found.sums, norms, found.losses)


def test_preflight_refuses_an_engine_that_forgets_units(owners):
    owners().method.preflight(owners().batches.rows[:4])
    with pytest.raises(UserError, match="differ by"):
        owners(engine=Forgetful).method.preflight(owners().batches.rows[:4])


def test_rounding_is_bounded_for_units(make_walk, plans, monkeypatch):
    """A slope of two rows may round by twice as much, so that each may round by half."""
    allowed = []
    monkeypatch.setattr("privzoo.methods.zeroth_order.check_losses", lambda *found: allowed.append(found[-1]))
    for units in (UNITS, None):
        walk = make_walk(plans(), units=units)
        walk.method.preflight(walk.batches.rows[:4])
    assert allowed[1] == pytest.approx(2 * allowed[0])


def test_a_whole_run_draws_units(owners):
    """Through the Trainer: the realised sizes are those of the units that were drawn."""
    run = owners(microbatch_size=5)
    run.fit()
    for release, sizes in enumerate(run.recorder.sizes):
        units = run.draws(release)
        assert sum(sizes) == sum(len(UNITS[unit]) for unit in units)
        assert max(sizes, default=0) <= 5
    assert len(run.recorder.sizes) == run.method.mechanism.plan.steps
    assert np.unique([len(run.draws(release)) for release in range(5)]).size > 1


def test_a_task_with_units_of_another_contract_is_refused(make_run, plans):
    """DESIGN's `unit_of_row` is not asked: without a word its rows would be units of their own."""

    class Old:
        rows_of_unit = None

        def unit_of_row(self, batch):
            return torch.zeros(len(batch["labels"]), dtype=torch.long)

        def collate(self, rows):
            return {}

    with pytest.raises(UserError, match="give the task rows_of_unit"):
        make_run(plans(), task=Old())
