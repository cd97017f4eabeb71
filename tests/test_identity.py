"""Which files of a user's own a digest covers: noise of a lost release must not be added to what edited code computes."""

import importlib
from pathlib import Path

import pytest

from privzoo.identity import _foreign_files


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method that imports a helper from another folder, and one beside it only when it is called."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "my_method.py").write_text("import my_helper\n\ndef made():\n    import my_late_helper\n")
    (tmp_path / "here" / "my_late_helper.py").write_text("weight = 1\n")
    (tmp_path / "there" / "my_helper.py").write_text("weight = 1\n")
    for folder in ("here", "there"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    importlib.invalidate_caches()
    return tmp_path


def test_what_a_users_method_imports_counts(own_code: Path) -> None:
    """PRIVACY line 35."""
    found = _foreign_files({"method": {"_target_": "my_method.made", "parts": [{"_target_": "torch.optim.SGD"}]}})
    expected = {"here/my_method.py", "here/my_late_helper.py", "there/my_helper.py"}
    assert {str(file.relative_to(own_code)) for file in found if file.is_relative_to(own_code)} == expected
    assert all("site-packages" not in file.parts for file in found)
    assert not [file for file in found if "privzoo" in file.parts and "src" in file.parts]


def test_a_target_in_an_installed_package_counts_itself_alone() -> None:
    found = _foreign_files({"optimizer": {"_target_": "schedulefree.AdamWScheduleFree"}})
    assert [file.parent.name for file in found if "site-packages" in file.parts] == ["schedulefree"]
