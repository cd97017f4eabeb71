"""Models that would break the promise are refused before the first release; models that are right pass."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from privzoo.errors import UserError
from privzoo.preparing import rows_to_try
from privzoo.privacy.clipping import BookKeeping, Loop
from privzoo.privacy.clipping.layouts import Layouts
from privzoo.privacy.coupling import refuse_coupling_modules
from privzoo.privacy.preflight import check_engine, check_losses

ENGINES = [BookKeeping, Loop]
T, E = 4, 6  # as many positions as rows are compared: a wrong axis has the right size
ROWS = [torch.randn(T, E, generator=torch.Generator().manual_seed(i)) for i in range(6)]


class Net(nn.Module):
    """`use(net, x)` between two linear layers; x and the result are (R, T, E)."""

    def __init__(self, use=lambda net, x: x, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(E, E), nn.Linear(E, 1)
        self.use = use
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.last(self.use(self, self.first(x)).tanh()).flatten(1).sin().sum(1)


def check(model, engine=BookKeeping, rows=ROWS, losses=None, clip_norm=0.5):
    losses = losses or (lambda batch: model(batch["x"]))
    check_engine(engine(model), model, losses, rows, lambda rows: {"x": torch.stack(rows)}, clip_norm)


RIGHT = {
    "plain": Net,
    "layer norm": lambda: Net(lambda net, x: net.norm(x), norm=nn.LayerNorm(E)),
    "position table": lambda: Net(lambda net, x: x + net.table(torch.arange(T)), table=nn.Embedding(T, E)),
    "attention over positions": lambda: Net(lambda net, x: F.scaled_dot_product_attention(x, x, x)),
    "frozen attention module": lambda: Net(
        lambda net, x: net.a(x, x, x)[0], a=nn.MultiheadAttention(E, 2, batch_first=True).requires_grad_(False)
    ),
    "starts from zero": lambda: Net(lambda net, x: x * net.gate, gate=nn.Parameter(torch.zeros(E))),
    "constant buffer": lambda: Net(lambda net, x: x * net.mask, mask=nn.Buffer(torch.tril(torch.ones(T, E)))),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_passes_and_is_left_as_it_was(name, dtype, engine):
    model = RIGHT[name]().to(dtype).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refuse_coupling_modules(model)
    check(model, engine, [row.to(dtype) for row in ROWS])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def half_precision_base(stored):
    """A frozen layer that computes in bfloat16 under trained float32 layers; in "4 bits" it only says that it does so, as
    bitsandbytes' Linear4bit does."""
    frozen = nn.Linear(E, E).requires_grad_(False)
    if stored == "4 bits":
        frozen.compute_dtype = torch.bfloat16
        return Net(lambda net, x: net.frozen(x).bfloat16().float(), frozen=frozen)
    return Net(lambda net, x: net.frozen(x.to(stored)).float(), frozen=frozen.to(stored))


def rounded_where_alone(model):
    """Losses that are 1 % off where a row is alone: other shapes round otherwise."""
    return lambda batch: model(batch["x"]) * (1.01 if len(batch["x"]) == 1 else 1.0)


BASES = [torch.float32, torch.bfloat16, "4 bits"]


@pytest.mark.parametrize("base", BASES)
def test_rounding_is_allowed_by_the_coarsest_format_frozen_or_not(base):
    model = half_precision_base(base)
    check(model)
    if base == torch.float32:
        with pytest.raises(UserError, match="differ by"):
            check(model, losses=rounded_where_alone(model))
    else:
        check(model, losses=rounded_where_alone(model))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", ["norms", "sums", "losses"])
def test_beside_a_coarse_base_the_engine_is_held_to_the_trained_format(base, part):
    """PRIVACY lines 5 and 33: norms too small by 1 % are contributions of 1.01 C; the same shape rounds alike."""

    def make(model):
        engine = BookKeeping(model)

        def run(forward, **keywords):
            found = engine(forward, **keywords)
            for value in found.sums.values() if part == "sums" else [getattr(found, part)]:
                value.mul_(0.99)
            return found

        return run

    with pytest.raises(UserError, match="differ by"):
        check(half_precision_base(base), make)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("base", BASES)
