"""The models of the benchmark: real sizes, random weights, random rows; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn


@dataclass
class Case:
    """A model and its losses of some of `rows` rows."""

    model: nn.Module
    losses: Callable[..., Tensor]
    rows: int


def roberta_base(rows: int, length: int) -> Case:
    """RoBERTa-base (12 layers, width 768) with a classification head."""
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, num_labels=2, hidden_dropout_prob=0.0,
                              attention_probs_dropout_prob=0.0, type_vocab_size=1)  # fmt: skip
    torch.manual_seed(0)
    model, ids = hf.RobertaForSequenceClassification(config), torch.randint(3, 50265, (rows, length))
    labels, mask = torch.randint(0, 2, (rows,)), torch.ones_like(ids)
    positions = torch.arange(2, length + 2).repeat(rows, 1)  # Opacus wants a row each, and one after the other in memory

    def losses(part: slice = slice(None)) -> Tensor:
        out = model(input_ids=ids[part], attention_mask=mask[part], position_ids=positions[part])
        return F.cross_entropy(out.logits, labels[part], reduction="none")

    return Case(model, losses, rows)


def gpt2(rows: int, length: int) -> Case:
    """GPT-2 small (12 layers, width 768), embeddings tied to the head."""
    config = hf.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(config)
    return causal(model, rows, length, 50257)


def llama(rows: int, length: int) -> Case:
    """A Llama of 4 layers and width 1024."""
    config = hf.LlamaConfig(vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
                            num_attention_heads=16)  # fmt: skip
    torch.manual_seed(0)
    return causal(hf.LlamaForCausalLM(config), rows, length, 8192)


def causal(model: nn.Module, rows: int, length: int, vocabulary: int) -> Case:
    ids = torch.randint(0, vocabulary, (rows, length))
    positions = torch.arange(length).expand(rows, length)

    def losses(part: slice = slice(None)) -> Tensor:
        logits = model(input_ids=ids[part], position_ids=positions[part], use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[part, 1:], reduction="none").mean(1)

    return Case(model, losses, rows)


MODELS: dict[str, Callable[[int, int], Case]] = {"roberta_base": roberta_base, "gpt2": gpt2, "llama": llama}


def trainable_of(case: Case, method: str) -> dict[str, nn.Parameter]:
    """Freezes what the method does not train, adds LoRA factors where it wants them; returns what is trained."""
    if method == "lora":
        for parameter in case.model.parameters():
            parameter.requires_grad_(False)
        for module in list(case.model.modules()):
            for name in ("q_proj", "v_proj"):
                if hasattr(module, name):
                    setattr(module, name, Lora(getattr(module, name), 16))
    if method == "bitfit":
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return {name: p for name, p in case.model.named_parameters() if p.requires_grad}


class Lora(nn.Module):
    """base(x) + (x A) B, as peft computes it without dropout."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@dataclass(frozen=True)
class Row:
    """One line of the table: `method` trains the parts of `model` on batches (rows, length).

    `goal`: what time and tensor bytes over the ordinary step shall be at most. `peers`: whether memory allows for them.
    """

    model: str
    method: str
    rows: int
    length: int
    goal: tuple[float, float] = (1.05, 1.05)
    peers: bool = True

    @property
    def name(self) -> str:
        return f"{self.model} {self.method} B={self.rows} T={self.length}"


ROWS = [
    Row("roberta_base", "full", 8, 128),
    Row("roberta_base", "full", 16, 128, peers=False),
    Row("gpt2", "full", 8, 128),
    Row("gpt2", "full", 2, 512, (1.10, 1.10)),
    Row("roberta_base", "full", 2, 512, (1.10, 1.10)),
    Row("llama", "lora", 8, 128, (1.03, 1.03)),
    Row("roberta_base", "bitfit", 8, 128, (0.68, 0.60)),
    Row("roberta_base", "bitfit", 2, 512, (0.68, 0.60)),
]
