"""Few-shot splits: the rows that a public seed names, k of every class, and a card that says for whom the promise is."""

import json
from collections import Counter

import pytest

from privzoo.composition import compose
from privzoo.errors import UserError
from privzoo.privacy.card import privacy_card
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.plan import PrivacyPlan
from privzoo.tasks.cells import Column
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.few_shot import FewShot

COLUMNS = [Column("text", "text"), Column("label", "label", 2)]
TOY = ToyData("text")


def rows_of(per_class: int, seed: int, split: str = "train") -> list[tuple]:
    table = FewShot(TOY, per_class, seed).load(split, COLUMNS, None)
    return list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_k_rows_of_each_class_in_the_order_of_the_source() -> None:
    whole = TOY.load("train", COLUMNS, None)
    places = {text: place for place, text in reversed(list(enumerate(whole["text"].to_pylist())))}
    found = rows_of(40, 42)
    assert Counter(label for _, label in found) == {0: 40, 1: 40}
    assert len({places[text] for text, _ in found}) == 80
    firsts = [places[text] for text, _ in found]
    assert firsts == sorted(firsts)
    labels = whole["label"].to_pylist()
    assert all(labels[places[text]] == label for text, label in found)


def test_the_seed_alone_decides() -> None:
    assert rows_of(40, 42) == rows_of(40, 42)
    common = set(rows_of(40, 42)) & set(rows_of(40, 13))
    assert len(common) < 10


def test_the_validation_split_is_whole() -> None:
    assert len(rows_of(1, 42, "validation")) == TOY.load("validation", COLUMNS, None).num_rows


def test_too_few_rows_of_a_class(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    lines = [json.dumps({"text": f"text {i}", "label": int(i == 0)}) for i in range(9)]
    (tmp_path / "mine" / "train.jsonl").write_text("\n".join(lines))
    few = FewShot(HubData("mine", None, "mine", {"train": "train"}), 2, 0)
    with pytest.raises(UserError, match=r"class 1 has 1 training rows, expected at least task\.data\.per_class=2: lower it"):
        few.load("train", COLUMNS, str(tmp_path))


@pytest.mark.parametrize("columns", [COLUMNS[:1], [*COLUMNS, Column("other", "label", 2)]])
def test_one_label_is_needed(columns, monkeypatch) -> None:
    monkeypatch.setattr(ToyData, "load", lambda self, split, columns, data_root: None)
    with pytest.raises(UserError, match="one label column"):
        FewShot(TOY, 1, 0).load("train", columns, None)


@pytest.mark.parametrize(
    ("per_class", "changes", "words"),
    [
        (0, {}, r"per_class=0, expected a whole number of at least 1"),
        (None, {"rows": 0}, r"rows=0"),
        (1, {"test_rows": 0}, r"test_rows=0"),
        (1, {"seed": -1}, r"seed=-1, expected a whole number of at least 0"),
        (1, {"seed": None}, r"seed=None"),
        (1, {"rows": 5}, r"per_class=1 and rows=5, expected one: set the other to null"),
        (None, {}, r"per_class=None and rows=None"),
    ],
)
def test_numbers_that_choose_nothing_or_twice_are_refused(per_class, changes, words) -> None:
    with pytest.raises(UserError, match=words):
        FewShot(TOY, per_class, **{"seed": 0} | changes)


def test_so_many_rows_of_all_classes() -> None:
    """The protocol of DPZero for OPT: no label is needed, and no order of the source is lost."""
    whole = TOY.load("train", COLUMNS, None)["text"].to_pylist()
    found = FewShot(TOY, None, 0, rows=100).load("train", COLUMNS[:1], None)["text"].to_pylist()
    assert len(found) == 100
    left = iter(whole)
    assert all(text in left for text in found), "not in the order of the source"
    other = FewShot(TOY, None, 29, rows=100).load("train", COLUMNS[:1], None)["text"].to_pylist()
    assert len(set(found) & set(other)) < 20
    with pytest.raises(UserError, match=r"There are 8000 training rows, expected at least task\.data\.rows=9000"):
        FewShot(TOY, None, 0, rows=9000).load("train", COLUMNS, None)


def test_so_many_test_rows() -> None:
    whole = TOY.load("validation", COLUMNS, None)
    found = FewShot(TOY, 1, 42, test_rows=50).load("validation", COLUMNS, None)
    assert found.num_rows == 50
    assert set(found["text"].to_pylist()) <= set(whole["text"].to_pylist())
    assert found["text"].to_pylist() != whole["text"].to_pylist()[:50]
    assert FewShot(TOY, 1, 42, test_rows=10**6).load("validation", COLUMNS, None).equals(whole)


@pytest.mark.parametrize("changes", [{"per_class": 4}, {"per_class": None, "rows": 5, "test_rows": 5}])
def test_the_train_split_under_another_name_is_refused(changes, tmp_path) -> None:
    """Whatever rows of it are selected."""
    (tmp_path / "mine").mkdir()
    lines = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(20)]
    for name in ("train", "test"):
        (tmp_path / "mine" / f"{name}.jsonl").write_text("\n".join(lines))
    few = FewShot(HubData("mine", None, "mine", {"train": "train", "validation": "test"}), seed=0, **changes)
    few.load("train", COLUMNS, str(tmp_path))
    with pytest.raises(UserError, match="train and validation are the same 20 rows"):
        few.load("validation", COLUMNS, str(tmp_path))


