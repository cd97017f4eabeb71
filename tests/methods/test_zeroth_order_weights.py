"""DPZero: weights while losses are taken and after, resume, options and pre-flight."""

import math

import pytest
import torch

from privzoo.errors import UserError
from privzoo.methods.base import Interrupted
from privzoo.methods.contents import seal_of
from privzoo.methods.directions import Direction, SeededSGD
from privzoo.privacy.callback import PrivacyCallback
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.noise import fingerprint
from privzoo.privacy.sampling import LogicalBatch


def batch_of(run, rows):
    return LogicalBatch(0, (run.method.task.collate(rows),))


# ---- weights


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sphere"])
def test_only_what_is_trained_moves(kind, make_walk, plans):
    """PRIVACY line 16: biases and head move in five releases, the rest and every buffer are bit-equal; no gradient."""
    run = make_walk(plans(), "biases", direction_kind=kind)
    before = {name: value.clone() for name, value in run.method.model.state_dict().items()}
    run.fit()
    moved = {name for name, value in run.method.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith("bias")} | {"classifier.weight"}
    assert all(p.grad is None for p in run.method.model.parameters())
    assert not run.method.walker.state


def test_float32_weights_come_back_to_within_rounding(make_walk, plans):
    """PRIVACY line 32: 20 queries with Rademacher directions: below 1e-7 for weights below 2, and not more in the end than
    after the first."""
    run = make_walk(plans(), direction_kind="rademacher")
    run.method.model.float()
    batch = batch_of(run, run.batches.rows[:2])
    before, drift = {name: p.detach().clone() for name, p in run.method.trainable.items()}, []
    for release in range(20):
        run.method.weights = str(release)
        run.method.query(batch)
        drift.append(max(float((p.detach() - before[name]).abs().max()) for name, p in run.method.trainable.items()))
    assert max(float(value.abs().max()) for value in before.values()) < 2 - 1e-3
    assert 0 < drift[0] <= drift[-1] <= 6e-8


def test_an_empty_draw_rounds_weights_as_any_other(make_walk, plans):
    """PRIVACY line 19: float32 weights that had not gone there and back would tell exactly which draws were empty."""
    after = []
    for number in (0, 2):
        run = make_walk(plans(), direction_kind="rademacher", directions=2)
        run.method.model.float()
        before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
        run.method.query(batch_of(run, run.batches.rows[:number]) if number else LogicalBatch(0, ()))
        assert any(not torch.equal(p, before[name]) for name, p in run.method.trainable.items())
        after.append({name: p.detach().clone() for name, p in run.method.trainable.items()})
    assert all(torch.equal(value, after[1][name]) for name, value in after[0].items())


def test_bfloat16_weights_come_back_bit_by_bit(make_walk, plans):
    """PRIVACY line 32, with the update of a release on a float32 copy that is exact to a millionth."""
    run = make_walk(plans(epochs=0.2), lr=1e-6)
    run.method.model.bfloat16()
    before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
    first = run.method.query(run.batches[0])["directions"]
    assert float(first.abs()) > 0
    assert all(torch.equal(p, before[name]) for name, p in run.method.trainable.items())
    run.fit()
    exact = run.method.exact
    assert all(value.dtype == torch.float32 for value in exact.values())
    moves = torch.cat([(exact[name] - value.float()).flatten() for name, value in before.items()])
    assert 0 < float(moves.abs().max()) < 1e-5
    assert (moves != 0).float().mean() > 0.5


def test_small_updates_of_bfloat16_weights_count_as_moved(make_walk, plans, tmp_path):
    """PRIVACY line 16: after releases of a millionth no bit of a bfloat16 weight need have changed, but its copy has."""
    plan = plans()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        run = make_walk(plan, lr=1e-5)
        run.method.model.bfloat16()
        torch.nn.init.ones_(run.method.model.classifier.bias)
        assert run.fit(callbacks=[PrivacyCallback(plan, ledger, "digest")]).global_step == 5
    assert torch.equal(run.method.model.classifier.bias, torch.ones(3, dtype=torch.bfloat16))


