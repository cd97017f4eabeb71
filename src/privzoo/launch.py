"""A run of several processes ("ranks"): starts them on this machine, or finds that torchrun or srun has started them.

    python -m privzoo.launch <order>     one rank, as `launch` starts it

A rank tells how it ended by a file; `launch` raises in the command's own process what is to be said, once. Ranks end with
the command, whatever ended it: each holds the reading end of a pipe that closes with it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from privzoo.cli import explain, is_a_rank
from privzoo.config import AUTO
from privzoo.errors import RunLost, Stopped, UserError
from privzoo.results import RunRecord, read_record
from privzoo.run_folder import RunFolder, open_folder, record_in

GRACE_S = 20.0  # for the other ranks to notice that one is gone
CAUSES = ("UserError", "RunLost", "Bug", "Stopped", "RankLost")  # of a rank's end; each may be what others came of
_OF_SRUN = ("PROCID", "LOCALID", "STEP_NUM_TASKS", "STEP_NODELIST", "JOB_ID", "STEP_ID")


def fine_tune(folder: RunFolder) -> RunRecord | None:
    """Fine-tune as the folder's configuration says, in as many processes as `trainer.devices` asks for.

    Returns:
        The record, that of a finished run at once; None in a process that torchrun or srun started as another than the
        first.
    Raises:
        UserError, Stopped, RunLost: as `privzoo.run.run` does on any rank; RunLost too if a rank was killed.
    """
    if is_a_rank():
        from privzoo.privacy.ranks import join_ranks
        from privzoo.run import run

        ranks = join_ranks()
        return run(folder, ranks) if not folder.is_done else folder.record if ranks.first else None
    if folder.is_done:
        return folder.record
    folder = _sized(folder)
    if folder.cfg.trainer.devices > 1:
        return launch(folder)
    from privzoo.run import run  # torch takes seconds: only when there is something to train

    return run(folder)


def as_a_rank(cfg: DictConfig) -> RunFolder:
    """The folder of the run, as the first rank finds it: the others would come upon what that one has just made.

    Raises:
        UserError: as `open_folder`, on every rank; if `trainer.devices` is not the number of processes.
    """
    from privzoo.privacy.ranks import join_ranks

    if "WORLD_SIZE" not in os.environ:
        _name_ranks_of_slurm()
    ranks = join_ranks()
    order: dict[str, Any] = {}
    if ranks.first:
        try:
            order = _order_of(_sized(_of_as_many(open_folder(cfg), ranks.count)))
        except (UserError, RunLost) as error:
            order = {"refusal": str(error), "lost": isinstance(error, RunLost)}
    order = ranks.from_first(order)
    if "refusal" in order:
        raise (RunLost if order["lost"] else UserError)(order["refusal"])
    return _folder_of(order)


def _sized(folder: RunFolder) -> RunFolder:
    """With a number in the place of microbatch_size=auto, which the folder will keep."""
    if folder.is_done or folder.cfg.microbatch_size != AUTO:
        return folder
    from privzoo.rehearsal import microbatch_size_of

    folder.cfg.microbatch_size = microbatch_size_of(folder.cfg)
    return folder


def _of_as_many(folder: RunFolder, count: int) -> RunFolder:
    devices = folder.cfg.trainer.devices
    if devices != count:
        raise UserError(f"Expected trainer.devices={devices} to be {count}, the processes that were started.")
    return folder


def _name_ranks_of_slurm() -> None:
    """The variables of torchrun from those of srun. (Lightning's own reading of them refuses `--ntasks`.)"""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    slurm = {key: os.environ[f"SLURM_{key}"] for key in _OF_SRUN}
    here = int(slurm["STEP_NUM_TASKS"]) // int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    os.environ |= {
        "RANK": slurm["PROCID"],
        "WORLD_SIZE": slurm["STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(slurm["STEP_NODELIST"]),
        "MASTER_PORT": str(15000 + (13 * int(slurm["JOB_ID"]) + int(slurm["STEP_ID"])) % 10000),
    }


def _order_of(folder: RunFolder) -> dict[str, Any]:
    return {"path": str(folder.path), "config": folder.plain_config(), "overrides": list(folder.overrides)}


def _folder_of(order: dict[str, Any]) -> RunFolder:
    path, cfg = Path(order["path"]), OmegaConf.create(order["config"])
    assert isinstance(cfg, DictConfig)
    return RunFolder(path, cfg, record_in(path), tuple(order["overrides"]))


def launch(folder: RunFolder) -> RunRecord:
    """A run of `trainer.devices` processes on this machine; see `fine_tune`."""
    count = folder.cfg.trainer.devices
    with tempfile.TemporaryDirectory(prefix="privzoo-ranks-") as place:
        (Path(place) / "order.json").write_text(json.dumps(_order_of(folder)))
        port = _free_port()
        ranks = [_start(Path(place), rank, count, port) for rank in range(count)]
        try:
            with _forwarding_signals(ranks) as forwarded:
                codes = _codes(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        _raise_what_happened(folder, codes, Path(place), forwarded)
    return read_record(folder.path)


def _start(place: Path, rank: int, count: int, port: int) -> subprocess.Popen:
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    command = [sys.executable, "-m", "privzoo.launch", str(place)]
    if rank == 0:  # speaks for all
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    with open(place / f"{rank}.output", "wb") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _forwarding_signals(ranks: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM go to every rank, each of which ends as a run of one process would; gives those that came."""
    forwarded: list[int] = []

    def forward(number: int, frame: Any) -> None:
        forwarded.append(number)
        for rank in ranks:
            rank.send_signal(number)

    former = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield forwarded
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _codes(ranks: list[subprocess.Popen]) -> list[int | None]:
    """Exit codes, once all have ended; None for one that did not within some time after another failed."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        failed = any(rank.returncode not in (None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM) for rank in ranks)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return [rank.returncode for rank in ranks]


def _raise_what_happened(folder: RunFolder, codes: list[int | None], place: Path, forwarded: list[int]) -> None:
    """The cause first: a rank that was killed, a user's mistake, lost work, a bug, a stop; then what others made of it."""
    go_on = f"go on with resume={folder.path}" if folder.ledger.exists() else "start it again"
    told: list[tuple[int, int, dict[str, Any]]] = []
    for rank, code in enumerate(codes):
        file = place / f"{rank}.json"
        if code and not file.exists() and -code in forwarded:  # before the run could mind it
            raise Stopped(f"stopped: {go_on}.", -code)
        if code and not file.exists():
            output = place / f"{rank}.output"
            sys.stderr.write(output.read_text(errors="replace")[-2000:] if output.exists() else "")
            raise RunLost(f"Rank {rank} of {len(codes)} was ended by {_named(code)}: {go_on}.")
        if code:
            end = json.loads(file.read_text())
            told.append((CAUSES.index(end["kind"]), rank, end))
    if not told:
        return
    _, rank, end = min(told, key=lambda each: each[:2])
    if end["kind"] == "Bug":
        sys.stderr.write(end["sentence"])
        raise RunLost(f"Rank {rank} of {len(codes)} ended with the error above: {go_on}.")
    if end["kind"] == "Stopped":
        raise Stopped(end["sentence"], end["number"])
    raise (UserError if end["kind"] == "UserError" else RunLost)(end["sentence"])


def _named(code: int) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


# ---- a rank


def main() -> None:
    """One rank of a run, as `launch` started it."""
    place, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    threading.Thread(target=end_with_the_command, daemon=True).start()
    code, told = 0, None
    try:
        _run(_folder_of(json.loads((place / "order.json").read_text())))
    except (KeyboardInterrupt, SystemExit) as stop:  # the latter is what Lightning makes of the former
        number = stop.signal_number if isinstance(stop, Stopped) else int(signal.SIGINT)
        said = str(stop) if isinstance(stop, Stopped) else "stopped by Ctrl-C."
        code, told = 128 + number, {"kind": "Stopped", "sentence": said, "number": number}
    except Exception as error:
        code, sentence = explain(error)
        kind = "Bug" if sentence is None else "UserError" if code == 2 else type(error).__name__
        kind = kind if kind in CAUSES else "RunLost"
        told = {"kind": kind, "sentence": sentence or traceback.format_exc()}
    if told is not None:
        try:
            (place / f"{rank}.new").write_text(json.dumps(told))
            os.rename(place / f"{rank}.new", place / f"{rank}.json")
        except OSError:  # the same full disk?
            print(f"privzoo: {told['sentence']}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads of a process group whose other half may be gone


def _run(folder: RunFolder) -> None:
    from privzoo.privacy.ranks import join_ranks, leave_ranks
    from privzoo.run import run

    run(folder, join_ranks())
    leave_ranks()


def end_with_the_command() -> None:
    """To be called in a thread of a process whose standard input is a pipe that closes with the command."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
