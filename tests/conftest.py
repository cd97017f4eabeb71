"""What all tests share: no network, no settings of the user's, and the real conf/."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
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


def pytest_configure(config: pytest.Config) -> None:
    # Calibrations are confirmed whenever they are used, so remembering them between test runs costs nothing.
    os.environ["PRIVZOO_CACHE"] = str(config.cache.mkdir("privzoo"))


LONGEST = ("test_resume", "test_run.py", "test_contract", "test_bad_input")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that wait longest for commands come first: of two workers, none is left with them at the end.
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
    absent = {
        "shared": None if shared_folder().is_dir() else f"no data and weights at {shared_folder()}",
        "slurm": None if shutil.which("sbatch") else "no sbatch on PATH",
        "gpu": "" if any(item.get_closest_marker("gpu") for item in items) else None,
    }
    if absent["gpu"] is not None:
        import torch

        absent["gpu"] = None if torch.cuda.is_available() else "no CUDA device"
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


class Zygote:
    """Runs privzoo commands in forked children of one process that has imported everything (see tests/zygote.py)."""

    def __init__(self, cache: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PRIVZOO_CACHE": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=cache,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, *argv: str, module: str = "privzoo.train", **request: object) -> tuple[int, str]:
        """Exit code (negative for a signal) and output of `python -m <module> <argv>`; `request` as in zygote.py."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"module": module, "argv": argv, **request}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["output"]


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"  # of this test run, for all its workers
    cache.mkdir(exist_ok=True)
    started = Zygote(cache)
    yield started
    started.process.stdin.close()
    started.process.wait()


@pytest.fixture(scope="session")
def privzoo(zygote: Zygote):
    """`code, output = privzoo("task=toy_text", …)`: a real command in a process of its own, network off."""
    return zygote


@pytest.fixture(scope="session")
def privzoo_on_few_rows(zygote: Zygote):
    """The same commands on the first rows of the toy data, which are read and scored in no time."""
    return partial(zygote, rows={"train": 1000, "validation": 100})
