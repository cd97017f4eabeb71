"""What each `trainer.strategy` takes of a rank's memory and time: two processes on this machine, gloo, no GPU.

    python bench/ranks.py [steps=4] [width=384] [layers=8] [methods=dp_full,…] [strategies=replicas,…] [out=<file>]

A BERT with random weights is trained on toy_text, 64 rows a release, 8 a micro-batch, without privacy (eps=inf: the same
lines without noise), so that runs are to end at the same weights. That is checked: a row tells how far they are from those
of `replicas`, in parts of the way from the beginning (Adam takes a step of full length where a gradient is nothing but
rounding, so that it is not 0). Fresh processes for each row. Memory is a rank's resident set beyond what it was when its
libraries were imported and the model not yet read, the larger one of both ranks: between two releases, and at most within
one; freed memory is given back at once (malloc's thresholds), which costs time. Time is the median of the releases but for
the first, as a ratio to `replicas`; on one machine what travels costs memory bandwidth alone. Nothing is scored.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

BATCH, MICRO_BATCH = 64, 8
STRATEGIES = ("replicas", "zero1", "zero2", "zero3", "fsdp")
METHODS = ("dp_full", "dp_lora", "dpzero")
FAR = 0.05  # weights that are farther apart are not the same


def make_model(folder: Path, width: int, layers: int) -> None:
    """Random weights with tiny_encoder's tokenizer."""
    from privzoo.models.pretrain import TINY_FOLDER

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER / "tiny_encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=4 * width, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rank(folder: Path, method: str, strategy: str, steps: int) -> None:
    """One of two processes, as torchrun starts them; writes what it measured."""
    import privzoo.run
    from privzoo.composition import compose
    from privzoo.launch import as_a_rank, fine_tune
    from privzoo.methods.base import PrivateMethod

    if strategy == "zero3":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # among the libraries

        assert deepspeed
    folder_of_run = as_a_rank(compose([
        "task=toy_text", f"method={method}", f"model.path={folder / 'model'}", "eps=inf", f"batch_size={BATCH}",
        f"microbatch_size={MICRO_BATCH}", f"epochs={steps * BATCH / 8000}", "trainer.progress=false", "lr=1e-5",
        f"output_dir={folder / f'{method} {strategy}'}", "trainer.devices=2", f"trainer.strategy={strategy}",
        "trainer.accelerator=cpu", "privacy.noise_seed=1",
    ]))  # fmt: skip
    before, between, most, seconds = resident("VmRSS"), [], [], []
    training_step = PrivateMethod.training_step

    def measured(self, *arguments):  # type: ignore[no-untyped-def]
        between.append(resident("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        training_step(self, *arguments)
        seconds.append(time.perf_counter() - start)
        most.append(resident("VmHWM"))

    PrivateMethod.training_step = measured  # type: ignore[method-assign]
    privzoo.run.evaluate_now = lambda *_: {}
    # Draws are keyed by the strategy, too, and directions by the weights, which differ by rounding: here by the release.
    privzoo.run.digest_on_ranks = lambda *_: "a benchmark"
    PrivateMethod._fingerprint = lambda _: "00" * 32  # type: ignore[method-assign]
    fine_tune(folder_of_run)
    found = {"between": between[-1] - before, "most": max(most) - before, "seconds": statistics.median(seconds[1:])}
    (folder / f"{method} {strategy} {os.environ['RANK']}").with_suffix(".json").write_text(json.dumps(found))


def resident(field: str) -> float:
    """MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def measured(folder: Path, method: str, strategy: str, steps: int) -> dict[str, float]:
    """Of the rank that takes more; "apart" is how far its weights are from those of `replicas`, in parts of the way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone",
               __file__, "rank", str(folder), method, strategy, str(steps)]  # fmt: skip
    freeing = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=os.environ | freeing, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{method} {strategy}: {ended.stderr[-3000:]}")
    found = [json.loads((folder / f"{method} {strategy} {each}.json").read_text()) for each in (0, 1)]
    most = {name: max(each[name] for each in found) for name in found[0]}
    began, ordinary, now = (weights(path) for path in (
        folder / "model", saved(folder / f"{method} replicas"), saved(folder / f"{method} {strategy}")
    ))  # fmt: skip
    way = sum(float((ordinary[name] - began.get(name, torch.zeros(()))).square().sum()) for name in ordinary)
    apart = sum(float((now[name] - ordinary[name]).square().sum()) for name in ordinary)
    return most | {"apart": (apart / way) ** 0.5}


def saved(runs: Path) -> Path:
    (run,) = runs.iterdir()
    return run / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


def main(options: dict[str, str]) -> None:
    steps, width, layers = (int(options.pop(name, default)) for name, default in
                            (("steps", "4"), ("width", "384"), ("layers", "8")))  # fmt: skip
    out = options.pop("out", None)
    methods, strategies = (options.pop(name, ",".join(all_of)).split(",") for name, all_of in
                           (("methods", METHODS), ("strategies", STRATEGIES)))  # fmt: skip
    if options:
        sys.exit(f"bench/ranks.py knows steps, width, layers, methods, strategies and out, found {', '.join(options)}.")
    lines, first = [], {"seconds": 1.0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model", width, layers)
        size = sum(value.nbytes for value in weights(folder / "model").values()) / 2**20
        for method in methods:
            for strategy in strategies:
                if method == "dpzero" and strategy in ("zero1", "zero2"):
                    continue  # they are replicas then
                found = measured(folder, method, strategy, steps)
                first = found if strategy == "replicas" else first
                right = "" if found["apart"] < FAR else " (OTHER WEIGHTS)"
                lines.append(
                    f"| {method} | {strategy} | {found['between']:.0f} | {found['most']:.0f} | "
                    f"{found['seconds'] / first['seconds']:.2f} | {found['apart']:.1e}{right} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    head = (
        f"`python bench/ranks.py steps={steps} width={width} layers={layers}`, {date.today()}, {platform.machine()} "
        f"({os.cpu_count()} cores, no GPU), torch {torch.__version__}, deepspeed {version('deepspeed')}, two processes of "
        f"one thread, gloo. Weights: {size:.0f} MiB of float32.\n\n| method | trainer.strategy | MiB between releases | "
        "MiB at most | time of a release, to replicas | weights apart |\n|---|---|---|---|---|---|\n"
    )
    text = head + "\n".join(lines) + "\n"
    Path(out or Path(__file__).parent / "results" / f"ranks-{date.today()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
