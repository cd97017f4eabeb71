"""Where randomness comes from: one 256-bit run key, and a keyed stream for every purpose, release and tensor.

A stream is a Philox counter generator whose 128-bit key is HMAC-SHA256(run key; purpose, release, digest, name). So two
streams that differ in anything are independent draws, and whoever knows the published `seed` knows none of them. The digest
stands for everything that determines the sum to be protected: another learning rate, other data or other weights give
another stream, so that no noise value is ever added to two different sums.

Floating-point limits: noise is float32 (a ziggurat with 23-bit mantissas; float64 for a float64 sum), so the low bits of a
noisy sum carry the usual floating-point artefacts (Mironov 2012); the plan's epsilon is for the ideal Gaussian.
"""

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

import numpy as np

from privzoo.errors import UserError

KEY_BYTES = 32


class RunKey:
    """The secret of one run. It is never logged, put in a checkpoint or shown; `repr` hides it.

    Args:
        secret: 32 bytes.
        is_test_key: True where the key came from a published seed, so that the run protects nobody.
    """

    def __init__(self, secret: bytes, is_test_key: bool = False) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"Expected a run key of {KEY_BYTES} bytes, found {len(secret)}.")
        self._secret = secret
        self.is_test_key = is_test_key

    @classmethod
    def fresh(cls) -> "RunKey":
        """256 bits from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def for_tests(cls, noise_seed: int) -> "RunKey":
        """A repeatable key. A run that uses it is NOT PRIVATE: anybody can compute its noise."""
        return cls(hashlib.sha256(f"privzoo test key {noise_seed}".encode()).digest(), is_test_key=True)

    @classmethod
    def load(cls, path: Path, is_test_key: bool = False) -> "RunKey":
        """The key of an unfinished run.

        Raises:
            UserError: if the file is missing or cut short.
        """
        try:
            secret = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} is missing: without its key a run cannot go on; start a new one.") from None
        if len(secret) != KEY_BYTES:
            raise UserError(f"{path} holds {len(secret)} bytes, expected {KEY_BYTES}: start a new run.")
        return cls(secret, is_test_key)

    def save(self, path: Path) -> None:
        """Write the key to a new file that only its owner can read (mode 0600), synced to disk."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._secret)
            file.flush()
            os.fsync(file.fileno())

    def stream(self, purpose: str, release: int, digest: str, name: str = "", block: int = 0) -> np.random.Generator:
        """The stream for one purpose of one release.

        Args:
            purpose: "sampling", "noise", …; each has streams of its own.
            release: index of the release, from 0.
            digest: what determines the sum (`digest`, and for noise the weights it is taken at).
            name: the tensor that the stream fills, where a release has several.
            block: which stretch of that tensor; blocks of one stream never overlap (2^192 values apart).
        """
        message = json.dumps([purpose, release, digest, name]).encode()
        key = int.from_bytes(hmac.digest(self._secret, message, "sha256")[:16], "big")
        return np.random.Generator(np.random.Philox(key=key, counter=block << 192))

    def digest(self, facts: dict[str, object]) -> str:
        """Digest of all that determines a release's sum: configuration, data fingerprint, initial weights, versions, ….

        It is keyed, as the ledger shows it and the facts hold a fingerprint of the private data: without the key nobody can
        check a guess at the data against it. Under another key the same facts have another digest.
        """
        message = "digest " + json.dumps(facts, sort_keys=True, allow_nan=True, default=str)
        return hmac.digest(self._secret, message.encode(), "sha256").hex()

    def seal(self, content: str) -> str:
        """A code that only this run can make, to tell its own checkpoint from another one."""
        return hmac.digest(self._secret, ("seal " + content).encode(), "sha256").hex()

    def __repr__(self) -> str:
        return f"RunKey(<secret>, is_test_key={self.is_test_key})"
