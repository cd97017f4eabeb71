"""privzoo's whole training step (Lightning, loader, ledger, keyed noise, curves) beside the engine's bare step.

    python bench/training_step.py [rounds=3] [steps=6] [method=dp_full] [out=bench/results/training_step-<date>.md]

Both train a BERT of MiniLM's size (6 layers, width 384) on toy_text, 512 rows a release, on the same rows. The bare
step is collating, clipped sums, torch's own normal noise and fused AdamW. The two are a process each and take turns by
release, one being stopped (SIGSTOP, all threads of it) while the other computes, because the machine's speed changes within
seconds; the ratio is the median over pairs of a release. The first release is left out on both sides. Memory is the largest
resident set of each process, libraries included.

    python bench/training_step.py memory [steps=6] [method=dp_full]

says where that memory goes, stage by stage; "bare_with_imports" is the bare step in a process that has imported
what the whole one needs (Lightning, accountant, loggers) and does not use it.
"""

import ctypes
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

BATCH, MICRO_BATCH = 512, 64
GOALS = (1.03, 1.05)  # of time and memory, over the bare step


def make_model(folder: Path) -> None:
    """Random weights with tiny_encoder's tokenizer."""
    from privzoo.models.pretrain import TINY_FOLDER

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER / "tiny_encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                     intermediate_size=1536, max_position_embeddings=64)  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def composed(folder: Path, method: str, steps: int):
    from privzoo.composition import compose

    return compose([
        "task=toy_text", f"method={method}", f"model.path={folder / 'model'}", "eps=null", "privacy.noise_multiplier=0.5",
        f"batch_size={BATCH}", f"microbatch_size={MICRO_BATCH}", f"epochs={steps * BATCH / 8000}", "trainer.progress=false",
        f"output_dir={folder / 'runs'}", "privacy.noise_seed=1", "lr=1e-5",
    ])  # fmt: skip


def whole(folder: Path, method: str, steps: int) -> dict:
    """Seconds a step of a run as a user starts it, from one update to the next, and what the process took at most."""
    from privzoo.methods.first_order import FirstOrder
    from privzoo.run import run
    from privzoo.run_folder import open_folder

    stages = Stages()
    query, update = FirstOrder.query, FirstOrder.update

    def asked(self, *args):
        if not stages.starts:
            (folder / "digest").write_text(self.mechanism.digest)  # with the key it says which rows a release draws
            stages.end("until the first release")
            stages.start_of_release()
        return query(self, *args)

    def timed(self, *args):
        update(self, *args)
        stages.end_of_release()

    FirstOrder.query, FirstOrder.update = asked, timed  # type: ignore[method-assign]
    run(open_folder(composed(folder, method, steps)))
    return stages.measured()


def bare(folder: Path, method: str, steps: int) -> dict:
    """The same of the same arithmetic in a plain loop."""
    from privzoo.composition import build
    from privzoo.config import plan_arguments
    from privzoo.methods.trainable import select_trainable
    from privzoo.privacy.clipping import BookKeeping
    from privzoo.privacy.plan import PrivacyPlan
    from privzoo.privacy.sampling import PoissonBatches, PoissonDraws
    from privzoo.privacy.streams import RunKey

    stages = Stages()
    cfg = composed(folder, method, steps)
    task = build(cfg.task)
    task.load(None)
    loaded = build(cfg.model)(kind=task.kind, num_labels=task.num_labels, seed=0)
    task.prepare(loaded.processor)
    plan = PrivacyPlan(**plan_arguments(cfg, task.num_examples))
    trainable = select_trainable(loaded.model, cfg.method.trainable, loaded.new_head)
    engine = BookKeeping(loaded.model)
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-5, fused=True)
    stages.end("until the first release")
    stages.start_of_release()
    batches = PoissonBatches(
        task.train, PoissonDraws(plan, RunKey.for_tests(1), (folder / "digest").read_text()), task.collate, task.length,
        MICRO_BATCH,
    )  # fmt: skip
    for release in range(plan.steps):
        sums: dict[str, torch.Tensor] = {}
        for rows in batches[release].micro_batches:
            engine(lambda rows=rows: task.losses(loaded.model, rows), 0.1, into=sums)
        for name, total in sums.items():
            trainable[name].grad = total.add_(torch.empty_like(total).normal_(0, 0.05)).div_(BATCH)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stages.end_of_release()
    return stages.measured()


