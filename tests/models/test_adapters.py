"""Adapters: what they add, where, how they are drawn, saved, loaded and merged."""

from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from privzoo.errors import UserError
from privzoo.models.adapters import add_biases, load_adapter, merge, query_and_value, wrap
from privzoo.models.checkpointing import turn_on_checkpointing
from privzoo.models.loading import load
from privzoo.privacy.clipping import BookKeeping, Loop
from privzoo.privacy.clipping.layouts import UnsupportedUse

LORA = partial(peft.LoraConfig, r=2, lora_alpha=4)
BIAS = partial(peft.LoraConfig, r=1, lora_alpha=1, lora_bias=True)
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
NARROW = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def encoder():
    return load("tiny_encoder", "sequence_classification", num_labels=2)


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**NARROW, num_key_value_heads=2)).eval()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_lora_lies_on_query_and_value_and_the_new_head_is_trained_with_it():
    loaded = encoder()
    model, head = wrap(loaded.model, loaded.new_head, LORA)
    names = set(trained(model))
    assert {name for name in names if "modules_to_save" in name} == set(head)
    assert len(head) == 2
    rest = {name.partition("attention.self.")[2] for name in names - set(head)}
    assert rest == {f"{m}.lora_{f}.default.weight" for m in ("query", "value") for f in "AB"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (hf.ViTForImageClassification(hf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4,
                                                   patch_size=2, intermediate_size=8)), ["q_proj", "v_proj"]),
        (hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)), ["c_attn"]),
        (hf.BertModel(hf.BertConfig(**NARROW)), ["query", "value"]),
        (hf.BloomModel(hf.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1)), ["query_key_value"]),
        (hf.T5Model(hf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), ["q", "v"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)  # fmt: skip
def test_names_of_query_and_value(model, expected):
    assert query_and_value(model) == expected


def test_an_unknown_attention_asks_for_targets():
    with pytest.raises(UserError, match=r"attention of Linear is not known here: .*method\.adapter\.targets"):
        query_and_value(torch.nn.Linear(2, 2))


def test_an_adapter_changes_nothing_at_first_and_hangs_on_its_seed_alone():
    found = []
    for seed, disturbed in ((0, 1), (0, 2), (1, 1)):
        loaded = encoder()
        with torch.no_grad():
            before = loaded.model(input_ids=IDS).logits
        torch.manual_seed(disturbed)
        state = torch.get_rng_state()
        model, _ = wrap(loaded.model, loaded.new_head, LORA, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, before)
        found.append(torch.cat([p.detach().flatten() for p in trained(model).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("targets", [["no_such_layer"], "no.such.layer"])
def test_targets_that_name_nothing(targets):
    loaded = encoder()
    with pytest.raises(UserError, match="peft cannot adapt BertForSequenceClassification so"):
        wrap(loaded.model, loaded.new_head, LORA, targets)


def randomise(model):
    for parameter in trained(model).values():
        torch.nn.init.normal_(parameter, std=0.3)


def test_saved_loaded_and_merged_it_is_the_same_model(tmp_path):
    loaded = encoder()
    model, _ = wrap(loaded.model, loaded.new_head, LORA)
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        again = load_adapter(encoder().model, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)
        merge(encoder().model, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
        plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_another_model_is_refused(tmp_path):
    loaded = encoder()
    wrap(loaded.model, loaded.new_head, LORA)[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(llama(), tmp_path)


# ---- BiTFiT-Add


def test_new_biases_move_every_linear_layer_of_the_body(tmp_path):
    """A Llama of one block has seven linear layers and no bias; with seven biases in place, each output is shifted by its
    own, and peft alone loads them again."""
    model, head = add_biases(llama(), (), BIAS)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 7
    assert head == ()
    assert all(not value.any() for value in biases.values())
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 12)
    with torch.no_grad():
        before = layer(x)
        torch.nn.init.normal_(layer.lora_B["default"].bias)
        torch.testing.assert_close(layer(x) - before, layer.lora_B["default"].bias.expand(2, 8), rtol=1e-4, atol=1e-5)
        model.eval().save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_model_with_all_its_biases_gets_none():
    loaded = encoder()
    with pytest.raises(UserError, match=r"has a bias: leave method\.add_bias=false"):
        add_biases(loaded.model, loaded.new_head, BIAS)


# ---- gradient checkpointing


def test_checkpointing_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="Linear has no gradient checkpointing"):
        turn_on_checkpointing(torch.nn.Linear(2, 2))


# ---- other tuners of peft

EXACT = {
    "LoRA": LORA, "DoRA": partial(peft.LoraConfig, r=2, use_dora=True),
    "IA3": partial(peft.IA3Config, feedforward_modules=[]),
    "LoKr": partial(peft.LoKrConfig, r=2), "VeRA": partial(peft.VeraConfig, r=2), "LNTuning": peft.LNTuningConfig,
    "VBLoRA": partial(peft.VBLoRAConfig, num_vectors=8, vector_length=16),
}  # fmt: skip
REFUSED = {
    "LoHa": partial(peft.LoHaConfig, r=2), "OFT": partial(peft.OFTConfig, r=0, oft_block_size=4),
    "FourierFT": partial(peft.FourierFTConfig, n_frequency=10), "HRA": partial(peft.HRAConfig, r=2),
}  # fmt: skip


def tuned(tuner):
    loaded = encoder()
    model, _ = wrap(loaded.model, loaded.new_head, tuner)
    torch.manual_seed(1)
    for parameter in trained(model).values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    labels = torch.tensor([0, 1])
    return model, lambda: F.cross_entropy(model(input_ids=IDS).logits, labels, reduction="none")


@pytest.mark.parametrize("name", EXACT)
def test_tuners_that_the_engine_treats_exactly(name):
    model, losses = tuned(EXACT[name])
    expected, found = Loop(model)(losses, 0.1), BookKeeping(model)(losses, 0.1)
    torch.testing.assert_close(found.norms, expected.norms.to(found.norms.dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_tuners_that_are_refused_by_name(name):
    model, losses = tuned(REFUSED[name])
    with pytest.raises(UnsupportedUse, match=r"base_model\.model\.bert\.encoder\.layer\."):
        BookKeeping(model)(losses, 0.1)
