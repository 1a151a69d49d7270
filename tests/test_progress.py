import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from moco.training import metrics

MEANS = {"loss": 8.123, "contrast_acc": 12.5, "q_k": 0.812, "q_t": -0.123, "q_queue": 0.01, "spread": 0.974}


def test_a_log_gets_a_line_every_print_freq_steps_and_at_the_end(capsys):
    epoch = metrics.Progress(range(7), 1, images_per_step=4, print_freq=3, epochs_left=1)
    for _ in epoch:
        if epoch.due():
            epoch.report(MEANS, 0.0301)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"epoch 1 [{step}/7]" for step in (3, 6, 7)]
    wanted = ("loss 8.123", "q·k 0.812", "q·t -0.123", "spread 0.974", "lr 0.0301", " images/s", "data ", "ETA 0:00:0")
    for line in lines:
        assert all(text in line for text in wanted)


def test_several_heads_are_reported_side_by_side(capsys):
    epoch = metrics.Progress(range(1), 0, 4, 1)
    for _ in epoch:
        epoch.report({"loss": [1.0, 2.5]}, [30.0, 0.1])
    assert "loss 1.000 2.500  lr 30 0.1  " in capsys.readouterr().out


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)

    def batches(self, steps, seconds):
        clock = self

        class Loader:
            def __len__(self):
                return steps

            def __iter__(self):
                for step in range(steps):
                    clock.now += seconds
                    yield step

        return Loader()


def test_the_wait_for_data_is_measured(monkeypatch):
    clock = Clock(monkeypatch)
    epoch = metrics.Progress(clock.batches(4, seconds=3), 0, images_per_step=8, print_freq=100)
    for _ in epoch:
        clock.now += 1
    assert epoch.speed() == {"images_per_s": 4 * 8 / 16, "data_share": 0.75}


def test_the_eta_counts_the_remaining_steps_of_all_epochs(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    epoch = metrics.Progress(clock.batches(10, seconds=9), 3, images_per_step=8, print_freq=4, epochs_left=2)
    for _ in epoch:
        clock.now += 1
        if epoch.due():
            epoch.report({"loss": 1.0}, 0.1)
    etas = re.findall(r"ETA (\S+)", capsys.readouterr().out)
    assert etas == ["0:04:20", "0:03:40", "0:03:20"]  # 26, 22 and 20 steps of 10 s


def test_a_resumed_epoch_starts_at_its_step(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    loader = clock.batches(10, seconds=1)
    epoch = metrics.Progress(loader, 0, images_per_step=8, print_freq=10, first_step=6)
    rest = iter(epoch)
    for _ in range(4):
        next(rest)
        if epoch.due():
            epoch.report({"loss": 1.0}, 0.1)
    assert "[10/10]" in capsys.readouterr().out
    assert epoch.speed()["images_per_s"] == 8  # of the steps that it did itself


class Terminal:
    """A terminal of 80 columns: `stream` to write to, and `text()`, all that it was sent, which closes it."""

    def __init__(self):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.stream, self.sent = os.fdopen(slave, "w", encoding="utf-8"), b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # once the stream is closed
            while data := os.read(self.master, 4096):
                self.sent += data

    def text(self):
        self.stream.close()
        self.reader.join(timeout=10)
        os.close(self.master)
        return self.sent.decode()


@pytest.mark.parametrize(
    "means, figures",
    [
        (MEANS, ["q·k 0.812", "q·t -0.123", "spread 0.974"]),
        ({"loss": 1.25, "acc1": 70.5}, ["loss 1.250", "acc1 70.500"]),  # the probe
    ],
)
def test_80_columns_show_the_figures_and_then_the_bar(capsys, monkeypatch, means, figures):
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal, clock = Terminal(), Clock(monkeypatch)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    # 200 epochs of 990 steps
    epoch = metrics.Progress(clock.batches(990, seconds=1), 100, images_per_step=128, print_freq=10, epochs_left=99)
    for _ in epoch:
        if epoch.due():
            epoch.report(means, 0.03)
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[A", terminal.text()) if "ETA" in line]
    assert len(lines) > 90
    for line in lines:
        assert len(line) <= 80
        assert all(text in line for text in ["epoch 100 ", *figures, " 128 images/s"])
        assert re.search(r"ETA \d+:\d\d:\d\d ", line)
    assert lines[-1].count("/990 |") == 1
    assert capsys.readouterr().out == ""  # no lines beside the bar
