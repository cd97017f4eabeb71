"""What every method of conf/method promises, on small models of five architectures, through a real Trainer."""

import math
import runpy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel

from privzoo.composition import build, compose
from privzoo.config import plan_arguments
from privzoo.models.adapters import ADAPTER_CONFIG
from privzoo.models.quantization import keep_quantized_weights, quantization_options
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.sampling import LogicalBatch, PoissonBatches, PoissonDraws
from privzoo.privacy.streams import RunKey

shared = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
ROWS, N, Recorder, Run, Texts = (shared[name] for name in ("ROWS", "N", "Recorder", "Run", "Texts"))
LABELS, CLIP_NORM = 3, 0.5
SMALL = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": LABELS,
         "max_position_embeddings": 16, "pad_token_id": 0, "initializer_range": 0.2}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "roberta": lambda: hf.RobertaConfig(**SMALL, **NO_DROPOUT, intermediate_size=24),
    "gpt2": lambda: hf.GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=LABELS,
                                  pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2),
    "opt": lambda: hf.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, attention_dropout=0.0),
    "mistral": lambda: hf.MistralConfig(**SMALL, intermediate_size=24, num_key_value_heads=1),
    "vit": lambda: hf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                                image_size=8, patch_size=4, num_labels=LABELS, initializer_range=0.2, **NO_DROPOUT),
}  # fmt: skip
METHODS = {
    "dp_full": [], "dp_bitfit": [], "dp_lora": [], "dp_head": [], "dp_qlora": [],
    "dpzero": ["method.smoothing=3e-3"],
    "dp_bitfit with new biases": ["method.add_bias=true"],
    "dp_full of the last block": ["method.trainable='(layers|layer|h)[.]1[.]'"],
    "dpzero of an adapter": ["method.lora=true", "method.smoothing=3e-3"],
    "dpzero in two phases": ["method.phases=[{epochs: 0.2, trainable: all},{epochs: 0.2, trainable: biases}]",
                             "method.smoothing=3e-3"],
    "dpzero beside 4 bits": ["model.quantization=nf4", "method.smoothing=0.03"],
    "dp_bitfit_two_phase": ["method.phases=[{epochs: 0.4, trainable: all, lr: 0.02},{trainable: biases}]"],
}  # fmt: skip


def makes_sense(method: str, architecture: str) -> bool:
    if architecture == "mistral":  # without biases; that it is refused then is in test_trainable
        return method not in ("dp_bitfit", "dp_bitfit_two_phase", "dpzero in two phases")
    return method != "dp_bitfit with new biases"


def case(method: str, architecture: str):
    """Every method on one architecture and every architecture with three methods, and in `make check` the others."""
    first = architecture == ("roberta" if makes_sense(method, "roberta") else "mistral")
    marks = [] if first or method in ("dp_full", "dp_lora", "dpzero") else pytest.mark.sweep
    return pytest.param(method, architecture, marks=marks)


CASES = [case(m, a) for m in METHODS for a in CONFIGS if makes_sense(m, a)]


