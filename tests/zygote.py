"""Runs privzoo commands in forked children of one process that has imported everything: real processes, real SIGKILL,
without eight seconds of imports each.

    python tests/zygote.py      listens at ./socket, and ends with the process that started it

On each connection it reads one JSON request a line and answers one JSON line.

A request: {"module": "privzoo.train", "argv": […]}, and where wanted
"kill": {"at": "fsync ledger.jsonl", "count": 3, "when": "before"}, "draws": a file, "started": a file for the process id,
"folder": where the command starts and looks for modules, "rows": {"train": 1000, "validation": 100}, the first rows of the
toy data, "script": Python to run in place of a module, "ranks": how many processes run it, as torchrun would start them,
"environment": all of it, "terminal": a device to read from and write to. Ranks that privzoo itself starts are forked, too;
"kill_rank" is the one that is killed. `kill.at` is "<call> <file name>" with call one of fsync, replace, rename, unlink;
"torn ledger.jsonl" leaves half a line behind; "draw rows" is the count-th draw. The answer: {"code": exit code, negative for
a signal; "output": text}.
"""

import atexit
import gc
import hashlib
import importlib.metadata
import json
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO


def install_kill(at: str, count: int, when: str) -> None:
    """SIGKILL this process at the count-th matching call, before or after it takes effect."""
    call, wanted = at.split(" ")
    seen = 0

    def due(path: str) -> bool:
        nonlocal seen
        seen += Path(path).name == wanted
        return Path(path).name == wanted and seen == count

    def wrap(original, path_of):
        def wrapped(*args, **kwargs):
            hit = due(path_of(*args))
            if hit and when == "before":
                if call == "torn":
                    size = os.fstat(args[0]).st_size
                    os.ftruncate(args[0], size - 20)
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    if call == "draw":
        from privzoo.privacy.sampling import PoissonDraws

        PoissonDraws.__call__ = wrap(PoissonDraws.__call__, lambda draws, release: wanted)
    elif call in ("fsync", "torn"):
        os.fsync = wrap(os.fsync, lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
    elif call in ("replace", "rename"):
        setattr(os, call, wrap(getattr(os, call), lambda source, target: str(target)))
    else:
        os.unlink = wrap(os.unlink, lambda path, **_: str(path))


def record_draws(file: str) -> None:
    """Append (release, identities of the drawn examples) for every draw that the loader makes."""
    from privzoo.privacy.sampling import PoissonDraws

    draw = PoissonDraws.__call__

    def recorded(self, release):
        drawn = draw(self, release)
        with open(file, "a") as out:
            out.write(json.dumps([release, drawn.tolist()]) + "\n")
        return drawn

    PoissonDraws.__call__ = recorded


def remember_epsilons(folder: Path) -> None:
    """Epsilons are pure functions of public numbers, and what a small run waits for longest: children share them."""
    from privzoo.privacy import accounting

    for name in ("epsilon_spent", "cross_check"):
        setattr(accounting, name, remembered(getattr(accounting, name), folder))


def remembered(function, folder: Path):
    @wraps(function)
    def asked(*args, **kwargs):
        question = f"{function.__name__} {args} {kwargs}"
        file = folder / hashlib.sha256(question.encode()).hexdigest()
        if not file.exists():
            new = file.with_suffix(f".{os.getpid()}")
            new.write_bytes(pickle.dumps(function(*args, **kwargs)))
            new.rename(file)
        return pickle.loads(file.read_bytes())

    return asked


def remember_toy_rows() -> None:
    """The toy tasks' rows are the same in every run: they are made once, before children are forked."""
    from privzoo import toyworld

    for name in ("text_rows", "lm_rows", "image_rows"):
        made_once = cache(getattr(toyworld, name))
        setattr(toyworld, name, made_once)
        for split in ("train", "validation"):
            made_once(split)


def remember_packages() -> None:
    """Every run asks for the versions of a dozen packages, twice."""
    importlib.metadata.version = cache(importlib.metadata.version)


def fill_caches_of_libraries() -> None:
    """What transformers and Hydra work out once a process is a fifth of what Python does in a small run."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from privzoo.composition import compose
    from privzoo.identity import _folders_of_python
    from privzoo.results import versions

    get_checkpoint_conversion_mapping("bert")
    compose([])
    versions()
    _folders_of_python()


def compose_once() -> None:
    """Hydra composes a command's configuration twice, first only to see whether its files ask for a sweep; none does here.
    tests/test_cli.py runs it as it is."""
    from hydra._internal.hydra import Hydra

    Hydra.get_mode = lambda self, config_name, overrides: None


def shorten_toy_data(rows: dict[str, int]) -> None:
    from privzoo import toyworld

    for name in ("text_rows", "lm_rows", "image_rows"):
        whole = getattr(toyworld, name)
        setattr(toyworld, name, lambda split, whole=whole: whole(split)[: rows[split]])


class ForkedPopen:
    """What privzoo.launch asks of subprocess.Popen, without the seconds of imports: the command runs in a forked child."""

    def __init__(self, command, env, stdin, stdout=None, stderr=None, start_new_session=True):
        reading, self.writing = os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            os.close(reading)
            return
        os.close(self.writing)
        os.setsid()
        os.dup2(reading, 0)
        if stdout is not None:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(env)
        code = 99
        try:
            self.prepare(int(env.get("RANK", -1)))
            run_as_main(command[2], command[3:])
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def fork_ranks(kill: dict | None, kill_rank: int | None) -> None:
    """privzoo.launch forks its ranks (a kill waits for one of them), and privzoo.rehearsal its process."""
    from privzoo import launch, rehearsal

    ForkedPopen.prepare = lambda self, rank: install_kill(**kill) if kill and rank == kill_rank else None
    launch.subprocess = rehearsal.subprocess = SimpleNamespace(Popen=ForkedPopen, PIPE=subprocess.PIPE)


def become_ranks(count: int) -> list[int]:
    """From here on this process is rank 0, with forked others; returns their numbers, on rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    others = []
    for rank in range(1, count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return []
        others.append(pid)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    return others


def run_as_main(module: str, argv: list[str]) -> None:
    sys.argv = [module, *argv]
    sys.modules.pop(module, None)  # as in a process that has not imported it
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def child(request: dict, output: int) -> None:
    os.setsid()
    terminal = request.get("terminal")
    os.dup2(os.open(terminal or os.devnull, os.O_RDWR), 0)
    os.dup2(0 if terminal else output, 1)
    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__  # where pytest put its own
    if request.get("environment"):
        os.environ.clear()
        os.environ.update(request["environment"])
    if request.get("folder"):
        os.chdir(request["folder"])
        sys.path.insert(0, request["folder"])
    if request.get("rows"):
        shorten_toy_data(request["rows"])
    if request.get("draws"):
        record_draws(request["draws"])
    if request["module"] in ("privzoo.train", "privzoo.plan"):
        fork_ranks(request.get("kill"), request.get("kill_rank"))
    if request.get("kill") and "kill_rank" not in request:
        install_kill(**request["kill"])
    others = become_ranks(request["ranks"]) if request.get("ranks") else []
    try:
        if request.get("script"):
            exec(request["script"], {"__name__": "__main__"})
            atexit._run_exitfuncs()
        else:
            run_as_main(request["module"], request["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99  # a traceback: never right
    sys.stdout.flush()
    sys.stderr.flush()
    for pid in others:
        code = code or os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(code)


IMPORTED = (
    "lightning", "opacus.accountants", "pandas", "pyarrow.parquet", "pyarrow.csv", "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.vit.modeling_vit", "privzoo.cli", "privzoo.run",
    "privzoo.tasks.classification", "privzoo.tasks.images", "privzoo.tasks.language_modelling",
)  # fmt: skip


def main() -> None:
    from parse_once import parse_once

    gc.disable()  # what is imported stays
    epsilons = Path(os.environ["PRIVZOO_CACHE"], "epsilons")
    epsilons.mkdir(exist_ok=True)
    parse_once()
    remember_packages()
    remember_epsilons(epsilons)  # before others import them by name
    for name in IMPORTED:
        importlib.import_module(name)
    remember_toy_rows()
    fill_caches_of_libraries()
    compose_once()
    gc.freeze()
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.new")
    listener.listen()
    os.rename("socket.new", "socket")  # whoever finds it can connect
    listener.settimeout(1.0)
    starter = os.getppid()
    while os.getppid() == starter:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:  # outlives its parent: another worker may still have commands to run
            listener.close()
            connection.settimeout(None)
            answer(connection.makefile("rw"))
            os._exit(0)
        connection.close()


def run_in_a_child(request: dict) -> dict:
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            child(request, output.fileno())
        if request.get("started"):  # the caller wants to send signals
            Path(request["started"]).write_text(str(pid))
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "output": output.read().decode(errors="replace")}


def answer(stream: TextIO) -> None:
    for line in stream:
        stream.write(json.dumps(run_in_a_child(json.loads(line))) + "\n")
        stream.flush()


if __name__ == "__main__":
    main()
