"""Engines side by side, and tiny transformers models to hold them against each other on."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from privzoo.privacy.clipping import BookKeeping, Loop

ARCHITECTURES = runpy.run_path(str(Path(__file__).with_name("architectures.py")))


@pytest.fixture
def transformer():
    """`transformer("GPT-2")`: (float64 model, its losses of some of four rows of unequal length)."""
    return ARCHITECTURES["model_and_losses"]


@pytest.fixture
def agree():
    """`agree(model, forward)`: an engine gives the loop's norms and sums, clipped (some units, not all) and unclipped.

    Returns the engine's unclipped result.
    """

    def check(model, forward, units=None, tolerance=1e-9, engine=BookKeeping):
        norms = Loop(model)(forward, math.inf, units).norms
        assert (norms > 0).any(), "the fixture has no gradient to compare"
        for clip_norm in (float(norms.mean()), math.inf):
            found, expected = (each(model)(forward, clip_norm, units) for each in (engine, Loop))
            torch.testing.assert_close(found.norms, expected.norms, rtol=tolerance, atol=0)
            torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=0)
            assert found.sums.keys() == expected.sums.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
            scale = max(float(value.abs().max()) for value in expected.sums.values())
            for name, value in expected.sums.items():
                torch.testing.assert_close(
                    found.sums[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
                )
        return found

    return check
