"""Scores of texts, by hand: each one against what its definition gives."""

import math
import shutil
from importlib.util import find_spec

import pytest

from privzoo.errors import UserError
from privzoo.tasks import text_scores
from privzoo.tasks.text_scores import DataToTextScores, RougeScores, nist


def test_rouge_by_hand():
    """the cat sat on (4) against a cat sat there (4) and the cat (2): the better reference counts, score by score."""
    found = RougeScores()(["the cat sat on"], [["a cat sat there", "the cat"]])
    assert found == {
        "rouge1": pytest.approx(2 * (2 / 4) * (2 / 2) / (2 / 4 + 1)),  # of "the cat": 2/3; of the other: 1/2
        "rouge2": pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1)),  # "the cat" of one bigram: 1/2; of the other: 1/3
        "rougeL": pytest.approx(2 / 3),
    }
    both = RougeScores()(["the cat sat on", "x"], [["the cat sat on"], ["y"]])
    assert set(both.values()) == {0.5}


def test_rouge_takes_the_stem():
    assert RougeScores()(["cats running"], [["cat run"]])["rouge1"] == 1.0


def test_bleu_by_hand(no_java):
    """a b c d e against two references, and a sentence that is right but for its tokens and case."""
    texts = ["A b c d e", "The pub is nice."]
    found = DataToTextScores()(texts, [["a b c x d e", "b c d"], ["the pub is nice ."]])
    shares = [10 / 10, 8 / 8, (2 + 3) / 6, (0 + 2) / 4]  # abc and bcd stand in a reference, cde does not
    shortness = math.exp(1 - (6 + 5) / 10)  # 6 words are nearer to 5 than 3 are
    assert found["bleu"] == pytest.approx(math.prod(shares) ** 0.25 * shortness)


def test_nist_by_hand():
    """Of all references together: a 3 times, b 2, c 1, of 6 words; "a b" twice, "a c" once."""
    references = [[["a", "b"], ["a", "b"]], [["a", "c"]]]
    one = math.log2(6 / 3) + math.log2(6 / 2) + math.log2(6 / 3) + math.log2(6 / 1)
    two = math.log2(3 / 2) + math.log2(3 / 1)
    assert nist([["a", "b"], ["a", "c"]], references) == pytest.approx(one / 4 + two / 2)


def test_nist_takes_n_grams_of_all_references_of_a_text():
    """The official scorer's definition: "a" is of the one reference and "b" of the other; nltk's takes the better one."""
    one = math.log2(4 / 1) + math.log2(4 / 1)
    assert nist([["a", "b"]], [[["a", "x"], ["y", "b"]]]) == pytest.approx(one / 2)
    twice = nist([["a", "a", "z"]], [[["a", "x", "x"], ["a", "a", "x"]]])
    assert twice == pytest.approx((2 * math.log2(6 / 3)) / 3 + math.log2(3 / 1) / 2)


def test_nist_of_short_texts():
    """Two thirds of the mean length of the references halve the score; nothing said is 0."""
    reference = [["a", "b", "c"], ["a", "b", "c"]]
    whole = (math.log2(6 / 2) * 2) / 2 + math.log2(2 / 2)
    assert nist([["a", "b"]], [reference]) == pytest.approx(whole / 2)
    assert nist([[]], [reference]) == 0.0


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_a_score_without_its_helper_is_missing_and_no_zero(no_java, monkeypatch):
    found = DataToTextScores()(["a b"], [["a b"]])
    assert [name for name, value in found.items() if math.isnan(value)] == ["meteor", "rougeL", "cider"]
    assert tuple(found) == DataToTextScores.metrics
    reason = DataToTextScores().missing()["meteor"]
    assert reason in ("no java on PATH", "pip install pycocoevalcap")
    monkeypatch.setattr(text_scores, "find_spec", lambda name: None)
    assert set(DataToTextScores().missing().values()) == {"pip install pycocoevalcap"}
    with pytest.raises(UserError, match=r"need sacrebleu, which is not installed: pip install 'privzoo\[metrics\]'"):
        DataToTextScores().check()


@pytest.mark.java
@pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed")
def test_captioning_scores():
    """ROUGE-L by hand, with the recall that weighs 1.2^2 (coco's); the same text has the most of all three."""
    texts = ["the pub is near the river", "it is cheap"]
    references = [["the pub is near the river"], ["it is a cheap pub", "cheap"]]
    found = DataToTextScores()(texts, references)
    precision, recall, beta = (
        1.0,
        1.0,
        1.2,
    )  # of 3 words of "it is cheap" all stand in order in a reference; "cheap" is whole
    second = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert found["rougeL"] == pytest.approx((1 + second) / 2)
    same = DataToTextScores()([those[0] for those in references], references)
    assert same["meteor"] > found["meteor"] > 0
    assert same["cider"] > found["cider"] > 0
    assert DataToTextScores()(["one\nline", "b"], [["one line"], ["b"]])["rougeL"] == 1.0
