"""One run from configuration to result: the only place where all parts meet."""

import hashlib
import signal
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer

from privzoo.checkpoints import Checkpoints, StopOnSignal, Straight, Validation, load_checkpoint
from privzoo.curves import Curves, EpsilonCurve
from privzoo.errors import Stopped
from privzoo.files import write_json
from privzoo.identity import digest_of_run, digest_on_ranks, first_record, require_same_plan
from privzoo.methods.base import Interrupted, PrivateMethod
from privzoo.models.loading import LoadedModel
from privzoo.preparing import method_of, model_of, plan_of, task_of
from privzoo.privacy.accounting import epsilon_spent
from privzoo.privacy.callback import PrivacyCallback, charged_twice, makeable
from privzoo.privacy.card import privacy_card
from privzoo.privacy.ledger import Ledger, Replica
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import ALONE, Ranks, telling_who_is_lost
from privzoo.privacy.replicas import over_ranks
from privzoo.privacy.sampling import PoissonBatches, PoissonDraws, private_loader
from privzoo.privacy.streams import RunKey
from privzoo.progress import Progress
from privzoo.results import RunRecord, peak_memory_bytes, write_record
from privzoo.run_folder import RunFolder
from privzoo.run_loggers import RunLogger, build_loggers
from privzoo.saving import save_merged, save_model, whole_state
from privzoo.scoring import evaluate_now
from privzoo.surroundings import device_of, quiet_libraries
from privzoo.tasks.base import Task


def run(folder: RunFolder, ranks: Ranks = ALONE) -> RunRecord | None:
    """Fine-tune as the folder's configuration says, from the start or from its last checkpoint, and write the result.

    Args:
        folder: of the run; all ranks see it, and the first one writes to it.
        ranks: the processes of this run, which have joined one another.
    Returns:
        The record; None on all ranks but the first.
    Raises:
        UserError: for what is wrong with data, model, plan or set-up, before the first release; a new folder is removed.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint to go on from.
        RunLost: if the disk is full.
    """
    quiet_libraries()
    cfg = folder.cfg
    task = task_of(cfg)
    plan = plan_of(cfg, task)
    loaded = model_of(cfg, task)
    ranks.require_equal("units of privacy", _units(task))
    if not ranks.from_first(folder.is_new):
        return _together(folder, task, plan, loaded, ranks)
    if ranks.first:
        seed = cfg.privacy.noise_seed
        folder.create(RunKey.fresh() if seed is None else RunKey.for_tests(seed))
    try:
        ranks.from_first("created")
        return _together(folder, task, plan, loaded, ranks)
    except BaseException:
        if ranks.first and folder.ledger.exists() and not folder.ledger.stat().st_size:  # no release: nothing is lost
            folder.discard()
        raise


def _units(task: Task) -> str:
    units = None if task.rows_of_unit is None else [[int(row) for row in unit] for unit in task.rows_of_unit]
    return hashlib.sha256(repr([task.num_examples, units]).encode()).hexdigest()


def _together(folder: RunFolder, task: Task, plan: PrivacyPlan, loaded: LoadedModel, ranks: Ranks) -> RunRecord | None:
    """`_train`; no rank ends before the first one has written what there is to write, as who watches them ends them all."""
    try:
        with telling_who_is_lost():
            record = _train(folder, task, plan, loaded, ranks)
    except Stopped:
        ranks.from_first("written")
        raise
    ranks.from_first("written")
    return record


def _train(folder: RunFolder, task: Task, plan: PrivacyPlan, loaded: LoadedModel, ranks: Ranks) -> RunRecord | None:
    cfg, device = folder.cfg, device_of(folder.cfg)
    key = RunKey.load(folder.key, is_test_key=cfg.privacy.noise_seed is not None)
    with Ledger(folder.ledger) if ranks.first else Replica(folder.ledger) as ledger:
        checkpoint = load_checkpoint(folder.checkpoint, key) if folder.checkpoint.exists() else None
        start = checkpoint["global_step"] if checkpoint else 0
        own_digest = partial(digest_of_run, cfg, key, task, loaded, ledger, device, checkpoint, ranks.count)
        mechanism = NoiseMechanism(plan, key, digest_on_ranks(ranks, ledger, own_digest))
        method = method_of(cfg, task, loaded, mechanism, ranks, device)
        frozen = method.fingerprint_of_the_rest()
        record = _record(folder, method, device)
        if checkpoint:
            method.on_load_checkpoint(checkpoint)
            method.load_state_dict(checkpoint["state_dict"], strict=False)  # the trained part; the rest is the base
        loggers: list[RunLogger] = []
        if record is not None:
            record = replace(record, resumes=record.resumes + (1 if ledger.entries else 0), devices=ranks.count)
            write_record(folder.path, record)
            loggers = _loggers(folder, start)
        ranks.from_first("ready")
        try:
            reached = checkpoint and (start, checkpoint["callbacks"]["Checkpoints"]["seconds"])
            if start < plan.steps and makeable(plan, ledger, mechanism.digest, start):
                reached = _fit(folder, method, ledger, start, loggers)
            if method.fingerprint_of_the_rest() != frozen:
                raise RuntimeError("Frozen weights changed during training: the method is not what it says.")
            if record is not None and reached:
                record = _reached(record, plan, ledger, *reached)
            record = _finish(folder, method, ledger, loaded.processor, record, device)
        except Interrupted as stop:
            if record is None:
                raise Stopped("stopped with the first rank", stop.args[2]) from None
            record = replace(_reached(record, plan, ledger, *stop.args[:2]), state="interrupted")
            write_record(folder.path, record)
            raise _stopped(folder, record, stop.args[2]) from None
        finally:
            if record is not None and ledger.entries:
                for logger in loggers:
                    logger.finish(record.to_json())
    return record


