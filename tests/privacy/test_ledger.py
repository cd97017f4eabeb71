"""PRIVACY 35: the ledger on disk holds at least what was released, and tells when it does not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from privzoo.errors import UserError
from privzoo.privacy.accounting import Release
from privzoo.privacy.ledger import Entry, Ledger

FIRST = Entry(release=0, sample_rate=0.1, noise_multiplier=1.5, clip_norm=0.5, digest="d", weights="w0")
SECOND = replace(FIRST, release=1, weights="w1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def filled(path: Path) -> list[bytes]:
    with Ledger(path) as ledger:
        assert ledger.charge(FIRST)
        assert ledger.charge(SECOND)
    return path.read_bytes().splitlines(keepends=True)


def test_a_line_is_synced_when_charge_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_bytes()))
    with Ledger(path) as ledger:
        ledger.charge(FIRST)
        assert json.loads(synced[0])["release"] == 0


def test_what_was_paid_is_read_back(path):
    filled(path)
    with Ledger(path) as ledger:
        assert ledger.entries == [FIRST, SECOND]
        assert ledger.releases() == [(Release(0.1, 1.5), 2)]


def test_the_very_same_release_is_paid_once(path):
    filled(path)
    with Ledger(path) as ledger:
        assert ledger.charge(SECOND) is False
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize(
    "change", [{"weights": "other"}, {"noise_multiplier": 1.0}, {"sample_rate": 0.2}, {"clip_norm": 1.0}]
)
def test_the_same_draw_with_another_sum_is_refused(path, change):
    """Same digest, hence same draw: independent draws are what the accountant assumes."""
    filled(path)
    with Ledger(path) as ledger, pytest.raises(ValueError, match="open a branch first"):
        ledger.charge(replace(SECOND, **change))


def test_another_configuration_pays_again(path):
    filled(path)
    with Ledger(path) as ledger:
        assert ledger.charge(replace(SECOND, digest="other")) is True
        assert ledger.releases() == [(Release(0.1, 1.5), 3)]


def test_a_line_cut_short_was_never_released(path):
    """The kill came before the sync returned; the rest stays, and the next line follows whole."""
    lines = filled(path)
    path.write_bytes(lines[0] + lines[1][:-15])
    with Ledger(path) as ledger:
        assert ledger.entries == [FIRST]
        ledger.charge(SECOND)
    assert path.read_bytes() == b"".join(lines)


def test_branches_are_counted_and_survive(path):
    filled(path)
    with Ledger(path) as ledger:
        ledger.branch("a reason")
        ledger.charge(replace(SECOND, digest="other"))
    with Ledger(path) as ledger:
        assert (len(ledger.branches), len(ledger.entries)) == (1, 3)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0]],
        lambda lines: [lines[0], lines[0]],
        lambda lines: [lines[0].replace(b"1.5", b"9.5"), lines[1]],
        lambda lines: [lines[0].replace(b'"chain"', b'"kind": "branch", "chain"'), lines[1]],
        lambda lines: [b"[]\n", *lines],
        lambda lines: [b"\n", *lines],
        lambda lines: [lines[0], b'{"kind": "release", "chain": ""}\n'],
    ],
)
def test_an_edited_ledger_is_refused(path, edit):
    path.write_bytes(b"".join(edit(filled(path))))
    with pytest.raises(UserError, match=r"(edited|damaged) at line \d.*start anew"):
        Ledger(path)


def test_a_ledger_shorter_than_its_checkpoint_is_refused(path):
    filled(path)
    with Ledger(path) as ledger:
        ledger.require(2)
        with pytest.raises(UserError, match="lacks 1 of the 3 releases"):
            ledger.require(3)


def test_one_process_at_a_time(path):
    with Ledger(path), pytest.raises(UserError, match="in use"):
        Ledger(path)
    with Ledger(path):
        pass


def test_a_refused_write_pays_nothing(path, monkeypatch):
    """A full disk: the error reaches the caller before any release, and the line is not believed."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Ledger(path) as ledger:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.charge(FIRST)
        assert ledger.entries == []
