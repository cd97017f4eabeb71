"""What all tests share: no network, no settings of the user's, and the real conf/."""

import errno
import fcntl
import gc
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

# Before any test imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("PRIVZOO_DATA", "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)

REPOSITORY = Path(__file__).resolve().parents[1]
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def shared_folder() -> Path:
    return Path(os.environ.get("PRIVZOO_SHARED", REPOSITORY.parent / "shared")).absolute()


collect_ignore = ["zygote.py", "parse_once.py", "hub_files.py"]
runpy.run_path(str(REPOSITORY / "tests" / "parse_once.py"))["parse_once"]()


def pytest_configure(config: pytest.Config) -> None:
    # Calibrations are confirmed whenever they are used, so remembering them between test runs costs nothing.
    os.environ["PRIVZOO_CACHE"] = str(config.cache.mkdir("privzoo"))


# Imports make a million objects that stay: to look through them for garbage again and again is a quarter of the collection.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


LONGEST = ("test_resume", "test_run", "test_contract", "test_bad_input")


def no_shared() -> str | None:
    return None if shared_folder().is_dir() else f"no data and weights at {shared_folder()}"


def no_slurm() -> str | None:
    if not shutil.which("sbatch"):
        return "no sbatch on PATH"
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    return None if " is UP" in ping.stdout else "sbatch is there, but no controller of SLURM answers"


def no_java() -> str | None:
    return None if shutil.which("java") else "no java on PATH"


def no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


# What a marked test needs, and the function that tells why it is not there.
NEEDS = {"shared": no_shared, "slurm": no_slurm, "java": no_java, "gpu": no_gpu}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that wait longest for commands come first: of two workers, none is left with them at the end.
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
    asked = {marker.name for item in items for marker in item.iter_markers()}
    absent = {name: why_absent() for name, why_absent in NEEDS.items() if name in asked}
    for item in items:
        for marker, reason in absent.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def shared() -> Path:
    """The folder with real data and weights; mark the test `shared`, so that it is skipped where there is none."""
    return shared_folder()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection but to this machine fails at once, and so does the look-up of a name: the cable is pulled."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):  # type: ignore[index]
            raise OSError(errno.ENETUNREACH, "the network is off in tests")
        connect(self, address)  # type: ignore[arg-type]

    def guarded_look_up(host: str | bytes | None, *args: object, **kwargs: object) -> object:
        name = host.decode() if isinstance(host, bytes) else host
        if name and not name.startswith(LOOPBACK):
            raise socket.gaierror(socket.EAI_AGAIN, "the network is off in tests")
        return look_up(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture
def run_config(tmp_path: Path):
    """`run_config("task=toy_lm", "eps=3")`: one run's configuration of the real conf/, writing below tmp_path."""
    from privzoo.composition import compose

    def make(*overrides: str):
        return compose([f"output_dir={tmp_path}/runs", "trainer.progress=false", *overrides])

    return make


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def is_alive(folder: Path) -> bool:
    """Whether the process that tests/conftest.py started in a folder is still there (and no zombie)."""
    try:
        pid = (folder / "pid").read_text()
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def zygote_folder(config: pytest.Config) -> Path:
    base = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "zygote"  # for all workers


def pytest_sessionstart(session: pytest.Session) -> None:
    """Under make test and for the sweeps of make check, while the workers still collect."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw0" and "sweep" in session.config.option.markexpr:
        session.config.started_early = Zygote.start(zygote_folder(session.config))  # type: ignore[attr-defined]


class Zygote:
    """Runs privzoo commands in forked children of one process that has imported everything, which all workers of a test run
    share (see tests/zygote.py)."""

    def __init__(self, folder: Path) -> None:
        self.started: subprocess.Popen | None = None
        with open(folder / "lock", "w") as lock:  # one worker starts it, the others wait until it is ready
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_alive(folder):  # not started yet, or ended with the worker that started it
                self.started = self.start(folder)
            while not (folder / "socket").exists():
                assert is_alive(folder), "tests/zygote.py ended"
                time.sleep(0.05)
            self.connection = connected(folder / "socket")
        self.stream = self.connection.makefile("rw")

    @staticmethod
    def start(folder: Path) -> subprocess.Popen:
        """Without waiting: it imports for some seconds, and listens then."""
        folder.mkdir(exist_ok=True)
        for name in ("socket", "socket.new"):
            (folder / name).unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PRIVZOO_CACHE": str(folder)}
        command = [sys.executable, str(REPOSITORY / "tests" / "zygote.py")]
        started = subprocess.Popen(command, env=environment, cwd=folder)
        (folder / "pid").write_text(str(started.pid))
        return started

    def close(self) -> None:
        self.stream.close()
        self.connection.close()
        if self.started is not None:
            self.started.terminate()
            self.started.wait()

    def __call__(self, *argv: str, module: str = "privzoo.train", **request: object) -> tuple[int, str]:
        """Exit code (negative for a signal) and output of `python -m <module> <argv>`; `request` as in zygote.py."""
        self.stream.write(json.dumps({"module": module, "argv": argv, **request}) + "\n")
        self.stream.flush()
        answer = json.loads(self.stream.readline())
        return answer["code"], answer["output"]


class ForkedHere:
    """The same where the process of the tests is itself forked from one that has imported everything, with a changed
    privzoo."""

    def __init__(self) -> None:
        self.run_in_a_child = runpy.run_path(str(REPOSITORY / "tests" / "zygote.py"))["run_in_a_child"]

    def __call__(self, *argv: str, module: str = "privzoo.train", **request: object) -> tuple[int, str]:
        answer = self.run_in_a_child({"module": module, "argv": argv, **request})
        return answer["code"], answer["output"]


@pytest.fixture(scope="session")
def zygote(request: pytest.FixtureRequest):
    if "PRIVZOO_MUTANT" in os.environ:
        yield ForkedHere()
        return
    folder = zygote_folder(request.config)
    folder.mkdir(exist_ok=True)
    zygote = Zygote(folder)
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def second_zygote(zygote: Zygote, request: pytest.FixtureRequest):
    """For a process that runs beside others."""
    second = Zygote(zygote_folder(request.config))
    yield second
    second.close()


@pytest.fixture(scope="session")
def privzoo(zygote: Zygote):
    """`code, output = privzoo("task=toy_text", …)`: a real command in a process of its own, network off."""
    return zygote


@pytest.fixture(scope="session")
def privzoo_on_few_rows(zygote: Zygote):
    """The same commands on the first rows of the toy data, which are read and scored in no time."""
    return partial(zygote, rows={"train": 1000, "validation": 100})


@pytest.fixture(scope="session")
def write_hub_files():
    """See `hub_files.write`."""
    return runpy.run_path(str(REPOSITORY / "tests" / "hub_files.py"))["write"]
