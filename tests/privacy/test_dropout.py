"""PRIVACY line 28: masks hang on the run's key, the release, the example and the place in the model, and on nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privzoo.errors import UserError
from privzoo.privacy.dropout import KeyedDropout, drops
from privzoo.privacy.sampling import DrawnRows
from privzoo.privacy.streams import RunKey

KEY = RunKey.for_tests(0)
T, D = 5, 6


def masks(examples, release=0, key=KEY, shape=(T, D), uses=1, p=0.5, digest="digest"):
    """What the last of `uses` dropouts leaves of ones, (R, *shape)."""
    with KeyedDropout(key, digest, DrawnRows({}, len(examples), release, examples)):
        for _ in range(uses):
            found = F.dropout(torch.ones(len(examples), *shape), p)
    return found


def test_an_examples_mask_does_not_hang_on_who_else_is_there():
    together = masks([3, 8, 11])
    assert torch.equal(masks([8]), together[1:2])
    assert torch.equal(masks([11, 3]), together[[2, 0]])


def test_padding_on_the_right_leaves_a_mask_alone():
    assert torch.equal(masks([3, 8], shape=(T + 4, D))[:, :T], masks([3, 8]))


@pytest.mark.parametrize(
    "other",
    [{"release": 1}, {"key": RunKey.for_tests(1)}, {"uses": 2}, {"examples": [4]}, {"digest": "another"}],
    ids=["release", "key", "place", "example", "digest"],
)
def test_masks_of_other_things_are_others(other):
    plain = {"examples": [3], "shape": (40, 40)}
    alike = (masks(**plain) == masks(**plain | other)).float().mean()
    assert 0.4 < alike < 0.6


def test_a_share_p_is_dropped_and_the_rest_grows():
    """Of 100,000 values: four standard deviations of their share are 0.0055."""
    found = masks([1, 2], shape=(500, 100), p=0.25)
    assert found.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert abs(float((found == 0).float().mean()) - 0.25) < 0.0055


def test_modules_and_dropout_in_place_are_keyed_too():
    model, value = nn.Dropout(0.5), torch.ones(1, T, D)
    with KeyedDropout(KEY, "digest", DrawnRows({}, 1, 0, [3])):
        found = model(value)
    with KeyedDropout(KEY, "digest", DrawnRows({}, 1, 0, [3])):
        F.dropout(value, 0.5, inplace=True)
    assert torch.equal(found, masks([3]))
    assert torch.equal(value, masks([3]))


def test_dropout_that_is_off_takes_no_mask():
    """Neither evaluation nor p=0 counts as a place in the model."""
    ones = torch.ones(1, T, D)
    with KeyedDropout(KEY, "digest", DrawnRows({}, 1, 0, [3])):
        assert torch.equal(nn.Dropout(0.5).eval()(ones), ones)
        assert torch.equal(F.dropout(ones, 0.0), ones)
        assert torch.equal(F.dropout(ones, 0.5), masks([3]))


ATTENTION = nn.MultiheadAttention(D, 2, dropout=0.1, batch_first=True)
HALF = torch.ones(2, 2, T, D)


@pytest.mark.parametrize(
    ("found", "forward"),
    [
        (r"shape \(2, 2, 5, 5\) for 2 rows", lambda: F.dropout(torch.ones(2, 2, T, T), 0.1)),
        (r"shape \(5, 2, 6\) for 2 rows", lambda: F.dropout(torch.ones(T, 2, D), 0.1)),
        (
            "scaled_dot_product_attention with dropout_p=0.1",
            lambda: F.scaled_dot_product_attention(HALF, HALF, HALF, None, 0.1),
        ),
        (
            "scaled_dot_product_attention with dropout_p=0.1",
            lambda: F.scaled_dot_product_attention(HALF, HALF, HALF, dropout_p=0.1),
        ),
        ("multi_head_attention_forward with dropout_p=0.1", lambda: ATTENTION(HALF[0], HALF[0], HALF[0])),
    ],
)
def test_what_cannot_be_keyed_is_refused(found, forward):
    """Attention probabilities are laid out by the padded length; rows that do not come first are somebody else's."""
    with (
        KeyedDropout(KEY, "digest", DrawnRows({}, 2, 0, [3, 8])),
        pytest.raises(UserError, match=f"Found .*{found}; expected rows first"),
    ):
        forward()


class Own(nn.Module):
    """Drops by a number of its own, as OPT does."""

    def __init__(self, hidden_dropout):
        super().__init__()
        self.hidden_dropout = hidden_dropout


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Dropout(0.0)), False),
        (nn.Sequential(nn.Dropout(0.1)), True),
        (Own(0.0), False),
        (Own(0.1), True),
        (nn.Linear(2, 2), False),
    ],
)
def test_dropout_of_every_kind_is_found(model, expected):
    assert drops(model) is expected
