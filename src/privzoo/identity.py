"""What a run is: the digest of all that determines its sums, and its first record."""

import hashlib
import inspect
import math
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from privzoo.config import run_id
from privzoo.errors import UserError
from privzoo.models.loading import LoadedModel
from privzoo.privacy.card import why_not_private
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.noise import fingerprint
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import Ranks
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
    loaded: LoadedModel,
    ledger: Ledger,
    device: torch.device,
    checkpoint: dict[str, Any] | None,
    world_size: int = 1,
) -> str:
    """The digest under which this session draws and adds noise.

    It is the same as that of an earlier session exactly if every release would come out the same: same key, configuration,
    data, initial weights, code, versions, device kind, number of ranks and of threads. Where releases were lost and cannot
    be computed again bit by bit (another device than a CPU, or a checkpoint that differs from the one they were taken at), a
    new branch is opened in the ledger, which makes draws and noise fresh and the lost releases paid twice.

    Raises:
        UserError: if the ledger lacks releases that the checkpoint holds.
    """
    facts = _facts(cfg, task, loaded, device) | {"world size": world_size}
    digest = key.digest({**facts, "branch": ledger.branches})
    start = checkpoint["global_step"] if checkpoint else 0
    ledger.require(start)
    lost = [entry for entry in ledger.entries if entry.digest == digest and entry.release >= start]
    if not lost:
        return digest
    weights = checkpoint["weights"] if checkpoint else lost[0].weights
    if device.type == "cpu" and lost[0].weights == weights:
        return digest
    ledger.branch(f"{len(lost)} lost releases cannot be computed again exactly")
    return key.digest({**facts, "branch": ledger.branches})


def digest_on_ranks(ranks: Ranks, ledger: Ledger, own: Callable[[], str]) -> str:
    """The digest, once every rank has found the same one for what it holds itself, and the first one's ledger.

    Args:
        ranks: of this run.
        ledger: the file on the first rank, a `Replica` elsewhere.
        own: works out this rank's; the first one may open a branch in the ledger by it.
    Raises:
        UserError: if data, weights, code or versions are not the same everywhere.
    """
    digest = own() if ranks.first else ""
    ledger.follow(*ranks.from_first((ledger.entries, ledger.branches)))
    digest = digest or own()
    ranks.require_equal("configuration, data, weights, code and versions", digest)
    return digest


def _facts(cfg: DictConfig, task: Task, loaded: LoadedModel, device: torch.device) -> dict[str, object]:
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    content = {key: value for key, value in content.items() if key not in FREE}
    content["trainer"] = {k: v for k, v in content["trainer"].items() if k not in FREE_OF_TRAINER}
    return {
        "configuration": content,
        "data": task.fingerprint(),
        "initial weights": fingerprint(loaded.model.state_dict().items()),
        "model": getattr(loaded.model, "config", None),
        "processor": _processor(loaded.processor),
        "code": [_code(), *sorted(_digest_of_file(file) for file in _foreign_files(content))],
        "versions": {name: version(name) for name in ("tokenizers", "pillow", "pyarrow", "safetensors")} | versions(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor(processor: object) -> list[str]:
    """What turns a row into numbers: the tokenizer's whole table and rules, or the image processor's settings."""
    backend = getattr(processor, "backend_tokenizer", None)
    return [repr(processor), backend.to_str() if backend is not None else ""]


def _foreign_files(content: Any) -> set[Path]:
    """The user's own code: what lies behind a `_target_` outside privzoo and torch, the Python files beside it, and every
    imported module that is not installed. An edit of any of them is another digest."""
    targets = {_file_of(target) for target in _targets(content) if not target.startswith(("privzoo.", "torch."))}
    named = {file for file in targets if file is not None}
    beside = {sibling for file in named if not _is_installed(file) for sibling in file.parent.glob("*.py")}
    modules = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name != "__main__"}
    # Most of thousands are installed.
    imported = {file for file in modules.values() if file is not None and "site-packages" not in file}
    return named | beside | {file for file in map(Path, imported) if not _is_installed(file) and file.is_file()}


def _targets(content: Any) -> Iterator[str]:
    """Every `_target_` in a configuration."""
    if isinstance(content, list):
        for item in content:
            yield from _targets(item)
    elif isinstance(content, dict):
        yield from _targets(list(content.values()))
        if isinstance(content.get("_target_"), str):
            yield content["_target_"]


def _file_of(target: str) -> Path | None:
    file = inspect.getsourcefile(_imported(target))
    return Path(file) if file else None


def _is_installed(file: Path) -> bool:
    """Whether a file is of privzoo, of an installed package or of Python itself: those have versions."""
    if {"site-packages", "dist-packages"} & set(file.parts):
        return True
    return str(file).startswith((str(Path(__file__).parent) + os.sep, *_folders_of_python()))


@cache
def _folders_of_python() -> tuple[str, ...]:
    """Asked for every module, and slow to work out."""
    return tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))


def _digest_of_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _imported(target: str) -> Any:
    """What holds a `_target_`; an optimizer may be of a package that is not installed."""
    try:
        return pkgutil.resolve_name(target.rpartition(".")[0])  # hydra's own look-up logs an error of several lines
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"_target_={target} cannot be imported ({error}): correct it, or install its package "
            "(pip install 'privzoo[optimizers]' for schedulefree and bitsandbytes)."
        ) from error


def _code() -> str:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def require_same_plan(record: RunRecord, plan: PrivacyPlan) -> None:
    """A resumed run goes on with the plan that it began with.

    Raises:
        UserError: if the data have another number of rows now, or another version of privzoo plans otherwise.
    """
    for name, found in (
        ("num_examples", plan.num_examples), ("delta", plan.delta), ("steps_planned", plan.steps),
        ("noise_multiplier", plan.at(0).noise_multiplier), ("sample_rate", plan.sample_rate),
    ):  # fmt: skip
        planned = getattr(record, name)
        if not math.isclose(found, planned, rel_tol=1e-3):
            raise UserError(
                f"Expected {name}={planned:g} as when the run began, found {found:g}: put its data back, or start "
                "another run."
            )


def first_record(
    folder: RunFolder,
    plan: PrivacyPlan,
    task: Task,
    device: torch.device,
    is_test_key: bool,
    untrained: dict[str, float],
    devices: int = 1,
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
        epsilon_spent=plan.epsilon if private else None,  # what it may come to, should the process be killed
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
        note=task.note,
        devices=devices,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        git_commit=git_commit(),
        versions=versions(),
    )
