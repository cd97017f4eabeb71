"""What the kinds of task share: rows in flat arrays, padding, the mode of the model."""

import pytest
import torch

from privzoo.tasks.base import EncodedRows, at_least_float32, pad_right, padding_mask, scoring


def test_rows_come_back_as_they_went_in_across_batches():
    batches = [
        {"input_ids": [[1, 2], []], "token_type_ids": [[0, 1], []]},
        {"input_ids": [[3]], "token_type_ids": [[1]]},
    ]
    rows = EncodedRows.from_batches(batches, {"label": [5, 6, 7]})
    assert [(r["input_ids"].tolist(), r["token_type_ids"].tolist(), r["label"]) for r in rows] == [
        ([1, 2], [0, 1], 5),
        ([], [], 6),
        ([3], [1], 7),
    ]
    assert len(rows) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            rows[index]


def test_padding():
    rows = [torch.tensor([4, 5, 6]).numpy(), torch.tensor([7]).numpy(), torch.tensor([]).numpy()]
    assert pad_right(rows, 9).tolist() == [[4, 5, 6], [7, 9, 9], [9, 9, 9]]
    assert padding_mask(rows).tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert pad_right(rows[2:], 9).tolist() == [[9]]
    assert pad_right(rows, 9).dtype == padding_mask(rows).dtype == torch.int64


def test_precision():
    kept = {d: at_least_float32(torch.zeros(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float32, torch.float64)}
    assert kept == {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def test_scoring_gives_every_module_its_mode_back():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5)).train()
    model[0].eval()  # a frozen part

    def fail():
        with scoring(model):
            assert not model[1].training
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()
