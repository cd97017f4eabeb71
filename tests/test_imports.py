"""Imports point one way, and what must start quickly does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "privzoo"
# What a part may import of privzoo, besides itself.
ALLOWED = {
    "privacy": {"errors"},
    "tasks": {"errors", "hub", "toyworld"},
    "models": {"errors", "hub", "toyworld"},
    "methods": {"errors", "privacy", "tasks"},
    "reporting": {"errors", "files", "results", "cli"},
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "privzoo":
            found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("privzoo.")}
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    files = list((SOURCE / part).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) - {part} <= ALLOWED[part], file


def test_methods_know_tasks_by_their_base_alone():
    for file in (SOURCE / "methods").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("privzoo.tasks"):
                assert node.module == "privzoo.tasks.base", file


def test_nothing_heavy_before_it_is_needed():
    """One process imports one module after the other, and names the first one that brings something heavy."""
    modules = (
        "train",
        "plan",
        "config",
        "cli",
        "results",
        "run_folder",
        "reporting.display",
        "tables",
        "privacy.plan",
        "privacy.ledger",
    )
    code = (
        f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module('privzoo.' + name)\n"
        "    if {'torch', 'lightning', 'transformers'} & set(sys.modules): sys.exit(name)\n"
        "import privzoo.run\nif {'peft', 'bitsandbytes'} & set(sys.modules): sys.exit('run')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
