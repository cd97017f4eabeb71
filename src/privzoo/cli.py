"""What all commands share: Hydra behind one door, one sentence for a user's mistake, and exit codes.

0: done. 2: a mistake of the user's. 1: work was lost (full disk), or a bug, which alone shows a traceback.
128 + n: stopped by signal n.
"""

import argparse
import difflib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from types import MappingProxyType
from typing import Any, NoReturn

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from privzoo.composition import HYDRA_VERSION_BASE, complete, compose, conf_dir
from privzoo.config import validate
from privzoo.errors import RunLost, Stopped, UserError

# What people type who come from other trainers.
OTHER_NAMES = {
    "accumulate_grad_batches": "microbatch_size",
    "data": "task",
    "dataset": "task",
    "epsilon": "eps",
    "gradient_clip_val": "clip_norm",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "max_grad_norm": "clip_norm",
}


def run_hydra(task_function: Callable[[DictConfig], None], config_name: str) -> None:
    """Runs `task_function` as a Hydra application on conf/<config_name>.yaml and ends the process with its exit code.

    Each job's configuration is completed (`choices`) and validated before the function is called, so a function that
    imports torch in its body is not reached by a wrong one. In a sweep a job that fails says so and the others go on;
    the exit code is then the highest of theirs.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    job = _Job(task_function)
    with exit_on_error(config_name):
        parser, arguments = read_flags()
        version.setbase(HYDRA_VERSION_BASE)
        _run_hydra(arguments, parser, job, config_path=str(conf_dir()), config_name=config_name)
    if job.exit_codes:
        sys.exit(max(job.exit_codes))


def read_flags(more: Mapping[str, str] = MappingProxyType({})) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Hydra's parser and what it makes of the command line; overrides may stand before and after flags.

    Args:
        more: flags beside Hydra's, and what each means.
    Raises:
        UserError: for a flag that does not exist or lacks its value.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"Cannot read the command line ({message}): expected key=value and flags; --help shows them.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    for flag, meaning in more.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    return parser, parser.parse_intermixed_args()


class _Job:
    """A task function that reports its failures itself, so that they do not end a sweep.

    In the process that made it, it keeps the exit codes. In another one (a launcher's) it raises, and the launcher
    carries the error back.
    """

    def __init__(self, task_function: Callable[[DictConfig], None]) -> None:
        update_wrapper(self, task_function)  # Hydra names the application after the wrapped function's module
        self.task_function = task_function
        self.process = os.getpid()
        self.exit_codes: list[int] = []

    def __call__(self, cfg: DictConfig) -> None:
        context = HydraConfig.get()
        sweep = context.mode == RunMode.MULTIRUN
        if sweep:
            print(f"privzoo: run {context.job.num + 1}: {' '.join(context.overrides.task)}", file=sys.stderr)
        try:
            complete(cfg, context.runtime.choices)
            validate(cfg)
            self.task_function(cfg)
        except Exception as error:
            if os.getpid() != self.process:
                raise
            code, sentence = explain(error, str(context.job.config_name))
            if sentence is None:
                if not sweep:
                    raise
                sys.excepthook(type(error), error, error.__traceback__)
            else:
                print(f"privzoo: {sentence}", file=sys.stderr)
            self.exit_codes.append(code)
            if is_a_rank():  # in a sweep the others may still be in this run: to go on alone would be to wait for ever
                sys.exit(code)


def is_a_rank() -> bool:
    """Whether torchrun or srun started several of this command, each to be one process of the run."""
    return any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


@contextmanager
def exit_on_error(config_name: str = "train") -> Iterator[None]:
    """Turns errors that are not bugs into one sentence on stderr, `privzoo: ...`, and the exit code of this module.

    A bug passes through and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        number = stop.signal_number if isinstance(stop, Stopped) else signal.SIGINT
        print(f"privzoo: {stop if isinstance(stop, Stopped) else 'stopped by Ctrl-C.'}", file=sys.stderr)
        sys.exit(128 + number)
    except Exception as error:
        code, sentence = explain(error, config_name)
        if sentence is None:
            raise
        print(f"privzoo: {sentence}", file=sys.stderr)
        sys.exit(code)


def explain(error: BaseException, config_name: str = "train") -> tuple[int, str | None]:
    """The exit code of an error and the sentence to print, which is None for a bug: that wants its traceback."""
    for link in _causes(error):
        if isinstance(link, UserError):
            return 2, _one_line(link)
        if isinstance(link, RunLost):
            return 1, _one_line(link)
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {link.filename}" if link.filename else ""
            return 1, f"The disk is full{where}: make room and go on with resume=<run folder>."
    if isinstance(error, InstantiationException) and not _names_a_wrong_target(error):
        return 1, None
    if isinstance(error, (HydraException, OmegaConfBaseException)) or _complains_hydra(error):
        return 2, _of_hydra(error, config_name)
    return 1, None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: Hydra and OmegaConf wrap what resolvers and constructors raise."""
    link: BaseException | None = error
    while link is not None:
        yield link
        wrapper = isinstance(link, (HydraException, OmegaConfBaseException))
        link = link.__cause__ or (link.__context__ if wrapper else None)


def _complains_hydra(error: BaseException) -> bool:
    """Whether Hydra itself raised a plain ValueError: for `task=3`, or for flags that exclude each other."""
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("hydra.")


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())


def _names_a_wrong_target(error: InstantiationException) -> bool:
    """Whether a yaml is at fault (a target or an argument that does not exist), not the code behind its target."""
    text = str(error)
    return text.startswith("Error locating target") or "unexpected keyword argument" in text


def _of_hydra(error: BaseException, config_name: str) -> str:
    """Hydra's message of several lines as one sentence with the way out."""
    text = _one_line(error)
    if isinstance(error, OverrideParseException):
        return (
            f"Cannot read '{error.override}': expected key=value; a value with spaces, quotes, commas, = or # goes "
            f"into quotes of its own, as in 'key=\"a value\"'."
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_choice(str(error.missing_cfg_file), error.options)
    if text.startswith(("Ambiguous value for argument", "Sweep parameters")):
        argument = text.split("'")[1]
        return f"{argument} names several values: add -m to run each of them, or give one."
    if isinstance(error, SearchPathException):
        folder = text.split("'")[1]
        return f"Expected --config-dir={folder} to be a folder: it does not exist."
    if text.startswith("Could not override"):
        return _unknown_key(text.split("'")[1], config_name)
    if text.startswith("Error resolving interpolation '${task}"):
        return "Expected one task and one method, as in task=sst2 method=dp_full: several need -m and no brackets."
    if text.startswith("Config group override must be a string"):
        return "Expected the name of a choice after a group such as task=, found a number or a truth value."
    if isinstance(error, ValueError):
        return f"Cannot read the command line: {text.rstrip('.')}."
    if not text and error.__cause__ is not None:
        text = _one_line(error.__cause__)
    return f"The configuration does not fit together: {text}"


def _unknown_key(key: str, config_name: str) -> str:
    elsewhere = _dotted(OmegaConf.to_container(compose(config_name=config_name), resolve=False))
    chosen = [each for each in sys.argv[1:] if each.startswith(("task=", "method=", "model=")) and "," not in each]
    try:
        known = _dotted(OmegaConf.to_container(compose(chosen, config_name=config_name), resolve=False))
    except (HydraException, OmegaConfBaseException, UserError):  # a choice may be of a user's own folder
        known = elsewhere
    group, _, last = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    near = [OTHER_NAMES[last]] if last in OTHER_NAMES else []
    near += [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    near += [name for name in known if name.rpartition(".")[2] == last]
    if key in elsewhere or key in known:
        hint = f": it exists, but not for the {group or 'configuration'} that is chosen."
    elif near:
        hint = f": did you mean '{near[0]}'?"
    elif group and siblings:
        hint = f": {group} takes {', '.join(siblings)}."
    else:
        hint = "."
    return f"Unknown key '{key}'{hint} `--cfg job` shows all keys."


def _dotted(content: Any, prefix: str = "") -> list[str]:
    names = []
    for key, value in content.items() if isinstance(content, dict) else ():
        names += [f"{prefix}{key}", *_dotted(value, f"{prefix}{key}.")]
    return names


def _unknown_choice(missing: str, options: Sequence[str] | None) -> str:
    group, _, name = missing.rpartition("/")
    name = name.removesuffix(".yaml")
    if options is None:
        options = [file.stem for file in (conf_dir() / group).glob("*.yaml")]
    near = difflib.get_close_matches(name, options, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{group or 'configuration'} '{name}' does not exist: choose one of {', '.join(sorted(options))}.{hint}"


def read_arguments(argv: Sequence[str], allowed: Mapping[str, str], required: Sequence[str] = ()) -> dict[str, str]:
    """The `key=value` arguments of a command that is not a Hydra application, values verbatim.

    `prompt=What's new, a=b?` is the key `prompt` and the rest. `--help` prints the keys and exits with 0.

    Args:
        argv: the arguments without the program's name.
        allowed: key -> what it means, for --help.
        required: keys that must be given.
    Raises:
        UserError: for an argument without `=`, an unknown or doubled key, or a missing one.

    >>> read_arguments(["prompt=What's new, a=b?"], {"prompt": "text to go on from"})
    {'prompt': "What's new, a=b?"}
    """
    if any(argument in ("-h", "--help") for argument in argv):
        _print_help(allowed, required)
    values: dict[str, str] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"Cannot read '{argument}': expected key=value with one of {', '.join(allowed)}.")
        if key not in allowed:
            near = difflib.get_close_matches(key, list(allowed), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(allowed)}."
            raise UserError(f"Unknown key '{key}': {hint}")
        if key in values:
            raise UserError(f"The key '{key}' is given twice: '{values[key]}' and '{value}'.")
        values[key] = value
    missing = [key for key in required if key not in values]
    if missing:
        raise UserError(f"Expected {missing[0]}=<{allowed[missing[0]]}> on the command line.")
    return values


def _print_help(allowed: Mapping[str, str], required: Sequence[str]) -> NoReturn:
    print("Arguments, as key=value with the value taken as it stands:")
    for key, meaning in allowed.items():
        print(f"  {key}=  {meaning}{' (required)' if key in required else ''}")
    sys.exit(0)
