import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from privzoo.errors import UserError
from privzoo.tasks.classification import Classification
from privzoo.tasks.data import HubData

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12 w13 w14", "w15 w16"]
LABELS = [0, 2, 1, 1, 0]


def build(source, text="a", **changes):
    arguments = {"name": "t", "text": text, "label": "y", "num_labels": 3, "max_length": 16} | changes
    return Classification(data=source, **arguments)


@pytest.fixture
def task(source, folder, bert_tokenizer):
    rows = {"a": TEXTS, "b": ["w20 w21"] * 5, "y": LABELS}
    task = build(source)
    task.load(folder(train=rows, validation=rows))
    task.prepare(bert_tokenizer)
    return task


def rows_of(task, *indices):
    return [task.train[i] for i in indices]


def test_rows_are_the_tokenizers(task):
    assert task.num_examples == 5
    assert task.train[1]["input_ids"].tolist() == [2, 8, 3]  # [CLS] w4 [SEP]
    assert task.train[1]["label"] == 2
    assert [task.length(row) for row in task.train] == [5, 3, 8, 6, 4]
    assert len(task.validation) == 5


def test_collate_by_hand(task):
    batch = task.collate(rows_of(task, 1, 0))
    assert batch["input_ids"].tolist() == [[2, 8, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0] * 5, [0] * 5]
    assert batch["labels"].tolist() == [2, 0]
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert task.rows_of_unit is None


def test_more_rows_than_one_tokenizer_call_keep_their_order(source, folder, bert_tokenizer):
    texts = [f"w{i % 30}" + " w0" * (i % 7) for i in range(4_501)]
    rows = {"a": texts, "y": [i % 3 for i in range(4_501)]}
    task = build(source)
    task.load(folder(train=rows, validation=rows))
    task.prepare(bert_tokenizer)
    assert len(task.train) == 4_501
    for i in (0, 1_999, 2_000, 2_001, 3_999, 4_000, 4_500):
        assert task.train[i]["input_ids"].tolist() == bert_tokenizer(texts[i]).input_ids
        assert task.train[i]["label"] == i % 3


