"""Mean pooling: the head is what it says, saves and loads as any model, and is refused where it makes no sense."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from privzoo.errors import UserError
from privzoo.models import loading
from privzoo.models.loading import load
from privzoo.privacy.clipping import BookKeeping, Loop

TINY = Path(loading.__file__).parent / "tiny"
IDS = torch.tensor([[2, 9, 12, 7, 3], [2, 8, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


PAIRS = torch.tensor([[2, 9, 12, 3, 7, 8, 3], [2, 8, 3, 11, 3, 0, 0]])  # [CLS] … [SEP] … [SEP]
TYPES = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]])
BOTH = {"input_ids": PAIRS, "attention_mask": (PAIRS != 0).long(), "token_type_ids": TYPES}


def pooled(**options):
    return load("tiny_encoder", "sequence_classification", 3, pooling="mean", **options)


def paired(**options):
    return load("tiny_encoder", "sequence_classification", 3, pooling="pair", texts=2, **options)


def test_the_head_is_linear_in_the_mean_of_the_real_tokens() -> None:
    loaded = pooled()
    assert loaded.new_head == ("classifier.weight", "classifier.bias")
    body = transformers.AutoModel.from_pretrained(TINY / "tiny_encoder")
    with torch.no_grad():
        found = loaded.model(input_ids=IDS, attention_mask=MASK).logits
        for row, length in enumerate((5, 3)):
            alone = body.eval()(input_ids=IDS[row : row + 1, :length]).last_hidden_state[0].mean(0)
            expected = loaded.model.classifier.weight @ alone + loaded.model.classifier.bias
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in loaded.model.named_parameters() if "pooler" in name], "trained for nothing"
    assert 0.015 < loaded.model.classifier.weight.std() < 0.025  # BERT's initializer_range


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pair_is_two_texts_that_are_embedded_alone(attention: str) -> None:
    """Beside the encoder that is given one text at a time, without padding."""
    loaded = paired()
    assert loaded.new_head == ("classifier.weight", "classifier.bias")
    loaded.model.encoder.set_attn_implementation(attention)
    body = transformers.AutoModel.from_pretrained(TINY / "tiny_encoder").eval()

    def alone(ids: list[int]) -> torch.Tensor:
        mean = body(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        return mean / mean.norm() * len(mean) ** 0.5

    with torch.no_grad():
        found = loaded.model(**BOTH).logits
        texts = [([2, 9, 12, 3], [2, 7, 8, 3]), ([2, 8, 3], [2, 11, 3])]
        for row, (u, v) in enumerate((alone(first), alone(second)) for first, second in texts):
            features = torch.cat([u, v, (u - v).abs(), u * v])
            expected = loaded.model.classifier.weight @ features + loaded.model.classifier.bias
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


def test_a_pair_of_padding_alone_has_no_nan() -> None:
    model = paired().model
    logits = model(**{**BOTH, "attention_mask": BOTH["attention_mask"] * torch.tensor([[1], [0]])}).logits
    logits.sum().backward()
    torch.testing.assert_close(logits[1], model.classifier.bias)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_the_head_hangs_on_the_seed_only() -> None:
    heads = [pooled(seed=seed).model.classifier.weight for seed in (3, 3, 4)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_settings_reach_the_encoder() -> None:
    model = pooled(dropout=0.25, dtype="bfloat16").model
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.25}  # 0: attention's
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("make", "texts"), [(pooled, 1), (paired, 2)])
def test_saved_and_loaded_it_says_the_same(tmp_path: Path, make, texts: int) -> None:
    loaded = make()
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    again = load(str(tmp_path), "sequence_classification", 3, texts=texts)
    assert again.new_head == ()
    with torch.no_grad():
        expected = loaded.model(**BOTH).logits
        assert torch.equal(again.model(**BOTH).logits, expected)
    assert load(str(tmp_path), "sequence_classification", 2, texts=texts).new_head == (
        "classifier.weight",
        "classifier.bias",
    )


def test_a_saved_head_for_pairs_is_not_given_single_texts(tmp_path: Path) -> None:
    loaded = paired()
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="but a row of this task has 1"):
        load(str(tmp_path), "sequence_classification", 3, pooling="mean")


@pytest.mark.parametrize("make", [pooled, paired])
def test_transformers_loads_it_without_privzoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make) -> None:
    """A transformers that has never heard of the class asks leave to run the code in the folder, and then says the same."""
    model = make().model
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, model.config.model_type)
    monkeypatch.delitem(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING._extra_content, type(model.config))
    with pytest.raises(ValueError, match="custom code"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", trust_remote_code=False)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(found).__module__.startswith("transformers_modules.")
    assert "privzoo" not in [line.split()[1] for line in Path(inspect.getfile(type(found))).read_text().splitlines()
                             if line.startswith(("import ", "from "))]  # fmt: skip
    with torch.no_grad():
        expected, logits = (each(**BOTH).logits for each in (model, found.eval()))
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [pooled, paired])
def test_its_clipped_sums_are_those_of_the_definition(make) -> None:
    model = make().model.double()
    labels = torch.tensor([0, 2])

    def losses(rows=slice(None)):
        logits = model(**{name: values[rows] for name, values in BOTH.items()}).logits
        return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")

    found, expected = BookKeeping(model)(losses, clip_norm=0.1), Loop(model)(losses, clip_norm=0.1)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
    assert set(found.sums) == set(expected.sums)
    for name, total in expected.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("pooling", "kind", "name", "words"),
    [
        ("max", "sequence_classification", "tiny_encoder", "expected model.pooling=mean, pair or null"),
        ("pair", "sequence_classification", "tiny_encoder", "but a row of this task has 1: set model.pooling=mean"),
        ("mean", "causal_lm", "tiny_lm", "set model.pooling=null"),
        ("mean", "image_classification", "tiny_vit", "set model.pooling=null"),
    ],
)
def test_refused_where_it_makes_no_sense(pooling: str, kind: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(name, kind, 2, pooling=pooling)


def test_a_tokenizer_that_does_not_tell_texts_apart_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY / "tiny_encoder", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="says which text a token is of"):
        load(str(tmp_path / "model"), "sequence_classification", 2, pooling="pair", texts=2)


def test_an_encoder_that_mixes_the_texts_is_refused(tmp_path: Path) -> None:
    """FNet takes no mask; its Fourier transform runs over the whole row."""
    transformers.FNetModel(transformers.FNetConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
                           ).save_pretrained(tmp_path)  # fmt: skip
    transformers.AutoTokenizer.from_pretrained(TINY / "tiny_encoder").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="needs an encoder that can keep two texts of a row apart"):
        load(str(tmp_path), "sequence_classification", 2, pooling="pair", texts=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pairs_in_half_precision(dtype: str) -> None:
    assert paired(dtype=dtype).model(**BOTH).logits.isfinite().all()


def test_a_row_of_padding_alone_and_large_states_in_half_precision() -> None:
    """Neither gives a NaN, which would take the row's part in a release away."""
    model = pooled().model
    model.classifier.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=MASK * torch.tensor([[1], [0]])).logits
    torch.testing.assert_close(found[1], torch.tensor([1.0, 2.0, 3.0]))

    class Large(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=torch.full((1, 500, 64), 200.0, dtype=torch.float16))

    model.half().encoder = Large()
    with torch.no_grad():
        model.classifier.weight.fill_(1 / 64)
        found = model(input_ids=torch.ones(1, 500).long(), attention_mask=torch.ones(1, 500)).logits
    torch.testing.assert_close(found, torch.tensor([[201.0, 202.0, 203.0]], dtype=torch.float16))


