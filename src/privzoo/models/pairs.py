"""Whether a tokenizer and an encoder can keep the two texts of a row apart, as `model.pooling=pair` asks."""

import math
from typing import Any

import torch

from privzoo.errors import UserError
from privzoo.models.mean_pooling import MeanPoolingClassifier


def check_pairs(path: str, tokenizer: Any, model: MeanPoolingClassifier) -> None:
    """Try a pair of texts.

    Raises:
        UserError: unless the tokenizer makes of it one token, the first text, then the second one, of types 0 and 1, and the
            encoder gives for both at once what it gives for each text alone.
    """
    texts = ("one text of some words, this", "another")
    row = tokenizer(*texts)
    types = row.get("token_type_ids", [])
    if sorted(set(types)) != [0, 1] or types != sorted(types) or row["input_ids"][0] != tokenizer.cls_token_id:
        raise UserError(
            f"model.pooling=pair needs a tokenizer that says which text a token is of, like BERT's by token_type_ids, but "
            f"that of {path!r} does not: set model.pooling=mean or null."
        )
    pair, *alone = ({k: torch.tensor([v]) for k, v in each.items()} for each in (row, *map(tokenizer, texts)))
    tolerance = 1e-3 if model.dtype == torch.float32 and not getattr(model.encoder, "is_quantized", False) else 3e-2
    try:
        off = model.off(pair, alone)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes no mask by pairs of tokens, or no positions
        off = math.inf
    if not off <= tolerance:
        raise UserError(
            f"model.pooling=pair needs an encoder that can keep two texts of a row apart, and {path!r} "
            f"({model.config.encoder.model_type}) does not (its embeddings are off by {off:.2g}): set model.pooling=mean or "
            "null."
        )