def test_a_class_that_has_fewer(tmp_path) -> None:
    """TREC's smallest class has 86 rows of the 512 that DPZero asks for."""
    (tmp_path / "mine").mkdir()
    lines = [json.dumps({"text": f"text {i}", "label": int(i < 2)}) for i in range(9)]
    (tmp_path / "mine" / "train.jsonl").write_text("\n".join(lines))
    few = FewShot(HubData("mine", None, "mine", {"train": "train"}), 4, 0, fewer=True)
    table = few.load("train", COLUMNS, str(tmp_path))
    assert Counter(table["label"].to_pylist()) == {0: 4, 1: 2}
    assert "at most 4 rows of each class" in few.selection


def test_dpzeros_recipe_makes_two_thousand_releases() -> None:
    cfg = compose(["task=sst2_few_shot", "method=dpzero", "eps=8"])
    assert cfg.epochs * 2 * cfg.task.data.per_class / cfg.batch_size == 2000
    assert (cfg.task.data.seed, cfg.method.trainable, cfg.clip_norm) == (42, "biases", 10.0)


def test_the_card_says_for_whom_the_promise_is(privzoo, tmp_path) -> None:
    """PRIVACY 38: N is that of the selected rows, and so is what the statement and the limits say."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "few.yaml").write_text(
        "_target_: privzoo.tasks.classification.Classification\n_convert_: all\nname: few\n"
        "data: {_target_: privzoo.tasks.few_shot.FewShot, source: {_target_: privzoo.tasks.data.ToyData, kind: text}, "
        "per_class: 50, seed: 7}\ntext: [text]\nlabel: label\nnum_labels: 2\nmax_length: 32\n"
        "default_model: tiny_encoder\nnum_examples: null\n"
    )
    code, output = privzoo(
        "--config-dir", str(tmp_path), "task=few", "method=dp_head", "eps=8", "batch_size=50", "epochs=1", "lr=1e-3",
        "trainer.accelerator=cpu", f"output_dir={tmp_path}/runs",
    )  # fmt: skip
    assert code == 0, output
    (run,) = (tmp_path / "runs").iterdir()
    card = json.loads((run / "privacy.json").read_text())
    assert card["plan"]["num_examples"] == 100
    assert "of the 100 in training" in card["statement"]
    assert card["limits"][-1].startswith("The training examples are 50 rows of each class, selected by the public seed 7: ")


def test_a_selection_is_a_limit_of_the_card(tmp_path) -> None:
    plan = PrivacyPlan(num_examples=100, batch_size=50, epochs=1, delta=1e-3, noise_multiplier=1.0)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        limits = [
            privacy_card(plan, ledger, False, False, "a gradient", selection)["limits"] for selection in (None, "Some rows.")
        ]
    assert limits[1] == [*limits[0], "Some rows."]


@pytest.mark.shared
def test_real_sst2(shared) -> None:
    few = compose(["task=sst2_few_shot"]).task.data
    from hydra.utils import instantiate

    table = instantiate(few).load("train", [Column("sentence", "text"), COLUMNS[1]], str(shared / "data"))
    assert Counter(table["label"].to_pylist()) == {0: 512, 1: 512}
