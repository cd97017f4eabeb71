"""What `engine.py` runs in processes of their own: the correctness of a step; its time, its memory, its profile.

python bench/workers.py check|serve <row as JSON> <variant>
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
    """Raises unless the variant's clipped sums equal the loop's, on two rows of this length (by which an engine chooses)."""
    from privzoo.privacy.clipping import Loop

    case = MODELS[row.model](2, row.length)
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
    """Answers each line of the input, "step", "weigh" or "profile", with a line of JSON."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = stepper(row, variant)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        found = {"step": timed, "weigh": weighed, "profile": profiled}[line.strip()](step)
        if line == "weigh\n":
            found.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
        print(json.dumps(found), flush=True)


def timed(step: Callable[[], None]) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def weighed(step: Callable[[], None]) -> list:
    """Peak tensor bytes of a step, and which operations made what lived then."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
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
    return [peak, at_peak]


def allocations(events: list, maker: str = "") -> Iterator[tuple[int, int, int, str]]:
    """(time, address, bytes, outermost operation) of everything that was allocated (or, below 0, freed)."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, maker
        operation = event.name if event.tag.name == "TorchOp" and event.name.startswith("aten::") else ""
        yield from allocations(event.children, maker or operation)


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of a step by operation, own time alone."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    return {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}


if __name__ == "__main__":
    kind, row, variant = sys.argv[1], Row(**json.loads(sys.argv[2])), sys.argv[3]
    {"serve": serve, "check": check}[kind](row, variant)
