"""What each pattern trains."""

import pytest
import torch
import transformers as hf
from torch import nn

from privzoo.errors import UserError
from privzoo.methods.trainable import select_trainable


class Small(nn.Module):
    """A body with a bias, a norm, a parameter that only sounds like a bias, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.attention = nn.MultiheadAttention(2, 1)  # in_proj_bias
        self.bias_table = nn.Embedding(3, 2)  # bias_table.weight is a table
        self.head = nn.Linear(2, 3)


HEAD = ("head.weight", "head.bias")
BIASES = {"body.bias", "norm.bias", "attention.in_proj_bias", "attention.out_proj.bias"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", {name for name, _ in Small().named_parameters()}),
        ("floats", {name for name, _ in Small().named_parameters()}),
        ("biases", BIASES | set(HEAD)),
        ("^body", {"body.weight", "body.bias", *HEAD}),
        (r"norm\.weight$", {"norm.weight", *HEAD}),
        ("head", set(HEAD)),
        ("body|norm", {"body.weight", "body.bias", "norm.weight", "norm.bias", *HEAD}),
    ],
)
def test_chosen_parameters_and_the_new_head(pattern, expected):
    """Exactly these require a gradient afterwards, whatever did before, and exactly these are returned, by name."""
    model = Small()
    model.norm.requires_grad_(False)
    found = select_trainable(model, pattern, HEAD)
    assert set(found) == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert all(found[name] is model.get_parameter(name) for name in found)


def test_without_a_new_head():
    assert set(select_trainable(Small(), "biases", ())) == BIASES | {"head.bias"}


def test_a_tied_parameter_is_known_by_its_first_name():
    """PRIVACY line 14: once, so that it is neither clipped nor noised twice."""
    model = Small()
    model.head.weight = model.bias_table.weight
    assert set(select_trainable(model, "bias_table|body", ("head.bias",))) == {
        "bias_table.weight", "body.weight", "body.bias", "head.bias",
    }  # fmt: skip


@pytest.mark.parametrize("pattern", ["biasses", "^head", r"head\.bias$"])
def test_a_pattern_that_chooses_nothing_but_the_head(pattern):
    """A new head alone is not what anybody asked for: a typing mistake would go unnoticed."""
    with pytest.raises(UserError, match=r"chooses nothing of the pretrained Small: parameter names are like body\.weight"):
        select_trainable(Small(), pattern, HEAD)


@pytest.mark.parametrize("pattern", ["(", "*bias", "[a"])
def test_a_pattern_that_is_no_regular_expression(pattern):
    with pytest.raises(UserError, match="is not a regular expression"):
        select_trainable(Small(), pattern, HEAD)


def test_a_model_without_biases():
    """DP-BiTFiT on Llama has nothing to train: refused with the way out, not trained on the head alone."""
    config = hf.LlamaConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, pad_token_id=0
    )
    model = hf.LlamaForSequenceClassification(config)
    with pytest.raises(UserError, match=r"trainable=biases .*LlamaForSeq.*method\.add_bias=true, or take method=dp_lora"):
        select_trainable(model, "biases", ("score.weight",))


def bert(**options):
    config = hf.BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=6)
    return hf.BertForSequenceClassification(config)


def test_a_head_that_the_checkpoint_brought_along():
    """Without a new head "head" is what lies outside the pretrained body."""
    assert set(select_trainable(bert(), "head", ())) == {"classifier.weight", "classifier.bias"}


def test_a_quantised_base_is_not_trained_itself():
    model = bert()
    model.bert.pooler.dense.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"whole numbers of torch\.uint8: .*take method=dp_qlora"):
        select_trainable(model, "all", ())
    names = {name for name, _ in model.named_parameters()}
    assert set(select_trainable(model, "floats", ())) == names - {"bert.pooler.dense.weight"}


def test_a_head_tied_to_the_body_is_refused():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(UserError, match=r"trainable=head chooses nothing .* shares its weights with the body"):
        select_trainable(model, "head", ())


def test_adapter_without_an_adapter_is_refused():
    with pytest.raises(UserError, match="it has no adapter; take method=dp_lora"):
        select_trainable(bert(), "adapter", ("classifier.weight",))