def test_a_pair_of_texts(source, folder, bert_tokenizer):
    rows = {"a": ["w0 w1 w2 w3 w4"], "b": ["w5 w6"], "y": [1]}
    task = build(source, ["a", "b"], max_length=8)
    task.load(folder(train=rows, validation=rows))
    task.prepare(bert_tokenizer)
    # 3 special tokens and 5 words: the longer text lost its last two
    assert task.train[0]["input_ids"].tolist() == [2, 4, 5, 6, 3, 9, 10, 3]
    assert task.train[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_long_rows_are_cut(source, folder, bert_tokenizer):
    rows = {"a": TEXTS, "y": LABELS}
    task = build(source, max_length=5)
    task.load(folder(train=rows, validation=rows))
    task.prepare(bert_tokenizer)
    assert task.train[2]["input_ids"].tolist() == [2, 9, 10, 11, 3]
    assert max(map(task.length, task.train)) == 5


def test_a_text_without_tokens_still_gives_a_row(source, folder, gpt_tokenizer):
    rows = {"a": ["", "w0"], "y": [0, 1]}
    task = build(source)
    task.load(folder(train=rows, validation=rows))
    task.prepare(gpt_tokenizer)  # sets no special tokens, and has no padding token
    batch = task.collate(rows_of(task, 0))
    assert batch["input_ids"].tolist() == [[0]]
    assert batch["attention_mask"].tolist() == [[1]]


def test_losses_are_each_rows_own(task, bert):
    losses = task.losses(bert, task.collate(rows_of(task, *range(5))))
    alone = [functional.cross_entropy(bert(torch.tensor([r["input_ids"].tolist()])).logits[0], torch.tensor(r["label"]))
             for r in rows_of(task, *range(5))]  # fmt: skip
    torch.testing.assert_close(losses, torch.stack(alone), rtol=0, atol=1e-12)
    assert losses.shape == (5,)


def test_another_rows_text_label_and_length_change_nothing(task, bert, gradients):
    """Row 2 is the longest, so the padded length stays; bit for bit."""
    reference = task.losses(bert, task.collate(rows_of(task, 2, 0)))
    expected = gradients(reference, bert)[0]
    for other in (1, 3, 4, 2):
        losses = task.losses(bert, task.collate(rows_of(task, 2, other)))
        assert torch.equal(losses[0], reference[0])
        assert torch.equal(gradients(losses, bert)[0], expected)


def test_padding_changes_nothing(task, bert, gradients):
    """Row 1 (3 tokens) alone, and beside rows of 4 and 8 tokens, at the first place and at the last."""
    alone = task.losses(bert, task.collate(rows_of(task, 1)))
    expected = gradients(alone, bert)[0]
    assert expected.norm() > 1e-3
    for others in ((4,), (2,), (2, 4)):
        for order in ((1, *others), (*others, 1)):
            losses = task.losses(bert, task.collate(rows_of(task, *order)))
            row = order.index(1)
            torch.testing.assert_close(losses[row], alone[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(gradients(losses, bert)[row], expected, rtol=0, atol=1e-12)


def test_half_precision_losses_are_float32(task, bert):
    assert task.losses(bert.to(torch.bfloat16), task.collate(rows_of(task, 0, 1))).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_evaluate_equals_one_row_at_a_time(task, bert, batches, size):
    right, loss = 0, 0.0
    for row in task.validation:
        logits = bert(torch.tensor([row["input_ids"].tolist()])).logits[0]
        right += int(logits.argmax() == row["label"])
        loss -= logits.log_softmax(0)[row["label"]].item()
    assert 0 < right < 5
    loader = (task.collate(rows) for rows in batches(task.validation, size))
    scores = task.evaluate(bert.train(), loader)
    assert tuple(scores) == task.metrics
    assert scores["accuracy"] == right / 5
    assert scores["loss"] == pytest.approx(loss / 5, abs=1e-12)
    assert bert.training


def test_evaluate_turns_dropout_off_and_takes_no_gradient(task, bert):
    bert.dropout.p = 0.9
    batch = task.collate(list(task.validation))
    assert len({task.evaluate(bert.train(), [batch])["loss"] for _ in range(5)}) == 1
    seen = []
    bert.classifier.register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
    task.evaluate(bert, [batch])
    assert seen == [False]


def test_fingerprint_hangs_on_the_train_rows_and_the_settings(source, folder):
    def of(texts=TEXTS, labels=LABELS, extra="x", validation="w0", **changes):
        task = build(source, **changes)
        rows = {"a": texts, "b": ["w1"] * len(texts), "y": labels, "unused": [extra] * len(texts)}
        task.load(folder(train=rows, validation={"a": [validation], "b": [""], "y": [0]}))
        return task.fingerprint()

    base = of()
    assert of() == base
    assert of(extra="other") == base
    assert of(validation="w1") == base
    changed = [
        of(texts=["w1 w2 w4", *TEXTS[1:]]),
        of(labels=[1, *LABELS[1:]]),
        of(texts=TEXTS[::-1], labels=LABELS[::-1]),
        of(texts=TEXTS[:4], labels=LABELS[:4]),
        of(max_length=17),
        of(text="b"),
        of(text=["a", "b"]),
        of(text=["b", "a"]),
    ]
    assert len({base, *changed}) == len(changed) + 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text": []}, "names 0 columns"),
        ({"text": ["a", "b", "c"]}, "names 3 columns"),
        ({"num_labels": 1}, "num_labels=1"),
        ({"label_names": ["no", "yes"]}, "2 names, expected num_labels=3"),
    ],
)
def test_bad_arguments(source, changes, expected):
    with pytest.raises(UserError, match=expected):
        build(source, **changes)


def test_processors_that_do_not_fit(source, folder, bert_tokenizer):
    rows = {"a": TEXTS, "y": LABELS}
    root = folder(train=rows, validation=rows)
    for processor, changes, expected in [
        (None, {}, "no tokenizer"),
        (bert_tokenizer, {"max_length": 33}, "at most 32 tokens: set task.max_length=32"),
        (bert_tokenizer, {"max_length": 2}, "max_length=2 to be a whole number of at least 3"),
    ]:
        task = build(source, **changes)
        task.load(root)
        with pytest.raises(UserError, match=expected):
            task.prepare(processor)


def test_both_splits_are_needed_and_checked(source, folder):
    task = build(source)
    with pytest.raises(UserError, match="no split 'validation'"):
        task.load(folder(train={"a": TEXTS, "y": LABELS}))
    with pytest.raises(UserError, match=r"validation.parquet, row 1: 'y' is 3, expected an integer from 0 to 2"):
        task.load(folder(validation={"a": TEXTS, "y": [0, 3, 0, 0, 0]}))


@pytest.mark.shared
@pytest.mark.sweep
def test_all_of_sst2_is_tokenised_as_its_tokenizer_does_it(shared):
    from transformers import AutoTokenizer

    from privzoo.tasks.data import HubData

    tokenizer = AutoTokenizer.from_pretrained(shared / "weights" / "minilm")
    splits = {"train": "train", "validation": "validation"}
    task = Classification("sst2", HubData("nyu-mll/glue", "sst2", "sst2", splits), ["sentence"], "label", 2, 256)
    task.load(str(shared / "data"))
    task.prepare(tokenizer)
    assert task.num_examples == len(task.train) == 67_349
    assert len(task.validation) == 872
    assert tokenizer.decode(task.train[0]["input_ids"]) == "[CLS] hide new secretions from the parental units [SEP]"
    # 67,349 rows of about 13 tokens, two int32 fields: a few MB, not one Python object a token
    held = sum(flat.nbytes for flat in task.train._tokens.values())
    assert held == 2 * 4 * sum(map(task.length, task.train))


def test_further_splits_are_scored_each_by_itself(tmp_path, bert_tokenizer, bert, batches):
    """Rows of all of them share micro-batches; only validation's make accuracy and loss."""
    splits = {"train": "train", "validation": "matched", "other": "mismatched"}
    source = HubData("some/set", None, "set", splits)
    (tmp_path / "set").mkdir()
    rows = {"train": (TEXTS, LABELS), "matched": (TEXTS[1:], LABELS[1:]), "mismatched": (["w7 w7", "w3"], [2, 2])}
    for name, (texts, labels) in rows.items():
        pq.write_table(pa.table({"a": texts, "y": labels}), tmp_path / "set" / f"{name}.parquet")
    whole = build(source, also_scored=["other"])
    assert whole.metrics == ("accuracy", "loss", "accuracy_other")
    matched, other = (
        build(source),
        build(HubData("some/set", None, "set", splits | {"validation": "mismatched", "other": "x"})),
    )
    for task in (whole, matched, other):
        task.load(str(tmp_path))
        task.prepare(bert_tokenizer)
    assert [len(task.validation) for task in (whole, matched, other)] == [6, 4, 2]
    assert "part" not in whole.collate([whole.train[0]])
    found = whole.evaluate(bert, (whole.collate(rows) for rows in batches(whole.validation, 4)))
    alone, beside = (task.evaluate(bert, [task.collate(list(task.validation))]) for task in (matched, other))
    assert found == pytest.approx(alone | {"accuracy_other": beside["accuracy"]})
    assert tuple(found) == whole.metrics


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_rows_without_a_label_are_left_out(tmp_path, bert_tokenizer, suffix):
    source = HubData("some/set", None, "set", {"train": "train", "validation": "train2"})
    (tmp_path / "set").mkdir()
    table = pa.table({"a": TEXTS, "y": [0, -1, 1, 1, -1]})
    for name in ("train", "train2"):
        path = tmp_path / "set" / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(table, path)
        elif suffix == "csv":
            path.write_text("a,y\n" + "".join(f"{row['a']},{row['y']}\n" for row in table.to_pylist()))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    task = build(source, unlabelled=-1)
    task.load(str(tmp_path))
    task.prepare(bert_tokenizer)
    assert task.num_examples == len(task.train) == len(task.validation) == 3
    assert [row["label"] for row in (task.train[i] for i in range(3))] == [0, 1, 1]
    with pytest.raises(UserError, match="'y' is -1, expected an integer from 0 to 2"):
        build(source).load(str(tmp_path))
