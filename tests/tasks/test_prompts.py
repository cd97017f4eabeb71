"""Prompts: the blank is where the model is read, words are one token each, and only texts are cut."""

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from privzoo.errors import UserError
from privzoo.tasks.classification import Classification
from privzoo.tasks.prompts import Prompt

WORDS = ["it", "was", "good", "bad", "fair", ".", "?", *(f"w{i}" for i in range(30))]
PLAIN = Prompt("{a} it was {mask} .", ["bad", "good"])
PAIR = Prompt("{a} ? {mask} . {b}", ["bad", "good"], causal="{a} ? {b} it was {mask}")


def tokenizer(specials, template, **named):
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    if template:
        core.post_processor = TemplateProcessing(single=template, special_tokens=[(s, specials.index(s)) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", model_max_length=32, **named)


@pytest.fixture
def masked():
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, it 5, was 6, good 7, bad 8, fair 9, . 10, ? 11, w0 12, ..."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return tokenizer(
        specials, "[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


@pytest.fixture
def causal():
    """<end> 0, [UNK] 1, it 2, was 3, good 4, bad 5, fair 6, . 7, ? 8, w0 9, ..."""
    return tokenizer(["<end>", "[UNK]"], None, eos_token="<end>")


def rows(prompt, processor, max_length=32, **columns):
    """Ids and blanks of a table's rows, as words."""
    blanks = []
    filled = prompt.made_for(processor, list(columns), 2, max_length)
    ids = filled.rows(pa.table(columns), blanks)
    return [processor.convert_ids_to_tokens(each) for each in ids], blanks


def test_a_masked_model_reads_the_whole_template(masked):
    found, blanks = rows(PLAIN, masked, a=["w0 w1", "w2"])
    assert found[0] == ["[CLS]", "w0", "w1", "it", "was", "[MASK]", ".", "[SEP]"]
    assert [each[blank] for each, blank in zip(found, blanks, strict=True)] == ["[MASK]"] * 2
    assert PLAIN.made_for(masked, ["a"], 2, 32).words == [8, 7]


def test_a_causal_model_reads_up_to_the_blank(causal):
    found, blanks = rows(PLAIN, causal, a=["w0 w1", "w2"])
    assert found == [["w0", "w1", "it", "was"], ["w2", "it", "was"]]
    assert blanks == [3, 2]
    assert PLAIN.made_for(causal, ["a"], 2, 32).words == [5, 4]
    found, blanks = rows(PAIR, causal, a=["w0"], b=["w1"])
    assert found == [["w0", "?", "w1", "it", "was"]]


@pytest.mark.parametrize(("a", "b"), [(20, 3), (3, 20), (20, 20), (12, 9), (40, 0)])
def test_only_texts_are_cut_the_longest_first(masked, a, b):
    """Of 16 tokens the template has [CLS] ? [MASK] . [SEP]; 11 are left for both texts."""
    words = [f"w{i}" for i in range(40)]
    (found,), (blank,) = rows(PAIR, masked, 16, a=[" ".join(words[:a])], b=[" ".join(words[:b])])
    assert len(found) == min(16, 5 + a + b)
    assert found[blank] == "[MASK]"
    first, second = found[1 : blank - 1], found[blank + 2 : -1]
    assert (first, second) == (words[: len(first)], words[: len(second)])
    assert len(first) == a or len(first) >= len(second) - 1
    assert len(second) == b or len(second) >= len(first) - 1


def test_a_text_that_names_the_mask_token_has_no_blank_of_its_own(masked):
    found, blanks = rows(PLAIN, masked, a=["w0 [MASK] w1"])
    assert found[0].count("[MASK]") == 1
    assert found[0][blanks[0]] == "[MASK]"
    assert found[0] == ["[CLS]", "w0", "w1", "it", "was", "[MASK]", ".", "[SEP]"]


def test_a_row_does_not_hang_on_the_others(masked):
    """PRIVACY line 7: how a row is cut is decided by itself."""
    texts = ["w0 w1 w2", " ".join(["w3"] * 50), "w4"]
    together, _ = rows(PLAIN, masked, 12, a=texts)
    assert together == [rows(PLAIN, masked, 12, a=[text])[0][0] for text in texts]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (Prompt("{a} it was .", ["bad", "good"]), "names a, expected each of a, mask once"),
        (Prompt("{mask} it was", ["bad", "good"]), "names mask, expected each of a, mask once"),
        (Prompt("{a} {a} {mask}", ["bad", "good"]), "names a, a, mask, expected"),
        (Prompt("{a} {mask", ["bad", "good"]), "is not a template"),
        (Prompt("{a} {mask}", ["bad", "good", "fair"]), "has 3 words, expected one for each of 2 classes"),
        (Prompt("{a} {mask}", ["bad", "bad"]), "begin alike"),
        (Prompt("{a} {mask}", ["bad", "splendid"]), "'splendid' is unknown to the tokenizer"),
        (Prompt("{a} {mask}", ["bad", "good fair"]), "'good fair' is 2 tokens"),
        (Prompt("{a} " + "it " * 32 + "{mask}", ["bad", "good"]), "leaves no room beside the template"),
    ],
)
def test_a_wrong_prompt_is_one_sentence(masked, prompt, sentence):
    with pytest.raises(UserError, match=sentence):
        prompt.made_for(masked, ["a"], 2, 32)