class Images(Texts):
    """Pictures of 8 by 8; the rows' token ids seed the pixels."""

    def collate(self, rows):
        pixels = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(row["ids"].sum()))) for row in rows]
        return {
            "pixel_values": torch.stack(pixels),
            "labels": torch.tensor([row["label"] for row in rows]),
            "strength": torch.tensor([row.get("strength", 1.0) for row in rows]),
        }

    def losses(self, model, batch):
        logits = model(pixel_values=batch["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none") * batch["strength"]


@cache
def composed(overrides: tuple):
    return compose(list(overrides))


@cache  # reckoning epsilon takes a while
def plan_of(arguments: tuple) -> PrivacyPlan:
    return PrivacyPlan(**dict(arguments))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(architecture)`: the folder of a small random model; BERT's kind of head is its last layer alone."""

    @cache
    def folder(architecture: str) -> str:
        torch.manual_seed(3)
        config = CONFIGS[architecture]()
        path = tmp_path_factory.mktemp(architecture)
        auto_class(architecture).from_config(config).save_pretrained(path)
        return str(path)

    return folder


def auto_class(architecture: str):
    return hf.AutoModelForImageClassification if architecture == "vit" else hf.AutoModelForSequenceClassification


def base_model(folder: str, architecture: str, quantization: str | None):
    model = auto_class(architecture).from_pretrained(folder, **quantization_options(quantization))
    if quantization:
        assert keep_quantized_weights(model)
    return model


def make(method: str, architecture: str, folder: str, private: bool = True, rows=ROWS, seed: int = 0) -> Run:
    """The method as its yaml makes it, two releases of 8 expected rows (five in the two phases)."""
    name = method.split(" ")[0]
    cfg = composed((
        f"method={name}", "batch_size=8", f"epochs={1 if 'phase' in name else 0.4}",
        f"clip_norm={CLIP_NORM}", "lr=0.01", "delta=1e-3",
        f"eps={'null' if private else 'inf'}", "privacy.noise_multiplier=" + ("1.0" if private else "null"),
        *METHODS[method],
    ))  # fmt: skip
    plan = plan_of(tuple(plan_arguments(cfg, N).items()))
    model = base_model(folder, architecture, cfg.model.quantization)
    head = [n for n, _ in model.named_parameters() if n.startswith(("classifier.", "score."))]
    task = Images() if architecture == "vit" else Texts()
    key = RunKey.for_tests(seed)
    made = build(cfg.method)(model=model, task=task, mechanism=NoiseMechanism(plan, key, "digest"), new_head=head, lr=0.01)
    draws = PoissonDraws(plan, key, "digest")
    batches = PoissonBatches(rows, draws, task.collate, lambda row: len(row["ids"]), 100)
    return Run(made.train(), draws, batches, Recorder())


def length(sums) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in sums.values()))


@pytest.mark.parametrize(("method", "architecture"), CASES)
def test_contract(method, architecture, bases, tmp_path):
    """PRIVACY lines 5, 16, 19 and 26: sensitivity, an empty draw, what moves, what is saved."""
    run = make(method, architecture, bases(architecture))
    private = run.method
    private.preflight([run.batches.rows[i] for i in range(4)])
    _one_example_moves_the_sum_by_at_most_c(run)
    assert length(private.query(LogicalBatch(0, ()))) == 0
    before = {name: value.clone() for name, value in private.model.state_dict().items()}
    rest = private.fingerprint_of_the_rest()
    trainer = run.fit()
    assert trainer.global_step == private.mechanism.draws == private.mechanism.plan.steps
    moved = {n for n, value in private.model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == set(private.trainable)
    assert private.fingerprint_of_the_rest() == rest
    _reloads_without_privzoo(run, architecture, bases(architecture), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_goes_on_from_a_checkpoint(method, bases, tmp_path):
    """PRIVACY line 35: what a method needs to go on is in the checkpoint, and the end is that of the whole run."""
    architecture = "mistral" if "new biases" in method else "roberta"
    straight = make(method, architecture, bases(architecture))
    steps = straight.method.mechanism.plan.steps
    at = steps - steps // 2  # in the second phase where there is one
    straight.fit_and_save(at, tmp_path / "last.ckpt")
    end = straight.recorder.weights[-1]
    assert any(not torch.equal(value, straight.recorder.weights[0][name]) for name, value in end.items())
    resumed = make(method, architecture, bases(architecture))
    resumed.fit(at, tmp_path / "last.ckpt")
    assert len(resumed.recorder.weights) == steps - at
    assert all(torch.equal(value, end[name]) for name, value in resumed.recorder.weights[-1].items())


def _one_example_moves_the_sum_by_at_most_c(run: Run) -> None:
    rows = [{**row, "strength": 10.0 ** (i % 5 - 2)} for i, row in enumerate(run.batches.rows[:8])]
    collate, clip_norm = run.method.task.collate, run.method.mechanism.plan.at(0).clip_norm
    whole = run.method.query(LogicalBatch(0, (collate(rows[:5]), collate(rows[5:]))))
    for left_out in (0, 4, 6):
        rest = [row for i, row in enumerate(rows) if i != left_out]
        without = run.method.query(LogicalBatch(0, (collate(rest),)))
        moved = length({name: whole[name] - without[name] for name in whole})
        assert 0 < moved <= clip_norm * (1 + 1e-4)


def _reloads_without_privzoo(run: Run, architecture: str, folder: str, to) -> None:
    model = run.method.model.eval()
    model.save_pretrained(to)
    quantized = bool(getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None))
    if (to / ADAPTER_CONFIG).exists():
        base = base_model(folder, architecture, "nf4" if quantized else None)
        again = PeftModel.from_pretrained(base, to)
    else:
        again = auto_class(architecture).from_pretrained(to)
    batch = run.method.task.collate(run.batches.rows[:4])
    with torch.no_grad():
        torch.testing.assert_close(
            run.method.task.losses(again.eval(), batch), run.method.task.losses(model, batch), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("dp_full", "dp_bitfit") and "dpzero" not in m])
def test_the_twin_is_ordinary_training(method, bases):
    """eps=inf against torch.optim on losses.sum() / B over the same draws, phases included; no clipping, no noise. Those of
    dp_full, dp_bitfit and dpzero have tests of their own."""
    architecture = "mistral" if "new biases" in method else "roberta"
    run = make(method, architecture, bases(architecture), private=False)
    private, plan = run.method, run.method.mechanism.plan
    weights = {name: p.detach().clone() for name, p in private.trainable.items()}
    # Not Adam: where a gradient is 0 but for rounding (a key's bias), it makes whole steps of it. The momentum is a state.
    private.make_optimizer = sgd = partial(torch.optim.SGD, momentum=0.9)
    run.fit()
    model = make(method, architecture, bases(architecture), private=False).method.model
    parameters = dict(model.named_parameters())
    optimizer = None
    for release in range(plan.steps):
        setting = plan.at(release)
        if setting.index == 0:
            trained = [parameters[name] for name in private.trained_in[setting.phase]]
            optimizer = sgd(trained, lr=0.01)
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(any(parameter is each for each in trained))
        for group in optimizer.param_groups:
            part = 1.0 if method == "dp_qlora" else (setting.steps - setting.index) / setting.steps
            group["lr"] = (0.02 if len(plan.phases) > setting.phase + 1 else 0.01) * part
        rows = [run.batches.rows[int(i)] for i in run.draws(release)]
        (private.task.losses(model, private.task.collate(rows)).sum() / 8).backward()
        optimizer.step()
    for name, parameter in private.trainable.items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=2e-5)
        assert not torch.equal(parameter, weights[name])


def test_a_frozen_weight_or_buffer_that_moves_is_noticed(bases):
    """PRIVACY line 26: a run compares this before its first release and after its last one."""
    private = make("dp_qlora", "opt", bases("opt")).method
    before = private.fingerprint_of_the_rest()
    (base, *_) = (p for n, p in private.model.named_parameters() if p.dtype == torch.uint8)
    base.data.view(-1)[0] ^= 1
    assert private.fingerprint_of_the_rest() != before
    base.data.view(-1)[0] ^= 1
    assert private.fingerprint_of_the_rest() == before
    private.model.register_buffer("longest", torch.zeros(1), persistent=False)
    before = private.fingerprint_of_the_rest()
    private.model.longest += 1
    assert private.fingerprint_of_the_rest() != before
