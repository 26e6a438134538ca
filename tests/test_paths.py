"""Where fp8ctl keeps its own things, and whose the folder of running servers is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fp8ctl import paths
from fp8ctl.errors import NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

XDG: dict[str, tuple[str, str, Callable[[], Path]]] = {
    "cache": ("XDG_CACHE_HOME", ".cache", paths.cache_dir),
    "data": ("XDG_DATA_HOME", ".local/share", paths.data_dir),
    "state": ("XDG_STATE_HOME", ".local/state", paths.state_dir),
}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the user a home and no settings."""
    for name in ("FP8CTL_HOME", *(entry[0] for entry in XDG.values())):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", XDG)
def test_without_settings_it_is_the_standard_place_in_the_home(kind: str, user: Path) -> None:
    _, fallback, folder = XDG[kind]
    assert folder() == user / fallback / "fp8ctl"


@pytest.mark.parametrize("kind", XDG)
def test_each_standard_variable_moves_its_own_folder(
    kind: str, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, _, folder = XDG[kind]
    monkeypatch.setenv(variable, str(user / "elsewhere"))
    assert folder() == user / "elsewhere" / "fp8ctl"
    for other, (_, fallback, theirs) in XDG.items():
        if other != kind:
            assert theirs() == user / fallback / "fp8ctl"


@pytest.mark.parametrize("kind", XDG)
def test_an_empty_variable_is_no_setting(
    kind: str, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, fallback, folder = XDG[kind]
    monkeypatch.setenv(variable, "")
    monkeypatch.setenv("FP8CTL_HOME", "")
    assert folder() == user / fallback / "fp8ctl"


def test_one_variable_puts_all_three_under_one_folder(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(user / "loses"))
    monkeypatch.setenv("FP8CTL_HOME", "~/own")
    for kind, (_, _, folder) in XDG.items():
        assert folder() == user / "own" / kind


def test_a_relative_home_does_not_move_with_the_working_folder(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user)
    monkeypatch.setenv("FP8CTL_HOME", "own")
    assert paths.cache_dir() == user / "own" / "cache"


def test_only_the_state_folder_is_made_and_it_is_private(user: Path) -> None:
    paths.cache_dir()
    paths.data_dir()
    assert list(user.iterdir()) == []
    assert paths.state_dir().stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_others_may_read_is_closed(user: Path) -> None:
    folder = user / ".local/state/fp8ctl"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert paths.state_dir() == folder
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_state_folder_of_somebody_else_is_refused(user: Path) -> None:
    folder = paths.state_dir()
    os.chown(folder, 65534, 65534)
    with pytest.raises(NotPermittedError, match="belongs to user 65534, not to 0") as caught:
        paths.state_dir()
    assert caught.value.exit_code == 6
    assert str(folder) in caught.value.message
    assert caught.value.hint == "export FP8CTL_HOME=/a/folder/you/own"


def test_a_file_in_the_place_of_the_state_folder_is_refused(user: Path) -> None:
    (user / ".local").write_text("")
    with pytest.raises(NotPermittedError, match="cannot use") as caught:
        paths.state_dir()
    assert caught.value.hint == "export FP8CTL_HOME=/a/folder/you/own"


def test_a_relative_setting_does_not_follow_the_working_folder(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert paths.cache_dir() == user / ".cache" / "fp8ctl"


def test_a_user_without_a_home_is_told_what_to_set(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", none)
    with pytest.raises(NotPermittedError) as caught:
        paths.cache_dir()
    assert "FP8CTL_HOME" in str(caught.value.hint)
