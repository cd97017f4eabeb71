"""Frozen weights dealt out to two real processes (FSDP2). Sums and weights: tests/methods/test_ranks.py."""

import json

import pytest
import torch
import transformers as hf
from torch import nn

from privzoo.errors import UserError
from privzoo.models.sharding import shard_frozen, whole_state

SCRIPT = """
import json, torch, transformers as hf
from peft import LoraConfig, get_peft_model
from privzoo.models.sharding import shard_frozen, whole_state
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
trained = [p for n, p in model.named_parameters() if "lora" in n or (n.endswith("bias") and not {adapter})]
for parameter in model.parameters():
    parameter.requires_grad_(any(parameter is each for each in trained))
settle = shard_frozen(model, trained, torch.device("cpu"), ranks.count)
after = model.generate(input_ids=prompt, **options).tolist()
settle()
frozen = [p for p in model.parameters() if not p.requires_grad]
state = whole_state(model)
found = dict(
    same_text=before == after, held=sum(held_here(p).numel() for p in frozen), of=sum(p.numel() for p in frozen),
    trained_whole=all(held_here(p) is p for p in trained), put_together=state and fingerprint(state.items()) == whole,
)
with open(f"{out}/{{ranks.rank}}", "w") as file:
    json.dump(found, file)
leave_ranks()
"""


@pytest.mark.parametrize("adapter", [False, True])
def test_each_rank_holds_a_part(adapter, privzoo, tmp_path):
    """What a model says is the same; about half of the frozen values lie on each rank, the trained ones on both; put
    together they are what was dealt out."""
    code, output = privzoo(script=SCRIPT.format(adapter=adapter, out=tmp_path), ranks=2)
    assert code == 0, output
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for each in found:
        assert each["same_text"]
        assert each["trained_whole"]
        assert each["held"] < 0.6 * each["of"]
        assert each["put_together"] is (None if adapter else True)
    assert sum(each["held"] for each in found) >= found[0]["of"]


def test_what_cannot_be_dealt_out():
    """Before any process is asked."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UserError, match="most weights of this method are trained"):
        shard_frozen(model, model.parameters(), torch.device("cpu"), 2)
    model[0].weight = nn.Parameter(torch.zeros(64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="cannot deal out a quantised model"):
        shard_frozen(model, [model[1].bias], torch.device("cpu"), 2)


def test_the_state_of_a_whole_model():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=4))
    state = whole_state(model)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