def test_losses_are_taken_without_a_graph(make_walk, plans):
    """A graph would keep every activation: the memory of training, not of inference."""
    run = make_walk(plans())
    losses, seen = run.method.task.losses, []

    def noticing(model, batch):
        seen.append(torch.is_grad_enabled())
        return losses(model, batch)

    run.method.task.losses = noticing
    run.method.query(batch_of(run, run.batches.rows[:2]))
    assert seen == [False, False]


def test_weights_are_whole_after_an_error_in_a_forward(make_walk, plans):
    run = make_walk(plans(), microbatch_size=2)
    before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
    losses, calls = run.method.task.losses, []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return losses(model, batch)

    run.method.task.losses = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit()
    assert run.method.mechanism.draws == 0
    for name, p in run.method.trainable.items():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-15)


def test_a_stop_comes_before_the_weights_are_moved(make_walk, plans):
    """A stop that is asked for during a release waits for its end; the next one is not begun, and weights, their
    fingerprint and the checkpoint are those after the first."""
    run = make_walk(plans(batch_size=20), microbatch_size=2)
    losses = run.method.task.losses

    def stopping(model, batch):
        run.method.stop_requested = True
        return losses(model, batch)

    run.method.task.losses = stopping
    with pytest.raises(Interrupted):
        run.fit()
    assert len(run.recorder.weights) == run.method.mechanism.draws == 1
    assert all(torch.equal(p, run.recorder.weights[0][name]) for name, p in run.method.trainable.items())
    assert run.method.weights == fingerprint(run.method.trainable.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_makes_the_same_weights(dtype, make_walk, plans, tmp_path):
    """From a checkpoint after two of five releases, with one lost release made again; the float32 copy is under the seal."""
    trained = {}
    for name in ("straight", "resumed"):
        run = make_walk(plans(), lr=1e-3)
        run.method.model.to(dtype)
        if name == "straight":
            saving = run.recorder.on_train_batch_end

            def save(trainer, method, outputs, batch, index, saving=saving):
                saving(trainer, method, outputs, batch, index)
                if trainer.global_step == 2:
                    trainer.save_checkpoint(tmp_path / "two.ckpt")

            run.recorder.on_train_batch_end = save
            run.fit()
        else:
            run.fit(2, tmp_path / "two.ckpt")
        trained[name] = run.recorder.weights[-1], {n: v.clone() for n, v in run.method.exact.items()}
    assert len(run.recorder.weights) == 3
    for straight, resumed in zip(*trained.values(), strict=True):
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    checkpoint = torch.load(tmp_path / "two.ckpt", weights_only=False)
    key = run.method.mechanism.key
    assert checkpoint["seal"] == seal_of(checkpoint, key)
    state = checkpoint["optimizer_states"][0]["state"]
    assert len(state) == (len(run.method.trainable) if dtype == torch.bfloat16 else 0)
    if state:
        state[0]["exact"].add_(1e-6)
        assert checkpoint["seal"] != seal_of(checkpoint, key)


def test_the_noise_is_keyed_by_the_float32_copies_of_bfloat16_weights(make_walk, plans, tmp_path):
    """PRIVACY line 35: two states of which the weights round alike are two states."""
    run = make_walk(plans(), lr=1e-3)
    run.method.model.bfloat16()
    run.fit().save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    before = run.method._fingerprint()
    assert before == run.method.weights == checkpoint["weights"]
    parameter = run.method.walker.param_groups[0]["params"][1]
    run.method.walker.exact(parameter).mul_(1 + 1e-6)
    assert before != run.method._fingerprint()


# ---- options and pre-flight


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"smoothing": 0.0}, "smoothing=0.0 to be a number above 0"),
        ({"smoothing": math.inf}, "smoothing=inf to be a number above 0"),
        ({"smoothing": "some"}, "smoothing=some to be a number above 0"),
        ({"directions": 0}, "directions=0 to be a whole number"),
        ({"directions": 1.5}, r"directions=1\.5 to be a whole number"),
        ({"direction_kind": "laplace"}, "direction_kind=laplace to be one of rademacher, normal, sphere"),
    ],
)
def test_options_out_of_range(options, sentence, make_walk, plans):
    with pytest.raises(UserError, match=sentence):
        make_walk(plans(), **options)


