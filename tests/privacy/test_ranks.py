"""What ranks tell one another, between real processes."""

import itertools
import json

import numpy as np
import pytest

from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import RankLost, Ranks, join_ranks, telling_who_is_lost
from privzoo.privacy.sampling import PoissonBatches, PoissonDraws
from privzoo.privacy.streams import RunKey

START = """
import json, os, torch
from privzoo.privacy import ranks as module
from privzoo.privacy.ranks import join_ranks, leave_ranks
ranks = join_ranks()
def tell(**found):
    with open(f"{out}/{{ranks.rank}}", "w") as file:
        json.dump(found, file)
"""


@pytest.fixture
def on_two(privzoo, tmp_path):
    """`on_two("tell(x=ranks.rank)")`: what each of two ranks tells; or of three."""

    def run(script, count=2):
        code, output = privzoo(script=START.format(out=tmp_path) + script, ranks=count)
        assert code == 0, output
        return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(count)]

    return run


def test_a_library_that_tells_of_a_lost_rank(on_two):
    """In one sentence; an error of another kind stays what it is."""
    script = """
from torch.distributed._functional_collectives import all_reduce
from privzoo.privacy.ranks import telling_who_is_lost
if not ranks.first:
    tell()
    os._exit(0)
try:
    with telling_who_is_lost():
        all_reduce(torch.ones(1 << 20), "sum", [0, 1]).sum().item()
except Exception as error:
    tell(kind=type(error).__name__, said=str(error))
os._exit(0)
"""
    found, _ = on_two(script)
    assert found["kind"] == "RankLost"
    assert found["said"].startswith("Another process of the run has ended (")
    with pytest.raises(RuntimeError, match="shapes") as told, telling_who_is_lost():
        raise RuntimeError("shapes")
    assert told.type is not RankLost


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("units", [False, True])
def test_shares_are_the_draw(count, units):
    """PRIVACY 18: every drawn unit is treated by one rank, whole, and by no other; no rank has two more than another."""
    plan = PrivacyPlan(num_examples=60, batch_size=20, epochs=3, delta=1e-3, clip_norm=1.0, noise_multiplier=1.0)
    rows_of_unit = [[2 * i, 2 * i + 1] for i in range(60)] if units else None
    rows = [[0] * (1 + i % 7) for i in range(120 if units else 60)]
    draws = PoissonDraws(plan, RunKey.for_tests(3), "digest")

    def collate(part):
        return {"length": np.array([len(row) for row in part])}

    shares = [PoissonBatches(rows, draws, collate, len, 5, rows_of_unit, Ranks(rank, count)) for rank in range(count)]
    for release in range(plan.steps):
        treated = [
            sorted(each for micro_batch in share[release].micro_batches for each in micro_batch.examples) for share in shares
        ]
        times = 2 if units else 1
        assert sorted(itertools.chain(*treated)) == sorted(list(draws(release)) * times)
        assert max(map(len, treated)) - min(map(len, treated)) <= times


def test_shares_do_not_hang_on_what_a_process_makes_of_a_row():
    """PRIVACY 18: ranks that reckon lengths otherwise (a tokenizer of their own) still treat each drawn unit once."""
    plan = PrivacyPlan(num_examples=60, batch_size=20, epochs=3, delta=1e-3, clip_norm=1.0, noise_multiplier=1.0)
    draws = PoissonDraws(plan, RunKey.for_tests(3), "digest")
    lengths = [lambda row: row, lambda row: -row]
    shares = [
        PoissonBatches(range(60), draws, lambda part: {}, length, 5, None, Ranks(rank, 2))
        for rank, length in enumerate(lengths)
    ]
    for release in range(plan.steps):
        treated = [each for share in shares for batch in share[release].micro_batches for each in batch.examples]
        assert sorted(treated) == draws(release).tolist()


