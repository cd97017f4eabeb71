"""MLflow, in the run folder or at a tracking server."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privzoo.errors import UserError, first_line
from privzoo.run_loggers.base import RunLogger, flatten, kept_id, require_listener, require_package


class MlflowLogger(RunLogger):
    """One MLflow run, in `<run folder>/mlruns` or at a tracking server; a resume continues the same MLflow run.

    MLflow cannot forget points: after a resume, steps that were lost and computed again are there twice.

    Args:
        experiment: its name in MLflow.
        tracking_uri: None means MLFLOW_TRACKING_URI, and without that the run folder.
    Raises:
        UserError: mlflow is not installed, or nobody answers at the tracking server.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        private: bool = False,
        resume_step: int | None = None,
        experiment: str = "privzoo",
        tracking_uri: str | None = None,
    ) -> None:
        super().__init__(folder, config, private, resume_step)
        require_package("mlflow", "mlflow")
        server = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._experiment = experiment
        self._uri = server or (self.folder / "mlruns").resolve().as_uri()
        self._backend = f"mlflow at {server}" if server else "mlflow"
        require_listener(self._uri, "mlflow")
        self._client: Any = None
        self._run_id = ""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}

    def _open(self) -> Any:
        if self._client is not None:
            return self._client
        # A run folder holds files: mlflow-skinny brings no SQL. MLflow 3 wants that to be told.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(tracking_uri=self._uri)
        try:
            run_id = kept_id(self.folder, self._backend)
            if run_id is None:
                run_id = self._create_run(client)
            else:
                client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            reason = first_line(error)
            raise UserError(f"logger=mlflow: {self._uri} refused ({reason}); check logger.mlflow.") from error
        self._client, self._run_id = client, run_id
        return client

    def _create_run(self, client: Any) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self._experiment)
        try:
            number = found.experiment_id if found else client.create_experiment(self._experiment)
        except MlflowException:
            found = client.get_experiment_by_name(self._experiment)  # another run of the grid was quicker
            if found is None:
                raise
            number = found.experiment_id
        run_id: str = client.create_run(number, run_name=self.name).info.run_id
        params = [Param(_name(key), str(value)[:500]) for key, value in flatten(self.config).items()]
        for start in range(0, len(params), 100):  # the most that one request may carry
            client.log_batch(run_id, params=params[start : start + 100])
        kept_id(self.folder, self._backend, run_id)
        return run_id

    def _write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        client, now = self._open(), int(time.time() * 1000)
        points = [Metric(_name(name), float(value), now, step) for name, value in values.items()]
        client.log_batch(self._run_id, metrics=points)

    def _write_summary(self, record: dict[str, Any]) -> None:
        client = self._open()
        self._write(record["steps"], {f"result/{k}": v for k, v in record.items() if isinstance(v, int | float)})
        for key, value in record.items():
            if isinstance(value, str):
                client.set_tag(self._run_id, _name(f"result/{key}"), value)
        client.log_dict(self._run_id, record, "result.json")
        ended = record["state"] in ("finished", "stopped_at_epsilon")
        client.set_terminated(self._run_id, "FINISHED" if ended else "KILLED")
        self._client = None


def _name(name: str) -> str:
    """`name` with what MLflow does not take replaced."""
    return re.sub(r"[^\w/. -]", "_", name)
