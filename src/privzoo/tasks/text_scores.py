"""Scores of texts beside references, by the libraries that papers use. One whose helper is missing says so: it is no 0."""

import math
import re
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

from privzoo.errors import UserError

Texts = Sequence[str]
References = Sequence[Sequence[str]]
NIST_LENGTHS = 5  # of n-grams
NIST_BETA = math.log(0.5) / math.log(1.5) ** 2  # two thirds of the references' length halve the score


class TextScores(ABC):
    """Scores of a whole set of texts.

    Attributes:
        metrics: their names, the headline first.
    """

    metrics: ClassVar[tuple[str, ...]]
    needs: ClassVar[dict[str, str]] = {}  # modules to packages

    def check(self) -> None:
        """Raises UserError where a package is not installed without which there is no score at all."""
        for module, package in self.needs.items():
            if find_spec(module) is None:
                raise UserError(f"The task's scores need {package}, which is not installed: pip install 'privzoo[metrics]'.")

    def missing(self) -> dict[str, str]:
        """The metrics that cannot be had here, and why."""
        return {}

    @abstractmethod
    def __call__(self, texts: Texts, references: References) -> dict[str, float]:
        """All metrics, in their order; NaN for one that is missing.

        Args:
            texts: one a row, at least one row.
            references: at least one a row; each text is held against those of its row.
        """


class SquadScores(TextScores):
    """exact_match is the share of texts that equal one of their references, f1 the mean of the best overlap of words with a
    reference, both in 0..1 and after the official normalisation of SQuAD v1.1 (Rajpurkar et al. 2016), by torchmetrics:
    lower case, without punctuation, without the articles a, an, the. Where nothing is left of both, they are equal and f1 is
    1.

    >>> SquadScores()(["the Normans !", "in 1066"], [["Normans"], ["1067", "year 1066"]])
    {'f1': 0.75, 'exact_match': 0.5}
    """

    metrics = ("f1", "exact_match")

    def __call__(self, texts: Texts, references: References) -> dict[str, float]:
        from torchmetrics.functional.text import squad

        said, true = [], []
        for number, (text, those) in enumerate(zip(texts, references, strict=True)):
            said.append({"prediction_text": text, "id": str(number)})
            true.append({"answers": {"text": list(those), "answer_start": [0] * len(those)}, "id": str(number)})
        found = squad(said, true)  # type: ignore[arg-type]  # its annotation forbids what its documentation shows
        return {name: found[name].item() / 100 for name in self.metrics}


class RougeScores(TextScores):
    """ROUGE-1, -2 and -L as F-measures (Lin 2004), the mean over texts of the best reference, with stemming, by rouge_score.
    ROUGE-L is that of a text as one sentence, not of its sentences apart (Lsum).

    >>> RougeScores()(["the cat sat"], [["a cat sat there"]])
    {'rouge1': 0.5714285714285715, 'rouge2': 0.4, 'rougeL': 0.5714285714285715}
    """

    metrics = ("rouge1", "rouge2", "rougeL")
    needs: ClassVar[dict[str, str]] = {"rouge_score": "rouge-score"}

    def __call__(self, texts: Texts, references: References) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(self.metrics), use_stemmer=True)
        found = [scorer.score_multi(list(those), text) for text, those in zip(texts, references, strict=True)]
        return {name: sum(each[name].fmeasure for each in found) / len(found) for name in self.metrics}


class DataToTextScores(TextScores):
    """The five scores of the E2E challenge (Dušek et al. 2020), each over all references of a text.

    bleu: in 0..1, corpus BLEU-4 by sacrebleu, in lower case and with mteval-v13a's tokens. nist: NIST-5 of the same, by the
    definition of the challenge's scorer: n-grams of all references of a text count, and the mean of their lengths; nltk's
    takes the best reference of a text. rougeL, cider, meteor: by pycocoevalcap, with the tokens of its PTB tokenizer, which
    is a Java program, as METEOR is.
    """

    metrics = ("bleu", "nist", "meteor", "rougeL", "cider")
    needs: ClassVar[dict[str, str]] = {"sacrebleu": "sacrebleu"}
    by_java: ClassVar[tuple[str, ...]] = ("meteor", "rougeL", "cider")

    def missing(self) -> dict[str, str]:
        if find_spec("pycocoevalcap") is None:
            return dict.fromkeys(self.by_java, "pip install pycocoevalcap")
        if shutil.which("java") is None:
            return dict.fromkeys(self.by_java, "no java on PATH")
        return {}

    def __call__(self, texts: Texts, references: References) -> dict[str, float]:
        from sacrebleu.metrics import BLEU
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

        width = max(map(len, references))
        # sacrebleu takes None for a reference that a text does not have, which its annotation forgets.
        streams: list[Any] = [[those[i] if i < len(those) else None for those in references] for i in range(width)]
        bleu = BLEU(lowercase=True, tokenize="13a").corpus_score(list(texts), streams).score / 100
        tokens = Tokenizer13a()

        def words(text: str) -> list[str]:
            return tokens(text).lower().split()

        found = {"bleu": bleu, "nist": nist([words(t) for t in texts], [[words(r) for r in those] for those in references])}
        by_java = dict.fromkeys(self.by_java, math.nan) if self.missing() else _captioning_scores(texts, references)
        return {name: (found | by_java)[name] for name in self.metrics}


def nist(texts: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    """NIST-5 of tokenised texts: for n = 1..5 the information of their n-grams that references hold, per n-gram of the
    texts, added up, times a penalty on shortness.

    An n-gram counts as often as the reference that holds it most. Its information is log2 of how often its first n - 1 words
    stand in all references over how often it does.

    Source: Doddington 2002; for several references as mteval-v13a.

    >>> round(nist([["a", "b"]], [[["a", "b"], ["a", "c"]]]), 6)  # (1 + 2) / 2 and 1
    2.5
    """
    in_references: Counter[tuple[str, ...]] = Counter()
    for those in references:
        for reference in those:
            in_references[()] += len(reference)
            for length in range(1, NIST_LENGTHS + 1):
                in_references.update(_ngrams(reference, length))
    score = 0.0
    for length in range(1, NIST_LENGTHS + 1):
        information, count = 0.0, 0
        for text, those in zip(texts, references, strict=True):
            own, held = Counter(_ngrams(text, length)), Counter[tuple[str, ...]]()
            for reference in those:
                held |= Counter(_ngrams(reference, length))
            count += own.total()
            information += sum(
                times * math.log2(in_references[ngram[:-1]] / in_references[ngram]) for ngram, times in (own & held).items()
            )
        score += information / count if count else 0.0
    expected = sum(sum(map(len, those)) / len(those) for those in references)
    ratio = sum(map(len, texts)) / expected if expected else 0.0
    return score * (math.exp(NIST_BETA * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio > 0))


def _ngrams(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def _captioning_scores(texts: Texts, references: References) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def captions(rows: References) -> dict[int, list[dict[str, str]]]:
        # A line break would shift all texts after it.
        one_line = [[re.sub(r"\s+", " ", text) for text in row] for row in rows]
        return {number: [{"caption": text} for text in row] for number, row in enumerate(one_line)}

    tokenizer = PTBTokenizer()
    true, said = tokenizer.tokenize(captions(references)), tokenizer.tokenize(captions([[text] for text in texts]))
    scorers = {"meteor": Meteor(), "rougeL": Rouge(), "cider": Cider()}
    return {name: float(scorer.compute_score(true, said)[0]) for name, scorer in scorers.items()}
