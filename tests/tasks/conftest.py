"""A small vocabulary, two tokenizers and two float64 models that no file is needed for."""

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from privzoo.tasks.data import HubData

WORDS = [f"w{i}" for i in range(30)]


def _core(specials):
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    return core


@pytest.fixture
def bert_tokenizer():
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, w0 4, w1 5, ...; makes token_type_ids."""
    core = _core(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def gpt_tokenizer():
    """<end> 0, [UNK] 1, w0 2, w1 3, ...; sets no special tokens by itself and has no padding token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_core(["<end>", "[UNK]"]), eos_token="<end>", unk_token="[UNK]", model_max_length=32
    )


@pytest.fixture
def bos_tokenizer():
    """<s> 0, <end> 1, [UNK] 2, w0 3, ...; begins every text with <s>."""
    core = _core(["<s>", "<end>", "[UNK]"])
    core.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<end>", unk_token="[UNK]")


@pytest.fixture
def bert():
    """Double precision, dropout 0, and weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).double()


@pytest.fixture
def gpt():
    """Double precision, dropout 0, and weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


@pytest.fixture
def folder(tmp_path):
    """Writes splits into a data root: folder(train={"text": [...], "label": [...]}, ...) returns the root."""

    def write(**splits):
        place = tmp_path / "root" / "set"
        place.mkdir(parents=True, exist_ok=True)
        for split, columns in splits.items():
            pyarrow.parquet.write_table(pa.table(columns), place / f"{split}.parquet")
        return str(tmp_path / "root")

    return write


@pytest.fixture
def source():
    """The data set that `folder` writes."""
    return HubData("someone/set", None, "set", {"train": "train", "validation": "validation"})


@pytest.fixture
def gradients():
    """gradients(losses, model): the gradient of each loss over all parameters as one row, shape (R, P)."""

    def of(losses, model):
        rows = []
        for loss in losses:
            found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            pairs = zip(found, model.parameters(), strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
        return torch.stack(rows)

    return of


@pytest.fixture
def batches():
    """batches(rows, size): lists of `size` rows; the last one is what is left."""
    return lambda rows, size: [[rows[i] for i in range(len(rows))[k : k + size]] for k in range(0, len(rows), size)]
