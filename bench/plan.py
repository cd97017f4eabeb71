"""What `privzoo.plan --cost` says beside what runs then took: time of a release and peak memory, one after the other.

    python bench/plan.py                                    the tasks that need no data
    python bench/plan.py shared=../shared out=plan.md       real data and a real encoder, too
    python bench/plan.py ranks=only                         two processes, by strategies: a BERT of 227 MiB, random weights

A run is of some releases, trained by the command itself; its peak is that of the whole process, and so is the rehearsal's.
The run's first release finds caches cold, as it is counted in the run's time. As a machine's speed changes from minute to
minute, a configuration is rehearsed before the run and after it; what is said is the mean of both.
"""

import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import fmean

from ranks import make_model

from privzoo.composition import compose
from privzoo.rehearsal import cost

TOYS = [
    ("toy_text", "dp_full", "batch_size=256"),
    ("toy_text", "dp_bitfit", "batch_size=256"),
    ("toy_text", "dpzero", "batch_size=512"),
    ("toy_lm", "dp_lora", "batch_size=256"),
    ("toy_lm", "dp_qlora", "batch_size=256"),
    ("toy_images", "dp_full", "batch_size=256"),
]
REAL = [
    ("sst2", "dp_full", "batch_size=200 microbatch_size=20"),
    ("sst2", "dp_bitfit", "batch_size=200 microbatch_size=20"),
    ("sst2", "dpzero", "batch_size=400 microbatch_size=50"),
    ("trec", "dp_lora", "batch_size=200 microbatch_size=50"),
]
RANKS = [
    ("toy_text", method, f"batch_size=128 microbatch_size=16 trainer.devices=2 trainer.strategy={strategy}")
    for method, strategy in (
        ("dp_full", "replicas"), ("dp_full", "zero2"), ("dp_full", "zero3"), ("dp_full", "fsdp"), ("dp_lora", "zero3"),
        ("dpzero", "fsdp"),
    )
]  # fmt: skip
RELEASES = {True: 40, False: 12}  # of a run: of tasks that need no data, of others


def line_of(task: str, method: str, settings: str, folder: Path | None) -> str:
    """Predicted and measured seconds of a release and GiB, and how far the former are off."""
    given = [f"task={task}", f"method={method}", "eps=8", *settings.split(), "trainer.progress=false"]
    if folder is not None and task == "toy_text":
        given += [f"model.path={folder}", "lr=1e-5"]
    elif folder is not None:
        given += [f"model.path={folder}/weights/minilm", f"data_root={folder}/data"]
    cfg = compose(given)
    before, releases = cost(cfg), RELEASES[folder is None]
    with tempfile.TemporaryDirectory() as place:
        count = examples_of(given)
        epochs = releases * cfg.batch_size / count
        command = [sys.executable, "-m", "privzoo.train", *given, f"epochs={epochs}", f"output_dir={place}/runs"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (record,) = (json.loads(file.read_text()) for file in Path(place, "runs").glob("*/result.json"))
    seconds, memory = record["wall_s"] / record["steps"], record["peak_memory_bytes"] / 2**30
    processes = cfg.trainer.devices
    told = [
        (
            found.seconds_per_release(cfg.batch_size, processes),
            found.memory_of_a_rank(cfg.trainer.strategy, processes) / 2**30,
        )
        for found in (before, cost(cfg))
    ]
    predicted = [fmean(values) for values in zip(*told, strict=True)]
    off = [f"{said / took - 1:+.0%}" for said, took in zip(predicted, (seconds, memory), strict=True)]
    return (
        f"| {task} {method} {settings} | {told[0][0]:.3g} and {told[1][0]:.3g} s | {seconds:.3g} s | {off[0]} "
        f"| {predicted[1]:.2f} GiB | {memory:.2f} GiB | {off[1]} |"
    )


def examples_of(given: list[str]) -> int:
    """N, as the plan command prints it."""
    said = subprocess.run([sys.executable, "-m", "privzoo.plan", *given], capture_output=True, text=True, check=True).stdout
    line = next(line for line in said.splitlines() if given[0].partition("=")[2] in line and "│" in line)
    return int(line.split("│")[5].replace(",", ""))


def main(argv: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in argv)
    shared = Path(options["shared"]).resolve() if "shared" in options else None
    lines = []
    with tempfile.TemporaryDirectory() as model:
        cases = [(*case, None) for case in TOYS] + ([(*case, shared) for case in REAL] if shared else [])
        if "ranks" in options:
            make_model(Path(model), width=768, layers=8)
            cases = [(*case, Path(model)) for case in RANKS]
        for task, method, settings, folder in cases:
            lines.append(line_of(task, method, settings, folder))
            print(lines[-1], flush=True)
    head = [
        f"`python bench/plan.py {' '.join(argv)}`, {date.today()}, 40 releases a run, of real data 12.", "",
        "| | release, predicted | measured | off | memory, predicted | measured | off |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    if "out" in options:
        Path(options["out"]).write_text("\n".join([*head, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
