"""Every mutant of tests/mutants.py turns its tests red, and they are green without it.

Run as a script this file is the zygote: it imports what is slow to import, but nothing of privzoo and without any torch
operation (threads do not survive a fork), and forks a child for each mutant. The child imports privzoo
from a mutated copy of src.
"""

import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MUTANTS = runpy.run_path(str(Path(__file__).with_name("mutants.py")))["MUTANTS"]
UNMUTATED = not os.environ.get("PRIVZOO_ALL_GREEN")  # of all tests it is known that they pass with the code as it is
SECONDS = 120  # a mutant under which a test hangs is ended, and told apart from one that is caught
BROKEN = (
    "NameError",
    "SyntaxError",
    "IndentationError",
    "ImportError",
    "ModuleNotFoundError",
    "FileNotFoundError",
)  # of the mutant's, or of the place where it runs: not caught


# ---- the tests


class Zygote:
    """Runs tests in children of the zygote; what they do without a mutant is remembered."""

    def __init__(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env={**os.environ, **threads, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )  # fmt: skip
        self._unmutated: dict[str, dict] = {}

    def run(self, tests: Sequence[str], file: str = "", old: str = "", new: str = "") -> dict:
        """`{"code": pytest's exit code, "failed": {node id: message}, "output": what was printed}`.

        Of a test that runs in parts, the parts after the first failing one are left out.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"tests": tests, "file": file, "old": old, "new": new}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote died"
        return json.loads(answer)

    def unmutated(self, file: str) -> dict:
        """What all tests do that any mutant names in one test file, with the code as it is."""
        if file not in self._unmutated:
            named = {test for mutant in MUTANTS for test in mutant.tests if test.startswith(f"{file}::")}
            self._unmutated[file] = self.run(sorted(named))
        return self._unmutated[file]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def zygote():
    started = Zygote()
    yield started
    started.close()


def of_one_file() -> list:
    """All that break tests of one file go to one worker, which runs these tests once without a mutant; most come first."""
    files = [mutant.tests[0].split("::")[0] for mutant in MUTANTS]
    ordered = sorted(zip(files, MUTANTS, strict=True), key=lambda pair: (-files.count(pair[0]), pair[0]))
    return [pytest.param(mutant, id=mutant.name, marks=pytest.mark.xdist_group(file)) for file, mutant in ordered]


@pytest.mark.parametrize("mutant", of_one_file())
def test_mutant_is_caught(zygote: Zygote, mutant) -> None:
    """Each test of the mutant passes as the code is (here, or just before in CI), and fails under the mutant for a reason of
    its own."""
    count = (REPOSITORY / "src/privzoo" / mutant.file).read_text().count(mutant.old)
    assert count == 1, f"mutant '{mutant.name}': its old text occurs {count} times in {mutant.file}, expected once"
    for file in {test.split("::")[0] for test in mutant.tests} if UNMUTATED else ():
        plain = zygote.unmutated(file)
        assert plain["code"] in (0, 1), f"{file} does not run without a mutant (code {plain['code']}):\n{plain['output']}"
        red = [test for test in mutant.tests if reasons(plain, test)]
        assert not red, f"{red} fail without a mutant:\n{plain['output']}"
    found = zygote.run(mutant.tests, mutant.file, mutant.old, mutant.new)
    assert found["code"] in (0, 1), f"mutant '{mutant.name}': pytest ends with code {found['code']}:\n{found['output']}"
    for test in mutant.tests:
        why = reasons(found, test)
        assert why, f"mutant '{mutant.name}' (PRIVACY {mutant.lines}) survives {test}"
        assert not why[0].startswith(BROKEN), f"mutant '{mutant.name}' is no running code: {why[0]}"


def reasons(found: dict, test: str) -> list[str]:
    """Messages of the failures of a test or its parts."""
    return [why for name, why in found["failed"].items() if name == test or name.startswith(f"{test}[")]


def test_mutants_are_told_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_the_proof_can_fail(zygote: Zygote) -> None:
    """An edit without effect is a survivor; a missing test and broken code are not taken for a catch."""
    test, edit = MUTANTS[0].tests[0], ("privacy/noise.py", "BLOCK = 1 << 18")
    assert zygote.run([test], *edit, "BLOCK = 2**18")["code"] == 0
    assert zygote.run([test + "_missing"], *edit, "BLOCK = 2**18")["code"] == 4
    assert zygote.run([test], *edit, "BLOCK = 1 <<")["code"] not in (0, 1)
    (why,) = zygote.run([test], *edit, "BLOCK = 1 << 18\n\n\ndel np")["failed"].values()
    assert why.startswith("NameError")


# ---- the zygote


class Failures:
    """A pytest plugin that keeps the message of every failure, and runs no further part of a named test that failed."""

    def __init__(self, named: list[str]) -> None:
        self.named = named
        self.why: dict[str, str] = {}

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        found = {"failed": self.why}
        of = [test for test in self.named if item.nodeid == test or item.nodeid.startswith(f"{test}[")]
        return True if all(reasons(found, test) for test in of) else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why.setdefault(report.nodeid, str(crash.message if crash else report.longrepr))


def child(request: dict[str, Any], folder: Path) -> int:
    """Run the tests in this process with privzoo from a copy of src; returns pytest's exit code."""
    os.setsid()
    copy, output = folder / "src", os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    shutil.copytree(REPOSITORY / "src", copy)
    (folder / "conf").symlink_to(REPOSITORY / "conf")
    if request["file"]:
        file = copy / "privzoo" / request["file"]
        text = file.read_text()
        assert text.count(request["old"]) == 1
        file.write_text(text.replace(request["old"], request["new"]))
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # for processes that the test starts
    os.environ["PRIVZOO_MUTANT"] = "1"  # for tests/conftest.py
    import privzoo

    assert Path(privzoo.__file__).is_relative_to(copy), f"privzoo comes from {privzoo.__file__}"
    options = [
        "-q",
        "--no-header",
        "--tb=native",
        "-p",
        "no:unraisableexception",
        "-o",
        "addopts=",
        "--import-mode=importlib",
    ]
    failures = Failures(request["tests"])
    places = ["-o", f"cache_dir={folder}/cache", f"--basetemp={folder}/tmp"]
    code = int(pytest.main([*options, *places, *request["tests"]], plugins=[failures]))
    (folder / "failed").write_text(json.dumps(failures.why))
    return code


def answer(request: dict[str, Any], folder: Path) -> dict[str, object]:
    """Fork, wait, and report; a child that takes too long is killed and has code -9."""
    process = os.fork()
    if process == 0:
        code = 70  # a mistake of ours, which pytest has no code for
        try:
            code = child(request, folder)
            sys.stdout.flush()
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while not (status := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            status = os.waitpid(process, 0)
            break
        time.sleep(0.005)
    failed, output = folder / "failed", folder / "output"
    return {
        "code": os.waitstatus_to_exitcode(status[1]),
        "failed": json.loads(failed.read_text()) if failed.exists() else {},
        "output": output.read_text(errors="replace")[-4000:] if output.exists() else "",
    }


IMPORTED = (
    "bitsandbytes", "dp_accounting.pld", "hydra.compose", "hydra.utils", "lightning.pytorch", "opacus.accountants", "pandas",
    "peft", "pyarrow.csv", "pyarrow.parquet", "scipy.optimize", "scipy.stats", "torch", "transformers",
    "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.vit.modeling_vit",
)  # fmt: skip


def main() -> None:
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    assert "privzoo" not in sys.modules
    gc.freeze()  # what is imported stays shared with the children
    gc.enable()
    for line in sys.stdin:
        folder = Path(tempfile.mkdtemp())  # a TemporaryDirectory would be removed by any forked process that ends
        try:
            print(json.dumps(answer(json.loads(line), folder)), flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
