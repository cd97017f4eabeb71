"""Time and memory of a private step beside an ordinary one: variants interleaved, correctness first, one process each.

    python bench/engine.py [rounds=3] [only=<part of a row's name>,…] [variants=a,b] [out=bench/results/engine.md]

A step is forward, (clipped) gradient and fused AdamW, without noise, which is measured on its own below the table: a release
of many micro-batches pays it once. Variants of a row run in turn, A B C A B C; each number is the median over rounds of the
ratio to the ordinary step of the same round. Memory comes from another process per variant: the largest sum of tensor bytes
that live in one step beyond weights and optimizer state, and the growth of the resident set over the whole process.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from models import MODELS, trainable_of
from variants import BY_LAYER, ENGINES, OURS, PEERS, PLAIN, VARIANTS, gradient_of


@dataclass(frozen=True)
class Row:
    """One line of the table: `method` trains the parts of `model` on batches (rows, length).

    `goal`: what time and tensor bytes over the ordinary step shall be at most.
    """

    model: str
    method: str
    rows: int
    length: int
    goal: tuple[float, float] = (1.05, 1.05)

    @property
    def name(self) -> str:
        return f"{self.model} {self.method} B={self.rows} T={self.length}"


ROWS = [
    Row("roberta_base", "full", 8, 128),
    Row("roberta_base", "full", 16, 128),
    Row("gpt2", "full", 8, 128),
    Row("gpt2", "full", 2, 512, (1.10, 1.10)),
    Row("roberta_base", "full", 2, 512, (1.10, 1.10)),
    Row("llama", "lora", 8, 128, (1.03, 1.03)),
    Row("roberta_base", "bitfit", 8, 128, (0.68, 0.60)),
    Row("roberta_base", "bitfit", 2, 512, (0.68, 0.60)),
]


# ---- a step


def stepper(row: Row, variant: str) -> Callable[[], None]:
    """A function that makes one optimizer step."""
    method = "full" if variant == "ordinary full" else row.method
    case = MODELS[row.model](row.rows, row.length)
    trainable = trainable_of(case, method)
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-5, fused=True)
    gradient = gradient_of(case, "ordinary" if variant == "ordinary full" else variant)

    def step() -> None:
        sums = gradient()
        for name, parameter in trainable.items():
            if name in sums:
                parameter.grad = sums[name]
        del sums
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- correctness


def check(row: Row, variant: str) -> None:
    """The variant's clipped sums on four short rows equal the loop's; raises if not."""
    from privzoo.privacy.clipping import Loop

    case = MODELS[row.model](4, 16)
    trainable = trainable_of(case, row.method)
    clip_norm = float(Loop(case.model)(case.losses, float("inf")).norms.mean())
    expected = Loop(case.model, "layer" if variant == BY_LAYER else "all")(case.losses, clip_norm).sums
    found = gradient_of(case, variant, clip_norm)()
    found = found or {n: p.grad for n, p in trainable.items() if p.grad is not None}
    scale = max(float(value.abs().max()) for value in expected.values())
    worst = max(float((found.get(n, torch.zeros(())) - value).abs().max()) for n, value in expected.items()) / scale
    if not worst < 1e-4:
        raise RuntimeError(f"differs from the loop by {worst:.1g}")


# ---- workers


def serve(row: Row, variant: str) -> None:
    """Answers each line of the input with the seconds of one step."""
    torch.set_num_threads(1)
    step = stepper(row, variant)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def weigh(row: Row, variant: str) -> None:
    """Prints peak tensor bytes of a step and the growth of the resident set."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = stepper(row, variant)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    events = sorted(allocations(profile.profiler.kineto_results.experimental_event_tree()))
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    print(json.dumps([peak, (after - before) * 1024]), flush=True)


def allocations(events: list) -> Iterator[tuple[int, int]]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from allocations(event.children)


def worker(kind: str, row: Row, variant: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "worker", kind, json.dumps(row.__dict__), variant]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- the table


