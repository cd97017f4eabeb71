"""A text classifier on the mean of an encoder's last hidden states.

Encoders that were trained to embed sentences by that mean (sentence-transformers' all-MiniLM and its kind) hold what they
know of a sentence there; their first token and their pooler were never trained for it. Nor were they trained on two texts in
one row: of a pair each text can be embedded alone, and the classifier sits on both and on how they differ (Conneau et al.
2017; Reimers & Gurevych 2019). transformers has no such heads for BERT.

The file needs torch and transformers only. It is saved beside the weights, so that
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` loads them without privzoo.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolingConfig(PretrainedConfig):
    """The encoder's configuration and the number of labels.

    Args:
        encoder: a configuration, or what its `to_dict` gave.
        pairs: whether a row is a pair of texts, each of which is embedded alone.
    """

    model_type = "mean_pooling_classifier"
    sub_configs: ClassVar = {"encoder": AutoConfig}

    def __init__(self, encoder: PretrainedConfig | dict[str, Any] | None = None, pairs: bool = False, **kwargs: Any) -> None:
        if isinstance(encoder, dict):
            if "model_type" not in encoder:
                raise ValueError("its configuration does not say of which type the encoder is")
            encoder = AutoConfig.for_model(**encoder)
        if encoder is not None and not isinstance(encoder, PretrainedConfig):
            raise ValueError(f"its encoder is {encoder!r}, no configuration")
        self.encoder, self.pairs = encoder, pairs
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        return self.encoder or self


class MeanPoolingClassifier(PreTrainedModel):
    """logits (R, labels) = a linear map of the mean over a row's tokens, padding left out.

    With `config.pairs`, of (u, v, |u - v|, u v), (R, 4 d): u and v are the means over the first and the second text, scaled
    to length sqrt(d), each as the encoder gives it for that text alone. token_type_ids say which text a token is of.

    Args:
        config: of encoder and head; the encoder takes input_ids and attention_mask and gives last_hidden_state (R, T, d).
            For pairs it takes position_ids and a mask by pairs of tokens, too, and its tokenizer puts one token first.
    """

    config_class = MeanPoolingConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MeanPoolingConfig) -> None:
        super().__init__(config)
        assert config.encoder is not None
        assert config.num_labels is not None
        self.encoder = _without_pooler(AutoModel.from_config(config.encoder))
        self.classifier = nn.Linear(config.encoder.hidden_size * (4 if config.pairs else 1), config.num_labels)
        self.num_labels = config.num_labels
        self.post_init()

    @classmethod
    def around(cls, encoder: PreTrainedModel, num_labels: int, pairs: bool = False) -> "MeanPoolingClassifier":
        """A pretrained encoder with a head drawn afresh from torch's generator."""
        # A configuration of its own: the one that a model holds says which attention to use, and is written to.
        with torch.device("meta"):
            model = cls(MeanPoolingConfig(encoder=encoder.config.to_dict(), num_labels=num_labels, pairs=pairs))
        model.encoder = _without_pooler(encoder)
        model.classifier.to_empty(device=encoder.device).to(encoder.dtype)
        model._init_weights(model.classifier)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            nn.init.normal_(module.weight, std=getattr(self.config.encoder, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Logits, (R, labels), of token ids (R, T) and their mask, 0 at padding; further inputs go to the encoder."""
        if self.config.pairs:
            assert token_type_ids is not None
            features = self._of_pairs(input_ids, attention_mask, token_type_ids, **inputs)
        else:
            if token_type_ids is not None:
                inputs["token_type_ids"] = token_type_ids
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
            features = _mean(hidden, attention_mask).to(hidden.dtype)
        return SequenceClassifierOutput(logits=self.classifier(features))

    def _of_pairs(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, **inputs: Any) -> Tensor:
        ids, positions, whose = _apart(input_ids, attention_mask, token_type_ids)
        same = whose[:, None, :, None] == whose[:, None, None, :]
        mask = torch.zeros_like(same, dtype=self.encoder.dtype).masked_fill_(~same, torch.finfo(self.encoder.dtype).min)
        hidden = self.encoder(input_ids=ids, position_ids=positions, attention_mask=mask, **inputs).last_hidden_state
        u, v = (_embedding(hidden, whose == text) for text in (1, 2))
        return torch.cat([u, v, (u - v).abs(), u * v], dim=1).to(hidden.dtype)

    @torch.no_grad()
    def off(self, pair: Mapping[str, Tensor], texts: Sequence[Mapping[str, Tensor]]) -> float:
        """How far embeddings of a pair's texts are from what the encoder gives for each alone, as a part of their length.

        Args:
            pair: one row, as for `forward`.
            texts: its two texts, one row each.
        """
        together = self._of_pairs(**pair).float()[0, : 2 * self.config.encoder.hidden_size].reshape(2, -1)
        hidden = [self.encoder(**text).last_hidden_state for text in texts]
        masks = [text["attention_mask"] for text in texts]
        alone = torch.cat([_embedding(each, mask) for each, mask in zip(hidden, masks, strict=True)]).float()
        return float(((together - alone).norm(dim=1) / alone.norm(dim=1)).max())


def _apart(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a row as if each text stood alone: the first token again before the second text, and positions anew.

    Returns:
        token ids, positions, and which text a token is of (1 or 2, 0 at padding); (R, T + 1) each. The token that came in
        is in column 0, where it does not move with the padding.
    """
    ids = torch.cat([input_ids[:, :1], input_ids], dim=1)
    whose = torch.cat([2 * attention_mask[:, :1], (token_type_ids + 1) * attention_mask], dim=1)
    positions = sum((whose == text).cumsum(1) * (whose == text) for text in (1, 2))
    assert isinstance(positions, Tensor)
    return ids, (positions - 1).clamp(min=0), whose


def _embedding(hidden: Tensor, mask: Tensor) -> Tensor:
    """(R, d): `_mean`, scaled to length sqrt(d)."""
    return functional.normalize(_mean(hidden, mask), dim=1) * hidden.shape[2] ** 0.5


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(R, d): the mean of states (R, T, d) where the mask, (R, T), is not 0."""
    # In float32 at least: a sum of float16 states overflows. A row of padding alone has mean 0, not NaN.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    real = mask[..., None].to(wide)
    return (hidden.to(wide) * real).sum(1) / real.sum(1).clamp(min=1)


def _without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = nn.Identity()  # would be computed, and trained, for nothing; some models call it unasked
    return encoder


MeanPoolingConfig.register_for_auto_class()
MeanPoolingClassifier.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register(MeanPoolingConfig.model_type, MeanPoolingConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPoolingConfig, MeanPoolingClassifier, exist_ok=True)
