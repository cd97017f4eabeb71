"""Runs without privacy against an ordinary training loop that is written here, over the same draws."""

import math

import pytest
import torch
import torch.nn.functional as F


def plain_loop(run, model, names, plan, lr, schedule):
    """torch.optim.AdamW on losses.sum() / B, row by row, by autograd; knows nothing of engines, micro-batches or plans'
    bookkeeping but their public numbers. Returns the weights after each release."""
    trained = [p for name, p in model.named_parameters() if name in names]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, foreach=False)
    after = []
    for release in range(plan.steps):
        loss = torch.zeros((), dtype=torch.float64)
        for index in run.draws(release):
            row = run.batches.rows[int(index)]
            logits = model(input_ids=torch.from_numpy(row["ids"])[None]).logits
            loss = loss + F.cross_entropy(logits[0], torch.tensor(row["label"]))
        optimizer.zero_grad()
        (loss / plan.batch_size).backward()
        if schedule == "linear":
            optimizer.param_groups[0]["lr"] = lr * (1 - release / plan.steps)
        optimizer.step()
        after.append({name: model.get_parameter(name).detach().clone() for name in names})
    return after


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("trainable", ["all", "biases"])
def test_twin_is_torch_optim_on_the_same_draws(trainable, schedule, make_run, plans):
    """PRIVACY lines 3, 5 and 11: dp_full and dp_bitfit at eps=inf after every one of five releases, float64, 1e-10."""
    plan = plans(private=False)
    run = make_run(plan, trainable, microbatch_size=3, schedule=schedule)
    other = make_run(plan, trainable).method.model
    expected = plain_loop(run, other, list(run.method.trainable), plan, 1e-2, schedule)
    run.fit()
    assert len({sum(sizes) for sizes in run.recorder.sizes}) > 1  # realised batches differ; the divisor does not
    assert len(run.recorder.weights) == plan.steps == 5
    for found, wanted in zip(run.recorder.weights, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert run.method.mechanism.plan.clip_norm == math.inf


def test_twin_leaves_the_frozen_part_alone(make_run, plans):
    run = make_run(plans(private=False), "biases")
    before = {name: value.clone() for name, value in run.method.model.state_dict().items()}
    run.fit()
    changed = {k for k, value in run.method.model.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == set(run.method.trainable)
