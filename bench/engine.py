"""Time and memory of a private step beside an ordinary one: variants interleaved, correctness first, one process each.

    python bench/engine.py [rounds=3] [only=<part of a row's name>,…] [variants=a,b] [out=bench/results/engine-<date>.md]

A step is forward, (clipped) gradient and fused AdamW, without noise, which is measured on its own below the table: a release
of many micro-batches pays it once. Variants of a row run in turn, A B C A B C; each number is the median over rounds of the
ratio to the ordinary step of the same round (a peer that is far off in its first round runs in no further one). Each variant
has a process of its own, which then says its memory: the largest sum of tensor bytes that live in one step beyond weights
and optimizer state, and the growth of the resident set over the whole process.

A run takes two hours. To stop *this* process alone (kill -STOP, -CONT) halts it between two steps, not within one. One that
was cut short leaves `unfinished.json` beside its table: started again, it takes over the rows that were measured with the
same code, and says so.
"""

import hashlib
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
from itertools import chain
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
def refusals(model: str, method: str, length: int, variants: tuple[str, ...]) -> dict[str, str]:
    """Of each variant why it does not run, or not rightly; nothing where it does."""
    run = worker("check", Row(model, method, 2, length), ",".join(variants))
    output, errors = run.communicate()
    if run.returncode:
        raise RuntimeError(errors[-2000:])
    return {variant: f"does not run: {why}" if why else "" for variant, why in json.loads(output.splitlines()[-1]).items()}


def measured(row: Row, rounds: int, wanted: list[str]) -> tuple[Found, Costs]:
    """By variant: ratios of time, of peak tensor bytes and of RSS growth, or why it does not run; and what costs what."""
    base = base_of(row)
    variants = [base, *(v for v in VARIANTS if v != base and v in wanted and (row.peers or v not in PEERS))]
    reasons = refusals(row.model, row.method, row.length, tuple(v for v in variants if v in ENGINES))
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
        for variant in set(workers) - {base}:  # peers want the memory
            workers[variant].kill()
        for peer in [v for v in running if v in PEERS]:  # one at a time: some take many times the memory
            try:
                pairs[peer], weights[peer] = beside(row, peer, workers[base], rounds)
            except RuntimeError as error:
                found[peer] = f"ended: {str(error).strip().splitlines()[-1][-90:]}"
    for variant, (peak, makers, resident) in weights.items():
        times = statistics.median(value / beside for value, beside in pairs[variant])
        found[variant] = (times, peak / weights[base][0], resident / weights[base][2])
        costs["bytes"][variant] = makers
    seconds_of_base = statistics.median(value for value, _ in pairs[base])
    print(f"  base {base}: {seconds_of_base:.2f} s a step, {weights[base][0] / 2**20:.0f} MiB of tensors in it", flush=True)
    return found, costs


def beside(row: Row, peer: str, base: subprocess.Popen, rounds: int) -> tuple[list[tuple[float, float]], list]:
    """A peer's steps in turn with those of the base, and its weight."""
    with started(row, [peer]) as alone:
        pairs = [(asked(alone[peer], "step"), asked(base, "step"))]
        while len(pairs) < rounds and pairs[0][0] < CLOSE * pairs[0][1]:
            pairs.append((asked(alone[peer], "step"), asked(base, "step")))
        return pairs, asked(alone[peer], "weigh")


@contextmanager
def started(row: Row, variants: list[str]) -> Iterator[dict[str, subprocess.Popen]]:
    workers = {}
    try:
        for variant in variants:  # one after the other: a first step proves layouts and fills caches
            workers[variant] = worker("serve", row, variant)
            line = workers[variant].stdout.readline()
            if line != "ready\n":
                raise RuntimeError(workers[variant].stderr.read()[-2000:].strip() or "no message (out of memory?)")
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
        raise RuntimeError(process.stderr.read()[-2000:].strip() or "no message (out of memory?)")
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


def report(argv: list[str], rounds: int, rows: list[list[list[str]]]) -> str:
    lines, goals, rest = ([*chain(*parts)] for parts in zip(*rows, strict=True))
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
    state, code = out.with_name("unfinished.json"), code_of(rounds, wanted)
    before = json.loads(state.read_text()) if state.exists() else {}
    done: dict[str, list[list[str]]] = before["rows"] if before.get("code") == code else {}
    for row in [row for row in ROWS if any(part in row.name for part in only)]:
        print(row.name + (" (measured before)" if row.name in done else ""), flush=True)
        if row.name not in done:
            done[row.name] = texts_of(row, *measured(row, rounds, wanted))
            state.write_text(json.dumps({"code": code, "rows": done}))
        print("\n".join(chain(*done[row.name])), flush=True)
        out.write_text(report(argv, rounds, list(done.values())))
    if "noise" in only or only == [""]:
        done["noise"] = [[], [], ["", noise_line()]]
        out.write_text(report(argv, rounds, list(done.values())))
    state.unlink(missing_ok=True)
    print(f"{out.read_text()}\nwritten to {out}")
    return 0


def texts_of(row: Row, found: Found, costs: Costs) -> list[list[str]]:
    """A row's lines of the table, of the goals and of the reasons."""
    cells = [found.get(v, "") for v in VARIANTS]
    texts = [c if isinstance(c, str) else "{:.2f} / {:.2f} / {:.2f}".format(*c) for c in cells]
    line = f"| {row.name} | " + " | ".join(texts) + " |"
    return [[line], [against_goal(row, found)], explained(row, found, costs)] if OURS in found else [[line], [], []]


def code_of(rounds: int, wanted: list[str]) -> str:
    """A hash of all that a row's numbers hang on: the engines, what is measured and how, and the packages."""
    here = Path(__file__).parent
    engines = here.parent / "src" / "privzoo" / "privacy" / "clipping"
    files = [*sorted(engines.glob("*.py")), *(here / f"{name}.py" for name in ("models", "variants", "workers"))]
    packages = [version(name) for name in ("torch", "transformers", "opacus")]
    return hashlib.sha256(repr([rounds, wanted, packages, *(file.read_text() for file in files)]).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
