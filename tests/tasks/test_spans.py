"""Spans of a context: windows, where answers stand, the best span; by hand (PRIVACY 37)."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from privzoo.errors import UserError
from privzoo.tasks.data import HubData
from privzoo.tasks.spans import SpanAnswers, best_spans, span_losses

WORDS = [f"w{i % 26}" for i in range(150)]
CONTEXT = " ".join(WORDS)


def row(context, answer, start, question="w1 w2"):
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def answer_at(word, length=2, context=CONTEXT):
    start = len(" ".join(WORDS[:word])) + (word > 0)
    text = " ".join(WORDS[word : word + length])
    assert context[start : start + len(text)] == text
    return row(context, text, start)


@pytest.fixture
def ready(tmp_path, bert_tokenizer):
    def of(train, validation=None, **options):
        for split, rows in (("train", train), ("validation", validation or train)):
            (tmp_path / "d").mkdir(exist_ok=True)
            (tmp_path / "d" / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        data = HubData("x/y", None, "d", {"train": "train", "validation": "validation"})
        task = SpanAnswers("qa", data, "question", "context", "answers", **({"max_length": 100, "stride": 20} | options))
        task.load(str(tmp_path))
        bert_tokenizer.model_max_length = 512
        task.prepare(bert_tokenizer)
        return task

    return of


def test_windows_of_a_question_are_one_unit(ready):
    """150 words in windows of 100 - 2 - 3 = 95 words that have 20 in common: 0..94 and 75..149."""
    task = ready([answer_at(3), row("w5 w6", "w6", 3), answer_at(140)])
    assert [list(map(int, unit)) for unit in task.rows_of_unit] == [[0, 1], [2], [3, 4]]
    assert task.num_examples == 3
    assert [len(task.train[i]["input_ids"]) for i in range(5)] == [100, 80, 7, 100, 80]
    second = task.train[1]
    assert second["input_ids"][5] == task.train[0]["input_ids"][5 + 75]
    assert task.train[0]["from"][:6].tolist() == [-1, -1, -1, -1, 0, 3]  # [CLS] w1 w2 [SEP], then the context


def test_where_the_answer_stands(ready):
    """Words 3 and 4 are in the first window alone, 80 and 81 in both, 94 and 95 whole in the second alone."""
    task = ready([answer_at(3), answer_at(80), answer_at(94)])
    before = 1 + 2 + 1  # [CLS] question [SEP]
    places = [(task.train[i]["start"], task.train[i]["end"]) for i in range(6)]
    first = [before + 3, before + 80, 0]
    second = [0, before + 80 - 75, before + 94 - 75]
    assert places == [(p, p + 1 if p else 0) for pair in zip(first, second, strict=True) for p in pair]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=128,
    )  # fmt: skip
    return BertForQuestionAnswering(config).double().eval()


def test_padding_weighs_nothing(ready, model):
    task = ready([answer_at(3), row("w5 w6", "w6", 3)])
    rows = [task.train[i] for i in range(3)]
    with torch.no_grad():
        together = task.losses(model, task.collate(rows))
        alone = torch.cat([task.losses(model, task.collate([each])) for each in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_loss_by_hand():
    start, end = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 0.0, -torch.inf]])
    found = span_losses(start, end, {"start": torch.tensor([2]), "end": torch.tensor([1])})
    by_hand = (torch.tensor(4.0).log() + (2 + torch.tensor(1.0).exp()).log() - 1) / 2
    torch.testing.assert_close(found, by_hand[None])


def test_best_span_by_hand():
    """Tokens 1 to 4 may be of the answer. The highest start is 4 and the highest end 1, which is no span."""
    start, end = torch.tensor([[9.0, 1.0, 2.0, 0.0, 5.0]]), torch.tensor([[9.0, 6.0, 0.0, 4.0, 0.5]])
    allowed = torch.tensor([[0, 1, 1, 1, 1]])
    assert best_spans(start, end, allowed, 5) == ([7.0], [1], [1])
    end[0, 1] = -1.0
    assert best_spans(start, end, allowed, 5) == ([6.0], [2], [3])
    assert best_spans(start, end, allowed, 1) == ([5.5], [4], [4])


class Oracle(torch.nn.Module):
    """Says where a word stands, if it is in the window, and with little conviction something else if not."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.weight = wanted, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, **rest):
        logits = (input_ids == self.wanted).double() * 5
        return SimpleNamespace(start_logits=logits, end_logits=logits)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_best_window_answers(batch, ready, bert_tokenizer):
    """The word is in the second window alone; windows of a question may come in different micro-batches."""
    words = [*WORDS[:140], "w27", *WORDS[141:]]
    context = " ".join(words)
    task = ready([row(context, "w27", context.index("w27")), row("w5 w6", "w6", 3)])
    windows = [task.validation[i] for i in range(3)]
    loader = [task.collate(windows[i : i + batch]) for i in range(0, 3, batch)]
    found = task.evaluate(Oracle(bert_tokenizer.convert_tokens_to_ids("w27")), loader)
    assert found["exact_match"] == 0.5
    assert set(found) == {"f1", "exact_match", "loss"}


def test_a_long_question_leaves_room(ready):
    task = ready([row("w5 w6", "w6", 3, question=" ".join(WORDS[:120]))], question_tokens=40)
    assert len(task.train[0]["input_ids"]) == 40 + 3 + 2
    assert (task.train[0]["start"], task.train[0]["end"]) == (43, 43)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("w5 w6", "w7", 3), "row 1: an answer of 2 characters is not at character 3 of 'context'"),
        (row("w5 w6", "w6", -2), "row 1: an answer of 2 characters is not at character -2"),
        (row("w5 w6", "", 3), "row 1: an answer of 0 characters"),
        (row("w5 w6", "w6", 3) | {"answers": {"text": ["w6"], "answer_start": []}}, "row 1: 'answers' has texts and places"),
        (row("w5 w6", "w6", 3) | {"answers": {"text": ["w6"]}}, "row 1: 'answers' is"),
        (row("w5 w6", "w6", 3) | {"answers": {"text": [], "answer_start": []}}, "row 1: 'answers' holds no text"),
    ],
    ids=["elsewhere", "before", "empty", "no place", "no places", "no answer"],
)
def test_answers_that_are_not_there(bad, message, ready):
    with pytest.raises(UserError, match=message):
        ready([row("w5 w6", "w6", 3), bad])


def test_arguments_are_checked(ready):
    with pytest.raises(UserError, match="stride=0"):
        ready([row("w5 w6", "w6", 3)], stride=0)
    with pytest.raises(UserError, match=r"task\.max_length=80"):
        ready([row("w5 w6", "w6", 3)], max_length=80)
