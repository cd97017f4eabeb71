"""Fine-tuning from Python, on the configuration of the command line: `privzoo.finetune(...)`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from privzoo.cli import explain, is_a_rank
from privzoo.composition import compose
from privzoo.config import GROUPS, validate
from privzoo.errors import UserError, first_line
from privzoo.launch import fine_tune
from privzoo.results import RunRecord
from privzoo.run_folder import open_folder


class Finetuned(NamedTuple):
    """A finished run.

    Attributes:
        record: what result.json holds.
        model: the fine-tuned model in evaluation mode, on the CPU.
        processor: its tokenizer or image processor.
        folder: the run folder, for `privzoo.sample.sample(folder, …)` and the commands.
    """

    record: RunRecord
    model: Any
    processor: Any
    folder: Path


def finetune(
    task: str,
    method: str,
    eps: float | None,
    overrides: Mapping[str, Any] | None = None,
    config_dir: str | None = None,
    **values: Any,
) -> Finetuned:
    """One run, or the result of the finished one that has this configuration: what `python -m privzoo.train` does.

    >>> finetune("jsonl", "dp_lora", 8, {"data.path": "train.jsonl"}, model="gpt2", batch_size=64)  # doctest: +SKIP

    Args:
        task, method: names of conf/task and conf/method, or of `config_dir`.
        eps: target epsilon, inf for a run without privacy.
        overrides: by dotted key, such as {"task.max_length": 128}; "+task.x" adds a key, as on the command line.
        config_dir: a folder with yaml files of your own, as --config-dir.
        values: the same for keys without a dot; model="gpt2" chooses conf/model/gpt2.yaml.
    Raises:
        UserError: as the command would end with exit code 2, before any work.
    """
    if is_a_rank():
        raise UserError("Expected one process, found one of several: finetune starts more itself (`trainer.devices`: 2).")
    if "resume" in {**values, **(overrides or {})}:
        raise UserError("Expected no resume= here: go on with `python -m privzoo.train resume=<run folder>`.")
    given = {"eps": float("inf") if eps == float("inf") else eps, **values, **(overrides or {})}
    given = {key: _plain(value) for key, value in given.items()}
    choices = [f"{key}={value}" for key, value in given.items() if key in GROUPS]
    try:
        cfg = compose([f"task={task}", f"method={method}", *choices], config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, "train")[1] or first_line(error)) from error
    for key, value in given.items():
        if key in GROUPS:
            continue
        try:
            OmegaConf.update(cfg, key.removeprefix("+"), value, force_add=key.startswith("+"))
        except OmegaConfBaseException as error:
            raise UserError(f"Unknown key '{key}': `python -m privzoo.train --cfg job` shows all keys.") from error
    validate(cfg)
    folder = open_folder(cfg)
    record = fine_tune(folder)
    assert record is not None
    from privzoo.finished import load_finished

    finished = load_finished(folder.path)
    return Finetuned(record, finished.model, finished.processor, folder.path)


def _plain(value: Any) -> Any:
    """A path as text, a number of numpy's as Python's; all else as it is."""
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value
