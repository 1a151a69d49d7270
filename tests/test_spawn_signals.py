"""A signal that comes while the ranks of a node are being started reaches them."""

import os
import signal

import pytest

from moco import launch
from moco.signals import STOP_SIGNALS


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Rank:
    def __init__(self, pid):
        self.pid = pid

    def is_alive(self):
        return True


class Context:
    processes = [Rank(101), Rank(102)]

    def join(self, grace_period):
        return True


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_ranks_start_is_forwarded(monkeypatch, number):
    sent, kill = [], os.kill

    def start(*args, **settings):
        kill(os.getpid(), number)
        return Context()

    monkeypatch.setattr(launch.mp, "start_processes", start)
    monkeypatch.setattr(launch.os, "kill", lambda pid, signum: sent.append((pid, signum)))
    launch._spawn(2, (), b"")
    assert sent == [(101, number), (102, number)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)