def test_beside_a_coarse_base_rows_may_not_influence_one_another(base, engine):
    """PRIVACY line 7: a loss that is scaled by its neighbours moves by 1 %, which other shapes might round, too."""
    model = half_precision_base(base)

    def losses(batch):
        return model(batch["x"]) * (1 + 0.01 * batch["x"].sum(dim=(1, 2)).tanh().mean())

    with pytest.raises(UserError, match="differ by"):
        check(model, engine, losses=losses)


@pytest.mark.parametrize("engine", ENGINES)
def test_group_wise_clipping_passes(engine):
    """PRIVACY line 33: it is held against group-wise clipping by definition; flat clipping gives other sums."""
    check(Net(), partial(engine, groups="layer"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [1, 2])
def test_fewer_rows_than_are_compared(number, engine):
    check(Net(), engine, ROWS[:number])


COUPLING = {
    "batch norm": nn.BatchNorm1d(3),
    "frozen batch norm": nn.BatchNorm2d(3).requires_grad_(False),
    "batch norm in evaluation mode": nn.BatchNorm1d(3).eval(),
    "batch norm without weights": nn.BatchNorm1d(3, affine=False),
    "batch norm without statistics": nn.BatchNorm3d(3, track_running_stats=False),
    "synchronised batch norm": nn.SyncBatchNorm(3),
    "lazy batch norm": nn.LazyBatchNorm1d(),
    "instance norm with statistics": nn.InstanceNorm2d(3, track_running_stats=True),
}


@pytest.mark.parametrize("name", COUPLING)
def test_modules_that_mix_examples(name):
    """PRIVACY line 12: refused wherever they are, frozen or not, by their name and with the way out."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(COUPLING[name]))
    with pytest.raises(UserError, match=r"1\.0 is a .*Norm.*replace it by GroupNorm or LayerNorm"):
        refuse_coupling_modules(model)


@pytest.mark.parametrize("kind", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_of_other_kinds(kind):
    """PRIVACY line 28: their masks are not keyed by example, so they are off or refused."""
    refuse_coupling_modules(nn.Sequential(kind(0.0), nn.Dropout(0.1)))
    with pytest.raises(UserError, match=rf"0 is a {kind.__name__} with p=0\.1, whose masks"):
        refuse_coupling_modules(nn.Sequential(kind(0.1)))


def test_dropout_beside_gradient_checkpointing():
    """PRIVACY line 28: a layer that is computed again in the backward pass would have other masks."""
    model = nn.Sequential(nn.Dropout(0.1))
    model.gradient_checkpointing = True
    with pytest.raises(UserError, match=r"set trainer\.gradient_checkpointing=false, or model\.dropout"):
        refuse_coupling_modules(model)
    model[0].p = 0.0
    refuse_coupling_modules(model)


SMALL = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
         "num_key_value_heads": 1, "pad_token_id": 0, "initializer_range": 1.0}  # fmt: skip
TURNED = {
    "dynamic": lambda: hf.LlamaModel(
        hf.LlamaConfig(
            **SMALL,
            max_position_embeddings=8,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        )
    ),
    "longrope": lambda: hf.Phi3Model(
        hf.Phi3Config(
            **SMALL,
            max_position_embeddings=32,
            original_max_position_embeddings=8,
            rope_parameters={
                "rope_type": "longrope",
                "short_factor": [1.0, 1.0],
                "long_factor": [2.0, 2.0],
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 8,
            },
        )
    ),
}


@pytest.mark.parametrize("kind", TURNED)
def test_positions_that_change_with_the_longest_row(kind):
    """PRIVACY line 12: a row longer than the first ones would turn all others of its micro-batch by other angles."""
    model = TURNED[kind]().eval()
    rows = [torch.randint(1, 9, (1, n), generator=torch.Generator().manual_seed(n)) for n in (4, 12)]
    with torch.no_grad():
        alone = model(rows[0]).last_hidden_state
        beside = model(torch.cat([F.pad(rows[0], (0, 8)), rows[1]])).last_hidden_state[:1, :4]
    assert not torch.allclose(alone, beside, atol=1e-4)  # causal: the padding is not what moves it
    sentence = rf"rotary_emb turns all rows .* 8 positions \(rope_type {kind}\): .*max_length=8"
    for longest in (9, None):
        with pytest.raises(UserError, match=sentence):
            refuse_coupling_modules(model, longest)
    refuse_coupling_modules(model, 8)


def test_attention_that_changes_with_the_batch():
    """BigBird goes over to full attention for good at the first short batch."""
    options = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.BigBirdConfig(**options, max_position_embeddings=64, attention_type="block_sparse")
    with pytest.raises(UserError, match="set attention_type to original_full"):
        refuse_coupling_modules(hf.BigBirdModel(config))
    config.attention_type = "original_full"
    refuse_coupling_modules(hf.BigBirdModel(config))


@pytest.mark.parametrize("of", ["gradients", "losses"])
def test_weights_that_change_with_the_rows(of):
    """PRIVACY line 12: max_norm shortens the rows of a table that a batch looks up, in place and without noise."""
    table = nn.Embedding(T, E, max_norm=0.1)
    model = Net(lambda net, x: x + net.table(torch.arange(T)), table=table)
    checks = {
        "gradients": lambda: check(model, Loop),
        "losses": lambda: check_losses(model, lambda b: model(b["x"]), ROWS, lambda rows: {"x": torch.stack(rows)}),
    }
    with pytest.raises(UserError, match=r"table\.weight is changed by the rows that it sees"):
        checks[of]()


def test_a_long_row_far_behind_is_looked_at():
    """PRIVACY line 7: coupling through padding shows beside the longest row, wherever it stands."""
    rows = [3 + i % 5 for i in range(200)]
    rows[150] = 64
    task = SimpleNamespace(train=rows, by_length=lambda rows: sorted(range(len(rows)), key=lambda i: rows[i]))
    seen = rows_to_try(task)
    assert len(seen) == 4
    assert (seen[0], seen[-1]) == (3, 64)


def test_norms_within_an_example_pass():
    refuse_coupling_modules(nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3)))


def over_batch(net, x):
    """Attention whose positions are the rows: nn.MultiheadAttention fed as if batch_first were True."""
    x = x.transpose(0, 1)
    return F.scaled_dot_product_attention(x, x, x).transpose(0, 1)


def remembered(net, x):
    net.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
    return x


WRONG = {
    "subtracts the batch mean": lambda net, x: x - x.mean(0, keepdim=True),
    "subtracts a part of the batch mean, without gradient": lambda net, x: x - 0.05 * x.mean(0, keepdim=True).detach(),
    "attends over the batch": over_batch,
    "scales by the largest of the batch": lambda net, x: x / x.abs().max(),
    "passes rows on": lambda net, x: x.roll(1, 0),
    "depends on the number of rows": lambda net, x: x * len(x),
    "functional batch norm": lambda net, x: F.batch_norm(x.mT, None, None, training=True).mT,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WRONG)
def test_rows_that_influence_one_another(name, engine):
    """PRIVACY lines 5, 7 and 12: whatever couples rows shows against each row alone. What couples gradients BookKeeping
    refuses itself, by the parameter in front of it."""
    proof = "" if engine is Loop else r"|first\.weight: no axis of its output holds one example each"
    with pytest.raises(UserError, match=f"Pre-flight: .* differ by{proof}"):
        check(Net(WRONG[name]), engine)


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_influence_one_another_with_an_engine_that_proves_nothing(name):
    """PRIVACY lines 5, 7 and 12: the pre-flight does not rely on the engine's own refusals."""
    with pytest.raises(UserError, match=r"Pre-flight: .* differ by"):
        check(Net(WRONG[name]), Guessing)


def test_a_buffer_that_learns_from_the_data():
    """PRIVACY line 12: a running mean is private data in the saved model, without noise."""
    model = Net(remembered, mean=nn.Buffer(torch.zeros(E)))
    with pytest.raises(UserError, match="mean"):
        check(model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum], ids=["mean", "sum"])
