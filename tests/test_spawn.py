"""Processes that a program starts itself: what they get, hear and leave."""

import atexit
import functools
import os
import pickle
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, alive, ended, started

from moco.errors import RunError, UsageError
from moco.processes import launch
from moco.processes.signals import STOP_SIGNALS

pytestmark = pytest.mark.usefixtures("handlers")


def save_what_arrived(ctx, path, tensor):
    torch.save({"ctx": ctx[:4], "tensor": tensor}, path)


def test_a_started_process_gets_its_arguments(tmp_path, capfd):
    tensor = torch.arange(5)
    settings = {"multiprocessing": True, "dist_url": launch.MULTICAST_DEFAULT}
    launch.launch(save_what_arrived, (tmp_path / "arrived.pt", tensor), **settings)
    arrived = torch.load(tmp_path / "arrived.pt", weights_only=False)
    assert arrived["ctx"] == (0, 1, 0, 1) and torch.equal(arrived["tensor"], tensor)
    assert "no GPU found" in capfd.readouterr().out


def look_around(folder, tensor, rank):
    """Write the parent and group of this process, its handlers, and what it and its parent hold of the tensor."""
    atexit.register((folder / f"exit of {rank}").touch)
    deadline = time.monotonic() + 20
    while anonymous(os.getppid()) > anonymous(os.getpid()) - tensor.nbytes / 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder / f"{rank}.pkl").write_bytes(
        pickle.dumps(
            {
                "parent": os.getppid(),
                "group": os.getpgid(0),
                "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
                "handlers": {signal.getsignal(signum) for signum in STOP_SIGNALS} - {signal.default_int_handler},
                "held by the parent": time.monotonic() > deadline,
            }
        )
    )


def anonymous(pid):
    """Bytes of a process's memory that are no file's."""
    (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) * 1024


def test_processes_share_one_import_of_pytorch(tmp_path):
    """They come from one process, which keeps nothing of what was sent, and whose signal handlers they do not keep."""
    launch.spawn_ranks(functools.partial(look_around, tmp_path, torch.ones(50_000_000)), 2)
    found = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["parent"] not in (os.getpid(), os.getppid())
    assert found[0]["group"] == found[0]["parent"] != os.getpgid(0)
    assert not found[0]["blocked"] and found[0]["handlers"] == {signal.SIG_DFL}
    assert not found[0]["held by the parent"]
    assert (tmp_path / "exit of 0").exists() and (tmp_path / "exit of 1").exists()


# How they end


def fail(how, rank):
    """End as `how` says, in rank 1; rank 0 is there for a second more, as one that learns of it."""
    if how == "refuse":
        raise UsageError("--lr: too large")
    if rank == 0:
        return time.sleep(2)
    if how == "kill itself":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "kill the starter":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    raise ValueError("put in by a test")


@pytest.mark.parametrize(
    "how, code, message",
    [
        ("refuse", 2, "error: --lr: too large"),
        ("kill itself", 1, "error: process 1 was killed by SIGKILL; if memory ran out"),
        ("a bug", 1, "ValueError: put in by a test"),
    ],
)
def test_the_program_ends_with_the_code_of_a_process(monkeypatch, capfd, how, code, message):
    with pytest.raises(SystemExit) as stop:
        launch.spawn_ranks(functools.partial(fail, how), 1 if how == "refuse" else 2)
    assert stop.value.code == code
    assert capfd.readouterr().err.count(message) == 1


def test_a_killed_starter_is_an_error():
    with pytest.raises(RunError, match="the process that starts the ranks was killed by SIGKILL"):
        launch.spawn_ranks(functools.partial(fail, "kill the starter"), 2)


# Signals


def wait(folder, rank):
    (folder / f"{rank} waits").touch()
    time.sleep(60)


def test_a_signal_ends_all_processes(tmp_path):
    def terminate():
        while len(list(tmp_path.glob("* waits"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should it come too early
    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit) as stop:
        launch.spawn_ranks(functools.partial(wait, tmp_path), 2)
    assert stop.value.code == 128 + signal.SIGTERM


PROGRAM = """
import time
from moco import spawn

def wait(rank):
    time.sleep(60)

if __name__ == "__main__":
    launch.spawn_ranks(wait, 2)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_during_the_import_ends_all_processes(tmp_path, number):
    """In a program of its own, since it matters what multiprocessing starts first."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = started(program, env={"PYTHONPATH": str(REPOSITORY)})
    while not starters(process) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    code, _, err = ended(process)
    assert (code, err) == (128 + number, "")


def starters(process):
    """The children of a program that multiprocessing has spawned."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive(process)}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


class Rank:
    def __init__(self, pid):
        self.pid = pid

    def is_alive(self):
        return True


class Context:
    processes = [Rank(101), Rank(102)]

    def join(self, grace_period):
        return True


class Reader:
    def recv_bytes(self):
        return pickle.dumps(fail)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_processes_start_is_forwarded(monkeypatch, number):
    sent = []

    def start(*args, **settings):
        signal.pthread_kill(threading.get_ident(), number)  # the tests have other threads, where it is not blocked
        return Context()

    monkeypatch.setattr(launch.mp, "start_processes", start)
    monkeypatch.setattr(launch.os, "kill", lambda pid, signum: sent.append((pid, signum)))
    monkeypatch.setattr(launch, "signal_when_parent_ends", lambda signum: None)
    launch._start(Reader(), 2)
    assert sent == [(101, number), (102, number)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)
