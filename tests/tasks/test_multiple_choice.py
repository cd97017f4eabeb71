"""Multiple choice: the right candidate is learned, and the likeliest one by the mean of its tokens is chosen."""

import pytest
import torch

from privzoo.errors import UserError
from privzoo.tasks.multiple_choice import MultipleChoice
from privzoo.tasks.splits import refuse_same_rows

ROWS = {
    "premise": ["w1 w2", "w3", "w4 w5 w6", "w7"],
    "question": ["cause", "effect", "effect", "cause"],
    "choice1": ["w10", "w11 w12 w13", "w14 w15", "w16"],
    "choice2": ["w17 w18 w19", "w20", "w21", "w22 w23 w24 w25"],
    "label": [0, 0, 1, 1],
}
WORDS = {"question": {"cause": "w8", "effect": "w9"}}
CANDIDATES = [" {choice1}", " {choice2}"]


@pytest.fixture
def ready(source, folder, gpt_tokenizer):
    def of(rows=ROWS, max_length=16, processor=gpt_tokenizer, **arguments):
        arguments = {"prompt": "{premise} {question}", "candidates": CANDIDATES, "words": WORDS} | arguments
        task = MultipleChoice("t", source, label="label", max_length=max_length, **arguments)
        task.load(folder(train=rows, validation=rows))
        task.prepare(processor)
        return task

    return of


def by_hand(gpt, tokenizer, prompt, candidate):
    """Mean negative log probability of the candidate's tokens, without a batch and without padding."""
    before, own = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, candidate))
    with torch.no_grad():
        said = gpt(input_ids=torch.tensor([before + own])).logits[0].log_softmax(-1)
    return -sum(said[len(before) - 1 + i, token].item() for i, token in enumerate(own)) / len(own)


PROMPTS = ["w1 w2 w8", "w3 w9", "w4 w5 w6 w9", "w7 w8"]


def test_the_candidate_of_the_smallest_mean_loss_is_chosen(ready, gpt, gpt_tokenizer, batches):
    task = ready()
    losses = [
        [by_hand(gpt, gpt_tokenizer, prompt, ROWS[f"choice{k}"][i]) for k in (1, 2)] for i, prompt in enumerate(PROMPTS)
    ]
    chosen = [each.index(min(each)) for each in losses]
    expected = sum(c == r for c, r in zip(chosen, ROWS["label"], strict=True)) / 4
    by_sum = [
        [loss * len(ROWS[f"choice{k + 1}"][i].split()) for k, loss in enumerate(each)] for i, each in enumerate(losses)
    ]
    assert chosen != [each.index(min(each)) for each in by_sum], "the fixture does not tell a mean from a sum"
    assert 0 < expected < 1 or chosen.count(0) not in (0, 4)
    for size in (1, 3, 4):
        found = task.evaluate(gpt, [task.collate(rows) for rows in batches(task.validation, size)])
        assert found["accuracy"] == expected
        right = [each[label] for each, label in zip(losses, ROWS["label"], strict=True)]
        assert found["loss"] == pytest.approx(sum(right) / 4, rel=1e-9)


def test_the_right_candidate_alone_is_learned(ready, gpt, gpt_tokenizer):
    task = ready()
    assert (task.num_examples, len(task.train)) == (4, 4)
    found = task.losses(gpt, task.collate([task.train[i] for i in range(4)]))
    right = [ROWS[f"choice{label + 1}"][i] for i, label in enumerate(ROWS["label"])]
    expected = [by_hand(gpt, gpt_tokenizer, prompt, own) for prompt, own in zip(PROMPTS, right, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_row_too_long_loses_the_beginning_of_its_prompt(ready, gpt_tokenizer):
    row = ready(max_length=4).validation[2]
    texts = [gpt_tokenizer.decode(each["input_ids"]) for each in row["choices"]]
    assert texts == ["w6 w9 w14 w15", "w5 w6 w9 w21"]
    assert [each["context"] for each in row["choices"]] == [2, 3]


def test_a_start_token_stays(ready, bos_tokenizer):
    row = ready(processor=bos_tokenizer, max_length=5).validation[0]
    assert [bos_tokenizer.decode(each["input_ids"]) for each in row["choices"]] == ["<s> w1 w2 w8 w10", "<s> w8 w17 w18 w19"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": ["cause", "why", "effect", "cause"]}, r"row 1: 'question' is 'why', expected one of cause, effect"),
        ({"label": [0, 2, 1, 1]}, r"row 1: 'label' is 2, expected an integer from 0 to 1"),
        ({"choice2": ["w1", " ", "w2", "w3"]}, r"row 1: 'choice2' is blank, expected text"),
        ({"premise": ["w1", None, "w2", "w3"]}, r"row 1: 'premise' is null, expected text"),
    ],
)
def test_rows_that_are_not_what_they_should_be(ready, changes, words):
    with pytest.raises(UserError, match=words):
        ready(ROWS | changes)


def test_one_candidate_is_no_choice(ready):
    with pytest.raises(UserError, match=r"task\.candidates names 1 choices, expected at least 2"):
        ready(candidates=CANDIDATES[:1])


def test_what_shapes_the_rows_changes_the_fingerprint(ready):
    changes = ({}, {"prompt": "{question} {premise}"}, {"max_length": 15}, {"candidates": CANDIDATES[::-1]},
               {"words": {"question": {"cause": "w8", "effect": "w8"}}})  # fmt: skip
    assert len({ready(**each).fingerprint() for each in changes}) == 5


def test_words_of_a_column_that_no_template_reads(ready):
    with pytest.raises(UserError, match=r"task\.words names 'qestion', which no template reads: they read choice1, choice2"):
        ready(words={"qestion": {}})


def test_a_prompt_without_a_token_is_refused(ready):
    """Its first candidate token could not be scored, and a candidate of one token would always win."""
    with pytest.raises(UserError, match=r"train split\), row 1: its prompt has no token to go on from"):
        ready(ROWS | {"premise": ["w1", "", "w2", "w3"]}, prompt="{premise}", words=None)


def test_training_rows_are_recognised_in_validation(ready):
    """One file under two names is refused, though a training row has one candidate and a validation row has all."""
    task = ready()
    with pytest.raises(UserError, match="train and validation are the same 4 rows"):
        refuse_same_rows(task.train, task.validation)
