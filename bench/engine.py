"""Time and memory of a private step beside an ordinary one: variants interleaved, correctness first, one process each.

    python bench/engine.py [rounds=3] [only=<part of a row's name>,…] [variants=a,b] [out=bench/results/engine-<date>.md]

A step is forward, (clipped) gradient and fused AdamW, without noise, which is measured on its own below the table: a release
of many micro-batches pays it once. Variants of a row run in turn, A B C A B C; each number is the median over rounds of the
ratio to the ordinary step of the same round (a peer that is far off in its first round runs in no further one). Each variant
has a process of its own, which then says its memory: the largest sum of tensor bytes that live in one step beyond weights
and optimizer state, and the growth of the resident set over the whole process.

A run takes an hour or more. To stop *this* process alone (kill -STOP, -CONT) halts it between two steps, not within one.
"""

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

from models import MODELS, ROWS, Row
from variants import ENGINES, OURS, PEERS, PLAIN, VARIANTS

Found = dict[str, str | tuple[float, float, float]]
Costs = dict[str, dict[str, dict[str, float]]]  # seconds and bytes, by variant and operation
LINES = 8  # of a profile
CLOSE = 1.3  # a peer slower than this, over the ordinary step, is far off


def worker(kind: str, row: Row, variant: str) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("workers.py")), kind, json.dumps(row.__dict__), variant]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def base_of(row: Row) -> str:
    return "ordinary full" if row.method == "bitfit" else PLAIN


@cache
def refusal(model: str, method: str, length: int, variant: str) -> str:
    """Why the variant does not run, or not rightly; nothing where it does."""
    run = worker("check", Row(model, method, 2, length), variant)
    _, errors = run.communicate()
    return "does not run: " + errors.strip().splitlines()[-1].split(": ", 1)[-1][:90] if run.returncode else ""


def measured(row: Row, rounds: int, wanted: list[str]) -> tuple[Found, Costs]:
    """By variant: ratios of time, of peak tensor bytes and of RSS growth, or why it does not run; and what costs what."""
    base = base_of(row)
    variants = [base, *(v for v in VARIANTS if v != base and v in wanted and (row.peers or v not in PEERS))]
    reasons = {v: refusal(row.model, row.method, row.length, v) for v in variants if v in ENGINES}
    found: Found = {variant: reason for variant, reason in reasons.items() if reason}
    running = [v for v in variants if v not in found]
    pairs: dict[str, list[tuple[float, float]]] = {}  # by variant: its seconds and the base's, by round
    weights: dict[str, list] = {}
    costs: Costs = {"seconds": {}, "bytes": {}}
    with started(row, [v for v in running if v not in PEERS]) as workers:
        for _ in range(rounds):
            seconds = {variant: asked(each, "step") for variant, each in workers.items()}
            for variant, value in seconds.items():
                pairs.setdefault(variant, []).append((value, seconds[base]))
        weights |= {variant: asked(each, "weigh") for variant, each in workers.items()}
        if OURS in workers:
            costs["seconds"] = {variant: asked(workers[variant], "profile") for variant in (base, OURS)}
        for peer in [v for v in running if v in PEERS]:  # one at a time: some take many times the memory
            with started(row, [peer]) as alone:
                pairs[peer] = [(asked(alone[peer], "step"), asked(workers[base], "step"))]
                while len(pairs[peer]) < rounds and pairs[peer][0][0] < CLOSE * pairs[peer][0][1]:
                    pairs[peer].append((asked(alone[peer], "step"), asked(workers[base], "step")))
                weights[peer] = asked(alone[peer], "weigh")
    for variant, (peak, makers, resident) in weights.items():
        times = statistics.median(value / beside for value, beside in pairs[variant])
        found[variant] = (times, peak / weights[base][0], resident / weights[base][2])
        costs["bytes"][variant] = makers
    seconds_of_base = statistics.median(value for value, _ in pairs[base])
    print(f"  base {base}: {seconds_of_base:.2f} s a step, {weights[base][0] / 2**20:.0f} MiB of tensors in it", flush=True)
    return found, costs


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


