"""Time and memory of a DPZero release beside two forward passes over the same rows: interleaved, correctness first.

    python bench/dpzero.py [rounds=3] [only=<part of a row's name>] [out=bench/results/dpzero.md]

A release is the whole of it: both sides of one direction, clipping, noise, update, and the fingerprint of the weights that
the next release's noise is keyed by. "Perturbations" are the three moves and the update by themselves. The peer is the walk
of the published MeZO and DPZero code (seed, `torch.normal` for a whole tensor, four passes), with the same losses. Memory
comes from a process of its own for each variant: the most that the process held, weights included.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from models import MODELS, Case, Row, trainable_of

from privzoo.methods.directions import Direction, SeededSGD
from privzoo.methods.zeroth_order import ZerothOrder
from privzoo.privacy.noise import NoiseMechanism, fingerprint
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.sampling import LogicalBatch
from privzoo.privacy.streams import RunKey

ROWS = [Row("roberta_base", "full", 16, 128), Row("roberta_base", "full", 4, 128), Row("llama", "lora", 8, 128)]
KINDS = ("rademacher", "normal", "sphere")
PLAIN, PEER = "two forwards", "published walk"
VARIANTS = (PLAIN, *KINDS, PEER)
SMOOTHING = 1e-3
STEPS = 1_000


class Rows:
    """The case's rows as a task whose micro-batches are row numbers."""

    def __init__(self, case: Case) -> None:
        self.case = case

    rows_of_unit = None

    def losses(self, model, batch):
        return self.case.losses(batch["row"])

    def batch(self, release: int) -> LogicalBatch:
        return LogicalBatch(release, ({"row": torch.arange(self.case.rows)},))


class Bare(ZerothOrder):
    """The method without a Trainer."""

    def finish_step(self) -> None:
        self.walker.step()
        self.weights = fingerprint(self.trainable.items())


def method_of(case: Case, names: list[str], kind: str, private: bool = True) -> Bare:
    chosen = {"noise_multiplier": 1.0} if private else {"epsilon": float("inf")}
    epochs = STEPS * case.rows / 10_000
    plan = PrivacyPlan(num_examples=10_000, batch_size=case.rows, epochs=epochs, delta=1e-5, clip_norm=1.0, **chosen)
    mechanism = NoiseMechanism(plan, RunKey.for_tests(0), "bench")
    pattern = "^(" + "|".join(name.replace(".", "[.]") for name in names) + ")$"
    return Bare(case.model, Rows(case), mechanism, pattern, (), SeededSGD, 1e-6, smoothing=SMOOTHING, direction_kind=kind)


def stepper(row: Row, variant: str) -> Callable[[], None]:
    """A function that makes one release, or what it is compared with."""
    case = MODELS[row.model](row.rows, row.length)
    trained = trainable_of(case, row.method)
    # Made for all variants: what the accountant's libraries take is no part of a release.
    method, count = method_of(case, list(trained), variant if variant in KINDS else KINDS[0]), iter(range(STEPS))
    if variant in KINDS:

        def release() -> None:
            method.training_step(method.task.batch(next(count)), 0)

        return release

    def move(scale: float) -> None:
        torch.manual_seed(1)
        for parameter in trained.values():
            parameter.data.add_(torch.normal(0.0, 1.0, size=parameter.shape), alpha=scale)

    @torch.no_grad()
    def other() -> None:
        walk = move if variant == PEER else (lambda scale: None)
        walk(SMOOTHING)
        higher = case.losses()
        walk(-2 * SMOOTHING)
        slope = float((higher - case.losses()).mean()) / (2 * SMOOTHING)
        walk(SMOOTHING)
        walk(-1e-6 * slope)

    return other


def perturbations(row: Row, kind: str) -> tuple[float, float, int]:
    """Seconds of three moves and an update, seconds of a fingerprint, and how many values are trained."""
    case = MODELS[row.model](row.rows, row.length)
    trained = trainable_of(case, row.method)
    walker, found = SeededSGD(trained.values(), lr=1e-6), []
    for release in range(3):
        direction, start = Direction(RunKey.for_tests(0), kind, release, "", 0, trained), time.perf_counter()
        for place, end in ((0.0, SMOOTHING), (SMOOTHING, -SMOOTHING), (-SMOOTHING, 0.0)):
            walker.displace(direction, place, end)
        walker.slopes = [(direction, 1.0)]
        walker.step()
        middle = time.perf_counter()
        fingerprint(trained.items())
        found.append((middle - start, time.perf_counter() - middle))
    moves, prints = zip(*found, strict=True)
    return statistics.median(moves), statistics.median(prints), sum(p.numel() for p in trained.values())


