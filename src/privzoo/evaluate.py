"""Score a finished run again from its folder: `python -m privzoo.evaluate run=<run folder>`."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from privzoo.cli import exit_on_error, read_arguments
from privzoo.finished import load_finished

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
    record, cfg, task, model, processor = load_finished(Path(run))
    import torch

    from privzoo.scoring import score

    task.load(data_root or cfg.data_root)
    task.prepare(processor)
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
