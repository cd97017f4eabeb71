"""Where a model's files are, and what is said where they cannot be had or read."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from privzoo.errors import UserError, first_line
from privzoo.hub import why_not_to_be_had

EMBEDDED = ("tiny_encoder", "tiny_lm", "tiny_vit")
_TINY_FOLDER = Path(__file__).parent / "tiny"
# What transformers, safetensors and torch raise for files that are missing, cut short or not what their name says.
_BAD_FILES = (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)


def locate(path: str) -> tuple[str, bool]:
    """Where transformers shall look, and whether it must keep off the network."""
    if path in EMBEDDED:
        return str(_TINY_FOLDER / path), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{path} is not a model folder: it holds no config.json; give model.path a folder written by"
                " save_pretrained, or a hub name."
            )
        return str(folder), True
    if folder.exists():
        raise UserError(f"{path} is a file: model.path expects the folder of a model, or a hub name.")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"{path} does not exist: model.path expects the folder of a model, or a hub name.")
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise UserError(f"{path!r} is neither a folder here nor a possible hub name: check model.path.") from None
    reason = why_not_to_be_had(path, "model")
    if reason and not isinstance(try_to_load_from_cache(path, "config.json"), str):
        raise UserError(
            f"Model {path!r} is neither a folder here nor to be had from the Hugging Face hub ({reason}): give"
            " model.path=<folder>, or connect to the network, or fill the hub's cache (HF_HOME) elsewhere and set"
            " HF_HUB_OFFLINE=1."
        )
    return path, reason is not None


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what the libraries raise for unreadable files into one sentence with the path and the reason."""
    try:
        yield
    except UserError:
        raise
    except _BAD_FILES as error:
        raise UserError(
            f"Model {path!r} cannot be read ({type(error).__name__}: {first_line(error)}): its files are damaged,"
            " incomplete or of another format; fetch it again or give another model.path."
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps bars and load reports off the screen: `new_head` says what they would."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