def test_a_loss_of_the_whole_batch(reduce, engine):
    """PRIVACY line 7: what a model called with `labels=` gives."""
    model = Net()
    with pytest.raises(UserError, match="one loss a row"):
        check(model, engine, losses=lambda batch: reduce(model(batch["x"])))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_mean_in_disguise(engine):
    """PRIVACY line 7: one number a row, but each of them the mean."""
    model = Net()
    proof = "" if engine is Loop else r"|last\.weight: no axis of its output holds one example each"
    with pytest.raises(UserError, match=f"Pre-flight: .* differ by{proof}"):
        check(model, engine, losses=lambda batch: model(batch["x"]).mean().expand(len(batch["x"])))


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_of_another_number(engine):
    """PRIVACY line 33: a loss a part of a row, each of which the engine can tell from the others; and each loss twice."""
    model = Net()
    with pytest.raises(UserError, match="Expected 4 losses for 4 rows, found 8"):
        check(model, engine, losses=lambda batch: model(batch["x"].reshape(-1, T // 2, E)))
    proof = "" if engine is Loop else r"|last\.weight: no axis of its output holds one example each"
    with pytest.raises(UserError, match=f"found 8{proof}"):
        check(model, engine, losses=lambda batch: model(batch["x"]).repeat(2))


TIME_FIRST = {
    "(T, R, E)": lambda net, x: net.inner(x.transpose(0, 1)).transpose(0, 1),
    "(T * R, E)": lambda net, x: net.inner(x.transpose(0, 1).reshape(-1, E)).view(x.shape[1], -1, E).transpose(0, 1),
    "two views, one behind the other": lambda net, x: net.inner(torch.cat([x[:, 0], x[:, 1]])).view(2, -1, 1, E).sum(0) + x,
    "norm in (T, R, E)": lambda net, x: net.norm(net.inner(x).transpose(0, 1)).transpose(0, 1),
    "bias of (T, R, E)": lambda net, x: (net.bias + net.inner(x).transpose(0, 1)).transpose(0, 1),
}


def time_first(name, gate=None):
    """The model whose inner part has another axis first; with `gate` (E,), behind a gate of that value."""
    use = TIME_FIRST[name] if gate is None else lambda net, x: x + TIME_FIRST[name](net, x) * net.gate
    parts = {"inner": nn.Linear(E, E), "norm": nn.LayerNorm(E), "bias": nn.Parameter(torch.ones(E))}
    if gate is not None:
        parts["gate"] = nn.Parameter(torch.full((E,), gate))
    model = Net(use, **parts)
    model.norm.requires_grad_("norm" in name)
    model.bias.requires_grad_("bias" in name)
    return model


class BatchFirst(Layouts):
    """Proves nothing, and reads every tensor as if the examples came first."""

    def measure(self, key, gradient, rows, turn, layouts=()):
        pass

    def conclude(self, weights, keys):
        pass

    def of(self, key, shape, rows):
        return "batch first"


class Guessing(BookKeeping):
    """A wrong engine: right only where the examples do come first."""

    def __init__(self, model):
        super().__init__(model)
        self.layouts = BatchFirst()


@pytest.mark.parametrize("engine", [*ENGINES, Guessing])
def test_the_usual_axis_whatever_the_engine_proves(engine):
    """Guessing is wrong only where the tests below say so."""
    check(Net(lambda net, x: x + net.norm(net.inner(x)), inner=nn.Linear(E, E), norm=nn.LayerNorm(E)), engine)


@pytest.mark.parametrize("gate", [None, 0.0, 1e-5])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TIME_FIRST)
def test_an_unusual_example_axis(name, engine, gate):
    """PRIVACY line 33: the axis is proved, though T == R and, behind a gate, the engine's first batch shows no gradient
    there; a bias that is added to (T, R, E) is refused by its name."""
    model = time_first(name, gate)
    if engine is BookKeeping and "bias" in name:
        with pytest.raises(UserError, match="bias: no axis of its output holds one example each"):
            check(model, engine)
    else:
        check(model, engine)


@pytest.mark.parametrize("name", TIME_FIRST)
def test_a_wrong_example_axis(name):
    """PRIVACY line 33: T == R, so no shape gives it away; only the numbers do."""
    with pytest.raises(UserError, match="differ by"):
        check(time_first(name), Guessing)


@pytest.mark.parametrize("gate", [0.0, 1e-5])
@pytest.mark.parametrize("name", TIME_FIRST)
def test_a_wrong_example_axis_behind_a_gate_that_is_still_shut(name, gate):
    """PRIVACY line 33: at the start the part gets no gradient, as behind LoRA's zero matrix or a zero head."""
    model = time_first(name, gate)
    with pytest.raises(UserError, match="differ by"):
        check(model, Guessing)
    assert torch.equal(model.gate, torch.full((E,), gate))


def test_a_trainable_parameter_that_takes_no_part():
    """PRIVACY line 16: it would collect noise and nothing else."""
    with pytest.raises(UserError, match=r"1 trainable tensors take no part in the loss, first idle\.weight"):
        check(Net(idle=nn.Linear(2, 2, bias=False)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite(value):
    model = Net()
    model.last.weight.data[0, 0] = value
    with pytest.raises(UserError, match="weights are not all finite"):
        check(model)


@pytest.mark.parametrize("engine", [*ENGINES, Guessing])
def test_no_example_with_a_finite_gradient(engine):
    """PRIVACY line 9: masking is for a few poisoned rows; if all are, the run would train on noise alone."""
    model = Net(lambda net, x: x * net.broken, broken=nn.Buffer(torch.full((E,), math.nan)))
    with pytest.raises(UserError, match=r"None of 4 examples|take microbatch_size=1|not finite"):
        check(model, engine)


@pytest.mark.parametrize("where", range(4))
def test_a_poisoned_row_does_not_hide_a_wrong_engine(where):
    """PRIVACY line 9: the other rows' norms are still compared; without clipping the sums alone would not tell."""
    rows = [row.clone() for row in ROWS]
    rows[where][0, 0] = math.nan
    check(Net(), rows=rows)
    with pytest.raises(UserError, match="gradient norms"):
        check(Net(), partial(Halved, what="norms"), rows)


class Halved(BookKeeping):
    """An engine that is wrong in one thing."""

    def __init__(self, model, what):
        super().__init__(model)
        self.what = what

    def __call__(self, *args, **kwargs):
        found = super().__call__(*args, **kwargs)
        if self.what in ("norms", "losses"):
            getattr(found, self.what).mul_(0.5)
        else:
            found.sums[self.what].mul_(0.5)
        return found


@pytest.mark.parametrize("what", ["losses", "norms", "first.weight", "first.bias", "last.weight", "last.bias"])
def test_an_engine_that_is_wrong_in_one_thing(what):
    sentences = {"losses": "losses of a batch", "norms": "gradient norms"}
    with pytest.raises(UserError, match=sentences.get(what, f"clipped sum of {what}")):
        check(Net(), partial(Halved, what=what))


def test_a_small_part_of_an_engine_that_is_wrong():
    """A tensor with small gradients is compared by its own size: here a thousandth of the others'."""
    model = Net(lambda net, x: x + 1e-3 * net.small(x), small=nn.Linear(E, E))
    check(model)
    with pytest.raises(UserError, match=r"clipped sum of small\.weight"):
        check(model, partial(Halved, what="small.weight"))
