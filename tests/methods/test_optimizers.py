"""Optimizers in real runs: any of torch.optim goes on from a checkpoint as if nothing had been; DP-AdamBC by hand."""

import importlib.util
import math
from functools import partial

import pytest
import torch
from torch import nn

from privzoo.errors import UserError
from privzoo.methods.contents import seal_of
from privzoo.methods.dp_adam import DPAdamBC
from privzoo.methods.optimizers import make_optimizer, refuse_by_shape, refuse_on_parts
from privzoo.privacy.clipping import AdaptiveClip
from privzoo.privacy.plan import Phase, PrivacyPlan


def foreign(name, **options):
    """A class of a package that may be absent."""
    module, _, attribute = name.rpartition(".")
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return pytest.param(None, id=attribute, marks=pytest.mark.skip(reason=f"no {module}"))
    return pytest.param(partial(getattr(importlib.import_module(module), attribute), **options), id=attribute)


FIRST = ("SGD", "AdamW", "Adafactor")
OPTIMIZERS = [
    *(
        pytest.param(
            partial(getattr(torch.optim, name), **options), id=name, marks=[] if name in FIRST else pytest.mark.sweep
        )
        for name, options in {
            "SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {"fused": True}, "NAdam": {}, "RAdam": {}, "Adagrad": {},
            "Adadelta": {}, "Adamax": {}, "RMSprop": {"centered": True}, "Rprop": {}, "ASGD": {}, "Adafactor": {},
        }.items()
    ),
    pytest.param(DPAdamBC, id="DPAdamBC"),
    foreign("bitsandbytes.optim.AdamW8bit", min_8bit_size=16),
    foreign("bitsandbytes.optim.PagedAdamW8bit", min_8bit_size=16),
    foreign("schedulefree.AdamWScheduleFree"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (partial(torch.optim.AdamW, fused=True), None),
        (partial(torch.optim.SGD, momentum=0.9), None),
        (DPAdamBC, None),
        (torch.optim.Adafactor, "Adafactor looks at the shape"),
        (torch.optim.Muon, "cannot be made"),
    ],
)
def test_what_looks_at_shapes_is_refused_where_ranks_hold_flat_ranges(make, refused):
    if refused is None:
        refuse_by_shape(make, 0.1)
        return
    with pytest.raises(UserError, match=refused):
        refuse_by_shape(make, 0.1)


def test_what_cannot_step_a_part_is_refused():
    """As 8-bit optimizers cannot, whose kernels know nothing of dealt-out tensors (tests/test_launch.py has a real one)."""

    class Kernel(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("got mixed tensors")

    refuse_on_parts(torch.optim.AdamW, 0.1, nn.Parameter(torch.zeros(4)))
    with pytest.raises(UserError, match=r"Kernel cannot step what trainer.strategy deals out \(got mixed tensors\)"):
        refuse_on_parts(Kernel, 0.1, nn.Parameter(torch.zeros(4)))


def float32_run(make_run, plan, **options):
    return make_run(plan, "biases", model=make_run(plan).method.model.float(), **options)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_trains_and_goes_on_from_a_checkpoint(optimizer, make_run, plans, tmp_path):
    """PRIVACY lines 16 and 35: every tensor moved, and weights after a resume are bit-equal; the seal holds."""
    straight = float32_run(make_run, plans(), optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in straight.method.trainable.items()}
    straight.fit_and_save(2, tmp_path / "last.ckpt")
    assert len(straight.recorder.weights) == 5
    end = straight.recorder.weights[-1]
    assert all(torch.isfinite(value).all() and not torch.equal(value, before[name]) for name, value in end.items())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["seal"] == seal_of(checkpoint, straight.method.mechanism.key)
    resumed = float32_run(make_run, plans(), optimizer=optimizer)
    resumed.fit(2, tmp_path / "last.ckpt")
    assert len(resumed.recorder.weights) == 3
    assert all(torch.equal(value, end[name]) for name, value in resumed.recorder.weights[-1].items())


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [p for p in OPTIMIZERS if p.id and p.id.endswith("8bit")])
def test_8_bit_states_on_a_gpu(optimizer, make_run, plans):
    run = float32_run(make_run, plans(), optimizer=optimizer)
    run.fit(accelerator="gpu")
    assert all(torch.isfinite(value).all() for value in run.recorder.weights[-1].values())


def test_the_seal_covers_numbers_of_the_optimizer(make_run, plans, tmp_path):
    """PRIVACY line 35: steps and the like that are no tensors."""
    run = make_run(plans(epochs=0.4), "biases", optimizer=DPAdamBC)
    run.fit().save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"][0]
    assert state["step"] == 2
    state["step"] = 3
    assert seal_of(checkpoint, run.method.mechanism.key) != checkpoint["seal"]


class Wants(torch.optim.SGD):
    def step(self, closure):
        return closure()


