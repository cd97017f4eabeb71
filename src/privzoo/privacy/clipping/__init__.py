"""Gradient engines: the clipped sum of per-unit gradients, behind one signature.

>>> import torch
>>> model = torch.nn.Linear(2, 1)
>>> out = BookKeeping(model)(lambda: model(torch.ones(3, 2)).squeeze(1), clip_norm=1.0)
>>> sorted(out.sums), out.norms.shape
(['bias', 'weight'], torch.Size([3]))
"""

from privzoo.privacy.clipping.adaptive import AdaptiveClip
from privzoo.privacy.clipping.book_keeping import BookKeeping
from privzoo.privacy.clipping.engine import ClippedSums, clip_factors
from privzoo.privacy.clipping.functions import AutoS, AutoV, Flat
from privzoo.privacy.clipping.ghost_two_pass import GhostTwoPass
from privzoo.privacy.clipping.layouts import UnsupportedUse
from privzoo.privacy.clipping.loop import Loop
from privzoo.privacy.clipping.opacus_hooks import OpacusHooks

__all__ = [
    "AdaptiveClip", "AutoS", "AutoV", "BookKeeping", "ClippedSums", "Flat", "GhostTwoPass", "Loop", "OpacusHooks",
    "UnsupportedUse", "clip_factors",
]  # fmt: skip
