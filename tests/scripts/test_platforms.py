"""Systems that are not supported: one line says so and what to do."""

import contextlib
import importlib.abc
import io
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from helpers import EVALUATE, FORKSERVER, PRETRAIN, PROBE, REPOSITORY

NOT_ON_WINDOWS = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty")


class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in NOT_ON_WINDOWS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def as_on_windows(folder, script, arguments):
    """Run a script in this process without what Windows lacks; its exit code and output go to files."""
    sys.platform = "win32"  # os.name stays: pathlib would look for Windows' own modules
    for name in [name for name in dir(signal) if name.startswith("SIG") and name not in ("SIG_DFL", "SIG_IGN")]:
        if name not in ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"):
            delattr(signal, name)
    for name in ("pthread_sigmask", "pthread_kill", "alarm", "setitimer"):
        delattr(signal, name)
    for name in ("fork", "killpg", "setsid", "sched_getaffinity", "O_NOFOLLOW"):
        delattr(os, name)
    sys.meta_path.insert(0, Missing())
    for name in [each for each in sys.modules if each.partition(".")[0] in ("moco", "common", *NOT_ON_WINDOWS)]:
        del sys.modules[name]
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "preprocess")]
    sys.argv = [script, *arguments]
    code, out, err = 0, io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    Path(folder, "result").write_text(f"{code}\n{out.getvalue()}{err.getvalue()}")


def on_windows(tmp_path, script, *arguments):
    process = FORKSERVER.Process(target=as_on_windows, args=(tmp_path, script, arguments))
    process.start()
    process.join(60)
    code, _, text = (tmp_path / "result").read_text().partition("\n")
    return int(code), text


@pytest.mark.parametrize("script", [PRETRAIN, PROBE, EVALUATE])
def test_on_windows_a_script_ends_in_one_line(script, tmp_path):
    code, text = on_windows(tmp_path, script, "--help")
    assert code == 2 and text.count("\n") == 1 and "use WSL" in text and "Traceback" not in text, text


@pytest.mark.parametrize("module", ["moco/negatives.py", "moco/builder.py", "moco/training/files.py"])
def test_what_other_code_imports_works_on_windows(module, tmp_path):
    code, text = on_windows(tmp_path, module, "--help")
    assert code == 0 and "WSL" not in text, text


@pytest.mark.parametrize("script", ["torchvision_folders.py", "imagenet_100_subset.py", "imagenet_texture_syn.py"])
def test_data_preparation_starts_on_windows(script, tmp_path):
    code, text = on_windows(tmp_path, f"preprocess/{script}", "--help")
    assert code == 0 and text.startswith(f"usage: {script}"), text