def test_an_encoder_that_calls_its_pooler_unasked(tmp_path: Path) -> None:
    config = transformers.SqueezeBertConfig(vocab_size=300, hidden_size=16, embedding_size=16, num_hidden_layers=1,
                                            num_attention_heads=4, intermediate_size=16)  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY / "tiny_encoder").save_pretrained(tmp_path)
    model = load(str(tmp_path), "sequence_classification", 2, pooling="mean").model
    assert model(input_ids=IDS, attention_mask=MASK).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (None, "holds no encoder"),
        ("bert", "its encoder is 'bert', no configuration"),
        ({"hidden_size": 64}, "does not say of which type"),
        (
            {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4},
            "weights of its body or holds them in another shape",
        ),
    ],
)
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, encoder: object, words: str) -> None:
    loaded = pooled()
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "encoder": encoder}))
    with pytest.raises(UserError, match=words):
        load(str(tmp_path), "sequence_classification", 3)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an encoder-decoder"):
        load(str(tmp_path), "sequence_classification", 2, pooling="mean")


def test_a_damaged_body_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = load("tiny_encoder", "sequence_classification", 2)
    model.model.bert.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "layer.1" in name)
    save_file(
        {name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 1 weights of its body"):
        load(str(tmp_path), "sequence_classification", 2, pooling="mean")
