"""Gradient engines: the clipped sum of per-unit gradients, behind one signature.

`AdaptiveClip` and `OpacusHooks` are imported when they are asked for: the other engines need nothing but torch.

>>> import torch
>>> model = torch.nn.Linear(2, 1)
>>> out = BookKeeping(model)(lambda: model(torch.ones(3, 2)).squeeze(1), clip_norm=1.0)
>>> sorted(out.sums), out.norms.shape
(['bias', 'weight'], torch.Size([3]))
"""

from typing import TYPE_CHECKING, Any

from privzoo.privacy.clipping.book_keeping import BookKeeping
from privzoo.privacy.clipping.engine import ClippedSums, clip_factors
from privzoo.privacy.clipping.functions import AutoS, AutoV, Flat
from privzoo.privacy.clipping.ghost_two_pass import GhostTwoPass
from privzoo.privacy.clipping.layouts import UnsupportedUse
from privzoo.privacy.clipping.loop import Loop

if TYPE_CHECKING:
    from privzoo.privacy.clipping.adaptive import AdaptiveClip
    from privzoo.privacy.clipping.opacus_hooks import OpacusHooks

__all__ = [
    "AdaptiveClip", "AutoS", "AutoV", "BookKeeping", "ClippedSums", "Flat", "GhostTwoPass", "Loop", "OpacusHooks",
    "UnsupportedUse", "clip_factors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "AdaptiveClip":
        from privzoo.privacy.clipping.adaptive import AdaptiveClip

        return AdaptiveClip
    if name == "OpacusHooks":
        from privzoo.privacy.clipping.opacus_hooks import OpacusHooks

        return OpacusHooks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