def _record(folder: RunFolder, method: PrivateMethod, device: torch.device) -> RunRecord | None:
    """The run's record so far, on the first rank; a new run's holds what the untrained model reaches."""
    record, plan, ranks = folder.record, method.mechanism.plan, method.ranks
    if record is None and (ranks.first or method.dealt_out):
        untrained, is_test_key = evaluate_now(method, folder.cfg, device), method.mechanism.key.is_test_key
        record = first_record(folder, plan, method.task, device, is_test_key, untrained, ranks.count)
    if not ranks.first:
        return None
    assert record is not None
    require_same_plan(record, plan)
    return record


def _fit(
    folder: RunFolder, method: PrivateMethod, ledger: Ledger, start: int, loggers: list[RunLogger]
) -> tuple[int, float]:
    """All releases that are left; returns how many are made then, and the seconds of training in all sessions.

    Raises:
        Interrupted: with the same two, and the signal's number.
    """
    cfg, task, mechanism, ranks = folder.cfg, method.task, method.mechanism, method.ranks
    plan = mechanism.plan
    epsilon_at = EpsilonCurve(plan, charged_twice(plan, ledger, mechanism.digest, start))
    draws = PoissonDraws(plan, mechanism.key, mechanism.digest)
    batches = PoissonBatches(
        task.train, draws, task.collate, task.length, cfg.microbatch_size, task.rows_of_unit, ranks, method.level
    )
    checkpoints, stop = Checkpoints(folder.checkpoint, cfg.trainer.checkpoint_every), StopOnSignal()
    scores = Validation(lambda: evaluate_now(method, cfg, method.device), cfg.trainer.validate_every)
    callbacks = [
        PrivacyCallback(plan, ledger, mechanism.digest),
        *([Curves(epsilon_at)] if ranks.first else []),
        *([scores] if ranks.first or method.dealt_out else []),
        checkpoints,
        stop,
        *([Progress(plan, epsilon_at)] if cfg.trainer.progress and ranks.first else []),
    ]
    trainer = Trainer(
        **over_ranks(ranks), accelerator=cfg.trainer.accelerator, precision=cfg.trainer.precision, max_epochs=1,
        logger=loggers, callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=folder.path,
        plugins=[Straight()],
    )  # fmt: skip
    if ranks.count > 1:  # Lightning's handlers exchange signals in collectives of their own
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    try:
        trainer.fit(method, private_loader(batches, start), ckpt_path=folder.checkpoint if start else None)
    except Interrupted:
        received = stop.received or signal.SIGTERM  # another rank's, if this one has got none
        raise Interrupted(trainer.global_step, checkpoints.seconds, received) from None
    finally:
        stop.restore()
    return trainer.global_step, checkpoints.seconds


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
    folder: RunFolder, method: PrivateMethod, ledger: Ledger, processor: Any, record: RunRecord | None, device: torch.device
) -> RunRecord | None:
    """Score the last step, save model, card and record; the record comes last, and makes the run a finished one."""
    if record is None and not method.dealt_out:
        return None
    plan = method.mechanism.plan
    metrics = evaluate_now(method, folder.cfg, device)
    with method.published():
        state = whole_state(method.model, method.dealt) if method.dealt else None
        if record is None:  # the first rank writes
            return None
        save_model(folder.model, method.model, processor, state)
    if folder.cfg.method.get("merge", False):
        save_merged(folder, method.task, processor)
    mechanism = method.mechanism
    card = privacy_card(
        plan, ledger, mechanism.key.is_test_key, folder.cfg.logger.private, method.contribution, method.task.selection
    )
    write_json(folder.card, card)
    state_of_run = "finished" if record.steps == plan.steps else "stopped_at_epsilon"
    record = replace(record, state=state_of_run, metrics=metrics, epsilon_spent=card["epsilon_spent"])
    write_record(folder.path, record)
    folder.key.unlink()
    return record


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
