"""What a run is: the digest of all that determines its sums, and its first record."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from privzoo.config import run_id
from privzoo.privacy.card import why_not_private
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.noise import fingerprint
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.streams import RunKey
from privzoo.results import RunRecord, git_commit, versions
from privzoo.run_folder import RunFolder
from privzoo.tasks.base import Task

# Configuration that cannot change a release's sum, so that a resumed run may change it and stay the same run.
FREE = ("logger", "output_dir", "data_root", "resume")
FREE_OF_TRAINER = ("progress", "checkpoint_every", "validate_every")


def digest_of_run(
    cfg: DictConfig,
    key: RunKey,
    task: Task,
    model: nn.Module,
    ledger: Ledger,
    device: torch.device,
    checkpoint: dict[str, Any] | None,
) -> str:
    """The digest under which this session draws and adds noise.

    It is the same as that of an earlier session exactly if every release would come out the same: same key, configuration,
    data, initial weights, code, versions, device kind and thread count. Where releases were lost and cannot be computed
    again bit by bit (another device than a CPU, or a checkpoint that differs from the one they were taken at), a new
    branch is opened in the ledger, which makes draws and noise fresh and the lost releases paid twice.

    Raises:
        UserError: if the ledger lacks releases that the checkpoint holds.
    """
    facts = _facts(cfg, task, model, device)
    digest = key.digest({**facts, "branch": ledger.branches})
    start = checkpoint["global_step"] if checkpoint else 0
    ledger.require(start)
    lost = [entry for entry in ledger.entries if entry.digest == digest and entry.release >= start]
    if not lost:
        return digest
    weights = _weights_of(checkpoint) if checkpoint else lost[0].weights
    if device.type == "cpu" and lost[0].weights == weights:
        return digest
    ledger.branch(f"{len(lost)} lost releases cannot be computed again exactly")
    return key.digest({**facts, "branch": ledger.branches})


def _facts(cfg: DictConfig, task: Task, model: nn.Module, device: torch.device) -> dict[str, object]:
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    content = {key: value for key, value in content.items() if key not in FREE}
    content["trainer"] = {k: v for k, v in content["trainer"].items() if k not in FREE_OF_TRAINER}
    return {
        "configuration": content,
        "data": task.fingerprint(),
        "initial weights": fingerprint(model.state_dict().items()),
        "code": _code(),
        "versions": versions(),
        "world size": 1,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _weights_of(checkpoint: dict[str, Any]) -> str:
    return fingerprint((name.removeprefix("model."), value) for name, value in checkpoint["state_dict"].items())


def _code() -> str:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def first_record(
    folder: RunFolder,
    plan: PrivacyPlan,
    task: Task,
    device: torch.device,
    is_test_key: bool,
    untrained: dict[str, float],
) -> RunRecord:
    """The record of a run before its first release."""
    cfg = folder.cfg
    private = plan.private and not is_test_key
    return RunRecord(
        run_id=folder.path.name.rpartition("-")[2],
        run_folder=folder.path.name,
        group_id=run_id(cfg, without=("seed",)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        state="running",
        task=cfg.choices.task,
        method=cfg.choices.method,
        model=cfg.choices.model,
        seed=cfg.seed,
        private=private,
        not_private_reason=why_not_private(plan, is_test_key),
        epsilon_target=plan.epsilon,
        epsilon_spent=0.0 if private else None,
        delta=plan.delta,
        noise_multiplier=plan.at(0).noise_multiplier,
        clip_norm=plan.clip_norm,
        sample_rate=plan.sample_rate,
        batch_size=plan.batch_size,
        num_examples=plan.num_examples,
        headline=task.metrics[0],
        higher_is_better=task.higher_is_better,
        untrained=untrained,
        steps=0,
        steps_planned=plan.steps,
        lr=cfg.lr,
        devices=1,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        git_commit=git_commit(),
        versions=versions(),
    )
