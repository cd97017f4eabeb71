"""Score a finished run again from its folder: `python -m privzoo.evaluate run=<run folder>`."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from privzoo.cli import exit_on_error, read_arguments
from privzoo.errors import UserError
from privzoo.results import read_record

ARGUMENTS = {"run": "a run folder that train has finished", "data_root": "folder with the data, as for train"}


def evaluate(run: str, data_root: str | None = None) -> dict[str, tuple[float, float | None]]:
    """Metrics of the saved model on the validation split, each beside the one in the run's record.

    The model is loaded from `<run>/model` as transformers or peft would load it, so this also shows that what was saved is
    what was scored.

    Args:
        run: run folder.
        data_root: in place of the one that the run was made with.
    Raises:
        UserError: if the folder is not that of a finished run, or its data cannot be found.
    """
    folder = Path(run)
    record = read_record(folder)
    if not (folder / "model").is_dir():
        raise UserError(f"Expected {folder} to hold a finished run, found state={record.state}: go on with resume={folder}.")

    import torch  # seconds: only when there is something to score
    from omegaconf import DictConfig, OmegaConf

    from privzoo.composition import build
    from privzoo.models.adapters import ADAPTER_CONFIG, load_adapter
    from privzoo.models.loading import load
    from privzoo.run import quiet_libraries, score

    quiet_libraries()
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    task = build(cfg.task)
    task.load(data_root or cfg.data_root)
    if (folder / "model" / ADAPTER_CONFIG).exists():  # beside the base that the run began with
        loaded = build(cfg.model)(kind=task.kind, num_labels=task.num_labels, seed=cfg.seed)
        model: torch.nn.Module = load_adapter(loaded.model, folder / "model")
    else:
        loaded = load(str(folder / "model"), task.kind, num_labels=task.num_labels, dtype=cfg.model.dtype)
        model = loaded.model
    task.prepare(loaded.processor)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    metrics = score(task, model.to(device), cfg, device)
    return {name: (value, record.metrics.get(name)) for name, value in metrics.items()}


def main() -> None:
    """Entry point of `privzoo-evaluate`."""
    with exit_on_error():
        arguments = read_arguments(sys.argv[1:], ARGUMENTS, required=["run"])
        metrics = evaluate(arguments["run"], arguments.get("data_root"))
        table = Table(title=f"{arguments['run']}, validation split")
        for column in ("metric", "now", "in result.json"):
            table.add_column(column)
        for name, (now, before) in metrics.items():
            table.add_row(name, f"{now:.6g}", "–" if before is None else f"{before:.6g}")
        Console().print(table)


if __name__ == "__main__":
    main()
