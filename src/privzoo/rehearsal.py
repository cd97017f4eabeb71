"""What a run would cost on this machine: its work, tried on the validation split in a process of its own.

    python -m privzoo.rehearsal <folder>     as `micro_batches` and `cost` start it

The promise does not cover the validation split. With training rows nothing is computed, so that the micro-batch that is
chosen (and written into the run's files) says nothing about them; a cost, which is shown to the user alone, tells how many
rows a unit has in the mean, and how long they are beside validation rows. A process of its own gives back all memory, and
may run out of it.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from privzoo.cli import explain
from privzoo.config import AUTO
from privzoo.errors import RunLost, UserError
from privzoo.launch import end_with_the_command

LARGEST = 512  # rows of a micro-batch that are tried
NO_GAIN = 1.05  # a larger micro-batch has to be faster by this factor
PATIENCE_S = 60.0  # after which no larger micro-batch is begun
SHARE_OF_DEVICE = 0.8  # of a GPU's memory, at most: training rows may be longer
RELEASES = 4  # of a rehearsal; the first one finds caches cold
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Tried:
    """A micro-batch of the longest validation rows, and the peak memory up to then (see `results.peak_memory_bytes`)."""

    microbatch_size: int
    seconds_per_row: float
    peak_memory_bytes: int
    memory_bytes: int | None  # of the device; None: a CPU


@dataclass(frozen=True)
class Cost:
    """What a run costs here: time is of one process.

    Attributes:
        microbatch_size: rows at a time.
        rows_per_unit: of the training split, mean.
        relative_length: of training rows beside validation rows, mean; the time of a row is taken to be proportional to it.
        seconds_per_row: of sampling, forward and backward passes and clipping, of validation rows as they come.
        seconds_besides: of a release, whatever is drawn: noise, optimizer, ledger, and a zeroth-order method's steps.
        peak_memory_bytes: of the device, on a CPU of the process (resident set), with a micro-batch of the longest rows.
        weights_bytes, trained_bytes, sums_bytes, state_bytes: of it, what strategies deal out: all weights, those that are
            trained, their clipped sums, the optimizer's state.
    """

    microbatch_size: int
    rows_per_unit: float
    relative_length: float
    seconds_per_row: float
    seconds_besides: float
    peak_memory_bytes: int
    weights_bytes: int = 0
    trained_bytes: int = 0
    sums_bytes: int = 0
    state_bytes: int = 0

    def memory_of_a_rank(self, strategy: str, processes: int) -> int:
        """Peak memory of each of several processes (docs/ranks.md): what is dealt out is taken to be so at the peak,
        too, and what comes together of it for a while to be nothing."""
        most = 2 * self.trained_bytes > self.weights_bytes
        dealt_out = {
            "replicas": 0,
            "zero1": self.state_bytes,
            "zero2": self.state_bytes + self.sums_bytes,
            "zero3": self.state_bytes + self.sums_bytes + self.weights_bytes,
            "fsdp": self.state_bytes + self.sums_bytes + self.weights_bytes
            if most
            else self.weights_bytes - self.trained_bytes,
        }
        return self.peak_memory_bytes - round(dealt_out[strategy] * (1 - 1 / processes))

    def seconds_per_release(self, batch_size: int, processes: int = 1) -> float:
        """Expected time of a release of `batch_size` units; several processes are taken to share the rows at no cost."""
        rows = batch_size * self.rows_per_unit
        return self.seconds_besides + rows * self.relative_length * self.seconds_per_row / processes


def cost(cfg: DictConfig) -> Cost:
    """Rehearse a configuration; with microbatch_size=auto the one of `microbatch_size_of`.

    Raises:
        UserError: for what `train` would refuse.
        RunLost: if it does not fit into memory.
    """
    size = microbatch_size_of(cfg) if cfg.microbatch_size == AUTO else cfg.microbatch_size
    told = _asked(cfg, size)
    if not told:
        raise RunLost(f"A rehearsal with microbatch_size={size} ran out of memory: lower it, or take microbatch_size=auto.")
    return Cost(**told[0])


def microbatch_size_of(cfg: DictConfig) -> int:
    """The smallest micro-batch that is about as fast as any, on the longest validation rows, and fits.

    Raises:
        UserError: for what `train` would refuse.
        RunLost: if not even one row fits.
    """
    print("privzoo: microbatch_size=auto: trying sizes on the validation split …", file=sys.stderr, flush=True)
    tried = [Tried(**found) for found in _asked(cfg, None)]
    chosen = best(tried)
    if chosen is None:
        raise RunLost(
            "Not even one row at a time fits into memory: take trainer.gradient_checkpointing=true, a smaller model or "
            "max_length, or trainer.strategy=fsdp with a microbatch_size of your own."
        )
    print(
        f"privzoo: microbatch_size={chosen.microbatch_size}: {1 / chosen.seconds_per_row:.3g} of the longest rows a second, "
        f"about {chosen.peak_memory_bytes / 2**30:.1f} GiB.",
        file=sys.stderr,
        flush=True,
    )
    return chosen.microbatch_size


def best(tried: Sequence[Tried]) -> Tried | None:
    """The smallest that is about as fast as the fastest, of those that leave some of the device's memory."""
    fit = [each for each in tried if not each.memory_bytes or each.peak_memory_bytes <= SHARE_OF_DEVICE * each.memory_bytes]
    fastest = min((each.seconds_per_row for each in fit), default=0.0)
    return next((each for each in fit if each.seconds_per_row <= NO_GAIN * fastest), None)


