"""Exceptions as one line, and without PyTorch."""

import subprocess
import sys

from helpers import REPOSITORY

from moco.errors import PeerError, RunError, UsageError, first_line, one_line


def test_messages_become_one_line():
    assert one_line("two\n lines  of\ttext") == "two lines of text\n"
    assert first_line("\n first\nsecond") == "first" and first_line(ValueError()) == ""


def test_an_ended_peer_is_a_run_error_and_bad_input_is_not():
    assert issubclass(PeerError, RunError) and not issubclass(UsageError, RunError)


def test_exceptions_need_no_pytorch():
    code = "import sys, moco.errors; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