def measured(row: Row, rounds: int, wanted: list[str]) -> dict[str, str | tuple[float, float, float]]:
    """By variant: ratios of time, of peak tensor bytes and of RSS growth, or why it does not run."""
    base = "ordinary full" if row.method == "bitfit" else PLAIN
    variants = [base, *(v for v in VARIANTS if v != base and v in wanted)]
    found: dict[str, str | tuple[float, float, float]] = {}
    for variant in [v for v in variants if v in ENGINES]:
        run = worker("check", row, variant)
        _, errors = run.communicate()
        if run.returncode:
            found[variant] = "does not run: " + errors.strip().splitlines()[-1].split(": ", 1)[-1][:90]
    running = [v for v in variants if v not in found]
    with started(row, running) as workers:
        times: dict[str, list[float]] = {variant: [] for variant in running}
        for _ in range(rounds):
            for variant in running:
                times[variant].append(asked(workers[variant]))
    weights = {}
    for variant in running:
        out, errors = worker("weigh", row, variant).communicate()
        weights[variant] = json.loads(out)
    for variant in running:
        ratios = [t / b for t, b in zip(times[variant], times[base], strict=True)]
        found[variant] = (statistics.median(ratios), *(w / b for w, b in zip(weights[variant], weights[base], strict=True)))
    seconds = statistics.median(times[base])
    print(f"  base {base}: {seconds:.2f} s a step, {weights[base][0] / 2**20:.0f} MiB of tensors in it", flush=True)
    return found


@contextmanager
def started(row: Row, variants: list[str]) -> Iterator[dict[str, subprocess.Popen]]:
    workers = {}
    try:
        for variant in variants:  # one after the other: a first step proves layouts and fills caches
            workers[variant] = worker("serve", row, variant)
            line = workers[variant].stdout.readline()
            if line != "ready\n":
                raise RuntimeError(f"{row.name} {variant}: {workers[variant].stderr.read()[-2000:]}")
        yield workers
    finally:
        for each in workers.values():
            each.kill()


def asked(process: subprocess.Popen) -> float:
    process.stdin.write("step\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def against_goal(row: Row, found: dict[str, str | tuple[float, float, float]]) -> str:
    """A line of the goals table."""
    ours = found[OURS]
    if isinstance(ours, str):
        return f"| {row.name} | {ours} |"
    cells = []
    for value, goal in zip(ours, row.goal, strict=False):
        cells += [f"{value:.2f}", f"{goal:.2f}" if value <= goal + 0.005 else f"{goal:.2f}: **missed**"]
    peers = [found[v] for v in PEERS if not isinstance(found.get(v, ""), str)]
    ahead = all(ours[0] < peer[0] for peer in peers) if peers else "not measured"
    return f"| {row.name} | {' | '.join(cells)} | {ahead if isinstance(ahead, str) else 'yes' if ahead else '**no**'} |"


def noise_line() -> str:
    """Seconds of a release's noise at GPT-2's size beside those of its clipped sums."""
    from noise import seconds_of_noise

    return seconds_of_noise(MODELS["gpt2"](8, 128))


def main(argv: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in argv)
    rounds, only = int(options.get("rounds", 3)), options.get("only", "").split(",")
    wanted = options.get("variants", ",".join(VARIANTS)).split(",")
    lines = ["| | " + " | ".join(VARIANTS) + " |", "|---|" + "---|" * len(VARIANTS)]
    goals = ["| | time | goal | tensor bytes | goal | ahead of all peers that run |", "|---|---|---|---|---|---|"]
    for row in [row for row in ROWS if any(part in row.name for part in only)]:
        print(row.name, flush=True)
        found = measured(row, rounds, wanted)
        cells = [found.get(v, "") for v in VARIANTS]
        texts = [c if isinstance(c, str) else "{:.2f} / {:.2f} / {:.2f}".format(*c) for c in cells]
        lines.append(f"| {row.name} | " + " | ".join(texts) + " |")
        print(lines[-1], flush=True)
        if OURS in found:
            goals.append(against_goal(row, found))
            print(goals[-1], flush=True)
    lines += ["", f"Goals, for {OURS}:", "", *goals]
    if "noise" in only or only == [""]:
        lines += ["", noise_line()]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "opacus"))
    head = (
        f"`python bench/engine.py {' '.join(argv)}`, {date.today()}, {platform.machine()}, one thread, {versions}, "
        f"{rounds} rounds.\n\nTime / peak tensor bytes in the step / RSS growth, each over the ordinary step "
        "(bitfit: over ordinary *full* fine-tuning).\n"
    )
    out = Path(options.get("out", "bench/results/engine.md"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([head, *lines]) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        kind, row, variant = sys.argv[2], Row(**json.loads(sys.argv[3])), sys.argv[4]
        {"serve": serve, "weigh": weigh, "check": check}[kind](row, variant)
    else:
        sys.exit(main(sys.argv[1:]))
