"""The toy world: the same on every machine, balanced, and without a leak from one part into another."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from privzoo import toyworld

TEXT = {"train": 8000, "validation": 1000}
LM = {"train": 4000, "validation": 500}
IMAGES = {"train": 4000, "validation": 500}
POSITIVE = {
    "good",
    "great",
    "lovely",
    "superb",
    "pleasant",
    "charming",
    "excellent",
    "wonderful",
    "delightful",
    "fine",
    "brilliant",
    "splendid",
}
NEGATIVE = {
    "bad",
    "awful",
    "bland",
    "dull",
    "dreadful",
    "horrible",
    "poor",
    "nasty",
    "terrible",
    "boring",
    "shabby",
    "miserable",
}


# Made once; the tests read them only.
text_rows, lm_rows, image_rows, public_images, public_text = map(
    functools.cache,
    (toyworld.text_rows, toyworld.lm_rows, toyworld.image_rows, toyworld.public_images, toyworld.public_text),
)


def digest(value: object) -> str:
    def plain(item: object) -> str:
        return hashlib.sha256(item.tobytes()).hexdigest() if isinstance(item, np.ndarray) else str(item)

    return hashlib.sha256(json.dumps(value, default=plain).encode()).hexdigest()[:16]


def everything() -> dict[str, str]:
    parts = {"public_text": public_text(), "public_images": public_images()}
    for split in ("train", "validation"):
        parts |= {f"text {split}": text_rows(split), f"lm {split}": lm_rows(split)}
        parts[f"images {split}"] = image_rows(split)
    return {name: digest(rows) for name, rows in parts.items()}


# The committed models and every published toy number hang on these: a change belongs into the CHANGELOG.
GOLDEN = {
    "images train": "ab9e5d1826388298",
    "images validation": "29879ef8199f543e",
    "lm train": "1d855a8b607ea9fb",
    "lm validation": "868488b3ab2e9760",
    "public_images": "a91db9b3d6191e47",
    "public_text": "4d082e0d7519665a",
    "text train": "78be3d79824f5c74",
    "text validation": "238a7fa38686d061",
}


def test_rows_are_those_that_the_committed_models_were_made_from() -> None:
    """The shorter half; tests/test_remade_models.py looks at everything."""
    assert digest(text_rows("train")) == GOLDEN["text train"]
    assert digest(lm_rows("train")) == GOLDEN["lm train"]
    assert digest(image_rows("validation")) == GOLDEN["images validation"]


def test_rows_do_not_hang_on_the_hash_seed_or_on_global_generators() -> None:
    code = "import random, test_toyworld as t; random.seed(5); print(t.digest(t.text_rows('train')))"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.path.dirname(__file__)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest(text_rows("train"))


@pytest.mark.parametrize("rows", [text_rows, lm_rows, image_rows])
def test_an_unknown_split_is_an_error(rows) -> None:
    with pytest.raises(ValueError, match="split='test'"):
        rows("test")


def test_rows_are_fresh_objects() -> None:
    toyworld.text_rows("validation")[0]["text"] = "spoilt"
    assert toyworld.text_rows("validation")[0]["text"] != "spoilt"


@pytest.mark.parametrize(("rows", "sizes", "labels"), [(text_rows, TEXT, 2), (image_rows, IMAGES, 4)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_are_balanced_and_mixed(rows, sizes: dict, labels: int, split: str) -> None:
    found = [row["label"] for row in rows(split)]
    assert Counter(found) == dict.fromkeys(range(labels), sizes[split] // labels)
    # The order tells nothing: the first tenth has every label about as often.
    start = Counter(found[: len(found) // 10])
    assert min(start.values()) > 0.7 * len(found) / 10 / labels


def test_no_row_comes_twice_in_either_split() -> None:
    texts = [row["text"] for split in TEXT for row in text_rows(split)]
    assert len(set(texts)) == len(texts) == sum(TEXT.values())
    pictures = [row["image"].tobytes() for split in IMAGES for row in image_rows(split)]
    assert len(set(pictures)) == len(pictures) == sum(IMAGES.values())
    restaurants = [frozenset(row["prompt"].split(" ; ")) for split in LM for row in lm_rows(split)]
    assert len(set(restaurants)) == len(restaurants) == sum(LM.values())


def private_text() -> list[str]:
    rows = [row["text"] for split in TEXT for row in text_rows(split)]
    return rows + [f"{row['prompt']} {row['target']}" for split in LM for row in lm_rows(split)]


def test_private_words_are_public_but_private_pairs_are_not() -> None:
    public = public_text()
    public_words = {word for text in public for word in text.split()}
    assert {word for text in private_text() for word in text.split()} <= public_words
    opinions = public[: toyworld.PUBLIC_OPINIONS]
    described = noun_adjectives(opinions) & noun_adjectives(private_text())
    assert described == set()
    assert noun_adjectives(opinions), "the pairs must be found at all"


def noun_adjectives(texts: list[str]) -> set[tuple[str, str]]:
    """Pairs (noun, adjective) of every "the <noun> was … <adjective>"."""
    pairs = set()
    for text in texts:
        words = text.split()
        for i, word in enumerate(words):
            if word == "was" and words[i - 2] == "the":
                adjective = next((w for w in words[i + 1 : i + 4] if w in POSITIVE | NEGATIVE), None)
                if adjective:
                    pairs.add((words[i - 1], adjective))
    return pairs


def test_opinions_have_six_to_fourteen_words() -> None:
    assert {len(row["text"].split()) for row in text_rows("train")} == set(range(6, 15))


def test_stated_share_of_labels_is_wrong() -> None:
    """Counted on the sentences that name one thing only, where a rule of three words reads the true label."""
    wrong = plain = 0
    for row in text_rows("train"):
        words = set(row["text"].split())
        verbs = words & {"liked", "loved", "enjoyed", "praised", "hated", "disliked", "regretted", "cursed"}
        if verbs or not words.isdisjoint({"but", "although", "and"}):
            continue
        good = bool(words & POSITIVE) != bool(words & {"not", "never", "hardly"})
        plain += 1
        wrong += good != row["label"]
    assert plain > 500
    assert wrong / plain == pytest.approx(toyworld.LABEL_NOISE, abs=0.012)


def test_counting_good_and_bad_words_is_not_enough() -> None:
    rows = text_rows("validation")
    right = sum(
        (len(POSITIVE & set(row["text"].split())) > len(NEGATIVE & set(row["text"].split()))) == row["label"] for row in rows
    )
    assert right / len(rows) < 0.7


def test_target_says_every_field() -> None:
    for row in lm_rows("validation"):
        fields = dict(field.split(" : ") for field in row["prompt"].split(" ; "))
        assert set(fields) == {"name", "food", "area", "price"}
        assert {fields["name"], fields["food"]} <= set(row["target"].split())
        assert {"low": "cheap", "fair": "moderate", "high": "costly"}[fields["price"]] in row["target"].split()
        assert row["target"].endswith(" .")
        assert row["target"] == row["target"].strip()


def test_public_listings_part_fields_from_text() -> None:
    public = public_text()
    assert not any("=" in text for text in public[: toyworld.PUBLIC_OPINIONS])
    assert all(text.count(" = ") == 1 for text in public[toyworld.PUBLIC_OPINIONS :])


def test_images(monkeypatch) -> None:
    monkeypatch.setattr(toyworld, "_PUBLIC_IMAGES", 200)  # all of them take seconds
    for row in image_rows("validation")[:20]:
        assert row["image"].shape == (16, 16, 3)
        assert row["image"].dtype == np.uint8
        assert type(row["label"]) is int
    assert {row["label"] for row in toyworld.public_images()} == set(range(8))
    assert set(toyworld.PRIVATE_SHAPES).isdisjoint(toyworld.PUBLIC_SHAPES)


def test_mean_colour_tells_nothing_of_the_shape() -> None:
    """Nearest class mean of the three colour channels, learned on train, is at chance (4 classes) on validation."""
    train, validation = image_rows("train"), image_rows("validation")
    means = np.array([np.mean([r["image"].mean((0, 1)) for r in train if r["label"] == k], axis=0) for k in range(4)])
    guesses = [np.linalg.norm(means - r["image"].mean((0, 1)), axis=1).argmin() for r in validation]
    assert np.mean([guess == r["label"] for guess, r in zip(guesses, validation, strict=True)]) < 0.36
