"""Adaptive clipping in a run: releases by hand, what one example moves, and what a checkpoint holds."""

import math

import pytest
import torch

from privzoo.errors import UserError
from privzoo.methods.contents import seal_of
from privzoo.privacy.clipping import AdaptiveClip
from privzoo.privacy.clipping.adaptive import COUNT
from privzoo.privacy.noise import NoiseMechanism, fingerprint
from privzoo.privacy.plan import Phase, PrivacyPlan
from privzoo.privacy.sampling import LogicalBatch
from privzoo.privacy.streams import RunKey

PARTS = [{"trainable": "biases"}, {"trainable": "all"}]


def phases(second_noise=1.0):
    return PrivacyPlan(
        num_examples=40, batch_size=8, epochs=0.4, delta=1e-3, noise_multiplier=1.0, clip_norm=0.5,
        then=(Phase(8, 0.4, 0.25, second_noise),),
    )  # fmt: skip


def test_every_phase_is_checked(make_run):
    plan = phases(4.0)
    with pytest.raises(UserError, match="noise_multiplier / 2 = 2"):
        make_run(plan, phases=PARTS, adaptive=AdaptiveClip(count_noise=1.0))
    make_run(plan, phases=PARTS, adaptive=AdaptiveClip(count_noise=2.1))


def test_card_and_curves_say_what_it_does(make_run, plans):
    """The curve holds the C_t that a release was clipped to: made of former releases, hence public."""
    run, used = make_run(plans(), adaptive=AdaptiveClip(quantile=0.9, count_noise=1.0)), []
    query = run.method.query

    def watched(batch):
        used.append(run.method.adaptive.clip_norm(run.method.mechanism.plan.at(batch.release)))
        sums = query(batch)
        assert run.method.public_metrics == {"clip_norm": used[-1]}
        return sums

    run.method.query = watched
    run.fit()
    assert len(set(used)) == len(used) > 1
    assert run.method.public_metrics == {"clip_norm": used[-1]}
    assert "C_t, and 1/2 or -1/2 to a count, both accounted as one release" in run.method.contribution
    assert "quantile 0.9 of the norms" in run.method.contribution
    twin = make_run(plans(private=False), adaptive=AdaptiveClip())
    twin.fit()
    assert twin.method.public_metrics == {}, "its clip norm is infinite"
    plain = make_run(plans()).method
    assert plain.public_metrics == {}
    assert plain.contribution == "a gradient, scaled as a whole by Flat() to a norm of at most clip_norm"


def test_a_new_phase_begins_at_its_own_clip_norm(make_run):
    """Two releases at C = 0.5, two at C = 0.25: C_2 = 0.25 whatever C_1 was."""
    run = make_run(phases(), phases=PARTS, adaptive=AdaptiveClip(count_noise=1.0))
    seen, engine = [], run.method.engine

    def watched(forward, clip_norm, unit_of_row, into):
        seen.append(clip_norm)
        return engine(forward, clip_norm, unit_of_row, into)

    run.method.engine = watched
    run.fit()
    assert len(seen) == 4
    assert seen[0] == 0.5
    assert seen[2] == 0.25
    assert seen[1] != 0.5
    assert seen[3] not in (0.25, seen[1])


