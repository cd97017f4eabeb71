"""What a finished run leaves for others: the model in transformers' own format, alone or merged with its base."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from privzoo.composition import build
from privzoo.errors import RunLost, first_line
from privzoo.privacy.sharding import DealtOut
from privzoo.run_folder import RunFolder
from privzoo.tasks.base import Task


def whole_state(model: nn.Module, dealt: DealtOut) -> dict[str, Tensor]:
    """The state dict with every dealt-out tensor put together again, on the CPU; all ranks take part.

    Of an adapter, which is saved without its base, it is what is trained.
    """
    if hasattr(model, "peft_config"):  # a PeftModel; to ask peft itself would load it and bitsandbytes into every run
        return {name: dealt.whole_of(name) for name in dealt.parts}
    return dealt.state()


def save_model(path: Path, model: Any, processor: Any, state: dict[str, Tensor] | None = None) -> None:
    """Write model and processor with `save_pretrained`, for transformers to load without privzoo; whole or not at all.

    Args:
        state: its weights, where the model itself holds a part of them alone.
    Raises:
        RunLost: if they cannot be written, for example to a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _without_deepspeed():
            model.save_pretrained(temporary, **({} if state is None else {"state_dict": state}))
        processor.save_pretrained(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:  # of a full disk safetensors makes an error of its own
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunLost(
            f"{path} cannot be written ({first_line(error)}): make room and go on with resume={path.parent}."
        ) from error


@contextmanager
def _without_deepspeed() -> Iterator[None]:
    """accelerate would import DeepSpeed where it is installed, which takes seconds, to ask whether the model is its engine,
    which no model here is."""
    hidden = "deepspeed" not in sys.modules
    if hidden:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["deepspeed"]


def save_merged(folder: RunFolder, task: Task, processor: Any) -> None:
    """Write the base in full precision with the saved adapter merged into it."""
    from privzoo.models.adapters import merge  # imports peft, which few runs need

    base = build(folder.cfg.model)(
        kind=task.kind, num_labels=task.num_labels, texts=task.texts, seed=folder.cfg.seed, quantization=None
    )
    save_model(folder.merged, merge(base.model, folder.model), processor)
