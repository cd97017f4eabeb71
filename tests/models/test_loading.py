"""Loading: the right class, the right new head, nothing global touched, and one sentence for whatever is wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants

from privzoo import hub
from privzoo.errors import UserError
from privzoo.models import loading
from privzoo.models.loading import load

TINY = Path(loading.__file__).parent / "tiny"
CASES = [
    ("tiny_encoder", "sequence_classification", 2, ("classifier.weight", "classifier.bias")),
    ("tiny_lm", "causal_lm", None, ()),
    ("tiny_vit", "image_classification", 4, ("classifier.weight", "classifier.bias")),
]


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(TINY / name, folder / "model"))


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(("name", "kind", "num_labels", "new_head"), CASES)
def test_tiny_model_loads_for_its_kind(name: str, kind: str, num_labels: int | None, new_head: tuple) -> None:
    loaded = load(name, kind, num_labels)
    assert loaded.new_head == new_head
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    if num_labels:
        assert loaded.model.classifier.weight.shape[0] == num_labels
    held = transformers.AutoModel.from_pretrained(TINY / name).state_dict()
    body = {n.removeprefix(f"{loaded.model.base_model_prefix}."): p for n, p in loaded.model.named_parameters()}
    shared = set(held) & set(body)
    assert len(shared) >= len(body) - len(new_head) > 10
    assert all(torch.equal(held[n], body[n]) for n in shared)


def test_encoder_is_a_masked_language_model_too() -> None:
    model, report = transformers.AutoModelForMaskedLM.from_pretrained(TINY / "tiny_encoder", output_loading_info=True)
    assert not report["missing_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "tiny_encoder")
    batch = tokenizer("the soup [MASK] very good .", return_tensors="pt")
    guess = model(**batch).logits[0, 3].argmax()
    assert tokenizer.convert_ids_to_tokens(int(guess)) == "was"


def test_new_head_hangs_on_the_seed_only_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load("tiny_encoder", "sequence_classification", 2, seed=3).model.classifier.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = load("tiny_encoder", "sequence_classification", 2, seed=3).model.classifier.weight
    other = load("tiny_encoder", "sequence_classification", 2, seed=4).model.classifier.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.01 < first.std() < 0.03  # BERT's initializer_range


def test_head_of_another_size_counts_as_new(tmp_path: Path) -> None:
    load("tiny_encoder", "sequence_classification", 3).model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY / "tiny_encoder").save_pretrained(tmp_path)
    assert load(str(tmp_path), "sequence_classification", 3).new_head == ()
    assert load(str(tmp_path), "sequence_classification", None).model.num_labels == 3
    resized = load(str(tmp_path), "sequence_classification", 2)
    assert resized.new_head == ("classifier.weight", "classifier.bias")
    assert resized.model.classifier.weight.shape == (2, 64)
    assert torch.isfinite(resized.model.classifier.weight).all()


@pytest.mark.parametrize(("name", "model"), [("tiny_encoder", "BertForMaskedLM"), ("tiny_lm", "GPT2LMHeadModel")])
def test_a_prompt_takes_a_language_model_as_it_was_pretrained(name: str, model: str) -> None:
    loaded = load(name, "prompt", 3)
    assert type(loaded.model).__name__ == model
    assert loaded.new_head == ()
    assert loaded.model.config.num_labels == load(name, "prompt").model.config.num_labels


def test_a_prompt_wants_the_weights_that_say_words(tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(TINY / "tiny_encoder").save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY / "tiny_encoder").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks weights that say words, such as cls\..*task\.head=classifier"):
        load(str(tmp_path), "prompt", 2)


@pytest.mark.parametrize(("name", "kind", "num_labels", "_"), CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_every_dropout_but_that_of_attention_is_set(
    tmp_path: Path, name: str, kind: str, num_labels: int | None, _: tuple, dropout: float
) -> None:
    folder = copy_of(name, tmp_path)
    fields = {
        "tiny_encoder": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
        "tiny_lm": ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"),
        "tiny_vit": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    }[name]
    edit_config(folder, **dict.fromkeys(fields, 0.1))
    model = load(str(folder), kind, num_labels, dropout=dropout).model
    assert {getattr(model.config, field) for field in fields if "att" not in field} == {dropout}
    assert {getattr(model.config, field) for field in fields if "att" in field} == {0.0}
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} | {0.0} == {0.0, dropout}


def test_dropout_fields_that_are_unset_or_nested_are_set_too() -> None:
    inner = transformers.PretrainedConfig(drop_path_rate=0.2)
    config = transformers.PretrainedConfig(classifier_dropout=None, use_dropout_layer=True, vision_config=inner)
    loading._set_dropout(config, 0.3)
    assert (config.classifier_dropout, config.use_dropout_layer, inner.drop_path_rate) == (0.3, True, 0.0)


def test_dtype_is_converted() -> None:
    assert load("tiny_lm", "causal_lm", dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16


def test_tokenizer_pads_on_the_right_and_has_a_pad_token(tmp_path: Path) -> None:
    folder = copy_of("tiny_lm", tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    edit_config(folder, pad_token_id=None)
    loaded = load(str(folder), "causal_lm")
    assert loaded.processor.pad_token == loaded.processor.eos_token == "<|endoftext|>"
    assert loaded.model.config.pad_token_id == loaded.processor.eos_token_id
    ids = loaded.processor(["the soup", "the soup was good"], padding=True)["input_ids"]
    assert ids[0][-2:] == [loaded.processor.pad_token_id] * 2


def test_word_tokenizers_know_the_whole_world() -> None:
    from privzoo import toyworld

    for name, kind in [("tiny_encoder", "sequence_classification"), ("tiny_lm", "causal_lm")]:
        tokenizer = load(name, kind, 2).processor
        rows = [row["text"] for row in toyworld.text_rows("validation")]
        rows += [f"{row['prompt']} = {row['target']}" for row in toyworld.lm_rows("validation")]
        ids = tokenizer(rows, add_special_tokens=False)["input_ids"]
        assert all(tokenizer.unk_token_id not in row for row in ids)
        assert [tokenizer.decode(row) for row in ids[:50]] == rows[:50]
    pair = load("tiny_encoder", "sequence_classification", 2).processor("good soup", "bad soup")
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_nothing_of_transformers_reaches_the_screen(capfd: pytest.CaptureFixture) -> None:
    bars = transformers.utils.logging.is_progress_bar_enabled()
    verbosity = transformers.utils.logging.get_verbosity()
    for name, kind, num_labels, _ in CASES:
        load(name, kind, num_labels)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    assert transformers.utils.logging.get_verbosity() == verbosity


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("tiny_vit", "sequence_classification", 2), ["'vit'", "sequence classification"]),
        (("tiny_encoder", "image_classification", 2), ["'bert'", "image classification"]),
        (("tiny_encoder", "causal_lm"), ["encoder", "sees the words"]),
        (("tiny_lm", "spans"), ["kind='spans'", "causal_lm"]),
        (("tiny_lm", "causal_lm", None, "float33"), ["dtype='float33'", "float32"]),
        (("tiny_lm", "causal_lm", None, "int64"), ["dtype='int64'", "float32"]),
        (("tiny_lm", "causal_lm", None, "nn"), ["dtype='nn'", "float32"]),
        (("tiny_lm", "causal_lm", None, "float32", 1.0), ["dropout=1.0", "< 1"]),
        (("tiny_lm", "causal_lm", None, "float32", -0.1), ["dropout=-0.1", "0 <="]),
        (("/no/such/model", "causal_lm"), ["/no/such/model", "does not exist", "model.path"]),
        (("../no-such-model", "causal_lm"), ["../no-such-model", "does not exist", "model.path"]),
        (("a/b/c", "causal_lm"), ["a/b/c", "does not exist", "model.path"]),
        (("no model", "causal_lm"), ["'no model'", "model.path"]),
    ],
)
def test_bad_argument(arguments: tuple, parts: list[str]) -> None:
    assert_sentence(parts, *arguments)


def assert_sentence(parts: list[str], *arguments: object) -> None:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    assert_sentence([str(tmp_path), "no config.json", "save_pretrained"], str(tmp_path), "causal_lm")
    (tmp_path / "config.json").write_text("{}")
    assert_sentence([str(tmp_path), "model_type"], str(tmp_path), "causal_lm")
    (tmp_path / "config.json").write_text("{")
    assert_sentence([str(tmp_path), "cannot be read"], str(tmp_path), "causal_lm")
    assert_sentence(["is a file"], str(tmp_path / "config.json"), "causal_lm")


@pytest.mark.parametrize("kept", [0, 4, 1000, -4])
def test_truncated_weights(tmp_path: Path, kept: int) -> None:
    folder = copy_of("tiny_lm", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert_sentence([str(folder), "cannot be read", "model.path"], str(folder), "causal_lm")


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_missing_file(tmp_path: Path, missing: str) -> None:
    folder = copy_of("tiny_lm", tmp_path)
    (folder / missing).unlink()
    assert_sentence([str(folder), "cannot be read", "model.path"], str(folder), "causal_lm")


def test_missing_image_processor(tmp_path: Path) -> None:
    folder = copy_of("tiny_vit", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    assert_sentence([str(folder), "cannot be read"], str(folder), "image_classification", 4)


def test_body_is_never_drawn_afresh(tmp_path: Path) -> None:
    folder = copy_of("tiny_encoder", tmp_path)
    shutil.copy(TINY / "tiny_vit" / "model.safetensors", folder)
    assert_sentence([str(folder), "lacks", "bert."], str(folder), "sequence_classification", 2)
    shutil.copy(TINY / "tiny_encoder" / "model.safetensors", folder)
    edit_config(folder, intermediate_size=96)
    assert_sentence([str(folder), "another shape", "bert.encoder"], str(folder), "sequence_classification", 2)


def test_missing_pooler_is_part_of_the_new_head(tmp_path: Path) -> None:
    folder = copy_of("tiny_encoder", tmp_path)
    transformers.AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    loaded = load(str(folder), "sequence_classification", 2)
    assert loaded.new_head[:2] == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert loaded.new_head[2:] == ("classifier.weight", "classifier.bias")


def test_a_base_in_8_bits_is_refused(tmp_path: Path) -> None:
    """Its layers look for outlying columns over all rows of a batch."""
    folder = copy_of("tiny_lm", tmp_path)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert_sentence(["stored quantised by bitsandbytes", "model.quantization=nf4"], str(folder), "causal_lm")


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = copy_of("tiny_lm", tmp_path)
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["vocab"]["addition"] = len(core["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(core))
    assert_sentence(["tokens", "different models"], str(folder), "causal_lm")


def test_code_in_a_model_folder_is_never_run_or_asked_about(tmp_path: Path) -> None:
    folder = copy_of("tiny_lm", tmp_path)
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    started = time.monotonic()
    assert_sentence([str(folder)], str(folder), "causal_lm")
    assert time.monotonic() - started < 5


def test_unreachable_hub_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    assert_sentence(["'some/model'", "model.path=<folder>", "HF_HUB_OFFLINE", "network"], "some/model", "causal_lm")
    assert time.monotonic() - started < 10


def test_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, never answers
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
        started = time.monotonic()
        assert_sentence(["'some/model'", "imeout"], "some/model", "causal_lm")
        assert time.monotonic() - started < 10


@pytest.mark.sweep
def test_offline_mode_asks_nobody_and_uses_the_cache(tmp_path: Path) -> None:
    assert_sentence(["'some/model'", "HF_HUB_OFFLINE is set"], "some/model", "causal_lm")
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(TINY / "tiny_lm", cached / "snapshots" / ("a" * 40))
    code = "from privzoo.models.loading import load; print(len(load('some/model', 'causal_lm').processor))"
    # The hub's folder is read when transformers is imported, so this needs a process of its own.
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) == len(load("tiny_lm", "causal_lm").processor)


@pytest.mark.shared
def test_minilm_loads_as_float32(shared: Path) -> None:
    loaded = load(str(shared / "weights" / "minilm"), "sequence_classification", 2)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.new_head == ("classifier.weight", "classifier.bias")
    assert sum(p.numel() for p in loaded.model.bert.parameters()) == 22_713_216
    assert {m.p for m in loaded.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@pytest.mark.shared
def test_llama_loads(shared: Path) -> None:
    loaded = load(str(shared / "weights" / "stories260k"), "causal_lm")
    assert loaded.new_head == ()
    assert loaded.processor.pad_token is not None
