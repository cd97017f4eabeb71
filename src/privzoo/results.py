"""The run record: written by `train`, read by tables. One flat json object per run folder.

Nothing here imports torch, so that tables start quickly and work where torch is not installed.
"""

import importlib.metadata
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from privzoo.errors import UserError
from privzoo.files import read_json, write_json

RECORD_NAME = "result.json"
SCHEMA_VERSION = 1
STATES = ("running", "interrupted", "stopped_at_epsilon", "finished")
_PACKAGES = (
    "torch", "lightning", "transformers", "datasets", "peft", "bitsandbytes", "opacus", "dp-accounting",
    "hydra-core", "numpy", "scipy", "safetensors",
)  # fmt: skip
# A dict field of the record and the prefix under which its entries lie in the flat json object.
_FLATTENED = {"metrics": "metric/", "untrained": "untrained/", "versions": "version/"}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a table needs to know about one run; `to_json` gives the content of result.json.

    Guarantees: equal to what is read back from disk, and free of NaN and Infinity. `eps=inf` is stored as null (both
    epsilons, and an infinite clip_norm). A metric or a rate that is not finite (a diverged run) becomes null and
    `note` says so, because a run that diverged has a result too: that it diverged.

    Keys of result.json:
        schema_version: of this list; a higher one than the reader's is refused.
        run_id: hash of the resolved configuration, the last part of the folder's name.
        run_folder: name of the run folder, without its parents.
        group_id: hash of the resolved configuration without the seed; runs that share it are the seeds of one table
            cell. null: never averaged with another run.
        created: UTC time of the first start, ISO 8601.
        state: running | interrupted | stopped_at_epsilon | finished.
        resumes: how often the run was continued.
        task, method, model: names of the chosen configurations.
        seed: of the initialisation and public choices; it fixes no draw and no noise.
        private: true if the run has the guarantee (epsilon_spent, delta).
        not_private_reason: why a run with a finite epsilon_target has no guarantee, for example "privacy.noise_seed was
            set"; null if it has one, and for eps=inf, which never promised one.
        epsilon_target, epsilon_spent: null for eps=inf. delta: null only if nothing was accounted.
        noise_multiplier: sigma, noise standard deviation over clip_norm. clip_norm: C, null for no clipping.
        sample_rate: q = batch_size / num_examples. batch_size: expected logical batch. num_examples: N, public.
        headline: name of the metric that tables show. higher_is_better: its direction.
        metric/<name>: of the model after the last step. untrained/<name>: of the model before the first step.
        lr: peak learning rate, null if the method has none.
        steps: releases made and accounted. steps_planned: T of the plan.
        examples_per_s: expected batch times releases over training time, so that it says nothing about drawn batches.
        peak_memory_bytes: of the device, on a CPU of the process (resident set).
        wall_s: seconds of training, summed over resumes.
        devices: number of processes that trained. device: kind, for example "cpu" or "NVIDIA H100".
        git_commit: of privzoo's checkout, with "-dirty" after uncommitted changes; null outside a checkout.
        version/<package>: installed versions.
        note: what a reader must know beside the numbers, null if nothing.

    Raises:
        ValueError: the record contradicts itself: private without an epsilon, not private without a reason, an unknown
            state, a headline that was not measured.
    """

    run_id: str
    run_folder: str
    created: str
    state: str
    task: str
    method: str
    model: str
    seed: int
    private: bool
    not_private_reason: str | None
    epsilon_target: float | None
    epsilon_spent: float | None
    delta: float | None
    noise_multiplier: float
    clip_norm: float | None
    sample_rate: float
    batch_size: int
    num_examples: int
    headline: str
    higher_is_better: bool
    steps: int
    steps_planned: int
    devices: int
    device: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    untrained: Mapping[str, float | None] = field(default_factory=dict)
    examples_per_s: float | None = None
    peak_memory_bytes: int | None = None
    wall_s: float = 0.0
    resumes: int = 0
    lr: float | None = None
    group_id: str | None = None
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        notes = [self.note] if self.note else []
        for name in ("epsilon_target", "epsilon_spent", "clip_norm"):
            if getattr(self, name) == math.inf:
                object.__setattr__(self, name, None)
        for name in ("metrics", "untrained"):
            object.__setattr__(self, name, _finite(getattr(self, name), _FLATTENED[name], notes))
        rate = _finite({"examples_per_s": self.examples_per_s}, "", notes)["examples_per_s"]
        object.__setattr__(self, "examples_per_s", rate)
        object.__setattr__(self, "note", "; ".join(notes) or None)
        self._check()

    def _check(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"Expected state={self.state!r} to be one of {', '.join(STATES)}.")
        if self.private and (self.epsilon_target is None or self.epsilon_spent is None or self.delta is None):
            raise ValueError("Expected a private run to have epsilon_target, epsilon_spent and delta.")
        if self.private and self.not_private_reason:
            raise ValueError(f"Expected private=false beside not_private_reason={self.not_private_reason!r}.")
        if not self.private and self.epsilon_target is not None and not self.not_private_reason:
            raise ValueError(f"Expected a reason why the run with epsilon_target={self.epsilon_target} is not private.")
        if any(name.startswith("private/") for name in (*self.metrics, *self.untrained)):
            raise ValueError("Expected no metric named private/...: the record is published.")
        if self.metrics and self.headline not in self.metrics:
            raise ValueError(f"Expected headline={self.headline!r} among the metrics {', '.join(self.metrics)}.")

    def to_json(self) -> dict[str, Any]:
        """The flat object that result.json holds, keys as listed above, values that json knows."""
        flat: dict[str, Any] = {"schema_version": self.schema_version}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _FLATTENED:
                flat |= {_FLATTENED[f.name] + key: entry for key, entry in value.items()}
            else:
                flat[f.name] = value
        return flat

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> "RunRecord":
        """The record that `to_json` flattened. KeyError, TypeError or ValueError if `flat` is not such an object."""
        values: dict[str, Any] = {name: {} for name in _FLATTENED}
        for key, value in flat.items():
            for name, prefix in _FLATTENED.items():
                if key.startswith(prefix):
                    values[name][key.removeprefix(prefix)] = value
                    break
            else:
                values[key] = value
        return cls(**values)


def _finite(values: Mapping[str, float | None], prefix: str, notes: list[str]) -> dict[str, float | None]:
    """`values` as plain floats with null for what is not finite, each of which adds a sentence to `notes`."""
    kept: dict[str, float | None] = {}
    for name, value in values.items():
        kept[name] = None if value is None else float(value)
        if value is not None and not math.isfinite(value):
            kept[name] = None
            notes.append(f"{prefix}{name} was {float(value)}")
    return kept


def write_record(folder: Path, record: RunRecord) -> None:
    """Writes `record` as the result.json of a run folder, with the promises of `write_json`."""
    write_json(Path(folder) / RECORD_NAME, record.to_json())


def read_record(folder: str | Path) -> RunRecord:
    """The record of a run folder.

    Raises:
        UserError: the folder is missing, is not a run folder, or its result.json cannot be read or understood.
    """
    folder = Path(folder)
    path = folder / RECORD_NAME
    if not folder.exists():
        raise UserError(f"There is no folder {folder}; expected a run folder, for example one below outputs/.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a run folder, that is, a folder that holds {RECORD_NAME}.")
    if not path.exists():
        raise UserError(f"{folder} is not a run folder: it holds no {RECORD_NAME}; name the folder that train printed.")
    flat = read_json(path)
    if "schema_version" not in flat:
        raise UserError(f"{path} is not a run record: it has no schema_version; was it edited?")
    if flat["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version={flat['schema_version']}, expected {SCHEMA_VERSION}; "
            "read it with the privzoo version that wrote it."
        )
    try:
        return RunRecord.from_json(flat)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a complete run record ({error}); was it edited?") from error


def run_folders(below: str | Path) -> list[Path]:
    """All folders below (or at) `below` that hold a result.json, sorted by path."""
    return sorted(path.parent for path in Path(below).rglob(RECORD_NAME))


def versions() -> dict[str, str]:
    """Installed versions by package name, with "python" and "privzoo"; a package that is absent is left out.

    Reads package metadata only: nothing is imported.
    """
    found = {"python": platform.python_version()}
    for name in ("privzoo", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(source: Path = Path(__file__)) -> str | None:
    """The commit that holds the file `source`, with "-dirty" if tracked files differ from it; None outside a checkout.

    An installed privzoo inside the checkout of another project (a .venv, say) gives None, not that project's commit:
    the file must be tracked.
    """
    # GIT_DIR and its like would point git at a checkout that has nothing to do with this file.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=source.parent, env=environment, capture_output=True, text=True, timeout=20
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def peak_memory_bytes(device_bytes: int | None = None) -> int:
    """Peak memory of the run in bytes: `device_bytes` if the device counts it, else this process's peak resident set.

    The resident set never falls: of several runs in one process, each sees the peak of all before it.

    Args:
        device_bytes: torch.cuda.max_memory_allocated() on a GPU, None on a CPU.
    """
    if device_bytes is not None:
        return int(device_bytes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