def test_releases_by_hand(make_run, plans):
    """Gradients and count row by row at the weights of the run, clipped to a C_t of our own, with noise of the two stds."""
    plan = plans(clip_norm=3.0)
    run = make_run(plan, optimizer=torch.optim.SGD, lr=0.1, schedule="constant", adaptive=AdaptiveClip(count_noise=1.0))
    model, adaptive, lengths = make_run(plan).method.model, AdaptiveClip(count_noise=1.0), []
    trained, task = dict(model.named_parameters()), run.method.task
    run.fit()
    for release, after in enumerate(run.recorder.weights):
        setting, clip_norm = plan.at(release), 3.0 * float(adaptive.scale)
        sums, count = {name: torch.zeros_like(p) for name, p in trained.items()}, torch.zeros(1)
        for index in run.draws(release):
            loss = task.losses(model, task.collate([run.batches.rows[int(index)]])).sum()
            own = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
            lengths.append(math.sqrt(sum(float(value.square().sum()) for value in own.values())))
            count += 0.5 if lengths[-1] <= clip_norm else -0.5
            for name, value in own.items():
                sums[name] += value * min(1.0, clip_norm / lengths[-1])
        mechanism, at = NoiseMechanism(plan, RunKey.for_tests(0), "digest"), fingerprint_of(trained, adaptive.scale)
        for name, total in sums.items():
            mechanism._add_noise(total, math.sqrt(4 / 3) * clip_norm, release, at, name)
        mechanism._add_noise(count, 1.0, release, at, COUNT)
        for name, parameter in trained.items():
            torch.testing.assert_close(after[name], parameter - 0.1 * sums[name] / 8, rtol=0, atol=1e-10)
            parameter.data.copy_(after[name])
        adaptive.update(count, setting)
    assert torch.equal(run.method.adaptive.scale, adaptive.scale)
    assert adaptive.scale != 1
    assert min(lengths) < clip_norm < max(lengths)


def fingerprint_of(trained, scale):
    return fingerprint([*trained.items(), ("adaptive.scale", scale)])


def test_one_example_moves_both_sums_by_no_more_than_their_sensitivity(make_run, plans):
    """PRIVACY line 5: gradients by at most C_t, the count by 1/2; so both, each in its noise, by at most 1 / sigma."""
    run = make_run(plans(), adaptive=AdaptiveClip(count_noise=1.0))
    method, task = run.method, run.method.task
    method.adaptive.scale.fill_(3.0)
    rows = [{**row, "strength": 10.0 ** (i % 9 - 4)} for i, row in enumerate(run.batches.rows)]
    whole = method.query(LogicalBatch(1, (task.collate(rows[:12]), task.collate(rows[12:20]))))
    gradients, count = method.parts(1)
    assert gradients.sensitivity == 1.5
    for left_out in range(10):
        rest = [row for i, row in enumerate(rows[:20]) if i != left_out]
        without = method.query(LogicalBatch(1, (task.collate(rest),)))
        moved = math.sqrt(sum(float((whole[name] - without[name]).square().sum()) for name in gradients.names))
        assert 0 < moved <= gradients.sensitivity * (1 + 1e-6)
        assert abs(float(whole[COUNT] - without[COUNT])) == 0.5
        joint = (moved / gradients.noise_std) ** 2 + (0.5 / count.noise_std) ** 2
        assert joint <= 1.0 * (1 + 1e-6)
    assert set(gradients.names) | set(count.names) == whole.keys()


def test_without_privacy_it_does_nothing(make_run, plans):
    """eps=inf: no clipping and no noise, so the twin is that of a fixed clip norm."""
    found = []
    for adaptive in (None, AdaptiveClip()):
        run = make_run(plans(private=False), adaptive=adaptive)
        run.fit()
        found.append(run.recorder.weights[-1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_the_clip_norm_lies_in_the_checkpoint_and_keys_the_noise(make_run, plans, tmp_path):
    """PRIVACY line 35: sealed, and part of what tells one release from another."""
    run = make_run(plans(), adaptive=AdaptiveClip(count_noise=1.0))
    run.fit().save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["adaptive.scale"] == run.method.adaptive.scale != 1
    seal = seal_of(checkpoint, run.method.mechanism.key)
    assert checkpoint["seal"] == seal
    before = run.method._fingerprint()
    assert before == run.method.weights == fingerprint_of(run.method.trainable, run.method.adaptive.scale)
    assert checkpoint["weights"] == before
    assert seal_of(checkpoint | {"weights": "of another release"}, run.method.mechanism.key) != seal
    checkpoint["state_dict"]["adaptive.scale"] += 1e-6
    assert seal_of(checkpoint, run.method.mechanism.key) != seal
    run.method.load_state_dict(checkpoint["state_dict"], strict=False)
    assert run.method._fingerprint() != before
    del checkpoint["state_dict"]["adaptive.scale"]
    with pytest.raises(UserError, match="resume with the run's own configuration"):
        run.method.on_load_checkpoint(checkpoint)
