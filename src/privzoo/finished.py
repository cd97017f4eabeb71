"""A finished run's model, as transformers or peft would load it from its folder."""

from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from privzoo.errors import UserError
from privzoo.results import RunRecord, read_record


class Finished(NamedTuple):
    """What a run folder holds.

    Attributes:
        task: made of the run's configuration; its data are not loaded yet.
        model: in evaluation mode, on the CPU.
        processor: its tokenizer or image processor.
    """

    record: RunRecord
    cfg: DictConfig
    task: Any
    model: Any
    processor: Any


def load_finished(folder: Path, untrained: bool = False) -> Finished:
    """The model that a run saved, or with `untrained` the one that it began with.

    Raises:
        UserError: if the folder is not that of a finished run.
    """
    record = read_record(folder)
    if not (folder / "model").is_dir():
        raise UserError(f"Expected {folder} to hold a finished run, found state={record.state}: go on with resume={folder}.")

    # torch takes seconds: only when there is a model to load
    from privzoo.composition import build
    from privzoo.models.adapters import ADAPTER_CONFIG, load_adapter
    from privzoo.models.loading import load
    from privzoo.surroundings import quiet_libraries

    quiet_libraries()
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    task = build(cfg.task)
    adapted = (folder / "model" / ADAPTER_CONFIG).exists()  # beside the base that the run began with
    if adapted or untrained:
        loaded = build(cfg.model)(kind=task.kind, num_labels=task.num_labels, texts=task.texts, seed=cfg.seed)
        model = loaded.model if untrained else load_adapter(loaded.model, folder / "model")
    else:
        loaded = load(str(folder / "model"), task.kind, num_labels=task.num_labels, dtype=cfg.model.dtype, texts=task.texts)
        model = loaded.model
    return Finished(record, cfg, task, model.eval(), loaded.processor)
