"""ResNets with group norms: a batch norm mixes the images of a batch, so that none has a gradient of its own.

The file needs torch and transformers only. It is saved beside the weights, so that
`AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` loads them without privzoo.
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

GROUPS = 32  # Wu and He 2018; fewer where a layer has fewer channels


class GroupNormResNetConfig(ResNetConfig):
    """A ResNet's configuration."""

    model_type = "resnet_group_norm"


class GroupNormResNet(ResNetForImageClassification):
    """logits of images (R, 3, H, W), each by itself.

    Scales and shifts are those of the checkpoint's batch norms; its running means and variances are not used, so that a
    pretrained network has to find its level anew.
    """

    config_class = GroupNormResNetConfig

    def __init__(self, config: GroupNormResNetConfig) -> None:
        super().__init__(config)
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    channels = child.num_features
                    setattr(module, name, nn.GroupNorm(math.gcd(GROUPS, channels), channels, child.eps))

    def forward(self, pixel_values: Tensor, **inputs: Any) -> ImageClassifierOutputWithNoAttention:
        """As a ResNet, and in the model's own precision."""
        return super().forward(pixel_values.to(self.dtype), **inputs)


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a layer normalises over the rows of a batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


GroupNormResNetConfig.register_for_auto_class()
GroupNormResNet.register_for_auto_class("AutoModelForImageClassification")
AutoConfig.register(GroupNormResNetConfig.model_type, GroupNormResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(GroupNormResNetConfig, GroupNormResNet, exist_ok=True)
