import os
import signal
import time

import pytest

from moco.processes import signals
from moco.processes.signals import StopSignal, StopWaiting

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.mark.parametrize("signum", signals.STOP_SIGNALS)
def test_a_signal_is_remembered_and_ends_nothing(signum):
    stop = StopSignal()
    assert stop.signum == 0
    os.kill(os.getpid(), signum)
    assert stop.signum == signum
    with pytest.raises(StopWaiting), stop.interruptible():  # nothing is waited for afterwards
        pass


def test_a_signal_ends_the_waiting_for_data():
    stop = StopSignal()
    with pytest.raises(StopWaiting), stop.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.signum == signal.SIGTERM


def test_a_second_interrupt_ends_the_process_at_once():
    StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signum == 0


def test_a_dead_worker_is_reported_when_the_run_can_be_saved():
    """PyTorch's SIGCHLD handler raises wherever the process is, in the middle of saving for example."""

    def report(signum, frame):
        if dead:
            raise RuntimeError("a worker is dead")

    stop, dead = StopSignal(), []
    with stop.interruptible():
        signal.signal(signal.SIGCHLD, report)
    with stop.interruptible():
        pass
    dead.append(1)
    os.kill(os.getpid(), signal.SIGCHLD)  # is not reported here
    with pytest.raises(RuntimeError, match="a worker is dead"), stop.interruptible():
        pass


def test_an_unread_stdout_counts_as_a_signal():
    stop = StopSignal()
    with stop.no_broken_pipe():
        raise BrokenPipeError
    assert stop.signum == signal.SIGPIPE


def test_a_blocked_signal_arrives_after_the_block():
    stop = StopSignal()
    with signals.blocked():
        signal.raise_signal(signal.SIGUSR1)  # to this thread
        assert stop.signum == 0
    assert stop.signum == signal.SIGUSR1


def test_loading_processes_ignore_stop_signals(monkeypatch):
    monkeypatch.setattr(signals.sys, "excepthook", None)
    signals.leave_signals_to_trainer()
    assert {signal.getsignal(signum) for signum in signals.STOP_SIGNALS} == {signal.SIG_IGN}
