"""The one promise that epsilon hangs on: a unit moves the clipped sum by at most C, whatever its gradient is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privzoo.errors import UserError
from privzoo.privacy.clipping import BookKeeping, GhostTwoPass, Loop

ENGINES = [BookKeeping, GhostTwoPass, Loop]
C = 0.3


class Small(nn.Module):
    """Table, wide layer (Gram form), narrow layer (instantiated form), tied head, scale: all kinds of sums at once."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6)
        self.wide = nn.Linear(6, 24)
        self.narrow = nn.Linear(24, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.to(dtype)

    def forward(self, ids, strength):
        hidden = self.narrow(self.wide(self.table(ids)).tanh()) * self.scale
        return F.linear(hidden, self.table.weight).sin().flatten(1).sum(1) * strength


def length(sums):
    return torch.sqrt(sum(value.double().square().sum() for value in sums.values())).item()


@pytest.mark.parametrize(
    ("dtype", "slack"),
    [pytest.param(torch.float64, 1e-6, marks=pytest.mark.sweep), pytest.param(torch.float32, 4e-6)],
)
def test_a_thousand_random_pairs(dtype, slack):
    """PRIVACY line 5: adding one example moves the sum by at most C(1 + 1e-6), and by more than nothing.

    Strengths from 1e-4 to 1e4 bring norms far below and far above C. There are one to four other examples: in float32
    their sum is rounded, too, hence its slack.
    """
    model, generator = Small(dtype), torch.Generator().manual_seed(5)
    engine, lengths = BookKeeping(model), []
    for pair in range(1000 if dtype == torch.float64 else 200):
        if pair % 10 == 0:  # other neighbours
            ids, strength = random_examples(1 + pair // 10 % 4, generator)
            without = engine(lambda i=ids, s=strength: model(i, s.to(dtype)), C).sums
        new_ids, new_strength = random_examples(1, generator)
        ids_with, strength_with = torch.cat([new_ids, ids]), torch.cat([new_strength, strength])
        with_it = engine(lambda i=ids_with, s=strength_with: model(i, s.to(dtype)), C).sums
        lengths.append(length({name: with_it[name] - without[name] for name in with_it}))
    assert max(lengths) <= C * (1 + slack)
    assert min(lengths) > 0
    assert 0.3 < sum(value > 0.999 * C for value in lengths) / len(lengths) < 0.9  # many are clipped, not all


def random_examples(count, generator):
    ids = torch.randint(0, 9, (count, 2), generator=generator)
    return ids, 10 ** (8 * torch.rand(count, generator=generator, dtype=torch.float64) - 4)


class Apart(nn.Module):
    """The loss is the difference of two places, whose gradients nearly cancel where the places are nearly alike."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(16, width, bias=False)

    def forward(self, x):
        hidden = self.layer(x)
        return (hidden[:, 0] - hidden[:, 1]).sum(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("width", [16, 1], ids=["Gram form", "instantiated form"])
@pytest.mark.parametrize("apart", [1e2, 1e-1, 1e-3, 0.0])
def test_places_that_cancel(engine, width, apart):
    """PRIVACY lines 5 and 27: ||G||^2 from Gram matrices is a difference of large numbers here. In float32 it may come
    out as 0, and a gradient counted as 0 is not clipped. Strength 1e6 makes the miss large."""
    model = Apart(width)
    for seed in range(40):
        place = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(seed)) * 1000
        x = torch.cat([place, place + apart], dim=1)
        found = engine(model)(lambda x=x: 1e6 * model(x), C)
        assert length(found.sums) <= C * (1 + 1e-6)
        assert torch.isfinite(found.norms).all()
        if apart >= 1e-1:  # and not on the safe side for nothing: a norm that is far too large takes the gradient away
            assert length(found.sums) > 0.95 * C


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strength", [1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e17, 1e25, 1e37])
def test_gradients_of_any_size_in_float32(engine, strength):
    """PRIVACY line 5: from denormal to overflowing. Tiny ones count as they are; those that overflow may count as 0."""
    model = Small(torch.float32)
    ids = torch.tensor([[3, 5], [1, 1]])
    alone = torch.tensor([strength, 0.0])
    made = engine(model)
    made(lambda: model(ids, torch.ones(2)), C)  # shows where the examples lie: of two rows and two places
    found = made(lambda: model(ids, alone), C)
    assert length(found.sums) <= C * (1 + 1e-6)
    if strength <= 1e17:
        assert length(found.sums) > 0
    if 1.0 <= strength <= 1e17:
        assert length(found.sums) > 0.999 * C
    for value in found.sums.values():
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_zero_gradient(engine):
    """An example without gradient contributes nothing and makes no 0 / 0."""
    model = Small(torch.float32)
    found = engine(model)(lambda: model(torch.tensor([[3, 5]]), torch.zeros(1)), C)
    assert found.norms.tolist() == [0.0]
    assert length(found.sums) == 0.0


@pytest.mark.parametrize("clip_norm", [C, math.inf])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
def test_a_poisoned_example_counts_as_nothing(name, poison, clip_norm, transformer):
    """PRIVACY line 9: its rows are masked (0 * NaN is NaN), and the others count as if it were not there."""
    model, losses = transformer(name)
    strength = torch.tensor([1.0, poison, 1.0, 1.0], dtype=torch.float64)
    found = BookKeeping(model)(lambda: losses() * strength, clip_norm)
    others = BookKeeping(model)(lambda: losses([0, 2, 3]), clip_norm)
    assert not math.isfinite(found.norms[1])
    torch.testing.assert_close(found.norms[[0, 2, 3]], others.norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sums, others.sums, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", [BookKeeping, GhostTwoPass])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e200])
def test_a_poisoned_input(poison, engine):
    """PRIVACY line 9: poisoned activations, through convolution, layer norm, position table and linear layers, of which
    the last one is wide (Gram form)."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.Conv2d(1, 2, 2), "n": nn.LayerNorm(4), "p": nn.Embedding(2, 4), "b": nn.Linear(4, 3), "c": nn.Linear(3, 40)}
    ).double()
    images = torch.randn(3, 1, 3, 3, dtype=torch.float64)

    def losses(x):
        hidden = model["n"](model["a"](x).flatten(2)) + model["p"](torch.arange(2))
        return model["c"](model["b"](hidden)).sin().flatten(1).sum(1)

    others = engine(model)(lambda: losses(images[1:]), C)
    images[0, 0, 1, 1] = poison
    found = engine(model)(lambda: losses(images), C)
    assert not torch.isfinite(found.norms[0])
    torch.testing.assert_close(found.sums, others.sums, rtol=1e-10, atol=1e-12)


def test_loop_refuses_what_one_poisoned_row_does_to_the_others():
    """PRIVACY line 9: 0 * NaN in the weight's gradient makes every example of the micro-batch NaN. Leaving all of them out
    would move the sum by 2C here, so that is refused; alone, the row counts as nothing."""
    model = nn.Linear(2, 1).double()
    rows = torch.tensor([[math.nan, 1.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(UserError, match="take microbatch_size=1"):
        Loop(model)(lambda: model(rows).squeeze(1), C)
    sums = Loop(model)(lambda: model(rows[1:]).squeeze(1), C).sums
    before = {name: value.clone() for name, value in sums.items()}
    Loop(model)(lambda: model(rows[:1]).squeeze(1), C, into=sums)
    assert all(torch.equal(sums[name], before[name]) for name in sums)


def test_a_poisoned_row_poisons_its_unit_alone():
    """A unit with one poisoned row counts as nothing; the unit between its rows is untouched."""
    model = nn.Linear(2, 1).double()
    rows = torch.tensor([[math.nan, 1.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    found = BookKeeping(model)(lambda: model(rows).squeeze(1), 1.0, torch.tensor([0, 1, 0]))
    assert math.isnan(found.norms[0])
    expected = torch.tensor([[3.0, 4.0]], dtype=torch.float64) / math.sqrt(26)  # gradient (3, 4) and bias 1
    torch.testing.assert_close(found.sums["weight"], expected)
