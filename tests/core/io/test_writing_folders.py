"""Folders and lines are written, or one error says why not."""

import os

import pytest

from distillfss_core.errors import OutputError
from distillfss_core.io.writing import append_line, make_folder


def test_a_folder_is_made_and_may_be_there(tmp_path):
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b" / "c", parents=True)
    assert (tmp_path / "a").is_dir()
    assert (tmp_path / "b" / "c").is_dir()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"cannot make .*/b/c: there is no folder .*/b; make it first"):
        make_folder(tmp_path / "b" / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot make .*/file: File exists; give another with -o"):
        make_folder(tmp_path / "file", parents=True)


def test_a_line_that_is_not_forced_to_disk_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    path.write_bytes(b"one\n")

    def full(_):
        raise OSError(28, "No space left on device")

    with open(path, "a+b", buffering=0) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OutputError, match=r"lines: No space left on device; free some space"):
                append_line(file, b"two\n", path)
        assert path.read_bytes() == b"one\n"
        append_line(file, b"three\n", path)
    assert path.read_bytes() == b"one\nthree\n"
