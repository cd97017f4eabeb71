"""One run from configuration to result: the only place where all parts meet."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from privzoo.checkpoints import Checkpoints, StopOnSignal, Validation, load_checkpoint
from privzoo.composition import build
from privzoo.config import plan_arguments
from privzoo.curves import Curves, EpsilonCurve
from privzoo.errors import RunLost, Stopped, UserError, first_line
from privzoo.files import write_json
from privzoo.identity import digest_of_run, first_record, require_same_plan
from privzoo.methods.base import Interrupted, PrivateMethod
from privzoo.models.adapters import merge
from privzoo.models.checkpointing import turn_on_checkpointing
from privzoo.models.loading import LoadedModel
from privzoo.privacy.accounting import epsilon_spent
from privzoo.privacy.callback import PrivacyCallback, charged_twice, makeable
from privzoo.privacy.card import privacy_card
from privzoo.privacy.coupling import refuse_coupling_modules
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.sampling import MicroBatch, PoissonBatches, PoissonDraws, private_loader
from privzoo.privacy.streams import RunKey
from privzoo.progress import Progress
from privzoo.results import RunRecord, peak_memory_bytes, write_record
from privzoo.run_folder import RunFolder
from privzoo.run_loggers import RunLogger, build_loggers
from privzoo.tasks.base import Task
from privzoo.tasks.splits import refuse_same_rows
from privzoo.tasks.units import FirstRows


def run(folder: RunFolder) -> RunRecord:
    """Fine-tune as the folder's configuration says, from the start or from its last checkpoint, and write the result.

    Raises:
        UserError: for what is wrong with data, model, plan or set-up, before the first release; a new folder is removed.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint to go on from.
        RunLost: if the disk is full.
    """
    quiet_libraries()
    cfg = folder.cfg
    task: Task = build(cfg.task)
    task.load(cfg.data_root)
    plan = PrivacyPlan(**plan_arguments(cfg, task.num_examples), unit=task.unit)
    loaded: LoadedModel = build(cfg.model)(kind=task.kind, num_labels=task.num_labels, seed=cfg.seed)
    task.prepare(loaded.processor)
    refuse_same_rows(task.train, task.validation)
    if task.rows_of_unit is not None:
        refuse_same_rows(FirstRows(task.train, task.rows_of_unit), task.validation)
    if task.label_names is not None and task.kind.endswith("classification"):
        names: Any = loaded.model.config
        names.id2label = dict(enumerate(task.label_names))
        names.label2id = {name: number for number, name in names.id2label.items()}
        names.problem_type = task.problem_type or names.problem_type
    if not folder.is_new:
        return _train(folder, task, plan, loaded)
    seed = cfg.privacy.noise_seed
    folder.create(RunKey.fresh() if seed is None else RunKey.for_tests(seed))
    try:
        return _train(folder, task, plan, loaded)
    except BaseException:
        if folder.ledger.exists() and folder.ledger.stat().st_size == 0:  # no release was made: nothing is lost
            folder.discard()
        raise


def _train(folder: RunFolder, task: Task, plan: PrivacyPlan, loaded: LoadedModel) -> RunRecord:
    cfg, device = folder.cfg, _device(folder.cfg)
    key = RunKey.load(folder.key, is_test_key=cfg.privacy.noise_seed is not None)
    with Ledger(folder.ledger) as ledger:
        checkpoint = load_checkpoint(folder.checkpoint, key) if folder.checkpoint.exists() else None
        start = checkpoint["global_step"] if checkpoint else 0
        digest = digest_of_run(cfg, key, task, loaded, ledger, device, checkpoint)
        mechanism = NoiseMechanism(plan, key, digest)
        method: PrivateMethod = build(cfg.method)(
            model=loaded.model, task=task, mechanism=mechanism, new_head=loaded.new_head, lr=cfg.lr
        )
        if cfg.trainer.gradient_checkpointing:
            turn_on_checkpointing(loaded.model)
        method.to(device).train()
        _check_before(method)
        frozen = method.fingerprint_of_the_rest()
        record = folder.record
        if record is None:
            record = first_record(folder, plan, task, device, key.is_test_key, evaluate_now(method, cfg, device))
        require_same_plan(record, plan)
        if checkpoint:
            method.on_load_checkpoint(checkpoint)
            method.load_state_dict(checkpoint["state_dict"], strict=False)  # the trained part; the rest is the base
        record = replace(record, resumes=record.resumes + (1 if ledger.entries else 0))
        write_record(folder.path, record)
        loggers = _loggers(folder, start)
        try:
            if start < plan.steps and makeable(plan, ledger, digest, start):
                record = _fit(folder, method, ledger, record, start, loggers)
            elif checkpoint:
                record = _reached(record, plan, ledger, start, checkpoint["callbacks"]["Checkpoints"]["seconds"])
            if method.fingerprint_of_the_rest() != frozen:
                raise RuntimeError("Frozen weights changed during training: the method is not what it says.")
            record = _finish(folder, method, ledger, loaded.processor, record, device)
        except Interrupted as stop:
            record = replace(stop.args[0], state="interrupted")
            write_record(folder.path, record)
            raise _stopped(folder, record, stop.args[1]) from None
        finally:
            for logger in loggers if ledger.entries else []:
                logger.finish(record.to_json())
    return record


def _fit(
    folder: RunFolder, method: PrivateMethod, ledger: Ledger, record: RunRecord, start: int, loggers: list[RunLogger]
) -> RunRecord:
    """All releases that are left; returns the record with what was reached.

    Raises:
        Interrupted: with the record so far and the signal's number.
    """
    cfg, task, mechanism = folder.cfg, method.task, method.mechanism
    plan = mechanism.plan
    epsilon_at = EpsilonCurve(plan, charged_twice(plan, ledger, mechanism.digest, start))
    draws = PoissonDraws(plan, mechanism.key, mechanism.digest)
    batches = PoissonBatches(task.train, draws, task.collate, task.length, cfg.microbatch_size, task.rows_of_unit)
    checkpoints, stop = Checkpoints(folder.checkpoint, cfg.trainer.checkpoint_every), StopOnSignal()
    callbacks = [
        PrivacyCallback(plan, ledger, mechanism.digest),
        Curves(epsilon_at),
        Validation(lambda: evaluate_now(method, cfg, method.device), cfg.trainer.validate_every),
        checkpoints,
        stop,
        *([Progress(plan, epsilon_at)] if cfg.trainer.progress else []),
    ]
    trainer = Trainer(
        accelerator=cfg.trainer.accelerator, devices=1, precision=cfg.trainer.precision, max_epochs=1, logger=loggers,
        callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=folder.path,
    )  # fmt: skip
    try:
        trainer.fit(method, private_loader(batches, start), ckpt_path=folder.checkpoint if start else None)
    except Interrupted:
        so_far = _reached(record, plan, ledger, trainer.global_step, checkpoints.seconds)
        raise Interrupted(so_far, stop.received) from None
    finally:
        stop.restore()
    return _reached(record, plan, ledger, trainer.global_step, checkpoints.seconds)


def _reached(record: RunRecord, plan: PrivacyPlan, ledger: Ledger, steps: int, seconds: float) -> RunRecord:
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return replace(
        record,
        steps=steps,
        epsilon_spent=epsilon_spent(ledger.releases(), plan.delta) if record.private else None,
        wall_s=seconds,
        examples_per_s=plan.expected_examples(steps) / seconds,
        peak_memory_bytes=peak_memory_bytes(peak),
    )


def _finish(
    folder: RunFolder, method: PrivateMethod, ledger: Ledger, processor: Any, record: RunRecord, device: torch.device
) -> RunRecord:
    """Score the last step, save model, card and record; the record comes last, and makes the run a finished one."""
    plan = method.mechanism.plan
    metrics = evaluate_now(method, folder.cfg, device)
    with method.published():
        save_model(folder.model, method.model, processor)
    if folder.cfg.method.get("merge", False):
        _save_merged(folder, method.task, processor)
    mechanism = method.mechanism
    card = privacy_card(
        plan, ledger, mechanism.key.is_test_key, folder.cfg.logger.private, method.contribution, method.task.selection
    )
    write_json(folder.card, card)
    state = "finished" if record.steps == plan.steps else "stopped_at_epsilon"
    record = replace(record, state=state, metrics=metrics, epsilon_spent=card["epsilon_spent"])
    write_record(folder.path, record)
    folder.key.unlink()
    return record


def save_model(path: Path, model: Any, processor: Any) -> None:
    """Write model and processor with `save_pretrained`, for transformers to load without privzoo; whole or not at all.

    Raises:
        RunLost: if they cannot be written, for example to a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:  # of a full disk safetensors makes an error of its own
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunLost(
            f"{path} cannot be written ({first_line(error)}): make room and go on with resume={path.parent}."
        ) from error


