"""Private steps beside ordinary ones on a GPU: real architectures, random weights, nothing is downloaded.

    python bench/gpu.py                                  every row, in at most eight minutes
    python bench/gpu.py only=mistral,vit rounds=3 minutes=4 out=gpu.md

It takes privzoo from src/ beside it, and needs torch, transformers, peft and bitsandbytes. Opacus serves its own columns and
dp-accounting DPZero; where they are not there the table says so. Without a GPU all sizes are tiny: a trial of the script.

Of each row first the correctness, on two short rows against the loop, in float32 but for a 4-bit base; then rounds in which
the ordinary twin, book-keeping and rows one by one take turns on one model; then the peers, whose hooks stay in the model.
Medians over rounds; peak memory of a step, weights and optimizer state included; multiplications by torch's FlopCounterMode
over the ordinary step, so that the share of the chip's peak is that of useful work.
"""

import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_models import MODELS, Case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = DEVICE.type == "cpu"
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bfloat16, as the maker states them
ORDINARY, OURS, ONE_BY_ONE, HOOKS, GHOST, FORWARD, DPZERO = (
    "ordinary", "book_keeping", "micro_batches_of_one", "opacus", "opacus_ghost", "two forward passes", "dpzero",
)  # fmt: skip
TURNS, PEERS = (ORDINARY, OURS, ONE_BY_ONE), (HOOKS, GHOST)
COLUMNS = (*TURNS, *PEERS)


@dataclass(frozen=True)
class Row:
    """`method` trains `model` on batches (rows, size): tokens of a text, or pixels of an image's side."""

    model: str
    method: str
    rows: int
    size: int
    peers: bool = True

    @property
    def name(self) -> str:
        return f"{self.model} {self.method} B={self.rows} size={self.size}"


ROWS = [
    Row("roberta_large", "full", 16, 256),
    Row("gpt2_large", "full", 8, 128),
    Row("mistral_7b", "qlora", 4, 512),
    Row("mistral_7b", "qlora", 2, 1024),
    Row("roberta_large", "bitfit", 16, 256),
    Row("opt_6_7b", "dpzero", 16, 256),
    Row("vit_large", "full", 32, 224),
    *(Row("roberta_large", method, 8, size, False) for size in (128, 256, 512, 1024) for method in ("full", "bitfit")),
    *(Row("vit_large", method, 16, size, False) for size in (224, 384) for method in ("full", "bitfit")),
]


@dataclass
class Measured:
    """A column of a row: median seconds of a step and its peak bytes, or why there are none."""

    seconds: float = 0.0
    peak: int = 0
    reason: str = ""


# ---- steps


def steps_of(case: Case, variant: str, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that makes one step of an optimizer, which all variants share: its state counts once."""
    if variant in (FORWARD, DPZERO):
        return zeroth_order(case, variant)
    trained = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    gradient = gradient_of(case, variant)

    def step() -> None:
        sums = gradient()
        for name, value in sums.items():
            trained[name].grad = value.to(trained[name].dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gradient_of(case: Case, variant: str, clip_norm: float = 1.0) -> Callable[[], dict[str, Tensor]]:
    """Clipped sums; of the ordinary step, and Opacus' ghost mode, gradients stay in .grad."""
    from privzoo.privacy.clipping import BookKeeping, Loop

    if variant == ORDINARY:
        return lambda: case.losses().sum().backward() or {}
    if variant == GHOST:
        from variants import opacus_ghost

        return opacus_ghost(case, clip_norm)
    if variant == HOOKS:
        return opacus_hooks(case, clip_norm)
    if variant == ONE_BY_ONE:
        loop, rows = Loop(case.model), range(case.rows)

        def one_by_one() -> dict[str, Tensor]:
            sums: dict[str, Tensor] | None = None
            for row in rows:
                sums = loop(lambda row=row: case.losses(slice(row, row + 1)), clip_norm, into=sums).sums
            return sums or {}

        return one_by_one
    engine = BookKeeping(case.model)
    return lambda: engine(case.losses, clip_norm).sums


def opacus_hooks(case: Case, clip_norm: float) -> Callable[[], dict[str, Tensor]]:
    """Opacus' per-sample gradients as its users have them: privzoo's wrapper would refuse what bfloat16 makes of them."""
    from opacus.grad_sample import GradSampleModule

    GradSampleModule(case.model, batch_first=True, loss_reduction="sum")
    trained: dict[str, Any] = {name: p for name, p in case.model.named_parameters() if p.requires_grad}

    def gradient() -> dict[str, Tensor]:
        case.losses().sum().backward()
        norms = torch.stack([p.grad_sample.flatten(1).float().norm(dim=1) for p in trained.values()]).norm(dim=0)
        factors, sums = (clip_norm / norms).clamp(max=1.0), {}
        for name, parameter in trained.items():
            samples, parameter.grad_sample, parameter.grad = parameter.grad_sample, None, None
            sums[name] = torch.einsum("r,r...->...", factors.to(samples.dtype), samples)
        return sums

    return gradient


def optimizer_of(case: Case) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad], lr=1e-6, fused=True)


