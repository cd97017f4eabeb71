"""Gradient engines: the clipped sum of per-unit gradients, behind one signature."""

from privzoo.privacy.clipping.book_keeping import BookKeeping
from privzoo.privacy.clipping.engine import ClippedSums, clip_factors
from privzoo.privacy.clipping.loop import Loop

__all__ = ["BookKeeping", "ClippedSums", "Loop", "clip_factors"]
