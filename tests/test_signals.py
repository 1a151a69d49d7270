import os
import signal
from types import SimpleNamespace

import pytest
from helpers import TORCHRUN_RANK

from moco import distributed
from moco.processes import signals
from moco.processes.signals import StopSignal

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.mark.parametrize("signum", signals.STOP_SIGNALS)
def test_a_signal_is_remembered_and_ends_nothing(signum):
    stop = StopSignal()
    assert stop.signum == 0
    os.kill(os.getpid(), signum)
    assert stop.signum == signum


def test_a_second_interrupt_ends_the_process_at_once():
    StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_the_end_of_torchrun_counts_as_sigterm(monkeypatch):
    for name, value in TORCHRUN_RANK.items():
        monkeypatch.setenv(name, value)
    stop = StopSignal()
    assert stop.signum == 0
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    assert stop.signum == signal.SIGTERM


def test_without_torchrun_the_parent_may_end(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = StopSignal()
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    assert stop.signum == 0


@pytest.mark.parametrize("is_main", [True, False])
def test_rank_0_says_where_a_signal_stopped_the_run(capsys, monkeypatch, is_main):
    monkeypatch.setattr(distributed, "is_main", lambda: is_main)
    with pytest.raises(SystemExit) as stop:
        signals.exit_on_signal(signal.SIGUSR1, "in epoch 3 after step 5")
    assert stop.value.code == 128 + signal.SIGUSR1
    said = "stopped by SIGUSR1 in epoch 3 after step 5, saved; continue with --resume auto\n"
    assert capsys.readouterr().out == (said if is_main else "")


def test_workers_leave_signals_to_the_trainer_until_it_exits(monkeypatch):
    ends = []
    monkeypatch.setattr(signals.os, "_exit", ends.append)
    exiting = SimpleNamespace(value=0)
    signals._ignore_signals(exiting, worker_id=0)
    for signum in signals.STOP_SIGNALS:
        os.kill(os.getpid(), signum)
    assert ends == []
    exiting.value = 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert ends == [0]