def _asked(cfg: DictConfig, microbatch_size: int | None) -> list[dict[str, Any]]:
    """What a rehearsing process has told before it ended, if only by want of memory."""
    with tempfile.TemporaryDirectory(prefix="privzoo-rehearsal-") as place:
        folder = Path(place)
        content = OmegaConf.to_container(cfg, resolve=True)
        (folder / "order.json").write_text(json.dumps({"config": content, "microbatch_size": microbatch_size}))
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        command = [sys.executable, "-m", "privzoo.rehearsal", place]
        with open(folder / "output", "wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if (folder / "refusal").exists():
            raise UserError((folder / "refusal").read_text())
        if code > 0:
            sys.stderr.write((folder / "output").read_text(errors="replace")[-2000:])
            raise RunLost("The rehearsal ended with the error above: give microbatch_size a number.")
        told = folder / "told.jsonl"
        return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []


# ---- the process that rehearses


def main() -> None:
    """Rehearse as order.json in the folder says, and tell line by line in told.jsonl."""
    folder = Path(sys.argv[1])
    order = json.loads((folder / "order.json").read_text())
    threading.Thread(target=end_with_the_command, daemon=True).start()
    code = 0
    try:
        cfg = OmegaConf.create(order["config"])
        assert isinstance(cfg, DictConfig)
        for found in _rehearsed(cfg, order["microbatch_size"], folder):
            with open(folder / "told.jsonl", "a") as told:
                told.write(json.dumps(asdict(found)) + "\n")
    except Exception as error:
        code, sentence = explain(error)
        if code == 2 and sentence is not None:
            (folder / "refusal").write_text(sentence)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rehearsed(cfg: DictConfig, microbatch_size: int | None, folder: Path) -> Iterator[Any]:
    from privzoo.rehearsing import Stage

    stage = Stage(cfg)
    if microbatch_size is not None:
        with suppress(MemoryError):
            yield stage.cost(microbatch_size, folder)
        return
    began, size, fastest, in_vain = time.monotonic(), 1, float("inf"), 0
    while size <= min(LARGEST, len(stage.rows)) and time.monotonic() - began < PATIENCE_S and in_vain < 2:
        found = stage.tried(size)
        if found is None:  # out of memory
            return
        yield found
        in_vain = in_vain + 1 if found.seconds_per_row * NO_GAIN > fastest else 0
        fastest = min(fastest, found.seconds_per_row)
        size *= 2


if __name__ == "__main__":
    main()