def test_sums_are_added_up_bucket_by_bucket(on_two):
    """Small tensors travel together, large ones alone, of each type apart; every rank has the same bits."""
    found = on_two("""
module.BUCKET = 10
sent = []
reduce = torch.distributed.all_reduce
torch.distributed.all_reduce = lambda value: (sent.append(value.numel()), reduce(value))
sums = {
    "a": torch.full((2, 3), 0.1 + ranks.rank), "b": torch.arange(4.0), "c": torch.full((25,), 1e-3 * (1 + ranks.rank)),
    "d": torch.tensor([1.0, ranks.rank], dtype=torch.float64), "e": torch.tensor(3.0), "f": torch.zeros(0),
}
ranks.add_up(sums)
tell(sent=sent, sums={name: value.tolist() for name, value in sums.items()})
leave_ranks()
""")
    assert found[0] == found[1]
    assert found[0]["sent"] == [10, 25, 2, 1]
    sums = found[0]["sums"]
    assert np.allclose(sums["a"], 1.2)
    assert sums["b"] == [0.0, 2.0, 4.0, 6.0]
    assert np.allclose(sums["c"], 3e-3)
    assert (sums["d"], sums["e"], sums["f"]) == ([2.0, 1.0], 6.0, [])


def test_three_ranks_hold_the_same_bits(on_two):
    """Though a sum of three hangs on the order in which it is made."""
    found = on_two(
        """
torch.manual_seed(ranks.rank)
sums = {"large": torch.randn(100_000), "small": torch.randn(7)}
ranks.add_up(sums)
from privzoo.privacy.noise import fingerprint
tell(bits=fingerprint(sums.items()))
leave_ranks()
""",
        count=3,
    )
    assert found[0] == found[1] == found[2]


def test_a_stop_and_weights_are_everybodys(on_two):
    """Both ranks learn that one was asked to stop; weights that differ in a bit are an error on both."""
    found = on_two("""
same, other = "ab" * 32, ("ab" if ranks.rank else "aa") * 32
asked = [ranks.any_stops(False, same), ranks.any_stops(ranks.rank == 1, same), ranks.any_stops(True, same)]
error = None
try:
    ranks.any_stops(False, other)
except RuntimeError as raised:
    error = str(raised)
tell(asked=asked, error=error)
leave_ranks()
""")
    assert found[0] == found[1]
    assert found[0]["asked"] == [False, True, True]
    assert str(found[0]["error"]).startswith("Weights are not the same on every rank")


def test_a_fingerprint_is_of_all_parts(on_two):
    """The same on both ranks, and another if either's part is, or what both hold."""
    found = on_two("""
def made(alike="a", first="b", second="c"):
    return ranks.together(alike, second if ranks.rank else first)
tell(made=[made(), made(alike="x"), made(first="x"), made(second="x"), made(first="c", second="b")])
leave_ranks()
""")
    assert found[0] == found[1]
    assert len(set(found[0]["made"])) == 5


def test_values_are_exchanged(on_two):
    found = on_two("""
first, all_ = ranks.from_first({"of": ranks.rank}), ranks.all_of([ranks.rank])
ranks.require_equal("data", "the same")
error = None
try:
    ranks.require_equal("data", f"of rank {ranks.rank}")
except ValueError as raised:
    error = str(raised)
tell(first=first, all=all_, error=error, me=[ranks.rank, ranks.count, ranks.first])
leave_ranks()
""")
    assert [each["me"] for each in found] == [[0, 2, True], [1, 2, False]]
    for each in found:
        assert (each["first"], each["all"]) == ({"of": 0}, [[0], [1]])
        assert each["error"] == "Expected the same data on every rank, found others on rank 1 than on rank 0."


def test_a_rank_that_is_gone_is_noticed(on_two):
    """Not waited for: the other one ends with a sentence."""
    code = """
if ranks.rank == 1:
    tell()
    os._exit(0)
try:
    ranks.add_up({"a": torch.zeros(3)})
except module.RankLost as error:
    tell(error=str(error))
os._exit(0)
"""
    found = on_two(code)
    assert str(found[0]["error"]).startswith("Another process of the run has ended (")


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join_ranks()
    assert ranks == Ranks(0, 1)
    assert ranks.any_stops(True, "no fingerprint")
    assert not ranks.any_stops(False, "no fingerprint")
    assert (ranks.from_first(3), ranks.all_of(3), list(ranks.share([1, 2]))) == (3, [3], [1, 2])