def parameters():
    return [{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1}]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (torch.optim.LBFGS, "LBFGS evaluates the loss again within a step"),
        (Wants, "Wants evaluates the loss again"),
        (torch.optim.SparseAdam, "SparseAdam takes sparse gradients"),
        (partial(torch.optim.Adam, betas=(2.0, 0.9)), r"cannot be made \(Invalid beta"),
        (partial(torch.optim.SGD, speed=3), r"cannot be made \(.*speed"),
        (partial(DPAdamBC, floor=0.0), r"cannot be made \(Expected eps=1e-08 >= 0, floor=0"),
        (partial(DPAdamBC, betas=(0.9, 1.0)), r"cannot be made \(Expected betas"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make_optimizer(make, parameters(), 0.1)


def test_refused_within_a_run_before_the_first_release(make_run, plans):
    run = make_run(plans(), optimizer=torch.optim.LBFGS)
    with pytest.raises(UserError, match="optimizer cannot be made"):
        run.fit()
    assert run.method.mechanism.draws == 0


# ---- DP-AdamBC


@pytest.mark.parametrize(("weight_decay", "other"), [(0.0, torch.optim.Adam), (0.1, torch.optim.AdamW)])
def test_without_noise_it_is_adam(weight_decay, other):
    """Against torch.optim, 30 steps over gradients of very different sizes, in float64."""
    generator, found = torch.Generator().manual_seed(0), []
    gradients = torch.randn(30, 50, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-6, 4).repeat(5)
    for make in (DPAdamBC, other):
        weight = nn.Parameter(torch.ones(50, dtype=torch.float64))
        optimizer = make([weight], lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_two_steps_by_hand():
    """betas (0.5, 0.5), eps 0. Step 1: g = 3, s = 1: m = 3, v = 9, less 1: 3 / sqrt(8). Step 2: g = 1, s = 2:
    m = 1.25 / 0.75, v = (0.25 * 9 + 0.5) / 0.75 - 0.25 * 1 / 0.75 - 0.5 * 4 / 0.75 = 0.5 / 0.75."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DPAdamBC([weight], lr=1.0, betas=(0.5, 0.5), eps=0.0, floor=1e-9)
    expected = 0.0
    for gradient, noise_std, move in (
        (3.0, 1.0, 3 / math.sqrt(8)),
        (1.0, 2.0, (0.75 + 0.5) / 0.75 / math.sqrt((2.25 + 0.5 - 0.25 - 2.0) / 0.75)),
    ):
        optimizer.param_groups[0]["noise_std"] = noise_std
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        expected -= move
        assert weight.item() == pytest.approx(expected, rel=1e-12)


def test_the_floor_by_hand():
    """g = 1, s = 2: v - s^2 = -3, so 0.25 s^2 = 1 in its place; the step is 1."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DPAdamBC([weight], lr=1.0, eps=0.0, floor=0.25)
    optimizer.param_groups[0]["noise_std"] = 2.0
    weight.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(-1.0)


def test_what_is_left_of_the_second_moment_is_the_signals():
    """400 coordinates with g = 0.5 under noise of s = 1: Adam's v is 1.25, the corrected one 0.25."""
    weight = nn.Parameter(torch.zeros(400, dtype=torch.float64))
    optimizer = DPAdamBC([weight], lr=0.0, betas=(0.9, 0.99))
    optimizer.param_groups[0]["noise_std"] = 1.0
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        weight.grad = 0.5 + torch.randn(400, generator=generator, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[weight]
    correction = 1 - 0.99 ** state["step"]
    assert float(state["exp_avg_sq"].mean()) / correction == pytest.approx(1.25, abs=0.05)
    assert (float(state["exp_avg_sq"].mean()) - state["noise_square"]) / correction == pytest.approx(0.25, abs=0.05)


class Told(DPAdamBC):
    """Records the noise that each group is told."""

    seen: list

    def step(self, closure=None):
        self.seen.append([group["noise_std"] for group in self.param_groups])
        return super().step(closure)


def told(make_run, plan, **options):
    class Recording(Told):
        seen = []  # noqa: RUF012

    run = make_run(plan, optimizer=Recording, head_lr_factor=2.0, **options)
    run.fit()
    return Recording.seen, run


def test_the_method_tells_it_the_noise_on_the_mean(make_run, plans):
    """sigma C / B = 1 * 0.5 / 8, for the head, too; 0 without privacy."""
    assert told(make_run, plans())[0] == [[0.0625, 0.0625]] * 5
    assert told(make_run, plans(private=False))[0] == [[0.0, 0.0]] * 5


def test_it_is_told_the_noise_of_the_clip_norm_that_adapts(make_run, plans):
    """sigma_g C_t / B of this release's C_t, not of the next one's."""
    seen, run = told(make_run, plans(), adaptive=AdaptiveClip(count_noise=1.0))
    first = math.sqrt(4 / 3) * 0.5 / 8
    assert seen[0] == pytest.approx([first, first])
    assert len({each[0] for each in seen}) == 5
    assert seen[-1][0] != pytest.approx(first * float(run.method.adaptive.scale), rel=1e-4)


def test_it_is_told_the_noise_of_the_phase(make_run):
    plan = PrivacyPlan(
        num_examples=40, batch_size=8, epochs=0.2, delta=1e-3, noise_multiplier=1.0, clip_norm=0.5,
        then=(Phase(16, 0.4, 0.25, 2.0),),
    )  # fmt: skip
    assert told(make_run, plan, phases=[{"trainable": "biases"}, {"trainable": "all"}])[0] == [
        [0.0625, 0.0625],
        [0.03125, 0.03125],
    ]
