"""Where the curves of a run go: metrics.csv in the run folder, and W&B, TensorBoard, MLflow on request.

Names that start with `private/` (train loss, norms, clip rate, realised batch) are exact statements about drawn
examples, outside the guarantee: every logger drops them unless the user asked for them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privzoo.run_loggers.base import RunFolderLogger, RunLogger


def build_loggers(
    folder: Path,
    config: Mapping[str, Any],
    *,
    private: bool = False,
    resume_step: int | None = None,
    wandb: Mapping[str, Any] | None = None,
    tensorboard: Mapping[str, Any] | None = None,
    mlflow: Mapping[str, Any] | None = None,
) -> list[RunLogger]:
    """The loggers of a run, metrics.csv first; a backend is added if its argument is not None.

    Args:
        folder: the run folder, existing.
        config: the resolved configuration as plain dicts, lists and scalars; it is published with the curves.
        private: let names that start with `private/` through.
        resume_step: the release after which a resumed run goes on; later points are dropped where that is possible.
        wandb: project, entity, mode (see `WandbLogger`). mlflow: experiment, tracking_uri (see `MlflowLogger`).
        tensorboard: an empty mapping.
    Raises:
        UserError: a package is missing, or a named server does not answer.
    """
    common: dict[str, Any] = {"folder": folder, "config": config, "private": private, "resume_step": resume_step}
    loggers: list[RunLogger] = [RunFolderLogger(**common)]
    # Imported on demand: wandb and mlflow take seconds.
    if wandb is not None:
        from privzoo.run_loggers.wandb_logger import WandbLogger

        loggers.append(WandbLogger(**common, **wandb))
    if tensorboard is not None:
        from privzoo.run_loggers.tensorboard_logger import TensorBoardLogger

        loggers.append(TensorBoardLogger(**common, **tensorboard))
    if mlflow is not None:
        from privzoo.run_loggers.mlflow_logger import MlflowLogger

        loggers.append(MlflowLogger(**common, **mlflow))
    return loggers
