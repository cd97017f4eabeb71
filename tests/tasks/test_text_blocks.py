"""Running text: blocks are counted in words, every token but a row's first carries loss, and padding none."""

import pytest
import torch

from privzoo.errors import UserError
from privzoo.tasks.text_blocks import TextBlocks

LINES = ["w0 w1 w2\n", "", " w3\n", "w4 w5 w6 w7 w8 w9 w10 w11 w12", "w13 w14\n"]


def build(source, words=4, max_length=16):
    return TextBlocks("t", source, "a", words, max_length)


@pytest.fixture
def task(source, folder, bos_tokenizer):
    found = build(source)
    found.load(folder(train={"a": LINES}, validation={"a": LINES[:3]}))
    found.prepare(bos_tokenizer)
    return found


def words_of(task, tokenizer):
    return [tokenizer.convert_ids_to_tokens(task.train[i]["input_ids"].tolist()) for i in range(len(task.train))]


def test_blocks_run_on_over_rows(task, bos_tokenizer):
    assert task.num_examples == len(task.train) == 4
    assert words_of(task, bos_tokenizer) == [
        ["<s>", "w0", "w1", "w2", "w3"],
        ["<s>", "w4", "w5", "w6", "w7"],
        ["<s>", "w8", "w9", "w10", "w11"],
        ["<s>", "w12", "w13", "w14"],
    ]
    assert len(task.validation) == 1
    assert "block of 4 words" in task.selection


def test_the_number_of_examples_does_not_hang_on_the_tokenizer(task, gpt_tokenizer):
    task.prepare(gpt_tokenizer)
    assert len(task.train) == task.num_examples == 4
    assert words_of(task, gpt_tokenizer)[3] == ["w12", "w13", "w14"]


def test_a_block_that_is_too_long_loses_its_end(source, folder, bos_tokenizer):
    found = build(source, words=9, max_length=5)
    found.load(folder(train={"a": LINES}, validation={"a": LINES}))
    found.prepare(bos_tokenizer)
    assert words_of(found, bos_tokenizer)[0] == ["<s>", "w0", "w1", "w2", "w3"]


def test_losses_and_scores_by_hand(task, gpt):
    """Each row alone: the mean over its tokens but the first; perplexity is over all tokens of the split."""
    rows = [task.train[i] for i in range(4)]
    batch = task.collate(rows)
    losses, total, tokens = task.losses(gpt, batch), 0.0, 0
    for row, loss in zip(rows, losses, strict=True):
        ids = torch.tensor(row["input_ids"].tolist())
        said = gpt(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        each = -said[range(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(loss, each.mean(), rtol=0, atol=1e-12)
        total, tokens = total + each.sum().item(), tokens + len(each)
    scores = task.evaluate(gpt, [task.collate(rows[:1]), task.collate(rows[1:])])
    assert tokens == 4 + 4 + 4 + 3
    assert scores["perplexity"] == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-6)
    assert scores["loss"] == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("words", [1, 0, 2.5, "many"])
def test_a_number_of_words_that_is_none(source, words):
    with pytest.raises(UserError, match=rf"Expected task\.words={words} to be a whole number of at least 2"):
        build(source, words)


def test_a_split_without_words(source, folder):
    with pytest.raises(UserError, match="task t: the train split holds no word in 'a'"):
        build(source).load(folder(train={"a": ["", " \n"]}, validation={"a": LINES}))
