"""What is checked before the first release of a method that looks at losses alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privzoo.errors import UserError
from privzoo.privacy.preflight import check_losses

E = 5
ROWS = [torch.randn(E, generator=torch.Generator().manual_seed(i)) for i in range(6)]


class Net(nn.Module):
    """`use(net, h)` between two linear layers; one loss a row."""

    def __init__(self, use=lambda net, h: h, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.use = nn.Linear(E, E), nn.Linear(E, 1), use
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.last(self.use(self, self.first(x)).tanh()).squeeze(1)


def check(model, rows=ROWS, losses=None, allowed=math.inf):
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    losses = losses or (lambda batch: model(batch["x"]).float())
    check_losses(model, losses, rows, lambda rows: {"x": torch.stack(rows).to(dtype)}, allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [1, 2, 6])
def test_a_right_model_passes_and_is_left_as_it_was(number, dtype):
    """Bit by bit, a gate that is 0 included; nothing needs a gradient."""
    model = Net(lambda net, h: h + h * net.gate, gate=nn.Parameter(torch.zeros(E))).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check(model, ROWS[:number])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check(model, losses=lambda batch: model(batch["x"]).detach().float())


COUPLING = {
    "a mean over the batch": Net(lambda net, h: h - h.mean(0)),
    "a gate that is 0 before a mean": Net(lambda net, h: h + net.gate * h.mean(0), gate=nn.Parameter(torch.zeros(E))),
    "rows in another's place": Net(lambda net, h: h.roll(1, 0)),
    "batch norm": Net(lambda net, h: F.batch_norm(h, None, None, training=True) if len(h) > 1 else h),
}


@pytest.mark.parametrize("name", COUPLING)
def test_coupling_is_refused(name):
    """PRIVACY lines 7 and 8: also where only weights away from their first values let it through."""
    before = {key: value.clone() for key, value in COUPLING[name].state_dict().items()}
    with pytest.raises(UserError, match="losses of a batch and of its rows alone differ"):
        check(COUPLING[name])
    assert all(torch.equal(value, before[key]) for key, value in COUPLING[name].state_dict().items())


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_beside_a_coarse_base_rows_may_not_influence_one_another(base):
    """PRIVACY line 7: other shapes round by 1 % beside a base in bfloat16, the same shape does not."""
    frozen = nn.Linear(E, E).requires_grad_(False).to(base)
    model = Net(lambda net, h: net.frozen(h.to(base)).float(), frozen=frozen)
    check(model)
    if base == torch.bfloat16:
        check(model, losses=lambda batch: model(batch["x"]) * (1.01 if len(batch["x"]) == 1 else 1.0))
    with pytest.raises(UserError, match="losses of a batch and of its rows alone differ"):
        check(model, losses=lambda batch: model(batch["x"]) * (1 + 0.01 * batch["x"].sum(dim=1).tanh().mean()))


def test_rounding_beyond_what_is_allowed_is_refused():
    """A loss that differs by a ten-thousandth passes as a loss, but not where it is divided by a thousandth."""
    model = Net(lambda net, h: h + 1e-4 * (len(h) == 1))
    check(model)
    check(model, allowed=1e-3)
    with pytest.raises(UserError, match=r"rounding moves a row's loss by .* take float32"):
        check(model, allowed=1e-6)


def test_dropout_is_refused():
    """PRIVACY line 29: the two losses of an example would be taken under different masks."""
    with pytest.raises(UserError, match="other losses the second time"):
        check(Net(lambda net, h: F.dropout(h, 0.5)))


def test_a_kept_copy_of_the_weights_is_refused():
    """Moved weights would not be seen: every slope would be 0."""
    model = Net()
    copy = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="stay the same when weights move"):
        check(model, losses=lambda batch: torch.func.functional_call(model, copy, (batch["x"],)))


def test_a_buffer_that_changes_is_refused():
    def use(net, h):
        net.seen.add_(1)
        return h

    with pytest.raises(UserError, match="seen is a buffer that changes with the data"):
        check(Net(use, seen=nn.Buffer(torch.zeros(1))))


def test_losses_are_one_a_row():
    model = Net()
    for wrong in (lambda batch: model(batch["x"]).mean(), lambda batch: model(batch["x"])[:1]):
        with pytest.raises(UserError, match="Expected 4 losses for 4 rows"):
            check(model, losses=wrong)


def test_only_rows_with_a_finite_loss_are_compared():
    rows = [torch.full((E,), float("nan")), *ROWS]
    check(Net(), rows)
    with pytest.raises(UserError, match="None of 4 examples has a finite loss"):
        check(Net(), [rows[0]] * 4)


def test_weights_that_are_not_finite_are_refused():
    model = Net()
    model.last.bias.data.fill_(float("inf"))
    with pytest.raises(UserError, match="weights are not all finite"):
        check(model)


def test_whole_numbers_cannot_be_trained():
    model = Net()
    model.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    check(model)  # frozen: a 4-bit base
    model.packed = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"packed holds torch\.complex64"):
        check(model)