def zeroth_order(case: Case, variant: str) -> Callable[[], None]:
    """A release of DPZero, or its two forward passes alone."""

    @torch.no_grad()
    def passes() -> None:
        for _ in range(2):
            case.losses()

    if variant == FORWARD:
        return passes
    from privzoo.methods.directions import Direction, SeededSGD
    from privzoo.privacy.clipping import clip_factors
    from privzoo.privacy.streams import RunKey

    parameters = dict(case.model.named_parameters())
    walker, key = SeededSGD(list(parameters.values()), lr=1e-7), RunKey.for_tests(0)
    releases = iter(range(1 << 30))

    @torch.no_grad()
    def step() -> None:
        release, at, losses = next(releases), 0.0, []
        direction = Direction(key, "rademacher", release, "", 0, parameters)
        for place in (1e-2, -1e-2):
            walker.displace(direction, at, place)
            at = place
            losses.append(case.losses().double())
        walker.displace(direction, at, 0.0)
        slopes = (losses[0] - losses[1]) / 2e-2
        walker.slopes = [(direction, float((slopes * clip_factors(slopes.abs(), 1.0)).sum()))]
        walker.step()

    return step


# ---- correctness


def differs(row: Row) -> str:
    """Nothing where book-keeping's clipped sums on two short rows are the loop's; a 4-bit base rounds to bfloat16."""
    from privzoo.privacy.clipping import BookKeeping, Loop

    case = MODELS[row.model](row.method, 2, 32 if row.model != "vit_large" else row.size, TINY, DEVICE, half=False)
    clip_norm = float(Loop(case.model)(case.losses, float("inf")).norms.mean())
    expected, found = (engine(case.model)(case.losses, clip_norm) for engine in (Loop, BookKeeping))
    scale = max(float(value.abs().max()) for value in expected.sums.values())
    worst = max(float((found.sums[name] - value).abs().max()) for name, value in expected.sums.items()) / scale
    allowed = 5e-2 if row.method == "qlora" else 1e-3
    return "" if worst <= allowed else f"differs from the loop by {worst:.1g}"


# ---- measuring


def measured(row: Row, rounds: int) -> tuple[dict[str, Measured], float]:
    """Of each column what it took, and the multiplications and additions of the ordinary step."""
    turns: tuple[str, ...] = (FORWARD, DPZERO) if row.method == "dpzero" else TURNS
    reason = "" if row.method == "dpzero" else differs(row)
    if row.method == "dpzero" and importlib.util.find_spec("dp_accounting") is None:
        return {DPZERO: Measured(reason="needs dp-accounting")}, 0.0
    if reason:
        return {OURS: Measured(reason=reason)}, 0.0
    case = MODELS[row.model](row.method, row.rows, row.size, TINY, DEVICE)
    found = in_turns(case, turns, rounds)
    with FlopCounterMode(display=False) as counter:
        steps_of(case, turns[0], optimizer_of(case))()
    for peer in PEERS if row.peers and row.method != "dpzero" else ():
        if importlib.util.find_spec("opacus") is None:
            found[peer] = Measured(reason="Opacus is not installed")
            continue
        del case  # its hooks would stay
        free()
        case = MODELS[row.model](row.method, row.rows, row.size, TINY, DEVICE)
        found |= in_turns(case, (peer,), rounds)
    del case
    free()
    return found, float(counter.get_total_flops())


