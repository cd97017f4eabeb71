"""TensorBoard event files in the run folder."""

from collections.abc import Mapping
from typing import Any

from privzoo.run_loggers.base import RunLogger, flatten, require_package


class TensorBoardLogger(RunLogger):
    """Curves in `<run folder>/tensorboard`, configuration and result as texts beside them.

    On resume, points after `resume_step` are marked as superseded, which TensorBoard respects.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_package("tensorboard", "tensorboard")
        self._writer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_writer": None}

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = None if self.resume_step is None else self.resume_step + 1
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)
            self._writer.add_text("config", _table(flatten(self.config)))
        return self._writer

    def _write(self, step: int, values: dict[str, float]) -> None:
        writer = self._open()
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # with tensorflow installed, up to two minutes of curve would otherwise be lost by a kill

    def _write_summary(self, record: dict[str, Any]) -> None:
        writer = self._open()
        writer.add_text("result", _table(record))
        writer.close()
        self._writer = None


def _table(values: Mapping[str, Any]) -> str:
    lines = ["| key | value |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in values.items()])
