import errno
import fcntl
import os
import re

import pytest

from moco.errors import UsageError
from moco.training import files


@pytest.fixture(autouse=True)
def _no_locks_left(monkeypatch):
    monkeypatch.setattr(files, "_held", {})


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(path) as file:
        file.write("ä" * 10_000)
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), files.atomic_write(path, "wb") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "ä" * 10_000 and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_is_a_link_or_where_there_are_none_a_copy(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links")))
    for content in "one", "two":  # in place of the file of that name
        (tmp_path / content).write_text(content)
        files.add_name(tmp_path / content, tmp_path / "latest")
        assert (tmp_path / "latest").read_text() == content
        assert os.path.samefile(tmp_path / content, tmp_path / "latest") == links
    assert sorted(os.listdir(tmp_path)) == ["latest", "one", "two"]


@pytest.mark.parametrize("number", sorted(files.UNSUPPORTED))
def test_where_nothing_can_be_flushed_files_are_written_with_one_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(descriptor):
        raise OSError(number, "refused")

    monkeypatch.setattr(files.os, "fsync", refuse)
    for name in "a", "b":
        with files.atomic_write(tmp_path / name) as file:
            file.write(name)
    assert capsys.readouterr().err.count("cannot flush") == 1 and (tmp_path / "b").read_text() == "b"
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), files.atomic_write(tmp_path / "a") as file:
        file.write("new")
    assert (tmp_path / "a").read_text() == "a" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_name_as_long_as_may_be_is_written(tmp_path):
    path = tmp_path / ("x" * 255)
    with files.atomic_write(path) as file:
        file.write("whole")
    files.add_name(path, tmp_path / ("y" * 255))
    assert path.read_text() == (tmp_path / ("y" * 255)).read_text() == "whole"


def test_two_writers_never_mix_a_file(tmp_path):
    with files.atomic_write(tmp_path / "file") as slow:
        slow.write("slow")
        with files.atomic_write(tmp_path / "file") as fast:
            fast.write("fast")
        assert (tmp_path / "file").read_text() == "fast"
    assert (tmp_path / "file").read_text() == "slow" and os.listdir(tmp_path) == ["file"]


def test_unfinished_files_are_removed_once_their_writer_has_ended(tmp_path):
    killed, in_use, link = (tmp_path / f"file.{letter * 16}.partial" for letter in "abc")
    for path in (killed, in_use, tmp_path / "other"):
        path.touch()
    link.symlink_to("other")
    with open(in_use) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with files.atomic_write(tmp_path / "file") as file:
            file.write("x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other", in_use.name, link.name}


class Busy:
    """Another process's lock on `path`, as far as flock can tell."""

    def __init__(self, path, owner):
        path.write_text(owner)
        self.file = open(path)  # noqa: SIM115
        fcntl.flock(self.file, fcntl.LOCK_EX)


def test_a_lock_names_its_owner_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    lock = files.FolderLock("--ckpt_path", tmp_path / "new" / "run" / ".lock")
    lock.acquire()
    files.FolderLock("--ckpt_path", tmp_path / "new" / "run" / ".lock").acquire()  # this process has it already
    owner = (tmp_path / "new" / "run" / ".lock").read_text()
    assert re.fullmatch(rf"process {os.getpid()} on \S+, since \d{{4}}-.*, Slurm job 17", owner)
    os.close(files._held[lock.path])
    Busy(tmp_path / "new" / "run" / ".lock", "")  # it is free


def test_a_busy_lock_is_refused_or_waited_for(tmp_path):
    path = tmp_path / ".r.json.lock"
    lock, busy = files.FolderLock(f"--json {tmp_path}/r.json", path), Busy(path, "process 1 on a")
    with pytest.raises(UsageError, match=r"--json .*r\.json: another run is writing here \(process 1 on a\); wait"):
        lock.acquire()
    told = []
    lock.acquire(on_busy=lambda owner: (told.append(owner), busy.file.close()))
    assert told == ["process 1 on a"] and path.read_text().startswith(f"process {os.getpid()}")


def test_a_lock_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to("precious")
    for folder in (tmp_path, tmp_path / "precious"):  # a link is not followed; a file is no folder
        with pytest.raises(UsageError, match=f"--ckpt_path {folder}: .* cannot be created or locked"):
            files.FolderLock(f"--ckpt_path {folder}", folder / ".lock").acquire()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("number", [*sorted(files.UNSUPPORTED), None])
def test_where_there_are_no_locks_files_are_written_all_the_same(tmp_path, monkeypatch, capsys, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    if number is None:  # as on Windows
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    leftover = tmp_path / f"file.{'a' * 16}.partial"
    leftover.touch()
    files.FolderLock("--ckpt_path", tmp_path / ".lock").acquire()
    assert ("has no locks" in capsys.readouterr().err) == (number is not None)
    with files.atomic_write(tmp_path / "file") as file:
        file.write("x")
    assert (tmp_path / "file").read_text() == "x"
    assert leftover.exists()  # nothing tells whether its writer has ended
