import math

import pytest
import torch

from privzoo.errors import UserError
from privzoo.tasks.language_modelling import PromptCompletion
from privzoo.tasks.prompt_tokens import joined

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]
TARGETS = ["w12", "w13 w14 w15", "w16 w17", "w18 w19 w20 w21"]


def build(source, **changes):
    arguments = {"name": "t", "prompt": "{p}", "target": "{t}", "max_length": 16} | changes
    return PromptCompletion(data=source, **arguments)


@pytest.fixture
def ready(source, folder, gpt_tokenizer):
    def of(prompts=PROMPTS, targets=TARGETS, tokenizer=gpt_tokenizer, **changes):
        rows = {"p": prompts, "t": targets}
        task = build(source, **changes)
        task.load(folder(train=rows, validation=rows))
        task.prepare(tokenizer)
        return task

    return of


def naive(model, row):
    """NLL of each target token, from the unpadded row alone, by the definition."""
    ids = row["input_ids"].tolist()
    log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([-log_probabilities[t - 1, ids[t]] for t in range(max(row["context"], 1), len(ids))])


def test_rows_and_collate_by_hand(ready):
    task = ready()
    assert task.num_examples == 4
    # gpt_tokenizer: <end> 0, w0 2. Row 0 is w1 w2 w3 | w12 <end>, row 1 is w4 | w13 w14 w15 <end>
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 14, 0], [6, 15, 16, 17, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 14, 0], [-100, 15, 16, 17, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5] * 2
    batch = task.collate([task.train[0], task.train[2]])
    assert batch["input_ids"].tolist()[0] == [3, 4, 5, 14, 0, 0, 0, 0]
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch["labels"].tolist()[0] == [-100, -100, -100, 14, 0, -100, -100, -100]  # one end token, not four


def test_the_start_token_of_a_tokenizer_stands_once_in_front(ready, bos_tokenizer):
    task = ready(tokenizer=bos_tokenizer)
    assert task.train[1]["input_ids"].tolist() == [0, 7, 16, 17, 18, 1]
    assert task.train[1]["context"] == 2


@pytest.mark.parametrize(
    ("start", "prompt", "target", "max_length", "expected"),
    [
        ([], [1, 2], [8, 9], 4, ([1, 2, 8, 9], 2)),
        ([], [1, 2, 3], [8, 9], 4, ([2, 3, 8, 9], 2)),  # the prompt loses its beginning
        ([], [1, 2, 3], [7, 8, 9], 4, ([3, 7, 8, 9], 1)),
        ([], [1, 2, 3], [6, 7, 8, 9], 4, ([3, 6, 7, 8], 1)),  # the target loses its end, a predecessor stays
        ([0], [1, 2, 3], [8, 9], 5, ([0, 2, 3, 8, 9], 3)),  # the start token stays
        ([0], [1, 2, 3], [8, 9], 3, ([0, 8, 9], 1)),
        ([0], [1, 2, 3], [6, 7, 8, 9], 3, ([0, 6, 7], 1)),
        ([], [], [7, 8, 9], 2, ([7, 8], 0)),
        ([0], [], [9], 5, ([0, 9], 1)),
        ([], [], [9], 5, ([9], 0)),
    ],
)
def test_cutting_by_hand(start, prompt, target, max_length, expected):
    assert joined(start, prompt, target, max_length) == expected


def test_templates(source, folder, gpt_tokenizer):
    rows = {"a.b": ["w1 {x}"], "c[0]": ["w2"], "t": ["w3"]}
    task = build(source, prompt="w9 {a.b} {c[0]} w8 {{", target="{t} w7")
    task.load(folder(train=rows, validation=rows))
    task.prepare(gpt_tokenizer)
    # the row's own braces are text (unknown word 1), as is the doubled one
    assert task.train[0]["input_ids"].tolist() == [11, 3, 1, 4, 10, 1, 5, 9, 0]
    assert task.train[0]["context"] == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": "no column"}, "names no column"),
        ({"target": "{t"}, "is not a template"),
        ({"prompt": "{}"}, "names no column"),
    ],
)
def test_bad_templates(source, changes, expected):
    with pytest.raises(UserError, match=expected):
        build(source, **changes)


def test_losses_are_the_mean_over_each_rows_own_target(ready, gpt):
    task = ready()
    losses = task.losses(gpt, task.collate(list(task.train)))
    assert losses.shape == (4,)
    expected = torch.stack([naive(gpt, row).mean() for row in task.train])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    assert [len(naive(gpt, row)) for row in task.train] == [2, 4, 3, 5]