def _save_merged(folder: RunFolder, task: Task, processor: Any) -> None:
    base = build(folder.cfg.model)(kind=task.kind, num_labels=task.num_labels, seed=folder.cfg.seed, quantization=None)
    save_model(folder.merged, merge(base.model, folder.model), processor)


def evaluate_now(method: PrivateMethod, cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """The task's metrics of the model as it is, or of the average of its weights, on the validation split."""
    with method.published():
        return score(method.task, method.model, cfg, device)


def score(task: Task, model: Any, cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """The task's metrics of a model on the validation split, in the precision that the run trains in."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
        return task.evaluate(model, _validation_batches(task, cfg.microbatch_size, device))


def _validation_batches(task: Task, microbatch_size: int, device: torch.device) -> Iterator[MicroBatch]:
    """The whole validation split in micro-batches of like length, on the device."""
    order = task.by_length(task.validation)
    for first in range(0, len(order), microbatch_size):
        rows = [task.validation[i] for i in order[first : first + microbatch_size]]
        yield {name: value.to(device) for name, value in task.collate(rows).items()}


def _check_before(method: PrivateMethod) -> None:
    task = method.task
    refuse_coupling_modules(method.model, getattr(task, "max_length", None))
    by_length = task.by_length(task.train)
    places = (0, len(by_length) // 3, 2 * len(by_length) // 3, len(by_length) - 1)  # padding shows between unlike lengths
    method.preflight([task.train[by_length[place]] for place in sorted(set(places))])


def _device(cfg: DictConfig) -> torch.device:
    try:
        probe = Trainer(accelerator=cfg.trainer.accelerator, devices=1, logger=False, enable_checkpointing=False)
    except MisconfigurationException as error:
        raise UserError(
            f"trainer.accelerator={cfg.trainer.accelerator} is not to be had here ({first_line(error)}): take auto or cpu."
        ) from None
    return probe.strategy.root_device


def _loggers(folder: RunFolder, start: int) -> list[RunLogger]:
    options = folder.plain_config()["logger"]
    private = options.pop("private")
    resume_step = start if folder.record else None
    return build_loggers(folder.path, folder.plain_config(), private=private, resume_step=resume_step, **options)


def _stopped(folder: RunFolder, record: RunRecord, number: int) -> Stopped:
    spent = f" with epsilon={record.epsilon_spent:.3g} spent" if record.epsilon_spent is not None else ""
    return Stopped(
        f"stopped after release {record.steps} of {record.steps_planned}{spent}; go on with: "
        f"python -m privzoo.train resume={folder.path}",
        number,
    )


def quiet_libraries() -> None:
    """Our own lines tell what matters; these would tell a user of a private run to change what must not change."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing(_enable)?` is deprecated")  # peft asks for it
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # and sets what GPT-2 needs
    warnings.filterwarnings("ignore", message="Adapter .* LoRA tensor.* have invalid shape")  # of the biases of BiTFiT-Add
    warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
