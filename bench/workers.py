"""What `engine.py` runs in processes of their own: one step, its correctness, its memory, its profile.

python bench/workers.py check|serve|weigh|profile <row as JSON> <variant>
"""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from models import MODELS, Row, trainable_of
from variants import BY_LAYER, gradient_of

PROFILED_STEPS = 2


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
    if not worst < 1e-3:  # rows alone and together round otherwise
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
    """Prints peak tensor bytes of a step, the growth of the resident set, and which operations made what lives then."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = stepper(row, variant)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    events = sorted(allocations(profile.profiler.kineto_results.experimental_event_tree()))
    live: Counter[str] = Counter()
    makers: dict[int, str] = {}
    now = peak = 0
    at_peak: dict[str, int] = {}
    for _, address, size, maker in events:
        maker = makers.setdefault(address, maker) if size > 0 else makers.pop(address, maker)
        live[maker] += size
        now += size
        if now > peak:
            peak, at_peak = now, dict(live)
    print(json.dumps([peak, (after - before) * 1024, at_peak]), flush=True)


def allocations(events: list, maker: str = "") -> Iterator[tuple[int, int, int, str]]:
    """(time, address, bytes, outermost operation) of everything that was allocated (or, below 0, freed)."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, maker
        operation = event.name if event.tag.name == "TorchOp" and event.name.startswith("aten::") else ""
        yield from allocations(event.children, maker or operation)


def profile(row: Row, variant: str) -> None:
    """Prints seconds a step by operation, own time alone."""
    torch.set_num_threads(1)
    step = stepper(row, variant)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED_STEPS):
            step()
    print(json.dumps({event.key: event.self_cpu_time_total / 1e6 / PROFILED_STEPS for event in found.key_averages()}))


if __name__ == "__main__":
    kind, row, variant = sys.argv[1], Row(**json.loads(sys.argv[2])), sys.argv[3]
    {"serve": serve, "weigh": weigh, "check": check, "profile": profile}[kind](row, variant)
