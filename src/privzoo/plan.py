"""`python -m privzoo.plan task=sst2 batch_size=1000 epochs=3 eps=1,3,8`: what runs would cost, without running them.

Takes what `python -m privzoo.train` takes. Several values of a key (with or without -m) and grids become one table.
Nothing is written; data are read where data_root names them, or the task's yaml does not say num_examples. With `--cost`
each configuration is rehearsed on this machine, too: time and memory, for data and a model that are at hand.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from privzoo.cli import exit_on_error, read_flags, run_hydra
from privzoo.composition import build, compose_sweep
from privzoo.config import plan_arguments, validate
from privzoo.privacy.plan import PrivacyPlan
from privzoo.rehearsal import Cost, cost
from privzoo.reporting.display import duration

TITLE = "Plans: Poisson sampling, neighbours differ by one example, epsilon by PLD"
TITLE_OF_COSTS = "Costs: rehearsed here, on the validation split; several processes are taken to share rows at no cost"


class Row(NamedTuple):
    """One run's plan: N examples, expected batch B, sample rate q = B/N, releases, noise multiplier sigma, and the
    epsilon that PLD accounting gives for all releases at delta."""

    task: str
    method: str
    eps: float | None
    delta: float
    N: int
    B: int
    q: float
    steps: int
    sigma: float
    epsilon: float


def main() -> None:
    """Prints the table; exit code 2 and one sentence for a mistake."""
    with exit_on_error():
        _, arguments = read_flags({"--cost": "rehearse each configuration here: time and memory"})
        if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion:
            run_hydra(_show, "train")
            return
        config_name = arguments.config_name or "train"
        configs = compose_sweep(arguments.overrides, arguments.config_dir, config_name)
        rows = plan_rows(configs)
        if not arguments.cost:
            _print(TITLE, table_of_plans(rows))
            return
        costs = []
        for number, cfg in enumerate(configs, start=1):
            print(
                f"privzoo: rehearsal {number} of {len(configs)}: {cfg.choices.task}, {cfg.choices.method}", file=sys.stderr
            )
            costs.append(cost(cfg))
        _print(TITLE, table_of_plans(rows))
        _print(TITLE_OF_COSTS, table_of_costs(rows, configs, costs))


def _show(cfg: DictConfig) -> None:
    raise AssertionError("reached only by flags that show something and run nothing")


def plan_rows(configs: Iterable[DictConfig]) -> list[Row]:
    """One row for each configuration, in their order; all are validated before the first is calibrated.

    Raises:
        UserError: for a configuration that `train` would refuse for its numbers.
    """
    configs = list(configs)
    for cfg in configs:
        validate(cfg)
    sizes: dict[str, int] = {}  # a grid has few data sets
    numbers = [tuple(plan_arguments(cfg, _num_examples(cfg, sizes)).items()) for cfg in configs]
    # Methods and seeds share their plan: a grid costs as many calibrations as it has different numbers.
    different = list(dict.fromkeys(numbers))
    if len(different) == 1:
        calibrated = [_calibrate(different[0])]
    else:
        with ProcessPoolExecutor(min(len(different), os.cpu_count() or 1)) as pool:
            calibrated = list(pool.map(_calibrate, different))
    found = dict(zip(different, calibrated, strict=True))
    return [_row(cfg, *found[key]) for cfg, key in zip(configs, numbers, strict=True)]


def _row(cfg: DictConfig, plan: PrivacyPlan, spent: float) -> Row:
    assert plan.noise_multiplier is not None
    return Row(
        task=cfg.choices.task,
        method=cfg.choices.method,
        eps=cfg.eps,
        delta=plan.delta,
        N=plan.num_examples,
        B=plan.batch_size,
        q=plan.sample_rate,
        steps=plan.steps,
        sigma=plan.noise_multiplier,
        epsilon=spent,
    )


def _calibrate(arguments: tuple[tuple[str, Any], ...]) -> tuple[PrivacyPlan, float]:
    plan = PrivacyPlan(**dict(arguments))
    return plan, plan.epsilon_after(plan.steps)


def _num_examples(cfg: DictConfig, known: dict[str, int]) -> int:
    stated = cfg.task.get("num_examples")
    if stated is not None and cfg.data_root is None:
        return int(stated)
    name = f"{cfg.data_root} {OmegaConf.to_yaml(cfg.task, resolve=True)}"
    if name not in known:
        task = build(cfg.task)
        task.load(cfg.data_root)
        known[name] = int(task.num_examples)
    return known[name]


def table_of_plans(rows: Sequence[Row]) -> list[list[str]]:
    """Names of the columns, and a line for each row."""
    lines = [
        [
            row.task, row.method, "-" if row.eps is None else f"{row.eps:g}", f"{row.delta:.3g}", f"{row.N:,}", f"{row.B:,}",
            f"{row.q:.6f}", f"{row.steps:,}", f"{row.sigma:.4f}", f"{row.epsilon:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    return [list(Row._fields), *lines]


def table_of_costs(rows: Sequence[Row], configs: Sequence[DictConfig], costs: Sequence[Cost]) -> list[list[str]]:
    """Names of the columns, and a line for each rehearsed configuration; time without loading and scoring."""
    lines = []
    for row, cfg, found in zip(rows, configs, costs, strict=True):
        seconds = found.seconds_per_release(row.B, cfg.trainer.devices)
        memory = found.memory_of_a_rank(cfg.trainer.strategy, cfg.trainer.devices)
        lines.append([
            row.task, row.method, "-" if row.eps is None else f"{row.eps:g}", str(cfg.trainer.devices),
            str(found.microbatch_size), f"{memory / 2**30:.2f} GiB", f"{seconds:.3g} s", f"{row.steps:,}",
            duration(seconds * row.steps),
        ])  # fmt: skip
    return [["task", "method", "eps", "processes", "micro-batch", "memory", "a release", "steps", "all"], *lines]


def _print(title: str, lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name, justify="left" if name in ("task", "method") else "right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*line)
    # In a pipe rich would fold the table to 80 columns and cut its figures.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