def test_an_optimizer_that_wants_gradients_is_refused(make_walk, plans):
    run = make_walk(plans(), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"to be privzoo\.methods\.directions\.SeededSGD, found SGD"):
        run.method.preflight(run.batches.rows)
    assert isinstance(make_walk(plans()).method.walker, SeededSGD)


def test_preflight_looks_at_losses(make_walk, plans):
    """PRIVACY lines 7 and 29: a mean over the batch is found before the first release; a right task leaves no trace."""
    run = make_walk(plans())
    before = {name: value.clone() for name, value in run.method.model.state_dict().items()}
    run.method.preflight(run.batches.rows)
    assert all(torch.equal(value, before[name]) for name, value in run.method.model.state_dict().items())
    losses = run.method.task.losses
    run.method.task.losses = lambda model, batch: losses(model, batch) - losses(model, batch).mean()
    with pytest.raises(UserError, match="examples influence one another"):
        run.method.preflight(run.batches.rows)


def test_preflight_knows_what_rounding_does_to_slopes(make_walk, plans):
    """A loss that is off by 1e-5 beside others moves a slope by 0.01 at lambda = 1e-3, and 16 of them by 0.16: too much for
    C = 0.5, not for 50."""

    def preflight(**options):
        run = make_walk(**options)
        run.method.model.float()
        losses = run.method.task.losses
        run.method.task.losses = lambda model, batch: losses(model, batch) + 1e-5 * (len(batch["labels"]) > 1)
        run.method.preflight(run.batches.rows)

    with pytest.raises(UserError, match="rounding moves a row's loss by"):
        preflight(plan=plans())
    preflight(plan=plans(clip_norm=50.0))
    preflight(plan=plans(), smoothing=1e-1)
    preflight(plan=plans(private=False))


def test_rounding_under_autocast_is_seen_before_the_first_release(make_walk, plans):
    """float32 passes the pre-flight, which knows no Trainer; losses off by 1e-3 are too coarse for C = 0.5."""

    def coarse(model, batch):
        shift = 1e-3 * (len(batch["labels"]) > 1) * torch.is_autocast_enabled("cpu")
        return losses(model, batch).float() + shift

    for clip_norm in (0.5, 1000.0):
        run = make_walk(plans(clip_norm=clip_norm), lr=1e-6)
        run.method.model.float()
        losses, run.method.task.losses = run.method.task.losses, coarse
        run.method.preflight(run.batches.rows)
        if clip_norm == 0.5:
            with pytest.raises(UserError, match="rounding moves a row's loss by"):
                run.fit(precision="bf16-mixed")
            assert run.method.mechanism.draws == 0
        else:
            before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
            assert run.fit(precision="bf16-mixed").global_step == 5
            assert not any(torch.equal(p, before[name]) for name, p in run.method.trainable.items())


def test_losses_that_are_not_one_a_row(make_walk, plans):
    run = make_walk(plans())
    losses = run.method.task.losses
    run.method.task.losses = lambda model, batch: losses(model, batch).mean()
    with pytest.raises(UserError, match="one loss a row"):
        run.method.query(batch_of(run, run.batches.rows[:3]))


def test_a_direction_runs_along_the_phase_alone(make_walk, plans):
    """What rests in a phase is not moved while losses are taken."""
    run = make_walk(plans())
    method = run.method
    biases = tuple(name for name in method.trainable if name.endswith("bias"))
    method.trained_in = [biases, tuple(method.trainable)]
    for number, names in enumerate(method.trained_in):
        method.start_phase(number)
        (direction,) = method._directions(0)
        assert isinstance(direction, Direction)
        assert tuple(direction.parameters) == names
