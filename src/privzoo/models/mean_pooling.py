"""A text classifier on the mean of an encoder's last hidden states.

Encoders that were trained to embed sentences by that mean (sentence-transformers' all-MiniLM and its kind) hold what they
know of a sentence there; their first token and their pooler were never trained for it. transformers has no such head for
BERT.

The file needs torch and transformers only. It is saved beside the weights, so that
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` loads them without privzoo.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
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
    """

    model_type = "mean_pooling_classifier"
    sub_configs: ClassVar = {"encoder": AutoConfig}

    def __init__(self, encoder: PretrainedConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(encoder, dict):
            if "model_type" not in encoder:
                raise ValueError("its configuration does not say of which type the encoder is")
            encoder = AutoConfig.for_model(**encoder)
        if encoder is not None and not isinstance(encoder, PretrainedConfig):
            raise ValueError(f"its encoder is {encoder!r}, no configuration")
        self.encoder = encoder
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        return self.encoder or self


class MeanPoolingClassifier(PreTrainedModel):
    """logits (R, labels) = a linear map of the mean over a row's tokens, padding left out.

    Args:
        config: of encoder and head; the encoder takes input_ids and attention_mask and gives last_hidden_state (R, T, d).
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
        self.classifier = nn.Linear(config.encoder.hidden_size, config.num_labels)
        self.num_labels = config.num_labels
        self.post_init()

    @classmethod
    def around(cls, encoder: PreTrainedModel, num_labels: int) -> "MeanPoolingClassifier":
        """A pretrained encoder with a head drawn afresh from torch's generator."""
        # A configuration of its own: the one that a model holds says which attention to use, and is written to.
        with torch.device("meta"):
            model = cls(MeanPoolingConfig(encoder=encoder.config.to_dict(), num_labels=num_labels))
        model.encoder = _without_pooler(encoder)
        model.classifier.to_empty(device=encoder.device).to(encoder.dtype)
        model._init_weights(model.classifier)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            nn.init.normal_(module.weight, std=getattr(self.config.encoder, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> SequenceClassifierOutput:
        """Logits, (R, labels), of token ids (R, T) and their mask, 0 at padding; further inputs go to the encoder."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        # In float32 at least: a sum of float16 states overflows. A row of padding alone has mean 0, not NaN.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        real = attention_mask[..., None].to(wide)
        mean = (hidden.to(wide) * real).sum(1) / real.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(mean.to(hidden.dtype)))


def _without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = nn.Identity()  # would be computed, and trained, for nothing; some models call it unasked
    return encoder


MeanPoolingConfig.register_for_auto_class()
MeanPoolingClassifier.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register(MeanPoolingConfig.model_type, MeanPoolingConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPoolingConfig, MeanPoolingClassifier, exist_ok=True)
