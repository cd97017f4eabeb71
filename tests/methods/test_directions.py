"""Directions that are drawn again, and the optimizer that walks along them."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from privzoo.methods.directions import KINDS, Direction, SeededSGD
from privzoo.privacy.noise import BLOCK
from privzoo.privacy.streams import RunKey

KEY = RunKey.for_tests(0)


def direction(parameters, kind="rademacher", release=0, digest="d", number=0, key=KEY):
    return Direction(key, kind, release, digest, number, parameters)


def values_of(drawn, parameter):
    return torch.cat([values for _, values in drawn.blocks(parameter)])


def parameters(dtype=torch.float32, size=1000):
    generator = torch.Generator().manual_seed(1)
    return {
        "a": torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)),
        "b": torch.nn.Parameter(torch.randn(7, 11, generator=generator).to(dtype)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_is_drawn_again_as_it_was(kind):
    """Block by block, in pieces of BLOCK values and a rest, in any order of the parameters."""
    tensors = {"a": torch.empty(BLOCK + 5), "b": torch.empty(3, 4)}
    first = [(p, place, u.clone()) for p in tensors for place, u in direction(tensors, kind).blocks(tensors[p])]
    assert [(p, place.start, place.stop) for p, place, _ in first] == [
        ("a", 0, BLOCK), ("a", BLOCK, BLOCK + 5), ("b", 0, 12),
    ]  # fmt: skip
    again = direction(tensors, kind)
    for p in ("b", "a"):
        expected = torch.cat([u for name, _, u in first if name == p])
        assert torch.equal(values_of(again, tensors[p]), expected)
    assert not torch.equal(first[0][2][:5], first[1][2])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_direction_are_the_whole_one(kind, monkeypatch):
    """Ranks that hold parts, which begin and end anywhere in a block, move them as one process moves the whole."""
    size, cuts = 2 * BLOCK + 70, (0, 0, 3, 64, BLOCK - 1, BLOCK + 33, 2 * BLOCK, 2 * BLOCK, 2 * BLOCK + 70)
    tensors = {"a": torch.empty(size), "b": torch.empty(3, 4)}
    along = direction(tensors, kind)
    whole = values_of(along, tensors["a"])
    for begins, ends in itertools.pairwise(cuts):
        monkeypatch.setattr("privzoo.methods.directions.begins_here", lambda _, begins=begins: begins)
        monkeypatch.setattr("privzoo.methods.directions.held_here", lambda each, n=ends - begins: each.view(-1)[:n])
        pieces = list(along.blocks(tensors["a"]))
        assert [place.start for place, _ in pieces] == [0, *(place.stop for place, _ in pieces[:-1])][: len(pieces)]
        found = torch.cat([values for _, values in pieces]) if pieces else whole[:0]
        assert torch.equal(found, whole[begins:ends]), (begins, ends)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [{"release": 1}, {"digest": "e"}, {"number": 1}, {"key": RunKey.for_tests(1)}])
def test_directions_that_differ_in_anything_are_independent(kind, other):
    tensors = {"a": torch.empty(10_000), "b": torch.empty(10_000)}
    one, two = (values_of(direction(tensors, kind, **which), tensors["a"]) for which in ({}, other))
    assert abs(float((one * two).mean())) < 0.04  # four standard deviations
    assert abs(float((one * values_of(direction(tensors, kind), tensors["b"])).mean())) < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind):
    """Mean 0, variance 1, neighbours uncorrelated; the fourth moment is 3 or (Rademacher) 1."""
    tensors = {"a": torch.empty(200_000)}
    u = values_of(direction(tensors, kind), tensors["a"]).double()
    assert u.dtype == torch.float64
    assert abs(u.mean()) < 4 / math.sqrt(len(u))
    assert u.square().mean() == pytest.approx(1, abs=4 * math.sqrt(2 / len(u)))
    for step in (1, 31, 32, 64, len(u) // 32):
        assert abs((u[step:] * u[:-step]).mean()) < 4 / math.sqrt(len(u) - step)
    assert u.pow(4).mean() == pytest.approx(1 if kind == "rademacher" else 3, abs=0.1)


def test_rademacher_values_are_signs():
    tensors = {"a": torch.empty(100)}
    assert set(values_of(direction(tensors), tensors["a"]).tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("kind", ["sphere", "rademacher"])
def test_length_over_all_parameters_together(kind):
    """sqrt(d) jointly; on the sphere no tensor has a length of its own."""
    tensors = parameters()
    squares = [values_of(direction(tensors, kind), p).double().square().sum() for p in tensors.values()]
    assert sum(squares) == pytest.approx(1077, rel=1e-6)
    assert (abs(squares[1] - 77) > 0.1) == (kind == "sphere")


def test_a_direction_is_its_own_stream(monkeypatch):
    """PRIVACY line 30: it asks for streams of the purpose "direction" and for no others."""
    asked, stream = [], RunKey.stream

    def noticing(self, purpose, *rest):
        asked.append((purpose, *rest))
        return stream(self, purpose, *rest)

    monkeypatch.setattr(RunKey, "stream", noticing)
    tensors = {"a": torch.empty(3)}
    found = values_of(direction(tensors, "normal", release=4, digest="dw", number=2), tensors["a"])
    assert asked == [("direction", 4, "dw", "2 a", 0)]
    expected = KEY.stream("direction", 4, "dw", "2 a", 0).standard_normal(3, dtype=np.float32)
    assert found.tolist() == expected.tolist()


# ---- the optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back_in_place(dtype):
    tensors = parameters(dtype)
    before = {name: p.detach().clone() for name, p in tensors.items()}
    u, walker = direction(tensors, "normal"), SeededSGD(tensors.values(), lr=1.0)
    walker.displace(u, 0.0, 0.25)
    walker.displace(u, 0.25, -0.5)
    for name, p in tensors.items():
        expected = before[name] - 0.5 * values_of(u, p).view_as(p)
        torch.testing.assert_close(p.detach(), expected.to(dtype), rtol=0, atol=1e-6)
    walker.displace(u, -0.5, 0.0)
    for name, p in tensors.items():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)
        assert p.grad is None
    assert not walker.state  # no copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stands_at_rounded_exact_places(dtype):
    """PRIVACY line 32: each place is the rounding of the float32 copy moved, and the way back is bit-exact."""
    tensors = parameters(dtype)
    u, walker = direction(tensors), SeededSGD(tensors.values(), lr=1.0)
    for name, p in tensors.items():
        walker.exact(p).add_(0.3 * torch.finfo(dtype).eps * p.detach().float())  # between two values of the dtype
        p.data.copy_(walker.exact(p))
        assert not torch.equal(walker.exact(p), p.detach().float()), name
    before = {name: (p.detach().clone(), walker.exact(p).clone()) for name, p in tensors.items()}
    for start, end in ((0.0, 0.01), (0.01, -0.01)):
        walker.displace(u, start, end)
        for name, p in tensors.items():
            assert torch.equal(p.detach(), (end * values_of(u, p).view_as(p) + before[name][1]).to(dtype))
    walker.displace(u, -0.01, 0.0)
    for name, p in tensors.items():
        assert torch.equal(p.detach(), before[name][0])
        assert torch.equal(walker.exact(p), before[name][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_of_a_millionth_is_not_swallowed(dtype):
    """PRIVACY line 32: 1.0 - 0.001 is 1.0 in bfloat16; one update of 1e-6 and 500 of 1e-5 arrive."""
    parameter = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    u, walker = direction({"p": parameter}), SeededSGD([parameter], lr=1e-6)
    signs = values_of(u, parameter)
    walker.slopes = [(u, 1.0)]
    walker.step()
    torch.testing.assert_close(walker.exact(parameter), 1 - 1e-6 * signs, rtol=0, atol=6e-8)
    assert not torch.equal(walker.exact(parameter), torch.ones(64))
    walker.param_groups[0]["lr"] = 1e-5
    for _ in range(500):
        walker.slopes = [(u, 1.0)]
        walker.step()
    torch.testing.assert_close(walker.exact(parameter), 1 - 5e-3 * signs, rtol=0, atol=3e-5)  # rounding of 500 sums
    assert torch.equal(parameter.detach(), walker.exact(parameter).to(dtype))
    assert (parameter[signs > 0] < 1).all()


def test_a_step_by_hand():
    """theta - lr * (2 u_0 - 3 u_1), at the rate of each group; what a direction does not cover stays."""
    tensors = parameters(torch.float64)
    resting = torch.nn.Parameter(torch.ones(3))
    walker = SeededSGD([{"params": [tensors["a"], resting], "lr": 0.5}, {"params": [tensors["b"]], "lr": 0.1}], lr=9.0)
    before = {name: p.detach().clone() for name, p in tensors.items()}
    us = [direction(tensors, "normal", number=number) for number in (0, 1)]
    walker.slopes = list(zip(us, (2.0, -3.0), strict=True))
    walker.step()
    for name, lr in (("a", 0.5), ("b", 0.1)):
        p = tensors[name]
        moved = 2 * values_of(us[0], p).double() - 3 * values_of(us[1], p).double()
        torch.testing.assert_close(p.detach(), before[name] - lr * moved.view_as(p), rtol=0, atol=1e-12)
    assert torch.equal(resting, torch.ones(3))
    assert walker.slopes == []
    kept = tensors["a"].detach().clone()
    walker.step()
    assert torch.equal(tensors["a"], kept)


def test_exact_copies_outlive_a_checkpoint():
    """torch would round them to the parameter's dtype when it loads them."""
    tensors = parameters(torch.bfloat16)
    u, walker = direction(tensors), SeededSGD(tensors.values(), lr=1e-6)
    walker.slopes = [(u, 1.0)]
    walker.step()
    others = {name: torch.nn.Parameter(p.detach().clone()) for name, p in tensors.items()}
    other = SeededSGD(others.values(), lr=1e-6)
    other.load_state_dict(copy.deepcopy(walker.state_dict()))
    for name in tensors:
        assert other.exact(others[name]).dtype == torch.float32
        assert torch.equal(other.exact(others[name]), walker.exact(tensors[name]))
        assert not torch.equal(other.exact(others[name]), others[name].float())


def test_autocast_sees_moved_weights():
    """It keeps bfloat16 copies of float32 weights for as long as it is on, here a whole release."""
    layer = torch.nn.Linear(8, 8)
    named = dict(layer.named_parameters())
    u, walker, x = direction(named), SeededSGD(named.values(), lr=1.0), torch.ones(1, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        here = layer(x)
        walker.displace(u, 0.0, 0.5)
        there = layer(x)
    assert (here - there).abs().max() > 0.1
