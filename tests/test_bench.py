"""The benchmarks are run by hand and rarely: at least what they import must be there."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def imported(file: Path) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("file", sorted(BENCH.glob("*.py")), ids=lambda file: file.name)
def test_what_a_benchmark_imports_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    names = imported(file)
    assert names
    for module, name in names:
        there = importlib.import_module(module)
        assert name is None or hasattr(there, name), f"{file.name} imports {name} from {module}, which has none"


def test_the_synthetic_study_is_of_the_algorithms_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1 bounds vectors of length L d and noises each coordinate, Algorithm 2 numbers of size L and noises one."""
    monkeypatch.syspath_prepend(str(BENCH))
    study = importlib.import_module("dpzero_synthetic")
    monkeypatch.setattr(study, "EXAMPLES", 50)
    w = np.array([0.3, -0.2, 0.1])

    def released(release, sigma=0.0):
        return release(study.Median(3, seed=1), w, sigma)

    fresh = study.Median(3, seed=1)
    u = fresh.generator.standard_normal(3)
    slopes = fresh.slopes(w, u)
    np.testing.assert_allclose(released(study.dpzero), np.clip(slopes, -study.SCALE, study.SCALE).sum() * u)
    vectors, longest = slopes[:, None] * u, study.SCALE * 3
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (lengths > longest).any()
    np.testing.assert_allclose(released(study.dpgd_0th), (vectors * np.minimum(1, longest / lengths)).sum(0))
    noise = released(study.dpzero, 2.0) - released(study.dpzero)
    np.testing.assert_allclose(noise / u, noise[0] / u[0])  # on one number
    noise = released(study.dpgd_0th, 2.0) - released(study.dpgd_0th)
    assert np.ptp(noise / u) > 1  # on every coordinate
    numeric = [(fresh.losses(w + 1e-6 * e).sum() - fresh.losses(w - 1e-6 * e).sum()) / 2e-6 for e in np.eye(3)]
    np.testing.assert_allclose(fresh.clipped_gradients(w), numeric, rtol=1e-5)


@pytest.mark.sweep
def test_the_gpu_benchmark_runs_at_tiny_sizes(tmp_path: Path) -> None:
    """A row of each kind, correctness included; its numbers are those of a trial."""
    rows = "only=qlora B=4,bitfit B=16 size=256,opt,vit_large full B=32"
    command = [sys.executable, str(BENCH / "gpu.py"), rows, "rounds=1", f"out={tmp_path}/gpu.md"]
    ended = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    table = (tmp_path / "gpu.md").read_text()
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and " B=" in line]
    assert len(lines) == 4
    for line in lines:
        assert "/s" in line[1], line
        assert "/s" in line[2], line
    assert "tiny sizes" in table