def test_another_rows_text_and_length_change_nothing(ready, gpt, gradients):
    """Row 2 is the longest, so the padded length stays; bit for bit."""
    task = ready()
    reference = task.losses(gpt, task.collate([task.train[2], task.train[0]]))
    expected = gradients(reference, gpt)[0]
    for other in (1, 3, 2):
        losses = task.losses(gpt, task.collate([task.train[2], task.train[other]]))
        assert torch.equal(losses[0], reference[0])
        assert torch.equal(gradients(losses, gpt)[0], expected)


def test_padding_changes_nothing(ready, gpt, gradients):
    task = ready()
    alone = task.losses(gpt, task.collate([task.train[0]]))
    expected = gradients(alone, gpt)[0]
    assert expected.norm() > 1e-3
    for other in (3, 2):
        losses = task.losses(gpt, task.collate([task.train[other], task.train[0]]))
        torch.testing.assert_close(losses[1], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients(losses, gpt)[1], expected, rtol=0, atol=1e-12)


def test_a_row_without_a_target_token_gives_exactly_zero(ready, gpt, gradients):
    """The end token alone, and nothing to predict it from."""
    task = ready(prompts=["", "w1"], targets=["w3", "w2"])
    bare = {**task.train[0], "input_ids": task.train[0]["input_ids"][-1:]}
    assert (bare["input_ids"].tolist(), bare["context"]) == ([0], 0)
    for rows in ([bare], [bare, task.train[1]]):
        losses = task.losses(gpt, task.collate(rows))
        assert losses[0].item() == 0.0
        assert torch.equal(gradients(losses[:1], gpt), torch.zeros(1, sum(p.numel() for p in gpt.parameters())))
    torch.testing.assert_close(losses[1], naive(gpt, task.train[1]).mean(), rtol=0, atol=1e-12)
    assert all(math.isfinite(score) for score in task.evaluate(gpt, [task.collate([bare])]).values())


def test_a_blank_target_of_a_published_set_is_refused(ready):
    with pytest.raises(UserError, match=r"train\.parquet, row 1: 't' is blank"):
        ready(prompts=["w1", "w2"], targets=["w3", " "])


def test_half_precision_losses_are_float32(ready, gpt):
    task = ready()
    assert task.losses(gpt.to(torch.bfloat16), task.collate(list(task.train))).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 4])
def test_evaluate_equals_one_row_at_a_time(ready, gpt, batches, size):
    task = ready()
    token_losses = [naive(gpt, row) for row in task.validation]
    right = 0
    for row in task.validation:
        ids = row["input_ids"].tolist()
        choices = gpt(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        right += sum(choices[t - 1] == ids[t] for t in range(row["context"], len(ids)))
    loader = (task.collate(rows) for rows in batches(task.validation, size))
    scores = task.evaluate(gpt.train(), loader)
    assert tuple(scores) == task.metrics
    assert scores["perplexity"] == pytest.approx(torch.cat(token_losses).mean().exp().item(), rel=1e-12)
    assert scores["token_accuracy"] == right / 14
    assert scores["loss"] == pytest.approx(torch.stack([x.mean() for x in token_losses]).mean().item(), rel=1e-12)
    assert gpt.training
    assert not task.higher_is_better


def test_token_accuracy_counts_targets_only(ready, gpt):
    """A model that always says w12 (14) is right on one of row 0's two target tokens."""
    task = ready()

    class Constant(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, 40)
            logits[..., 14] = 1.0
            return type("Output", (), {"logits": logits})

    assert task.evaluate(Constant(), [task.collate([task.train[0], task.train[2]])])["token_accuracy"] == 1 / 5


def test_fingerprint(source, folder):
    def of(prompts=PROMPTS, targets=TARGETS, **changes):
        task = build(source, **changes)
        rows = {"p": prompts, "t": targets}
        task.load(folder(train=rows, validation={"p": ["w0"], "t": ["w0"]}))
        return task.fingerprint()

    base = of()
    assert of() == base
    changed = [
        of(prompts=["w1 w2 w4", *PROMPTS[1:]]),
        of(targets=[*TARGETS[:3], "w18 w19 w20 w2"]),
        of(prompts=PROMPTS[::-1], targets=TARGETS[::-1]),
        of(max_length=17),
        of(prompt="{p} ="),
        of(prompt="{t}", target="{p}"),
    ]
    assert len({base, *changed}) == len(changed) + 1


def test_tokenizers_that_do_not_fit(ready, gpt_tokenizer):
    with pytest.raises(UserError, match="max_length=1 to be a whole number of at least 2"):
        ready(max_length=1)
    with pytest.raises(UserError, match="at most 32 tokens"):
        ready(max_length=33)
    gpt_tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        ready(tokenizer=gpt_tokenizer)
