"""What a run's configuration must satisfy, checked before torch is imported, and the name that it gives the run."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from privzoo.errors import UserError
from privzoo.privacy.plan import Phase, default_delta

GROUPS = ("task", "method", "model", "privacy", "trainer", "logger")
VALUES = ("eps", "delta", "epochs", "batch_size", "microbatch_size", "lr", "clip_norm", "seed")
PATHS = ("data_root", "output_dir", "resume")
TOP_LEVEL = (*GROUPS, *VALUES, *PATHS, "data", "choices")
NESTED = {
    "data": ("path", "validation_path", "on_error"),
    "privacy": ("noise_multiplier", "noise", "accountant", "noise_seed"),
    "trainer": (
        "accelerator",
        "precision",
        "devices",
        "strategy",
        "offload",
        "checkpoint_every",
        "validate_every",
        "progress",
        "gradient_checkpointing",
    ),
}
PHASE_KEYS = ("epochs", "trainable", "lr", "clip_norm", "batch_size")
AUTO = "auto"  # microbatch_size: a rehearsal chooses it
PRECISIONS = ("32-true", "bf16-mixed")  # those in which the engines were compared with the definition
STRATEGIES = ("replicas", "fsdp", "zero1", "zero2", "zero3")
OFFLOADING = ("zero1", "zero2", "zero3")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


# ---- identity --------------------------------------------------------------------------------------------------------


def run_id(cfg: DictConfig, without: Sequence[str] = ()) -> str:
    """Eight hexadecimal digits that name what a run computes.

    A hash of the resolved configuration without what cannot change the result: logger, data_root, output_dir, resume,
    microbatch_size, and the trainer's progress, checkpoint_every, strategy and offload. Numbers count by value (eps=8 is
    eps=8.0), and the order of keys does not count.
    """
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in ("logger", "microbatch_size", "data", *PATHS, *without):  # task.data holds what it reads of data
        content.pop(key, None)
    for key in ("progress", "checkpoint_every", "strategy", "offload"):
        content["trainer"].pop(key, None)
    text = json.dumps(_by_value(content), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _by_value(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _by_value(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_by_value(value) for value in content]
    if isinstance(content, float) and content.is_integer():
        return int(content)
    return content


def run_name(cfg: DictConfig) -> str:
    """`<task>-<method>-eps<e>-s<seed>-<id>`, or sigma<s> in place of eps<e>; letters, digits and `._+-` alone."""
    if cfg.eps is not None:
        budget = f"eps{_by_value(cfg.eps)}"
    else:
        budget = f"sigma{_by_value(cfg.privacy.noise_multiplier)}"
    name = f"{cfg.choices.task}-{cfg.choices.method}-{budget}-s{cfg.seed}-{run_id(cfg)}"
    return re.sub(r"[^\w.+-]", "_", name)


# ---- validation ------------------------------------------------------------------------------------------------------


def validate(cfg: DictConfig) -> None:
    """Refuses what is wrong whatever the data and the model: without torch, so that a mistake costs a second.

    Raises:
        UserError: one sentence with the value found, the value expected and the way out.
    """
    for key in map(str, cfg):
        if key not in TOP_LEVEL:
            raise UserError(f"Unknown key '{key}': nothing reads it; --cfg job shows all keys.")
    for group, keys in NESTED.items():
        for key in cfg[group]:
            if key not in keys:
                raise UserError(f"Unknown key '{group}.{key}': nothing reads it; {group} takes {', '.join(keys)}.")
    _check_budget(cfg)
    _check_number(cfg, "epochs", "a number > 0", lambda v: 0 < v < math.inf)
    _check_number(cfg, "lr", "a number > 0", lambda v: 0 < v < math.inf)
    without_privacy = cfg.eps == math.inf
    _check_number(cfg, "clip_norm", "a finite number > 0", lambda v: 0 < v < math.inf or (v > 0 and without_privacy))
    _check_whole(cfg, "batch_size", 1)
    if cfg.microbatch_size != AUTO:
        _check_whole(cfg, "microbatch_size", 1)
    _check_whole(cfg, "seed", 0)
    _check_phases(cfg)
    _check_privacy(cfg)
    _check_trainer(cfg)
    _check_one_of(cfg, "logger.private", (True, False))
    _check_own_data(cfg)
    _check_replaced(cfg)
    _check_paths(cfg)


def _refuse(key: str, value: Any, expected: str, way_out: str = "") -> None:
    raise UserError(f"Expected {key}={value} to be {expected}{'; ' + way_out if way_out else ''}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_number(cfg: DictConfig, key: str, expected: str, good: Callable[[float], bool], way_out: str = "") -> None:
    value = OmegaConf.select(cfg, key)
    if not _is_number(value) or not good(value):
        _refuse(key, value, expected, way_out)


def _check_whole(cfg: DictConfig, key: str, least: int) -> None:
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _refuse(key, value, f"a whole number >= {least}", "write it without a dot or an exponent")


def _check_one_of(cfg: DictConfig, key: str, values: Sequence[Any]) -> None:
    value = OmegaConf.select(cfg, key)
    if value not in values or type(value) is not type(values[0]):
        _refuse(key, value, "one of " + ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values))


def _check_budget(cfg: DictConfig) -> None:
    sigma = cfg.privacy.noise_multiplier
    if sigma is None:
        _check_number(cfg, "eps", "a number > 0, or inf for a run without privacy", lambda v: v > 0)
    elif cfg.eps is not None:
        _refuse("privacy.noise_multiplier", sigma, f"given alone, found eps={cfg.eps} too", "add eps=null")
    else:
        way_out = "eps=inf is a run without noise"
        _check_number(cfg, "privacy.noise_multiplier", "a finite number > 0", lambda v: 0 < v < math.inf, way_out)
    if cfg.delta is not None:
        way_out = "below 1/N; delta=null takes 1/(2N)"
        _check_number(cfg, "delta", "a number between 0 and 1", lambda v: 0 < v < 1, way_out)


def _check_phases(cfg: DictConfig) -> None:
    phases = cfg.method.get("phases")
    if phases is None:
        return
    way_out = "as in method.phases=[{epochs: 1, trainable: all, lr: 1e-3}, {trainable: biases}]"
    if not isinstance(phases, ListConfig) or not phases or not all(isinstance(p, DictConfig) for p in phases):
        _refuse("method.phases", phases, "a list of phases", way_out)
    for number, phase in enumerate(phases):
        for key in phase:
            if key not in PHASE_KEYS:
                raise UserError(f"Unknown key '{key}' in method.phases[{number}]: a phase takes {', '.join(PHASE_KEYS)}.")
        for key in ("epochs", "lr", "clip_norm"):
            if key in phase:
                _check_number(cfg, f"method.phases[{number}].{key}", "a number > 0", lambda v: 0 < v < math.inf)
        if "batch_size" in phase:
            _check_whole(cfg, f"method.phases[{number}].batch_size", 1)
        if not isinstance(phase.get("trainable", ""), str):
            _refuse(f"method.phases[{number}].trainable", phase.trainable, "a text such as all or biases")
    epochs_of_phases(cfg)


def epochs_of_phases(cfg: DictConfig) -> list[float]:
    """Epochs of each phase of `method.phases`: what one phase leaves open is what the others leave of `epochs`.

    Raises:
        UserError: if the phases do not come to `epochs` in all.
    """
    given = [phase.get("epochs") for phase in cfg.method.phases]
    left = Fraction(str(cfg.epochs)) - sum((Fraction(str(epochs)) for epochs in given if epochs is not None), Fraction(0))
    if given.count(None) > 1 or (left > 0) != (None in given) or left < 0:
        stated = ", ".join("open" if epochs is None else f"{epochs:g}" for epochs in given)
        raise UserError(
            f"Expected the phases to come to epochs={cfg.epochs:g} in all, found {stated}: give each its epochs, or leave "
            "out those of one, which takes what is left."
        )
    return [float(left) if epochs is None else epochs for epochs in given]


def plan_arguments(cfg: DictConfig, num_examples: int) -> dict[str, Any]:
    """Arguments of the `PrivacyPlan` of a configuration: epsilon or noise_multiplier given, delta by default < 1 / (2N)."""
    phases = [Phase(cfg.batch_size, cfg.epochs, float(cfg.clip_norm), cfg.privacy.noise_multiplier)]
    if cfg.method.get("phases") is not None:
        phases = [
            Phase(
                phase.get("batch_size", cfg.batch_size), epochs, float(phase.get("clip_norm", cfg.clip_norm)),
                cfg.privacy.noise_multiplier,
            )
            for phase, epochs in zip(cfg.method.phases, epochs_of_phases(cfg), strict=True)
        ]  # fmt: skip
    first, *later = phases
    return {
        "num_examples": num_examples,
        "delta": default_delta(num_examples) if cfg.delta is None else float(cfg.delta),
        "epsilon": None if cfg.eps is None else float(cfg.eps),
        "then": tuple(later),
        "noise": cfg.privacy.noise,
        **asdict(first),
    }


def _check_privacy(cfg: DictConfig) -> None:
    _check_one_of(cfg, "privacy.accountant", ("pld",))
    _check_one_of(cfg, "privacy.noise", ("gaussian", "laplace"))
    if cfg.privacy.noise_seed is not None:
        _check_whole(cfg, "privacy.noise_seed", 0)


def _check_trainer(cfg: DictConfig) -> None:
    _check_one_of(cfg, "trainer.accelerator", ACCELERATORS)
    _check_one_of(cfg, "trainer.precision", PRECISIONS)
    _check_whole(cfg, "trainer.devices", 1)
    _check_one_of(cfg, "trainer.strategy", STRATEGIES)
    if cfg.trainer.strategy != STRATEGIES[0] and cfg.trainer.devices == 1:
        _refuse("trainer.devices", 1, f"at least 2 with trainer.strategy={cfg.trainer.strategy}")
    if cfg.trainer.strategy == "zero3" and find_spec("deepspeed") is None:
        raise UserError("trainer.strategy=zero3 needs DeepSpeed: pip install 'privzoo[deepspeed]', or take fsdp.")
    _check_one_of(cfg, "trainer.offload", (True, False))
    if cfg.trainer.offload and cfg.trainer.strategy not in OFFLOADING:
        _refuse(
            "trainer.offload", True, f"false with trainer.strategy={cfg.trainer.strategy}", "zero1, zero2 and zero3 know it"
        )
    _check_one_of(cfg, "trainer.progress", (True, False))
    _check_one_of(cfg, "trainer.gradient_checkpointing", (True, False))
    _check_whole(cfg, "trainer.checkpoint_every", 1)
    _check_whole(cfg, "trainer.validate_every", 0)


def _check_own_data(cfg: DictConfig) -> None:
    _check_one_of(cfg, "data.on_error", ("raise", "skip"))
    reads_files = "path" in (cfg.task.get("data") or {})
    if not reads_files and any(cfg.data[key] is not None for key in ("path", "validation_path")):
        raise UserError(
            f"Expected data.path={cfg.data.path} to be null for task={cfg.choices.task}: task=jsonl reads a file."
        )
    source = cfg.task.get("data") or {}
    if cfg.data.on_error != "raise" and "on_error" not in source and "on_error" not in (source.get("source") or {}):
        raise UserError(
            f"Expected data.on_error=raise for task={cfg.choices.task}: its data cannot skip rows; in a task of your own, "
            "its data need a line on_error: ${data.on_error}."
        )
    if reads_files and cfg.task.data.path is None:
        raise UserError(f"Expected data.path=<file> beside task={cfg.choices.task}: it reads a file of your own.")
    for key in ("path", "validation_path"):
        path = cfg.task.data.get(key) if reads_files else None
        if path is not None and not Path(str(path)).expanduser().is_file():
            raise UserError(f"Expected data.{key}={path} to be a file: it does not exist.")


def _check_replaced(cfg: DictConfig) -> None:
    """An adapter names its base alone: loaded from there, it would stand beside batch norms again."""
    if not cfg.model.get("replace_batchnorm"):
        return
    if cfg.method.get("add_bias"):
        _refuse(
            "method.add_bias", True, "false beside model.replace_batchnorm=true", "its adapter would be put on batch norms"
        )
    if cfg.method.get("adapter") is not None and not cfg.method.get("merge"):
        _refuse(
            "method.merge", False, "true beside model.replace_batchnorm=true", "an adapter alone would be put on batch norms"
        )


def _check_paths(cfg: DictConfig) -> None:
    if cfg.data_root is not None and not Path(str(cfg.data_root)).expanduser().is_dir():
        raise UserError(
            f"Expected data_root={cfg.data_root} to be a folder: it does not exist; "
            "correct data_root= or PRIVZOO_DATA, or leave both out to ask the hub."
        )
    output_dir = Path(str(cfg.output_dir)).absolute()
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"Expected output_dir={cfg.output_dir} to be a folder to write to: {existing} is not one.")
    if cfg.resume is not None:
        missing = [name for name in ("config.yaml", "ledger.jsonl") if not (Path(str(cfg.resume)) / name).is_file()]
        if missing:
            raise UserError(f"Expected resume={cfg.resume} to be a run folder: it has no {' and no '.join(missing)}.")