def asked(process: subprocess.Popen, what: str):
    """What a worker answers."""
    process.stdin.write(what + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended: {process.stderr.read()[-2000:] or 'no message (out of memory?)'}")
    return json.loads(line)


def against_goal(row: Row, found: Found) -> str:
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


def explained(row: Row, found: Found, costs: Costs) -> list[str]:
    """Where the time and the memory of a row go that missed its goal."""
    ours = found[OURS]
    if isinstance(ours, str) or all(value <= goal + 0.005 for value, goal in zip(ours, row.goal, strict=False)):
        return []
    base = base_of(row)
    seconds, bytes_ = (differences(costs[what], base) for what in ("seconds", "bytes"))
    return [
        f"- {row.name}: more time than the ordinary step, in percent of it: {seconds};"
        f" more (or less) tensor bytes at the peak, in percent of its peak: {bytes_}."
    ]


def differences(costs: dict[str, dict[str, float]], base: str) -> str:
    """The operations in which our step differs most from the ordinary one."""
    whole = sum(costs[base].values())
    found = {name: costs[OURS].get(name, 0) - costs[base].get(name, 0) for name in costs[OURS] | costs[base]}
    largest = sorted(found, key=lambda name: -abs(found[name]))[:LINES]
    return ", ".join(f"{name or 'engine'} {100 * found[name] / whole:+.1f}" for name in largest)


def noise_line() -> str:
    """Seconds of a release's noise at GPT-2's size beside those of its clipped sums."""
    from noise import seconds_of_noise

    return seconds_of_noise(MODELS["gpt2"](8, 128))


def report(argv: list[str], rounds: int, lines: list[str], goals: list[str], rest: list[str]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "opacus"))
    head = (
        f"`python bench/engine.py {' '.join(argv)}`, {date.today()}, {platform.machine()}, one thread, {versions}, "
        f"{rounds} rounds.\n\nTime / peak tensor bytes in the step / RSS growth, each over the ordinary step "
        "(bitfit: over ordinary *full* fine-tuning).\n"
    )
    top = ["| | " + " | ".join(VARIANTS) + " |", "|---|" + "---|" * len(VARIANTS)]
    second = ["| | time | goal | tensor bytes | goal | ahead of all peers that run |", "|---|---|---|---|---|---|"]
    return "\n".join([head, *top, *lines, "", f"Goals, for {OURS}:", "", *second, *goals, "", *rest]) + "\n"


def main(argv: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in argv)
    rounds, only = int(options.get("rounds", 3)), options.get("only", "").split(",")
    wanted = options.get("variants", ",".join(VARIANTS)).split(",")
    out = Path(options.get("out", f"bench/results/engine-{date.today()}.md"))
    out.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    goals: list[str] = []
    reasons: list[str] = []
    for row in [row for row in ROWS if any(part in row.name for part in only)]:
        print(row.name, flush=True)
        found, costs = measured(row, rounds, wanted)
        cells = [found.get(v, "") for v in VARIANTS]
        texts = [c if isinstance(c, str) else "{:.2f} / {:.2f} / {:.2f}".format(*c) for c in cells]
        lines.append(f"| {row.name} | " + " | ".join(texts) + " |")
        print(lines[-1], flush=True)
        if OURS in found:
            goals.append(against_goal(row, found))
            why = explained(row, found, costs)
            reasons += why
            print("\n".join([goals[-1], *why]), flush=True)
        out.write_text(report(argv, rounds, lines, goals, reasons))  # after each row: a long run may be cut short
    if "noise" in only or only == [""]:
        reasons += ["", noise_line()]
        out.write_text(report(argv, rounds, lines, goals, reasons))
    print(f"{out.read_text()}\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