class Stages:
    """Seconds of each release, and what the process took until then: its largest resident set in each stage, in MiB.

    Between two releases the process stops itself, until its turn comes.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.seconds: list[float] = []
        self.memory: dict[str, float] = {}
        self.end("imports")

    def end(self, stage: str) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.memory[f"{stage}, at most"] = int(status["VmHWM"].split()[0]) / 1024
        self.memory[f"{stage}, at its end"] = int(status["VmRSS"].split()[0]) / 1024
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def start_of_release(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        self.starts.append(time.perf_counter())

    def end_of_release(self) -> None:
        self.seconds.append(time.perf_counter() - self.starts[-1])
        self.end(f"release {len(self.seconds) - 1}")
        self.start_of_release()

    def measured(self) -> dict:
        """Of the last release, too: tensors that live between releases, and what malloc holds beyond what is in use."""
        storages = {s.data_ptr(): s.nbytes() for s in map(storage, gc.get_objects()) if s is not None}
        self.memory["tensors that live between releases"] = sum(storages.values()) / 2**20
        self.memory["free, but held by malloc"] = held_free() / 2**20
        peak = max(value for stage, value in self.memory.items() if stage.endswith("at most")) * 2**20
        return {"seconds": self.seconds, "bytes": peak, "memory": self.memory}


def storage(thing: object) -> torch.UntypedStorage | None:
    return thing.untyped_storage() if type(thing) in (torch.Tensor, torch.nn.Parameter) else None


def held_free() -> int:
    """Bytes that glibc keeps for later, by its mallinfo2()."""

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )]  # fmt: skip

    function = ctypes.CDLL("libc.so.6").mallinfo2
    function.restype = Info
    return function().fordblks


def bare_with_imports(folder: Path, method: str, steps: int) -> dict:
    """`bare`, in a process as large as `whole`'s at its start."""
    import privzoo.run

    assert privzoo.run
    return bare(folder, method, steps)


SIDES = {"whole": whole, "bare": bare, "bare_with_imports": bare_with_imports}


def measured(kinds: Sequence[str], folder: Path, method: str, steps: int) -> list[dict]:
    """What the sides say. They go on one at a time, in the order given, from stop to stop; "whole" comes first."""
    running = [
        subprocess.Popen([sys.executable, __file__, "worker", kind, str(folder), method, str(steps)],
                         stdout=subprocess.PIPE, text=True)
        for kind in kinds
    ]  # fmt: skip
    left = list(running)
    for process in running:
        os.waitpid(process.pid, os.WUNTRACED)  # until the first release
    while left:
        for process in list(left):
            process.send_signal(signal.SIGCONT)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                process.returncode = os.waitstatus_to_exitcode(status)
                left.remove(process)
    if any(process.returncode for process in running):
        raise SystemExit(f"A side failed: {[process.returncode for process in running]}")
    return [json.loads(process.stdout.read().strip().splitlines()[-1]) for process in running if process.stdout]


def memory(argv: list[str]) -> int:
    """Prints the stages of both sides, beside each other."""
    options = dict(argument.split("=", 1) for argument in argv)
    method, steps = options.get("method", "dp_full"), int(options.get("steps", 6))
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        sides = [each["memory"] for each in measured(list(SIDES), Path(folder), method, steps)]
    print(f"| {method}, MiB | {' | '.join(SIDES)} |\n|---|---|---|---|")
    for stage in sides[0]:
        print(f"| {stage} | " + " | ".join(f"{side[stage]:.0f}" for side in sides) + " |")
    return 0


def main(argv: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in argv)
    rounds, steps = int(options.get("rounds", 3)), int(options.get("steps", 6))
    goals = [
        f"{what} (goal {goal})"
        for what, goal in zip(("whole step / bare step, quartiles", "memory of the process"), GOALS, strict=True)
    ]
    lines = [f"| method | bare step | {goals[0]} | {goals[1]} |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        for method in options.get("method", "dp_full,dp_bitfit").split(","):
            seconds, times, memories = [], [], []
            for turn in range(rounds):
                place = Path(folder) / f"{method}{turn}"
                place.mkdir()
                (place / "model").symlink_to(Path(folder) / "model")
                w, b = measured(("whole", "bare"), place, method, steps)
                seconds += b["seconds"][1:]
                times += [one / other for one, other in zip(w["seconds"][1:], b["seconds"][1:], strict=True)]
                memories.append(w["bytes"] / b["bytes"])
            low, middle, high = statistics.quantiles(times, n=4)
            lines.append(
                f"| {method} | {statistics.median(seconds):.2f} s | {middle:.3f} ({low:.3f} to {high:.3f}) | "
                f"{statistics.median(memories):.3f} |"
            )
            print(lines[-1], flush=True)
    head = (
        f"`python bench/training_step.py {' '.join(argv)}`, {date.today()}, {platform.machine()}, one thread, "
        f"torch {version('torch')}, lightning {version('lightning')}, {rounds} rounds of {steps} releases of {BATCH} rows.\n"
    )
    out = Path(options.get("out", f"bench/results/training_step-{date.today()}.md"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([head, *lines]) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        torch.set_num_threads(1)
        print(json.dumps(SIDES[sys.argv[2]](Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))))
    else:
        sys.exit(memory(sys.argv[2:]) if sys.argv[1:2] == ["memory"] else main(sys.argv[1:]))
