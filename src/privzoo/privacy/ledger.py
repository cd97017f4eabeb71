"""The write-ahead ledger: what was released, on disk before it is released.

`ledger.jsonl` is authoritative. A line is synced before the release that it pays for, so after kill -9 the ledger holds at
least what was made public. A release that is computed again in exactly the same way (same digest, same weights, hence same
draw, same sum, same noise) gives the same output once more and counts once. Anything else is charged.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from privzoo.errors import UserError
from privzoo.privacy.accounting import GAUSSIAN, Release, Releases


@dataclass(frozen=True)
class Entry:
    """One release that was paid for, with all that tells whether another one is the same."""

    release: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    digest: str
    weights: str
    noise: str = GAUSSIAN


class Ledger:
    """Opens or creates a run's ledger and locks it against a second process.

    Args:
        path: `ledger.jsonl` of the run folder.
    Raises:
        UserError: if another process holds it, or if it was edited (lines are chained by hashes).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.branches: list[str] = []  # a random name each, so that copies of a folder never share one
        self._chain = ""
        self._file = open(path, "a+b")  # noqa: SIM115 - held, with its lock, until close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path} is in use: another process runs in {path.parent}; wait for it or stop it.") from None
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; nothing is lost, as every line is on disk."""
        self._file.close()

    def charge(self, entry: Entry) -> bool:
        """Pay for a release before it is made: the line is on disk when this returns.

        Returns:
            True for a new line; False if this very release was paid for before (it is being computed again).
        Raises:
            ValueError: if the release was made in this configuration at other weights. Its draw would be the same and its
                noise another, which no accountant covers; open a new branch first.
            OSError: if the line could not be written; the release must not be made.
        """
        for earlier in self.entries:
            if (earlier.release, earlier.digest) == (entry.release, entry.digest):
                if earlier != entry:
                    raise ValueError(f"Release {entry.release} was made before at other weights: open a branch first.")
                return False
        self._append({"kind": "release", **asdict(entry)})
        self.entries.append(entry)
        return True

    def branch(self, reason: str) -> None:
        """From here on draws and noise are fresh (`branches` is part of the digest), and releases are paid for anew."""
        name = secrets.token_hex(16)
        self._append({"kind": "branch", "reason": reason, "name": name})
        self.branches.append(name)

    def require(self, made: int) -> None:
        """Check that the first `made` releases were paid for, as a checkpoint that holds them says.

        Raises:
            UserError: if some were not; then lines were lost, and with them the true epsilon.
        """
        missing = set(range(made)) - {entry.release for entry in self.entries}
        if missing:
            raise UserError(
                f"{self.path} lacks {len(missing)} of the {made} releases that the checkpoint holds: its epsilon can't be "
                "known; put the whole ledger back, or start a new run."
            )

    def releases(self) -> Releases:
        """All releases paid for, grouped, for an accountant."""
        counts = Counter(Release(e.sample_rate, e.noise_multiplier, e.noise) for e in self.entries)
        return list(counts.items())

    def follow(self, entries: list[Entry], branches: list[str]) -> None:
        """Take over what the first rank read from disk."""
        self.entries, self.branches = list(entries), list(branches)

    def _append(self, line: dict[str, object]) -> None:
        chain = _link(self._chain, line)
        self._file.write(json.dumps({**line, "chain": chain}).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._chain = chain

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a line cut short by a kill: its release was never made
            self._file.truncate(whole)
        for number, text in enumerate(content[:whole].splitlines(), start=1):
            try:
                line = json.loads(text)
                chain = line.pop("chain")
                kind = line["kind"]
                entry = Entry(**{k: v for k, v in line.items() if k != "kind"}) if kind == "release" else None
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{self.path} is damaged at line {number}: its epsilon can't be known; start anew."
                ) from None
            if chain != _link(self._chain, line):
                raise UserError(f"{self.path} was edited at line {number}: its epsilon can't be known; start anew.")
            self._chain = chain
            if entry is None:
                self.branches.append(line["name"])
            else:
                self.entries.append(entry)


class Replica(Ledger):
    """The ledger as ranks hold it that do not keep the run folder: in memory, charged with the same entries.

    Guarantee: the first rank's line is on disk before it gives its share to a sum, and without that share no rank has the
    sum. So what is charged here was paid for on disk when anything can come of it.

    Args:
        path: of the first rank's ledger, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.branches = [], []
        self._chain = ""

    def close(self) -> None:
        """Nothing is held."""

    def _append(self, line: dict[str, object]) -> None:
        """The first rank writes."""


def _link(chain: str, line: dict[str, object]) -> str:
    return hashlib.sha256((chain + json.dumps(line, sort_keys=True)).encode()).hexdigest()[:16]
