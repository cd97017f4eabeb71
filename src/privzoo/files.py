"""Files that are whole or absent, whatever happens while they are written."""

import json
import os
from pathlib import Path
from typing import Any

from privzoo.errors import RunLost, UserError


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, wholly or not at all, and durably once it returns.

    Whatever happens (full disk, kill -9, loss of power), `path` holds either its former content or the new one.

    Raises:
        RunLost: the disk refused; the former content is untouched and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename across disks is not atomic
    try:
        try:
            with open(temporary, "w", encoding="utf-8", newline="") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        kept = "its former content is kept" if path.exists() else "nothing was written there"
        raise RunLost(f"Could not write {path} ({error.strerror}): {kept}; make room and resume.") from error


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` to `path` as json with the promises of `write_text`.

    Raises:
        RunLost: the disk refused.
        ValueError: `obj` holds NaN or Infinity, which json cannot say; nothing is written.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The json object in the existing file `path`.

    Raises:
        UserError: the file cannot be read, is cut short, or holds something else.
    """
    try:
        obj = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file that you may read.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged or cut short ({error}); resume the run or restore a copy.") from error
    if not isinstance(obj, dict):
        raise UserError(f"{path} holds a json {type(obj).__name__}, expected one json object; was it edited?")
    return obj


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a loss of power: the rename itself lives in the folder's own data."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
