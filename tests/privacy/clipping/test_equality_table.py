"""Which engine is exact on which architecture: held against the definition here, and written down in docs/engine.md.

PRIVZOO_WRITE_DOCS=1 python -m pytest tests/privacy/clipping/test_equality_table.py     writes the table anew
"""

import functools
import math
import os
import runpy
from pathlib import Path

import pytest
import torch

from privzoo.privacy.clipping import BookKeeping, GhostTwoPass, Loop, OpacusHooks, UnsupportedUse

MODELS = list(runpy.run_path(str(Path(__file__).with_name("architectures.py")))["MODELS"])
DOCUMENT = Path(__file__).parents[3] / "docs" / "engine.md"
MAY_BE_REFUSED = {"DeBERTa-v2"}
# Their norms are reckoned in float32 whatever the model's dtype, so equality is to its rounding.
HALF_FLOAT32 = {"BLOOM", "Llama", "Mistral", "Qwen2", "Gemma", "T5"}


@functools.cache  # asked for by several tests
def worst(name, engine, dtype, model_and_losses):
    """Largest relative difference from the loop, of norms and of the clipped sums of all parameters."""
    model, losses = model_and_losses(name, dtype)
    clip_norm = float(Loop(model)(losses, math.inf).norms.mean())
    expected, found = Loop(model)(losses, clip_norm), engine(model)(losses, clip_norm)
    assert (expected.norms > clip_norm).any()
    assert (expected.norms < clip_norm).any()
    assert found.sums.keys() == expected.sums.keys()
    assert all(value.any() for value in expected.sums.values()), "a parameter without gradient proves nothing"
    scale = max(float(value.abs().max()) for value in expected.sums.values())
    differences = [float((found.sums[k] - v).abs().max()) / scale for k, v in expected.sums.items()]
    return max(*differences, float(((found.norms - expected.norms) / expected.norms).abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_book_keeping_equals_the_loop(name, transformer):
    """PRIVACY lines 14 and 15: every parameter and norm, to 1e-9 in float64 and 1e-5 in float32; or refused by name."""
    if name in MAY_BE_REFUSED:
        with pytest.raises(UnsupportedUse, match=r"rel_embeddings\.weight"):
            worst(name, BookKeeping, torch.float64, transformer)
        return
    assert worst(name, BookKeeping, torch.float64, transformer) <= (1e-7 if name == "Gemma" else 1e-9)
    assert worst(name, BookKeeping, torch.float32, transformer) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_ghost_two_pass_equals_the_loop(name, transformer):
    if name in MAY_BE_REFUSED:
        with pytest.raises(UnsupportedUse, match=r"rel_embeddings\.weight"):
            worst(name, GhostTwoPass, torch.float64, transformer)
        return
    assert worst(name, GhostTwoPass, torch.float64, transformer) <= (1e-6 if name in HALF_FLOAT32 else 1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_opacus_hooks_equal_the_loop_or_refuse(name, transformer):
    """The second oracle: Opacus' own arithmetic."""
    if verdict(name, OpacusHooks, transformer) == "exact":
        assert worst(name, OpacusHooks, torch.float64, transformer) <= 1e-9


def verdict(name, engine, model_and_losses):
    try:
        return "exact" if worst(name, engine, torch.float64, model_and_losses) <= 1e-6 else "wrong"
    except UnsupportedUse as refusal:
        return "refused: " + str(refusal).split("#")[0] if engine is not OpacusHooks else "refused"


@pytest.mark.filterwarnings("ignore")
def test_the_document_says_what_is_true(transformer):
    """docs/engine.md holds the table that these models give."""
    lines = ["| architecture | book_keeping | ghost_two_pass | opacus |", "|---|---|---|---|"]
    for name in MODELS:
        found = [verdict(name, engine, transformer) for engine in (BookKeeping, GhostTwoPass, OpacusHooks)]
        assert "wrong" not in found, f"{name}: {found}"
        lines.append(f"| {name} | {' | '.join(found)} |")
    table = "\n".join(lines)
    before, after = (DOCUMENT.read_text().split(mark)[i] for mark, i in (("<!-- table -->\n", 0), ("\n<!-- end -->", 1)))
    whole = f"{before}<!-- table -->\n{table}\n<!-- end -->{after}"
    if os.environ.get("PRIVZOO_WRITE_DOCS"):
        DOCUMENT.write_text(whole)
    assert DOCUMENT.read_text() == whole, f"{DOCUMENT} is out of date: see the head of this file"