def test_a_template_that_goes_on_is_not_for_a_causal_model(causal):
    with pytest.raises(UserError, match=r"goes on after its blank with \{b\}.*task\.prompt\.causal"):
        Prompt("{a} ? {mask} . {b}", ["bad", "good"]).made_for(causal, ["a", "b"], 2, 32)


@pytest.fixture
def task(source, folder, masked):
    found = Classification("t", source, ["a"], "y", 2, 16, head="prompt", prompt=PLAIN)
    data = {"a": ["w0 w1 w2", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15", "w3 w3"], "y": [0, 1, 1, 0]}
    found.load(folder(train=data, validation=data))
    found.prepare(masked)
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5 + len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=12, max_position_embeddings=32, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, initializer_range=0.5)  # fmt: skip
    return BertForMaskedLM(config).double()


def test_the_loss_is_that_of_the_words_in_the_blank(task, model):
    rows_ = [task.train[i] for i in range(4)]
    losses = task.losses(model, task.collate(rows_))
    for row, loss in zip(rows_, losses, strict=True):
        ids = row["input_ids"].tolist()
        said = model(input_ids=torch.tensor([ids])).logits[0, ids.index(4), [8, 7]]
        torch.testing.assert_close(loss, -said.log_softmax(0)[row["label"]], rtol=0, atol=1e-12)
    scores = task.evaluate(model, [task.collate(rows_)])
    assert scores["loss"] == pytest.approx(losses.mean().item())
    assert tuple(scores) == ("accuracy", "loss")


def test_the_prompt_is_part_of_what_is_encoded(source, folder):
    """PRIVACY line 36: another template is another sum, and gets other noise."""
    data = {"a": ["w0", "w4"], "y": [0, 1]}
    root, digests = folder(train=data, validation=data), set()
    for head, prompt in (("classifier", PLAIN), ("prompt", PLAIN), ("prompt", Prompt("{a} was {mask} .", ["bad", "good"]))):
        task = Classification("t", source, ["a"], "y", 2, 16, head=head, prompt=prompt)
        task.load(root)
        digests.add(task.fingerprint())
    assert len(digests) == 3


@pytest.mark.parametrize(("head", "prompt", "ways"), [("prmpt", PLAIN, "or prompt"), ("prompt", None, "has no prompt")])
def test_a_head_that_is_not_there(source, head, prompt, ways):
    with pytest.raises(UserError, match=rf"Unknown task\.head={head}: expected classifier.*{ways}"):
        Classification("t", source, ["a"], "y", 2, 16, head=head, prompt=prompt)
