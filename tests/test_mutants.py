"""Every mutant of tests/mutants.py turns its tests red, and they are green without it.

Run as a script this file is the zygote: it imports what is slow to import, but nothing of privzoo and without any torch
operation (threads do not survive a fork), and forks a child for each test under each mutant. The child imports privzoo
from a mutated copy of src.
"""

import gc
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MUTANTS = runpy.run_path(str(Path(__file__).with_name("mutants.py")))["MUTANTS"]
SECONDS = 120  # a test under a mutant that hangs is ended, and told apart from one that fails
BROKEN = (
    "NameError",
    "SyntaxError",
    "IndentationError",
    "ImportError",
    "ModuleNotFoundError",
)  # of the mutant's, not caught


# ---- the tests


class Zygote:
    """Runs one test in a child of the zygote; what it found without a mutant is remembered."""

    def __init__(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env={**os.environ, **threads, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )  # fmt: skip
        self._unmutated: dict[str, dict] = {}

    def run(self, test: str, file: str = "", old: str = "", new: str = "") -> dict:
        """`{"code": pytest's exit code, "why": message of the first failure, "output": what it printed}`."""
        if not file and test in self._unmutated:
            return self._unmutated[test]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"test": test, "file": file, "old": old, "new": new}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote died"
        found = json.loads(answer)
        if not file:
            self._unmutated[test] = found
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def zygote():
    started = Zygote()
    yield started
    started.close()


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutant_is_caught(zygote: Zygote, mutant) -> None:
    """Each test of the mutant passes as the code is, and fails under the mutant for a reason of its own."""
    count = (REPOSITORY / "src/privzoo" / mutant.file).read_text().count(mutant.old)
    assert count == 1, f"mutant '{mutant.name}': its old text occurs {count} times in {mutant.file}, expected once"
    for test in mutant.tests:
        plain = zygote.run(test)
        assert plain["code"] == 0, f"{test} does not pass without a mutant (code {plain['code']}):\n{plain['output']}"
        found = zygote.run(test, mutant.file, mutant.old, mutant.new)
        assert found["code"] != 0, f"mutant '{mutant.name}' (PRIVACY {mutant.lines}) survives {test}"
        assert found["code"] == 1, f"{test}: expected a failure, found pytest code {found['code']}:\n{found['output']}"
        assert not found["why"].startswith(BROKEN), f"mutant '{mutant.name}' is no running code: {found['why']}"


def test_mutants_are_told_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_changes_nothing_survives(zygote: Zygote) -> None:
    """The proof can fail: an edit without effect is a survivor, a missing test and broken code are not taken for a catch."""
    test, edit = MUTANTS[0].tests[0], ("privacy/noise.py", "BLOCK = 1 << 18")
    assert zygote.run(test, *edit, "BLOCK = 2**18")["code"] == 0
    assert zygote.run(test + "_missing", *edit, "BLOCK = 2**18")["code"] == 4
    assert zygote.run(test, *edit, "BLOCK = 1 <<")["code"] not in (0, 1)
    assert zygote.run(test, *edit, "BLOCK = 1 << 18\n\n\ndel np")["why"].startswith("NameError")


# ---- the zygote


class FirstFailure:
    """A pytest plugin that keeps the message of the first failure."""

    def __init__(self) -> None:
        self.why = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.why:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why = str(crash.message if crash else report.longrepr)


def child(request: dict[str, str], folder: Path) -> int:
    """Run the test in this process with privzoo from a copy of src; returns pytest's exit code."""
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
        shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # for processes that the test starts
    import privzoo

    assert Path(privzoo.__file__).is_relative_to(copy), f"privzoo comes from {privzoo.__file__}"
    options = [
        "-p",
        "no:unraisableexception",
        "-x",
        "-q",
        "--no-header",
        "--tb=short",
        "-o",
        "addopts=",
        "--import-mode=importlib",
    ]
    keeper = FirstFailure()
    places = ["-o", f"cache_dir={folder}/cache", f"--basetemp={folder}/tmp"]
    code = int(pytest.main([*options, *places, request["test"]], plugins=[keeper]))
    (folder / "why").write_text(keeper.why)
    return code


def answer(request: dict[str, str], folder: Path) -> dict[str, object]:
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
    why, output = (folder / name for name in ("why", "output"))
    return {
        "code": os.waitstatus_to_exitcode(status[1]),
        "why": why.read_text() if why.exists() else "",
        "output": output.read_text(errors="replace")[-4000:] if output.exists() else "",
    }


def main() -> None:
    import dp_accounting.pld
    import lightning.pytorch
    import opacus.accountants
    import scipy.optimize
    import scipy.stats
    import torch
    import transformers

    assert all((dp_accounting, lightning, opacus, scipy, torch, transformers))
    assert "privzoo" not in sys.modules
    gc.freeze()  # what is imported stays shared with the children
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(answer(json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