def in_turns(case: Case, variants: tuple[str, ...], rounds: int) -> dict[str, Measured]:
    found, times = {variant: Measured() for variant in variants}, {variant: list[float]() for variant in variants}
    steps, optimizer = dict[str, Callable[[], None]](), optimizer_of(case)
    for number in range(rounds + 1):  # the first finds caches cold, and proves where examples lie
        for variant in variants:
            if found[variant].reason:
                continue
            try:
                if variant not in steps:
                    steps[variant] = steps_of(case, variant, optimizer)
                if number == 0:
                    steps[variant]()
                seconds, found[variant].peak = timed(steps[variant])
                times[variant].append(seconds)
            except Exception as error:  # a peer's is part of the table, as is memory that runs out
                found[variant].reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:80]
                case.model.zero_grad(set_to_none=True)
                free()
    for variant in variants:
        found[variant].seconds = statistics.median(times[variant][1:] or times[variant] or [0.0])
    return found


def timed(step: Callable[[], None]) -> tuple[float, int]:
    """Seconds and peak bytes of a step."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# ---- the table


def line_of(row: Row, found: dict[str, Measured], flops: float) -> str:
    """Examples a second, share of the chip's peak, peak memory; and time and memory over the twin's."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    peak = next((tflops for chip, tflops in PEAK_TFLOPS.items() if chip in name), None)
    renamed = {FORWARD: ORDINARY, DPZERO: OURS}
    columns = {renamed.get(variant, variant): each for variant, each in found.items()}
    twin, cells = columns.get(ORDINARY), []
    for variant in COLUMNS:
        each = columns.get(variant)
        if each is None or each.reason:
            cells.append(each.reason if each else "")
            continue
        share = f", {flops / each.seconds / 1e12 / peak:.0%}" if peak and flops else ""
        against = f" ({each.seconds / twin.seconds:.2f} / {each.peak / twin.peak:.2f})" if twin and twin.peak else ""
        cells.append(f"{row.rows / each.seconds:.3g}/s{share}, {each.peak / 2**30:.1f} GiB{against}")
    return f"| {row.name} | " + " | ".join(cells) + " |"


def main(argv: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in argv)
    rounds, only = int(options.get("rounds", 3)), options.get("only", "").split(",")
    deadline = time.monotonic() + 60 * float(options.get("minutes", 8))
    chip = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU: tiny sizes, a trial of the script alone"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    head = [
        f"`python bench/gpu.py {' '.join(argv)}`, {date.today()}, {chip}, {packages}, {rounds} rounds.", "",
        "Examples a second, share of the chip's dense bfloat16 peak, peak memory (time / memory over the ordinary twin).",
        "",
        "| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|",
    ]  # fmt: skip
    lines = []
    for row in [row for row in ROWS if any(part in row.name for part in only)]:
        if time.monotonic() > deadline:
            lines.append(f"| {row.name} | not reached in {options.get('minutes', 8)} minutes |")
            continue
        try:
            lines.append(line_of(row, *measured(row, rounds)))
        except torch.OutOfMemoryError as error:
            lines.append(f"| {row.name} | {str(error).splitlines()[0][:80]} |")
            free()
        print(lines[-1], flush=True)
    if "out" in options:
        Path(options["out"]).write_text("\n".join([*head, *lines]) + "\n")
    print("\n".join([*head, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
