"""A journal of finished work survives whatever happens while a line is written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier

import pytest

from distillfss_core.errors import InputFileError, OutputError
from distillfss_core.labelstore import journal as journal_module
from distillfss_core.labelstore.journal import Journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "record"


def write(path, count: int) -> bytes:
    journal = Journal(path, {"run": "a"})
    for at in range(count):
        journal.add({"at": at})
    journal.close()
    return path.read_bytes()


def test_what_is_added_is_there_again(path):
    write(path, 3)
    journal = Journal(path, {"run": "another"})
    assert journal.header["run"] == "a"
    assert journal.entries == [{"at": 0}, {"at": 1}, {"at": 2}]
    journal.add({"at": 3})
    journal.close()
    assert [e["at"] for e in Journal(path).entries] == [0, 1, 2, 3]


def test_a_record_cut_anywhere_keeps_its_whole_lines_and_goes_on(path):
    whole = write(path, 2)
    lines = whole.splitlines(keepends=True)
    for size in range(len(lines[0]), len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        kept = sum(size >= len(b"".join(lines[: n + 2])) for n in range(2))
        assert len(journal.entries) == kept
        journal.add({"at": "new"})
        journal.close()
        again = Journal(path)
        assert again.entries[-1] == {"at": "new"}
        assert len(again.entries) == kept + 1
        again.close()


def test_a_changed_line_is_not_believed(path):
    whole = write(path, 2)
    path.write_bytes(whole.replace(b'"at":1', b'"at":7'))
    assert Journal(path).entries == [{"at": 0}]


@pytest.mark.parametrize("content", [b"", b"hello\n", b"00000000 {}\n"])
def test_what_is_no_record_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="no journal"):
        Journal(path)


def test_two_runs_cannot_have_it_open(path):
    first = Journal(path, {})
    with pytest.raises(OutputError, match="another run"):
        Journal(path)
    first.close()
    Journal(path).close()


def test_another_process_cannot_have_it_open_until_it_is_killed(path):
    code = "import sys, time; from pathlib import Path; from distillfss_core.labelstore.journal import Journal\n"
    code += (
        "journal = Journal(Path(sys.argv[1]), {}); journal.add({'at': 0}); print('open', flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline().strip() == b"open"
            with pytest.raises(OutputError, match=r"record: another run is writing here; wait for it, or stop it"):
                Journal(path)
        finally:
            process.kill()
    journal = Journal(path)
    assert journal.entries == [{"at": 0}]
    journal.close()


def test_it_can_be_closed_by_another_thread(path):
    journal = Journal(path, {})
    with ThreadPoolExecutor(1) as pool:
        pool.submit(journal.close).result()
    Journal(path).close()


def test_of_runs_that_start_at_once_one_has_it(tmp_path):
    for attempt in range(40):
        path, gate = tmp_path / str(attempt), Barrier(4)

        def start(path=path, gate=gate):
            gate.wait()
            with suppress(OutputError):
                return Journal(path, {"run": "a"})

        with ThreadPoolExecutor(4) as pool:
            opened = [future.result() for future in [pool.submit(start) for _ in range(4)]]
        (journal,) = [r for r in opened if r]
        journal.add({"at": 0})
        journal.close()
        assert Journal(path).entries == [{"at": 0}]


def test_a_record_that_was_removed_meanwhile_is_not_written(path, monkeypatch):
    write(path, 2)
    original, removed = journal_module._lock, []

    def late(name):
        if not removed:
            removed.append(path.rename(path.with_name("removed")))
        return original(name)

    monkeypatch.setattr(journal_module, "_lock", late)
    journal = Journal(path, {"run": "b"})
    journal.add({"at": 7})
    journal.close()
    assert Journal(path).header["run"] == "b"
    assert Journal(path).entries == [{"at": 7}]
    assert len(Journal(removed[0]).entries) == 2


def test_a_header_that_was_cut_is_written_again(path):
    whole = write(path, 0)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert write(path, 0) == whole


def test_a_full_disk_leaves_it_good(path, monkeypatch):
    journal = Journal(path, {})
    journal.add({"at": 0})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            journal.add({"at": 1})
    journal.add({"at": 2})
    journal.close()
    assert [e["at"] for e in Journal(path).entries] == [0, 2]
