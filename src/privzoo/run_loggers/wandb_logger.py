"""Weights & Biases: online when somebody is logged in, else offline in the run folder. Never asks, stays quiet."""

import inspect
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privzoo.errors import UserError, first_line
from privzoo.run_loggers.base import RunLogger, kept_id, require_package

INIT_TIMEOUT_S = 15  # an unreachable server costs this once, then the run goes on offline
FINISH_TIMEOUT_S = 60
_MODES = ("auto", "online", "offline", "disabled")
_log = logging.getLogger(__name__)


class WandbLogger(RunLogger):
    """One W&B run whose files lie in `<run folder>/wandb`; a resume continues the same W&B run id.

    Offline, a resume is a further `offline-run-*` segment with that id, and `wandb sync` joins them. W&B cannot forget
    points: after a resume, steps that were lost and computed again are there twice, with equal values.

    The terminal's output is not captured, since it shows `private/loss`; machine figures (memory, utilisation) follow
    the drawn batches and are sent only with `private`.

    Args:
        project: None means WANDB_PROJECT, and without that "privzoo".
        entity: user or team, None for the account's own.
        mode: auto (WANDB_MODE if it is set, else online when somebody is logged in), online, offline or disabled.
    Raises:
        UserError: wandb is not installed, an unknown mode, or mode=online while nobody is logged in.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        private: bool = False,
        resume_step: int | None = None,
        project: str | None = None,
        entity: str | None = None,
        mode: str = "auto",
    ) -> None:
        super().__init__(folder, config, private, resume_step)
        require_package("wandb", "wandb")
        if mode not in _MODES:
            raise UserError(f"Expected logger.wandb.mode={mode} to be one of {', '.join(_MODES)}.")
        self._project = project or os.environ.get("WANDB_PROJECT") or "privzoo"
        self._entity = entity
        self._mode = mode
        self._run: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_run": None}

    def _open(self) -> Any:
        if self._run is None:
            self._run = self._init(_resolve_mode(self._mode))
            # Points carry the release themselves: W&B's own counter refuses to go back, and a resume goes back.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step", step_sync=True)
        return self._run

    def _init(self, mode: Any) -> Any:
        import wandb

        if wandb.run is not None:
            wandb.run.finish()  # of a run before in this process that broke off; wandb would hand it out again
        if mode == "offline":
            _log.info("W&B: offline in %s; `wandb sync` sends it.", self.folder / "wandb")
        run_id = kept_id(self.folder, "wandb", new=secrets.token_hex(6))
        try:
            return wandb.init(
                project=self._project,
                entity=self._entity,
                name=self.name,
                id=run_id,
                resume="allow",
                dir=str(self.folder),
                config=dict(self.config),
                mode=mode,
                settings=_settings(
                    console="off",
                    x_disable_stats=not self.private,
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=FINISH_TIMEOUT_S,
                ),
            )
        except wandb.errors.Error as error:
            if mode != "online" or self._mode == "online":
                raise UserError(f"logger=wandb failed ({error}); check logger.wandb or choose logger=csv.") from error
            _log.warning("W&B cannot be reached (%s); going on offline.", first_line(error))
            wandb.teardown()  # its service holds on to the run id of the attempt
            return self._init("offline")

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._open().log({"step": step, **values})

    def _write_summary(self, record: dict[str, Any]) -> None:
        run = self._open()
        run.summary.update(record)
        run.finish(exit_code=0 if record["state"] in ("finished", "stopped_at_epsilon") else 1)
        self._run = None


def _settings(**values: Any) -> Any:
    """Settings that keep W&B silent, with those of `values` that the installed version has."""
    import wandb

    return wandb.Settings(silent=True, **{k: v for k, v in values.items() if k in wandb.Settings.model_fields})


def _resolve_mode(mode: str) -> str:
    if mode in ("offline", "disabled"):
        return mode
    asked = os.environ.get("WANDB_MODE")
    if mode == "auto" and asked in ("offline", "dryrun", "disabled"):
        return "offline" if asked == "dryrun" else asked
    if _logged_in():
        return "online"
    if mode == "online":
        raise UserError("logger.wandb.mode=online needs a login: run `wandb login`, or choose mode=auto.")
    return "offline"


def _logged_in() -> bool:
    """Whether W&B finds a key (environment, settings, netrc) without asking anybody or any server."""
    import wandb

    wandb.setup(settings=_settings())
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:
            return wandb.login(prompt=False, verify=False)
        return wandb.api.api_key is not None  # before wandb 0.31
    except wandb.errors.Error as error:
        _log.warning("W&B: the stored login is not usable (%s).", first_line(error))
        return False
