"""Weights dealt out to two real processes (FSDP2, ZeRO). Sums and weights: tests/methods/test_ranks.py."""

import json
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from torch import nn

from privzoo.errors import UserError
from privzoo.methods.dealing import check_parts, refuse_parts
from privzoo.privacy.clipping import BookKeeping, Loop
from privzoo.privacy.ranks import ALONE
from privzoo.privacy.sharding import DealtOut, part_like, whole
from privzoo.privacy.strategies import Dealer
from privzoo.saving import whole_state

SCRIPT = """
import json, torch, transformers as hf
from peft import LoraConfig, get_peft_model
from privzoo.privacy.strategies import Dealer
from privzoo.saving import whole_state
from privzoo.privacy.clipping import BookKeeping
from privzoo.privacy.noise import fingerprint
from privzoo.privacy.ranks import held_here, join_ranks, leave_ranks
ranks = join_ranks()
torch.manual_seed(0)
config = hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=24, bos_token_id=1, eos_token_id=1)
model = hf.GPT2LMHeadModel(config).eval()
prompt = torch.tensor([[3, 4, 5]])
options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt))
before = model.generate(prompt, **options).tolist()
whole, values = fingerprint(model.state_dict().items()), sum(p.numel() for p in model.parameters())
if {adapter}:
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"]))
trained = {{n: p for n, p in model.named_parameters() if {trained}}}
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name in trained)
sizes = {{n: p.numel() for n, p in model.named_parameters()}}
dealt = Dealer({strategy!r}, torch.device("cpu"), ranks.count)(model, trained)
after = model.generate(input_ids=prompt, **options).tolist()
shared = [(n, p) for n, p in model.named_parameters() if n not in trained or not {whole}]
if dealt.wholes:  # a backward pass: some of what it gathers is of no module that it comes back to
    engine = BookKeeping(model)
    engine.dealt = dealt
    loss = lambda: torch.nn.functional.cross_entropy(model(input_ids=prompt).logits[:, -1], prompt[:, -1], reduction="none")
    engine(loss, 1.0)
state = whole_state(model, dealt)
put_together, names = fingerprint(state.items()) == whole, sorted(state)
name = min(trained)
wanted = dealt.whole_of(name) + 1
dealt.put(name, wanted)
put = torch.equal(dealt.whole_of(name), wanted) and torch.equal(whole_state(model, dealt)[name], wanted)
found = dict(
    put=put, same_text=before == after, held=sum(held_here(dealt.here(p)).numel() for n, p in shared),
    of=sum(sizes[n] for n, p in shared),
    trained_whole=all(held_here(dealt.here(p)) is p for n, p in model.named_parameters() if n in trained),
    wholes=sorted(dealt.wholes) == sorted(trained), put_together=put_together,
    those_trained=names == sorted(trained),
)
with open(f"{out}/{{ranks.rank}}", "w") as file:
    json.dump(found, file)
leave_ranks()
"""


@pytest.mark.parametrize(
    ("strategy", "trained", "whole"),
    [
        ("fsdp", "adapter", True),
        ("fsdp", "biases", True),
        ("fsdp", "all", False),
        ("zero2", "all", False),
        ("zero3", "adapter", False),
        ("zero3", "all", False),
    ],
)
def test_each_rank_holds_a_part(strategy, trained, whole, privzoo, tmp_path):
    """What a model says is the same; about half of the values lie on each rank, and what is trained on both where it stays
    whole; put together they are what was dealt out."""
    adapter, names = trained == "adapter", {"adapter": '"lora" in n', "biases": 'n.endswith("bias")', "all": "True"}
    script = SCRIPT.format(strategy=strategy, adapter=adapter, trained=names[trained], whole=whole, out=tmp_path)
    code, output = privzoo(script=script, ranks=2)
    assert code == 0, output
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for each in found:
        assert each["same_text"]
        assert each["put"]
        assert each["trained_whole"] is (whole or strategy == "zero2")
        assert each["wholes"] is not whole
        assert (each["held"] < 0.6 * each["of"]) is (strategy != "zero2")  # which keeps all weights
        assert each["those_trained"] if adapter else each["put_together"]
    assert sum(each["held"] for each in found) >= found[0]["of"]


def test_what_cannot_be_dealt_out():
    """Before any process is asked."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.zeros(64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="cannot deal out what is trained beside quantised weights"):
        Dealer("fsdp", torch.device("cpu"), 2)(model, dict(model.named_parameters()))


def test_what_needs_the_whole_model_at_once():
    """A bound that would not hold, or a gradient that would go nowhere, is refused by its name."""
    model = nn.Linear(4, 2)
    fine, by_layer, derives = BookKeeping(model), BookKeeping(model, groups="layer"), BookKeeping(model)
    derives.layouts.proved["weight#0", 1] = "batch first"
    for engine, phases, message in (
        (Loop(model), 1, "those of Loop hang on the rows"),
        (None, 2, "trained in phases"),
        (by_layer, 1, "clipped by layer"),
        (fine, 2, "trained in phases"),
        (derives, 1, r"others are made of \(weight#0\)"),
    ):
        with pytest.raises(UserError, match=message):
            refuse_parts("zero2", engine, phases, True)
    refuse_parts("fsdp", fine, 1, True)
    for engine in (None, fine, by_layer, derives):
        refuse_parts("fsdp", engine, 2, False)


@pytest.mark.parametrize(
    ("where", "wrong", "names"),
    [
        ("first", 1.0, "first"),
        ("first", float("nan"), "first"),
        ("small", -0.1, "small"),  # all of it
        ("zero", 1e-5, None),  # rounding beside the largest
        ("first", 0.0, None),
    ],
)
def test_parts_that_are_not_those_of_the_whole_are_seen(where, wrong, names):
    """PRIVACY 15: also where they are not finite, and where they are small beside others."""
    alone = {"zero": torch.zeros(3), "first": torch.tensor([1.0, -200.0, 0.5]), "empty": torch.zeros(0)}
    alone["small"] = torch.tensor([0.0, 0.1])
    found = {name: value.clone() for name, value in alone.items()}
    found[where][1] += wrong
    with pytest.raises(RuntimeError, match=f"With parts of a model {names} is not") if names else nullcontext():
        check_parts(found, alone, 2e-3, ALONE)


def test_what_is_whole_stays_what_it_is():
    for value in (torch.ones(2), 3, None):
        assert whole(value) is value
        assert part_like(value, torch.zeros(2)) is value


def test_the_state_of_a_whole_model():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=4))
    state = whole_state(model, DealtOut(model, None))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
