"""Composing the configuration of a run out of conf/, and making objects of its nodes.

Keys named `default_*` (a task's default_model, a method's default_lr), a task's num_examples, and a method's merge, add_bias
and lora are read by the configuration; `build` leaves them out when it makes an object of a node.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from privzoo.errors import UserError

HYDRA_VERSION_BASE = "1.3"
_CONFIGURATION_ALONE = ("num_examples", "merge", "add_bias", "lora")


def conf_dir() -> Path:
    """The absolute folder of the shipped configuration: inside the package of a wheel, beside src/ in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parents[1] / "conf"


def default_model(task: str, method: str) -> str:
    """The model that a task's yaml names, for `model: ${default_model:${task},${method}}`.

    The yaml may name one model, or one for each method with `default` for the others. It is looked for in every
    folder on Hydra's search path, a user's --config-dir included; a yaml without the key inherits it through its
    defaults list.
    """
    if not isinstance(task, str) or not isinstance(method, str):
        raise UserError(f"Expected one task and one method, found task={task} method={method}; -m runs several.")
    named = _task_key(task, "default_model")
    if named is None:
        raise UserError(f"Task '{task}' has no default_model: add the key to its yaml, or give model=.")
    if isinstance(named, DictConfig):
        if method not in named and "default" not in named:
            raise UserError(f"Task '{task}' has no default_model for method '{method}': give model=.")
        named = named.get(method, named.get("default"))
    return str(named)


def _task_key(task: str, key: str) -> Any:
    sources = GlobalHydra.instance().config_loader().get_sources()
    folders = [Path(source.path) for source in sources if source.scheme() == "file"]
    for folder in folders:
        file = folder / "task" / f"{task}.yaml"
        if not file.is_file():
            continue
        content = OmegaConf.load(file)
        if isinstance(content, ListConfig) or key in content:
            return content.get(key) if isinstance(content, DictConfig) else None
        parents = [entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
        inherited = [_task_key(parent, key) for parent in reversed(parents) if parent != task]
        return next((value for value in inherited if value is not None), None)
    return None


def _when(condition: Any, then: Any, otherwise: Any) -> Any:
    if not isinstance(condition, bool):
        raise UserError(f"Expected true or false, found {condition}.")
    return then if condition else otherwise


def _twin(eps: Any, private: Any, non_private: Any) -> Any:
    return non_private if eps == math.inf else private


OmegaConf.register_new_resolver("default_model", default_model, replace=True)
OmegaConf.register_new_resolver("twin", _twin, replace=True)
OmegaConf.register_new_resolver("when", _when, replace=True)


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[Hydra]:
    """A Hydra over the shipped conf/ and a user's folder, apart from one that may be running already."""
    version.setbase(HYDRA_VERSION_BASE)
    search_path = create_config_search_path(str(conf_dir()))
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"Expected --config-dir={config_dir} to be a folder: it does not exist.")
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        yield Hydra.create_main_hydra2(task_name="privzoo", config_search_path=search_path)
    finally:
        state.hydra = running


def _compose(hydra: Hydra, overrides: Sequence[str], config_name: str) -> DictConfig:
    cfg = hydra.compose_config(config_name=config_name, overrides=list(overrides), run_mode=RunMode.RUN)
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    return complete(cfg, choices)


def complete(cfg: DictConfig, choices: Mapping[str, Any]) -> DictConfig:
    """Adds `choices`, the names behind the groups (choices.task, choices.method, choices.model), to a composed cfg."""
    with open_dict(cfg):
        cfg.choices = {group: choices[group] for group in ("task", "method", "model")}
        if cfg.get("data_root") == "":  # PRIVZOO_DATA set to nothing means not set
            cfg.data_root = None
    return cfg


def compose(overrides: Sequence[str] = (), config_dir: str | None = None, config_name: str = "train") -> DictConfig:
    """One run's configuration as `python -m privzoo.train` sees it, `choices` included; unresolved, not validated."""
    with _hydra(config_dir) as hydra:
        return _compose(hydra, overrides, config_name)


def compose_sweep(overrides: Sequence[str], config_dir: str | None = None, config_name: str = "train") -> list[DictConfig]:
    """The configurations of all runs that `-m` starts with these overrides, grids (hydra.sweeper.params) included."""
    with _hydra(config_dir) as hydra:
        master = hydra.compose_config(config_name=config_name, overrides=list(overrides), run_mode=RunMode.MULTIRUN)
        grid = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(
            grid + list(master.hydra.overrides.task)
        )
        of_hydra = list(master.hydra.overrides.hydra)
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [_compose(hydra, [*of_hydra, *job], config_name) for job in jobs]


def build(node: DictConfig, **keywords: Any) -> Any:
    """The object (or, with `_partial_: true`, the function that makes it) which a node's `_target_` names.

    Keys for the configuration alone are left out. A keyword that the target does not take is found here, not when the
    function is called.

    Raises:
        UserError: if the node holds a key that its target does not know.
    """
    content: Any = OmegaConf.to_container(node, resolve=True)
    arguments = {k: v for k, v in content.items() if not k.startswith("default_") and k not in _CONFIGURATION_ALONE}
    made = instantiate(arguments, _convert_="all", **keywords)  # a list of omegaconf's own kind cannot be saved as JSON
    _check_keywords(made)
    return made


def _check_keywords(made: Any) -> None:
    if not isinstance(made, partial):
        return
    known = _arguments(made.func)
    for key in made.keywords:
        if known is not None and key not in known:
            raise UserError(f"{made.func.__qualname__} has no argument '{key}': it takes {', '.join(known)}.")
    for value in made.keywords.values():
        _check_keywords(value)


def _arguments(function: Any) -> list[str] | None:
    """Names that a call takes; a class that hands `**rest` on takes what its parents take. None: it takes any."""
    found: list[str] = []
    classes = inspect.getmro(function)[1:-1] if inspect.isclass(function) else ()
    parents = [vars(c)["__init__"] for c in classes if "__init__" in vars(c)]
    for each in [function, *parents]:
        parameters = inspect.signature(each).parameters.values()
        found += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return list(dict.fromkeys(found))
    return None
