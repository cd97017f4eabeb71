"""What a run begins with: task, plan, model and method, as the configuration says."""

from typing import Any

import torch
from omegaconf import DictConfig

from privzoo.composition import build
from privzoo.config import plan_arguments
from privzoo.methods.base import PrivateMethod
from privzoo.methods.dealing import put_in_place
from privzoo.models.checkpointing import turn_on_checkpointing
from privzoo.models.loading import LoadedModel
from privzoo.privacy.coupling import refuse_coupling_modules
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import Ranks
from privzoo.privacy.strategies import Dealer
from privzoo.tasks.base import Task
from privzoo.tasks.splits import refuse_same_rows
from privzoo.tasks.units import FirstRows


def task_of(cfg: DictConfig) -> Task:
    """The task with its rows read, not yet encoded."""
    task: Task = build(cfg.task)
    task.load(cfg.data_root)
    return task


def plan_of(cfg: DictConfig, task: Task) -> PrivacyPlan:
    """The plan for the task's own number of units."""
    return PrivacyPlan(**plan_arguments(cfg, task.num_examples), unit=task.unit)


def model_of(cfg: DictConfig, task: Task) -> LoadedModel:
    """The model for a task, whose rows are encoded for it.

    Raises:
        UserError: if training rows are scored as validation.
    """
    loaded: LoadedModel = build(cfg.model)(kind=task.kind, num_labels=task.num_labels, texts=task.texts, seed=cfg.seed)
    task.prepare(loaded.processor)
    refuse_same_rows(task.train, task.validation)
    if task.rows_of_unit is not None:
        refuse_same_rows(FirstRows(task.train, task.rows_of_unit), task.validation)
    if task.label_names is not None and task.kind.endswith("classification"):
        names: Any = loaded.model.config
        names.id2label = dict(enumerate(task.label_names))
        names.label2id = {name: number for number, name in names.id2label.items()}
        names.problem_type = task.problem_type or names.problem_type
    return loaded


def method_of(
    cfg: DictConfig, task: Task, loaded: LoadedModel, mechanism: NoiseMechanism, ranks: Ranks, device: torch.device
) -> PrivateMethod:
    """The method with its model in place, after the pre-flight."""
    method: PrivateMethod = build(cfg.method)(
        model=loaded.model, task=task, mechanism=mechanism, new_head=loaded.new_head, lr=cfg.lr, ranks=ranks
    )
    if cfg.trainer.gradient_checkpointing:
        turn_on_checkpointing(loaded.model)
    refuse_coupling_modules(method.model, getattr(task, "max_length", None))
    put_in_place(method, rows_to_try(task), device, _dealer_of(cfg, method, device))
    return method


def _dealer_of(cfg: DictConfig, method: PrivateMethod, device: torch.device) -> Dealer | None:
    """What deals the model out; None where every rank holds it and nothing of what is made of it could be dealt out."""
    strategy = cfg.trainer.strategy
    if strategy == "replicas" or (strategy in ("zero1", "zero2") and not hasattr(method, "engine")):
        return None
    return Dealer(strategy, device, method.ranks.count, cfg.trainer.offload)


def rows_to_try(task: Task) -> list[Any]:
    """Up to four training rows of unlike lengths, the last one the longest: padding shows between them."""
    by_length = task.by_length(task.train)
    places = (0, len(by_length) // 3, 2 * len(by_length) // 3, len(by_length) - 1)
    return [task.train[by_length[place]] for place in sorted(set(places))]
