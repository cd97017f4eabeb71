"""What `engine.py` runs in processes of their own: the correctness of a step; its time, its memory, its profile.

python bench/workers.py serve <row as JSON> <variant>
python bench/workers.py check <row as JSON> <variant>,…
"""

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from models import MODELS, Case, Row, trainable_of
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


def check(row: Row, variants: list[str]) -> None:
    """Says of each variant, as a line of JSON, why it does not run or not rightly: its clipped sums are to be the loop's, on
    two rows of this length (by which an engine chooses its form). The loop is run once, each variant in a child."""
    from privzoo.privacy.clipping import Loop

    torch.set_num_threads(1)  # threads would not survive the forks
    case = MODELS[row.model](2, row.length)
    trainable_of(case, row.method)
    clip_norm = float(Loop(case.model)(case.losses, float("inf")).norms.mean())
    groups = {variant: "layer" if variant == BY_LAYER else "all" for variant in variants}
    expected = {each: Loop(case.model, each)(case.losses, clip_norm).sums for each in set(groups.values())}
    found = {variant: in_a_child(differs, case, variant, clip_norm, expected[groups[variant]]) for variant in variants}
    print(json.dumps(found))


def in_a_child(function: Callable[..., str], *arguments: object) -> str:
    """What the function says, or the last line of its error."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            said = function(*arguments)
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1][:90]
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    _, status = os.wait()
    return said if status == 0 else "ended (out of memory?)"


def differs(case: Case, variant: str, clip_norm: float, expected: dict[str, torch.Tensor]) -> str:
    """Nothing where the variant's sums are the expected ones."""
    found = gradient_of(case, variant, clip_norm)()
    found = found or {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    scale = max(float(value.abs().max()) for value in expected.values())
    worst = max(float((found.get(n, torch.zeros(())) - value).abs().max()) for n, value in expected.items()) / scale
    return "" if worst < 1e-3 else f"differs from the loop by {worst:.1g}"  # rows alone and together round otherwise


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
    if kind == "check":
        check(row, variant.split(","))
    else:
        serve(row, variant)
