"""The folder of one run: its name, what lies in it, and which configuration a resumed run takes."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from privzoo.config import run_id, run_name, validate
from privzoo.errors import UserError
from privzoo.files import sync_folder, write_text
from privzoo.privacy.streams import RunKey
from privzoo.results import RECORD_NAME, RunRecord, read_record

DONE = ("finished", "stopped_at_epsilon")
# What an override may change when a run is resumed. All but the first line change how sums come about: then releases
# that were lost are paid for again.
RESUME_MAY_CHANGE = (
    "resume", "output_dir", "logger", "data_root", "trainer.progress", "trainer.checkpoint_every", "trainer.validate_every",
    "lr", "microbatch_size", "trainer.accelerator", "trainer.precision", "trainer.gradient_checkpointing", "model.path",
    "method.schedule", "method.warmup", "method.optimizer", "method.engine", "trainer.devices", "trainer.strategy",
    "trainer.offload",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Attributes:
        path: the folder.
        cfg: the configuration in force; for a resumed run its own, with the allowed overrides.
        record: the last result.json, None for a new run.
        overrides: of the command line.
    """

    path: Path
    cfg: DictConfig
    record: RunRecord | None
    overrides: tuple[str, ...] = ()

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def key(self) -> Path:
        return self.path / "run.key"

    @property
    def checkpoint(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def card(self) -> Path:
        return self.path / "privacy.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def is_new(self) -> bool:
        return not self.ledger.exists()

    @property
    def is_done(self) -> bool:
        return self.record is not None and self.record.state in DONE

    def create(self, key: RunKey) -> None:
        """Make the folder with configuration, key and an empty ledger, all at once: it appears whole or not at all.

        Raises:
            UserError: if it exists already.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staging = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            write_text(staging / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))
            write_text(staging / "overrides.yaml", OmegaConf.to_yaml(list(self.overrides)))
            key.save(staging / self.key.name)
            (staging / self.ledger.name).touch()
            os.rename(staging, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            if self.path.exists():
                raise UserError(f"{self.path} exists: another process has just started this run.") from error
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def discard(self) -> None:
        """Remove the folder of a run that failed before its first release."""
        shutil.rmtree(self.path, ignore_errors=True)

    def plain_config(self) -> dict[str, Any]:
        """The resolved configuration as plain values."""
        content = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(content, dict)
        return {str(key): value for key, value in content.items()}


def open_folder(cfg: DictConfig) -> RunFolder:
    """The folder of the run that `cfg` asks for, existing (resume, or finished before) or still to be made.

    Raises:
        UserError: if the folder holds an unfinished run that was not named by `resume`, or an override of a resumed run
            would change what was promised.
    """
    if cfg.resume is not None:
        path = Path(str(cfg.resume))
        return RunFolder(path, _resumed(path, cfg), record_in(path), _overrides())
    path = Path(str(cfg.output_dir)) / run_name(cfg)
    folder = RunFolder(path, cfg, record_in(path), _overrides())
    if path.exists() and not folder.is_done:
        raise UserError(f"{path} holds an unfinished run of this configuration: go on with resume={path}, or remove it.")
    return folder


def record_in(path: Path) -> RunRecord | None:
    """The record of a run folder, None where there is none yet."""
    return read_record(path) if (path / RECORD_NAME).exists() else None


def _resumed(path: Path, cfg: DictConfig) -> DictConfig:
    stored = OmegaConf.load(path / "config.yaml")
    if not isinstance(stored, DictConfig) or "choices" not in stored:
        raise UserError(f"{path}/config.yaml is not the configuration of a run: was it edited?")
    record = record_in(path)
    if run_id(stored) != (record.run_id if record else path.name.rpartition("-")[2]):
        raise UserError(
            f"{path}/config.yaml was edited: put it back; a resumed run may change lr and the like on the command line."
        )
    stored.resume = str(path)
    for key in _overridden():
        found, kept = OmegaConf.select(cfg, key), OmegaConf.select(stored, key)
        allowed = any(key == may or key.startswith(may + ".") for may in RESUME_MAY_CHANGE)
        if key in ("task", "method", "model"):
            found, kept = cfg.choices[key], stored.choices[key]
        if allowed and key.startswith("logger") and cfg.logger.private != stored.logger.private:
            raise UserError(
                f"Expected logger.private={stored.logger.private} as in {path}: the card speaks of all sessions."
            )
        if allowed:
            OmegaConf.update(stored, key, found, merge=False)
        elif found != kept:
            raise UserError(
                f"Expected {key}={kept} as in {path}, found {key}={found}: a resumed run keeps its promise; start another "
                "run without resume=."
            )
    validate(stored)
    return stored


def _overrides() -> tuple[str, ...]:
    return tuple(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()


def _overridden() -> list[str]:
    parsed = OverridesParser.create().parse_overrides(list(_overrides()))
    return [override.key_or_group for override in parsed]
