"""Nobody ever sees half of a file."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest

from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, explain_os_error, write_json, write_text


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "er" / "file"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent  # the same disk, so that renaming is one step
        assert not temporary.exists()  # DuckDB wants to make the file itself
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ToolmemError])
def test_what_goes_wrong_leaves_the_old_file(error, tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ToolmemError, match=r"cannot write .*file: the disk is full"):
        write_text(tmp_path / "file", "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"), (errno.ENOTDIR, "is a file, not a folder"),
        (errno.EISDIR, "this is a folder"), (errno.EDQUOT, "quota"),
    ],
)  # fmt: skip
def test_advice(number, advice):
    message = str(explain_os_error(OSError(number, os.strerror(number)), "some/file"))
    assert message.startswith("cannot write some/file: ")
    assert advice in message


def test_an_unusual_error_speaks_for_itself():
    assert "Too many open files" in str(
        explain_os_error(OSError(errno.EMFILE, "Too many open files"), "f")
    )


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolmemError, match=r"not a folder|File exists"):
        write_text(tmp_path / "file" / "x", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ToolmemError, match="this is a folder"):
        write_text(tmp_path / "folder", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_permissions_stay(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    target.chmod(0o640)
    write_text(target, "new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_file_is_readable_as_any_other(tmp_path):
    """Not by its owner alone, as temporary files are."""
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "file", "x")
    mode = (tmp_path / "file").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_very_long_name_is_told(tmp_path):
    with pytest.raises(ToolmemError, match="too long"):
        write_text(tmp_path / ("x" * 300), "x")
    write_text(tmp_path / ("x" * 250), "x")
    assert len(list(tmp_path.iterdir())) == 1


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1, None]}
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_what_a_killed_process_left_is_removed(tmp_path):
    from toolmem.files import remove_unfinished

    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "last.ckpt") as temporary:
        temporary.write_text("half")
        left = tmp_path / temporary.name.replace(".part", "2.part")
        left.write_text("half")  # atomic_path itself would clean up
        raise KeyboardInterrupt
    (tmp_path / "best.ckpt").write_text("whole")
    assert left.exists()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