def check(row: Row, kind: str) -> float:
    """A release without privacy on four short rows equals one on whole copies of weights and direction; returns the drift.

    Raises:
        RuntimeError: if it does not.
    """
    case = MODELS[row.model](4, 16)
    trained = trainable_of(case, row.method)
    method = method_of(case, list(trained), kind, private=False)
    before = {name: p.detach().clone() for name, p in trained.items()}
    direction = Direction(method.mechanism.key, kind, 0, "bench", 0, trained)
    whole = {n: torch.cat([u.clone() for _, u in direction.blocks(p)]).view_as(p) for n, p in trained.items()}
    sides = []
    with torch.no_grad():
        for side in (SMOOTHING, -SMOOTHING):
            for name, p in trained.items():
                p.copy_(before[name] + side * whole[name])
            sides.append(case.losses().double())
        for name, p in trained.items():
            p.copy_(before[name])
    expected = float((sides[0] - sides[1]).sum()) / (2 * SMOOTHING)
    sums = method.query(method.task.batch(0))
    drift = max(float((p.detach() - before[name]).abs().max()) for name, p in trained.items())
    if not abs(float(sums["directions"]) - expected) < 1e-2 * max(1.0, abs(expected)):  # float32 losses over 2 lambda
        raise RuntimeError(f"{row.name} {kind}: slope {float(sums['directions'])}, expected {expected}")
    lr = method.walker.param_groups[0]["lr"] = 1e-2
    method.update(sums, method.mechanism.plan.at(0))
    for name, p in trained.items():
        moved = lr * float(sums["directions"]) / case.rows * whole[name]
        if not torch.allclose(p.detach(), before[name] - moved, rtol=0, atol=1e-6 + 1e-4 * float(moved.abs().max())):
            raise RuntimeError(f"{row.name} {kind}: {name} is not where it should be")
    return drift


# ---- processes


def serve(row: Row, variant: str) -> None:
    """Answers each line of the input with the seconds of one step."""
    step = stepper(row, variant)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def weigh(row: Row, variant: str) -> None:
    """Prints the most memory that the process held over two steps, in MiB."""
    step = stepper(row, variant)
    step()
    step()
    # Not getrusage: its figure is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def worker(kind: str, row: Row, variant: str) -> subprocess.Popen:
    command = [sys.executable, __file__, kind, json.dumps(row.__dict__), variant]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def asked(process: subprocess.Popen) -> float:
    process.stdin.write("step\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measured(row: Row, rounds: int) -> list[str]:
    """Lines of the table for a row."""
    drifts = {kind: check(row, kind) for kind in KINDS}
    workers = {variant: worker("serve", row, variant) for variant in VARIANTS}
    try:
        for process in workers.values():
            assert process.stdout.readline() == "ready\n"
        seconds = [{variant: asked(process) for variant, process in workers.items()} for _ in range(rounds)]
    finally:
        for process in workers.values():
            process.kill()
    memory = {variant: float(worker("weigh", row, variant).communicate()[0]) for variant in VARIANTS}
    base, lines = statistics.median(each[PLAIN] for each in seconds), []
    for variant in VARIANTS:
        ratio = statistics.median(each[variant] / each[PLAIN] for each in seconds)
        cells = [
            f"{ratio * base:.2f} s",
            f"{ratio:.3f}",
            f"{memory[variant]:.0f} MiB",
            f"{memory[variant] / memory[PLAIN]:.3f}",
        ]
        if variant in KINDS:
            moves, prints, count = perturbations(row, variant)
            rest = statistics.median((each[variant] - moves) / each[PLAIN] for each in seconds)
            cells += [f"{moves:.2f} s ({moves / count / 4 * 1e9:.2f} ns)", f"{prints:.2f} s", f"{rest:.3f}"]
            cells += [f"{drifts[variant]:.1e}"]
        else:
            cells += ["", "", "", ""]
        lines.append(f"| {row.name}: {variant} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main(argv: list[str]) -> None:
    options = dict(argument.split("=", 1) for argument in argv)
    rounds, out = int(options.get("rounds", 3)), Path(options.get("out", "bench/results/dpzero.md"))
    lines: list[str] = []
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    command = f"python bench/dpzero.py {' '.join(argv)}".strip()
    head = f"`{command}`, {date.today()}, {platform.machine()}, one thread, {versions}, {rounds} rounds."
    titles = (
        "", "a release", "/ two forwards", "peak memory", "/ two forwards", "perturbations (a value and pass)",
        "fingerprint", "(release - perturbations) / two forwards", "drift of a query",
    )  # fmt: skip
    for row in [row for row in ROWS if options.get("only", "") in row.name]:
        lines += measured(row, rounds)
        table = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *lines]
        out.write_text("\n".join([head, "", *table]) + "\n")  # after each row: a long run may be cut short
    print(f"written to {out}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3 and sys.argv[1] in ("serve", "weigh"):
        {"serve": serve, "weigh": weigh}[sys.argv[1]](Row(**json.loads(sys.argv[2])), sys.argv[3])
    else:
        main(sys.argv[1:])
