"""Averages of the weights: by hand, bit-equal after a resume, and training knows nothing of them."""

import importlib.util
import math
from functools import partial

import pytest
import torch
from torch import nn

from privzoo.errors import UserError
from privzoo.methods.average import ExponentialAverage, weights_to_publish
from privzoo.methods.contents import seal_of
from privzoo.methods.optimizers import make_optimizer


def published(method):
    with method.published():
        return {name: p.detach().clone() for name, p in method.model.named_parameters()}


def test_by_hand_and_training_knows_nothing_of_it(make_run, plans):
    """a_1 = w_1, a_t = 0.7 a_{t-1} + 0.3 w_t over five releases; the weights are those of a run without an average, to the
    bit, before and after they make room for it."""
    plain, run = make_run(plans(), "biases"), make_run(plans(), "biases", average=ExponentialAverage(0.7))
    untrained = published(run.method)
    assert all(torch.equal(p, untrained[name]) for name, p in run.method.model.named_parameters())
    plain.fit()
    run.fit()
    expected = {name: value.clone() for name, value in run.recorder.weights[0].items()}
    for weights in run.recorder.weights[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * value for name, value in weights.items()}
    found = published(run.method)
    for name, value in run.method.model.named_parameters():
        wanted = expected.get(name, value)
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-14)
    assert any(not torch.equal(found[name], run.recorder.weights[-1][name]) for name in expected)
    for name, value in run.method.trainable.items():
        assert torch.equal(value, plain.recorder.weights[-1][name])


@pytest.mark.parametrize("at_release", [2, 5])
def test_it_goes_on_from_a_checkpoint(at_release, make_run, plans, tmp_path):
    """PRIVACY line 35: weights and average are bit-equal, and a run that is over has its average without training again."""
    straight = make_run(plans(), "biases", average=ExponentialAverage(0.7))
    trainer = straight.fit_and_save(2, tmp_path / "last.ckpt")
    if at_release == 5:
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = make_run(plans(), "biases", average=ExponentialAverage(0.7))
    if at_release == 5:
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        resumed.method.on_load_checkpoint(checkpoint)
        resumed.method.load_state_dict(checkpoint["state_dict"], strict=False)
    else:
        resumed.fit(2, tmp_path / "last.ckpt")
    for name, value in straight.method.trainable.items():
        assert torch.equal(value, resumed.method.trainable[name])
    expected, found = published(straight.method), published(resumed.method)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_checkpoint_holds_it_sealed_and_no_noise_hangs_on_it(make_run, plans, tmp_path):
    """PRIVACY line 35. The average is a copy of the trained part alone."""
    run = make_run(plans(), "biases", average=ExponentialAverage(0.7))
    run.fit().save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    averages = [name for name in checkpoint["state_dict"] if name.startswith("average.averaged.module")]
    assert len(averages) == len(run.method.trainable) == 20
    assert checkpoint["seal"] == seal_of(checkpoint, run.method.mechanism.key)
    weights = run.method._fingerprint()
    checkpoint["state_dict"][averages[3]][0] += 1
    assert seal_of(checkpoint, run.method.mechanism.key) != checkpoint["seal"]
    run.method.load_state_dict(checkpoint["state_dict"], strict=False)
    assert run.method._fingerprint() == weights == run.method.weights == checkpoint["weights"]


def test_in_bf16_it_is_kept_in_float32():
    """Steps of 1 % of a bf16 number are lost in bf16."""
    weights, average = {"w": torch.ones(3, dtype=torch.bfloat16)}, ExponentialAverage(0.99)
    average.follow(weights)
    average.update(weights)
    weights["w"].mul_(1.25)
    for _ in range(3):
        average.update(weights)
    (found,) = average.averaged.module.parameters()
    torch.testing.assert_close(found.detach(), torch.full((3,), 1.25 - 0.25 * 0.99**3))


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan, "much"])
def test_decay_out_of_range(decay):
    with pytest.raises(UserError, match=r"0 <= method\.average\.decay="):
        ExponentialAverage(decay)


# ---- optimizers that train at one point and are scored at another


class TwoPoints(torch.optim.SGD):
    """Scored at a third of the weights that it trains: to go there and back rounds."""

    training = False

    def eval(self):
        self._scale(1 / 3)

    def train(self):
        if not self.training:
            self.training = True
        else:
            self._scale(3)

    @torch.no_grad()
    def _scale(self, factor):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(factor)


def test_scored_at_the_other_point_and_back_to_the_bit():
    weight = nn.Parameter(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    optimizer, before = make_optimizer(TwoPoints, [{"params": [weight], "lr": 0.1}], 0.1), weight.detach().clone()
    assert optimizer.training
    with weights_to_publish({"w": weight}, optimizer, None):
        assert torch.equal(weight, before * (1 / 3))
    assert torch.equal(weight, before)
    assert not torch.equal(before * (1 / 3) * 3, before)


def test_two_points_are_refused_with_an_average_and_with_phases(make_run, plans):
    run = make_run(plans(), optimizer=TwoPoints, average=ExponentialAverage())
    with pytest.raises(UserError, match=r"averages the weights already: leave method\.average=null"):
        run.fit()
    with pytest.raises(UserError, match="this plan has 2 phases"):
        make_optimizer(TwoPoints, [{"params": [nn.Parameter(torch.ones(1))]}], 0.1, phases=2)


@pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="no schedulefree")
@pytest.mark.parametrize("over", [False, True], ids=["in training", "over"])
def test_schedule_free_is_scored_at_its_average(over, make_run, plans, tmp_path):
    """What is published is x, which y = 0.1 z + 0.9 x gives; also of a run that is over, from its checkpoint alone."""
    import schedulefree

    def make():
        optimizer = partial(schedulefree.AdamWScheduleFree, betas=(0.9, 0.999))
        return make_run(plans(), "biases", optimizer=optimizer, schedule="constant")

    run = make()
    trainer = run.fit()
    expected = {name: (p.detach() - 0.1 * run.method.made.state[p]["z"]) / 0.9 for name, p in run.method.trainable.items()}
    if over:
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        run, checkpoint = make(), torch.load(tmp_path / "last.ckpt", weights_only=True)
        run.method.on_load_checkpoint(checkpoint)
        run.method.load_state_dict(checkpoint["state_dict"], strict=False)
    found = published(run.method)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
        assert not torch.equal(value, run.method.trainable[name])
