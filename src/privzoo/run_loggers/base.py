"""What every logger of a run has in common: whose names go out, who writes, and under which id."""

import importlib.util
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from privzoo.errors import UserError
from privzoo.files import read_json, write_json
from privzoo.metrics_file import METRICS_NAME, MetricsFile

PRIVATE_PREFIX = "private/"
IDS_NAME = "loggers.json"


class RunLogger(Logger, ABC):
    """A Lightning logger of one run, which lets `private/...` through only if `private` is true.

    Writes on rank zero only, and opens its backend with the first thing written, so that it can be sent to a spawned
    process before. Lightning's `finalize` does not close it, since the result is written after the fit; `finish` does.

    Args:
        folder: the run folder.
        config: the resolved configuration, plain dicts, lists and scalars.
        private: let names that start with `private/` through.
        resume_step: the release after which a resumed run goes on, None for a new run.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], private: bool = False, resume_step: int | None = None
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.config = config
        self.private = private
        self.resume_step = resume_step

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds one point to each curve at release `step`. Lightning's own "epoch" is dropped: a run is one loader."""
        assert step is not None, "a curve over releases needs the release"
        public = (name for name in metrics if self.private or not name.startswith(PRIVATE_PREFIX))
        shown = {name: metrics[name] for name in public if name != "epoch"}
        if shown:
            self._write(step, {name: v if isinstance(v, int) else float(v) for name, v in shown.items()})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the whole resolved configuration is written instead of a module's constructor arguments."""

    @rank_zero_only
    def finish(self, record: Mapping[str, Any]) -> None:
        """Writes the flat result record (`RunRecord.to_json`) as the summary and closes the backend.

        Call it for a run that broke off too, with the state it broke off in. A later write opens the backend again.
        """
        self._write_summary(dict(record))

    @abstractmethod
    def _write(self, step: int, values: dict[str, float]) -> None:
        """Adds one point to each of these curves; rank zero, private ones are gone."""

    def _write_summary(self, record: dict[str, Any]) -> None:
        """What `finish` promises; rank zero. Nothing for a logger that has no summary."""


class RunFolderLogger(RunLogger):
    """Writes metrics.csv into the run folder, as `MetricsFile` promises; on resume, later rows are dropped first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file: MetricsFile | None = None
        if getattr(rank_zero_only, "rank", 0) == 0:
            self._file = MetricsFile(self.folder / METRICS_NAME, self.resume_step)

    def _write(self, step: int, values: dict[str, float]) -> None:
        assert self._file is not None
        self._file.add(step, values)


def kept_id(folder: Path, backend: str, new: str | None = None) -> str | None:
    """The id of this run at `backend`, kept in the run folder's loggers.json; `new` is kept if there is none yet.

    It is not the run's own id, a hash of the configuration: the same configuration run again in another folder is
    another run to W&B and MLflow.
    """
    path = folder / IDS_NAME
    ids = read_json(path) if path.exists() else {}
    if backend not in ids and new is not None:
        ids[backend] = new
        write_json(path, ids)
    return ids.get(backend)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`config` with nested keys joined by dots; lists are kept as values.

    >>> flatten({"lr": 0.1, "task": {"name": "sst2", "text": ["a"]}})
    {'lr': 0.1, 'task.name': 'sst2', 'task.text': ['a']}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def require_package(package: str, logger: str) -> None:
    """Raises UserError if `package`, which `logger` needs, is not installed."""
    if importlib.util.find_spec(package) is None:
        extra = "wandb" if logger == "wandb" else f"'privzoo[{logger}]'"
        raise UserError(f"logger={logger} needs the package {package}: pip install {extra}, or choose logger=csv.")


def require_listener(uri: str, logger: str, timeout: float = 5.0) -> None:
    """Raises UserError if `uri` is that of a server which does not take a connection within `timeout` seconds.

    Clients repeat for minutes before they say so. Behind a proxy nothing is tried: only the client knows the way.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.scheme in getproxies() or parts.hostname is None:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout).close()
    except OSError as error:
        raise UserError(
            f"logger={logger}: no server answers at {uri} ({os.strerror(error.errno) if error.errno else error}); "
            "start it, correct the address, or choose logger=csv."
        ) from error
