"""The committed tiny models are what the script makes. That takes a minute: `make check` does it."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy

from privzoo import toyworld
from privzoo.models import pretrain

NAMES = ["tiny_encoder", "tiny_lm", "tiny_vit"]
COMMITTED = pretrain.TINY_FOLDER


def public_loss(folder: Path) -> float:
    """How well the model in `folder` knows the public part; for the ViT, which has no head, by a linear probe."""
    if folder.name == "tiny_vit":
        rows = toyworld._image_rows(np.random.default_rng(16), toyworld.PUBLIC_SHAPES, 800)  # of the public part's kind
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        pixels = processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        body = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        with torch.no_grad():
            features = body(pixels).last_hidden_state[:, 0].double()
        features = torch.cat([features, torch.ones(len(rows), 1)], dim=1)
        wanted = torch.eye(8, dtype=torch.float64)[[row["label"] for row in rows]]
        return float((features @ torch.linalg.lstsq(features, wanted).solution - wanted).square().mean())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = toyworld.public_text()[8900:9100]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    if folder.name == "tiny_lm":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        return float(cross_entropy(logits[real[:, 1:]], ids[:, 1:][real[:, 1:]]))
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    texts_part = slice(0, 100)  # opinions; the encoder has read nothing else
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids > 4)
    with torch.no_grad():
        logits = model(ids.masked_fill(hidden, tokenizer.mask_token_id), real.long()).logits
    return float(cross_entropy(logits[texts_part][hidden[texts_part]], ids[texts_part][hidden[texts_part]]))


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that the script has made just now."""
    out = tmp_path_factory.mktemp("pretrained")
    assert pretrain.main([f"out={out}", f"model={request.param}"]) == 0
    assert [path.name for path in out.iterdir()] == [request.param]
    return out / request.param


def test_the_script_makes_the_committed_files(made: Path) -> None:
    committed = COMMITTED / made.name
    assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in committed.iterdir())
    for path in committed.glob("*.json"):
        texts = [(folder / path.name).read_text() for folder in (made, committed)]
        contents = [json.loads(text) for text in texts]
        for content in contents:
            content.pop("transformers_version", None)
        assert contents[0] == contents[1], path.name
        if path.name.startswith("tokenizer"):
            assert texts[0] == texts[1]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (made, committed))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    # On one kind of processor the same bits. Another one rounds otherwise and training spreads that: with the start
    # moved by one unit in the last place LM and ViT came to cosines of 0.9998, the encoder, which has a plateau to get
    # off, to 0.65 with a loss 3.5 % apart; with another seed they come to about 0. Vectors are left out: biases of keys,
    # of which softmax takes no notice, hold nothing but rounding errors.
    nearness, loss_apart = (0.3, 0.1) if made.name == "tiny_encoder" else (0.98, 0.03)
    for name in ours:
        if ours[name].ndim > 1:
            assert float(cosine_similarity(ours[name].flatten(), theirs[name].flatten(), dim=0)) > nearness, name
    assert public_loss(made) == pytest.approx(public_loss(committed), rel=loss_apart)


@pytest.mark.parametrize(("name", "at_most"), [("tiny_encoder", 3.0), ("tiny_lm", 1.5), ("tiny_vit", 0.07)])
def test_committed_model_knows_the_public_part(name: str, at_most: float) -> None:
    """Untrained ones score 5.4, 5.5 and 0.10."""
    assert public_loss(COMMITTED / name) < at_most


def test_all_rows_are_those_that_the_committed_models_were_made_from() -> None:
    rows = runpy.run_path(str(Path(__file__).with_name("test_toyworld.py")))
    assert rows["everything"]() == rows["GOLDEN"]
