"""The run key and its streams: secret, keyed by everything that matters, 128 bits wide."""

import itertools
import os
import pickle
import random
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from privzoo.errors import UserError
from privzoo.privacy.streams import RunKey

DIGEST = "d" * 64


def values(key: RunKey, **changes: object) -> tuple[float, ...]:
    where = {"purpose": "noise", "release": 3, "digest": DIGEST, "name": "weight", "block": 0}
    return tuple(key.stream(**{**where, **changes}).random(4))


def test_streams_differ_by_everything_that_names_them() -> None:
    """PRIVACY 36: key, purpose, release, digest, tensor and block each give another stream; the same names the same one."""
    key = RunKey.for_tests(0)
    found = [
        values(key),
        values(RunKey.for_tests(1)),
        values(key, purpose="sampling"),
        values(key, purpose="directions"),
        values(key, release=4),
        values(key, release=3 + 2**32),
        values(key, digest="e" * 64),
        values(key, name="bias"),
        values(key, name=""),
        values(key, block=1),
        values(key, block=2**20),
    ]
    assert len(set(itertools.chain(*found))) == 4 * len(found)
    assert values(RunKey.for_tests(0)) == found[0]


def test_names_of_streams_cannot_be_confused() -> None:
    """PRIVACY 36: nothing moved from one name to the next gives the same stream."""
    key = RunKey.for_tests(0)
    names = [("a", "bc", "d"), ("ab", "c", "d"), ("a", "b", "cd"), ("a", 'b", "c', "d")]
    found = [values(key, purpose=purpose, digest=digest, name=name) for purpose, digest, name in names]
    assert len(set(found)) == len(found)


def test_blocks_do_not_overlap() -> None:
    """PRIVACY 36: a long stretch of one block holds nothing of the next one."""
    stretches = [RunKey.for_tests(0).stream("noise", 0, DIGEST, "w", block).random(5000) for block in range(3)]
    assert len(np.unique(np.concatenate(stretches))) == 15_000


def test_128_bits_reach_the_generator() -> None:
    """PRIVACY 36: the generator's key is two 64-bit words, and every one of the 128 bits takes both values.

    64 streams leave a bit constant with probability 2^-63; a key made of 32 bits leaves 96 of them constant.
    """
    key = RunKey.for_tests(0)
    words = np.array(
        [key.stream("noise", t, DIGEST).bit_generator.state["state"]["key"] for t in range(64)], dtype=np.uint64
    )
    assert words.shape == (64, 2)
    assert np.bitwise_or.reduce(words).tolist() == [2**64 - 1] * 2
    assert np.bitwise_and.reduce(words).tolist() == [0, 0]


def test_every_bit_of_the_secret_matters() -> None:
    """PRIVACY 36: all 32 bytes are keyed, not a part of them."""
    secret = bytes(32)
    changed = [values(RunKey(secret[:i] + b"\x01" + secret[i + 1 :])) for i in range(32)]
    assert len({values(RunKey(secret)), *changed}) == 33


def test_fresh_keys_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """PRIVACY 36: 256 bits of entropy, whatever seeds are set."""
    found = []
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the very thing that must not matter
        torch.manual_seed(0)
        found.append(values(RunKey.fresh()))
    assert len(set(found)) == 3
    asked = []
    monkeypatch.setattr(secrets, "token_bytes", lambda count: asked.append(count) or bytes(count))
    assert not RunKey.fresh().is_test_key
    assert asked == [32]


def test_published_seed_does_not_determine_the_streams() -> None:
    """PRIVACY 36: `seed` may stand in the digest, but two runs of one configuration share nothing."""
    digest = RunKey.for_tests(0).digest({"seed": 0, "eps": 1.0})
    assert values(RunKey.fresh(), digest=digest) != values(RunKey.fresh(), digest=digest)


def test_only_a_test_key_says_so() -> None:
    """PRIVACY 36: a run with a published noise seed can be told apart; the card says NOT PRIVATE."""
    assert RunKey.for_tests(7).is_test_key
    assert not RunKey.fresh().is_test_key
    assert not RunKey(bytes(32)).is_test_key


@pytest.mark.parametrize("show", [repr, str, "{}".format, lambda key: f"{[key]}", lambda key: f"{key!r:>80}"])
def test_the_secret_is_never_shown(show: Callable[[RunKey], str]) -> None:
    secret = bytes(range(200, 232))
    text = show(RunKey(secret))
    assert "<secret>" in text
    assert secret.hex() not in text
    assert repr(secret)[2:-1] not in text


def test_key_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    mask = os.umask(0)  # the most careless user there is
    try:
        RunKey.for_tests(0).save(tmp_path / "run.key")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "run.key").stat().st_mode) == 0o600
    assert (tmp_path / "run.key").stat().st_size == 32


def test_key_file_is_never_overwritten(tmp_path: Path) -> None:
    """Also not through a link that somebody laid out."""
    RunKey.for_tests(0).save(tmp_path / "run.key")
    before = (tmp_path / "run.key").read_bytes()
    with pytest.raises(FileExistsError):
        RunKey.for_tests(1).save(tmp_path / "run.key")
    assert (tmp_path / "run.key").read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        RunKey.for_tests(1).save(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_loaded_key_gives_the_same_streams(tmp_path: Path) -> None:
    RunKey.for_tests(5).save(tmp_path / "run.key")
    assert values(RunKey.load(tmp_path / "run.key")) == values(RunKey.for_tests(5))
    assert not RunKey.load(tmp_path / "run.key").is_test_key
    assert RunKey.load(tmp_path / "run.key", is_test_key=True).is_test_key


def test_missing_or_short_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        RunKey.load(tmp_path / "run.key")
    (tmp_path / "run.key").write_bytes(bytes(31))
    with pytest.raises(UserError, match="31 bytes, expected 32"):
        RunKey.load(tmp_path / "run.key")
    with pytest.raises(ValueError, match="16"):
        RunKey(bytes(16))


def test_digest_tells_any_two_sets_of_facts_apart() -> None:
    """PRIVACY 35 and 36: another value, type, name or nesting is another digest; the order of the facts is not."""
    facts: list[dict[str, object]] = [
        {}, {"lr": 0.1}, {"lr": 0.1 + 1e-17 + 2e-17}, {"lr": "0.1"}, {"lr": 1}, {"lr": 1.0}, {"lr": True}, {"lr": None},
        {"LR": 0.1}, {"a": {"lr": 0.1}}, {"lr": [0.1]}, {"lr": float("inf")}, {"lr": 0.1, "eps": 1}, {"lr": 0.1, "eps": 2},
    ]  # fmt: skip
    assert len({RunKey.for_tests(0).digest(each) for each in facts}) == len(facts)
    assert RunKey.for_tests(0).digest({"a": 1, "b": 2}) == RunKey.for_tests(0).digest({"b": 2, "a": 1})
    assert RunKey.for_tests(0).digest(pickle.loads(pickle.dumps({"path": Path("x")}))) == RunKey.for_tests(0).digest(
        {"path": Path("x")}
    )
