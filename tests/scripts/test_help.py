"""--help of the three scripts; that of preprocess/: test_preprocess_start.py."""

import contextlib
import io
import re
import runpy
import sys

import pytest
from helpers import EVALUATE, PRETRAIN, PROBE, REPOSITORY, run_script


def help_of(script, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    return output.getvalue()


@pytest.mark.parametrize("script", [PRETRAIN, PROBE, EVALUATE])
def test_help_fits_the_terminal_and_explains_every_option(script, monkeypatch):
    narrow, wide = (help_of(script, columns, monkeypatch) for columns in (80, 120))
    for columns, text in (80, narrow), (120, wide):
        assert max(map(len, text.splitlines())) <= columns
    assert "(default: None)" not in wide and "(default: False)" not in wide
    options = [entry.split("\n\n")[0] for entry in re.split(r"\n  (?=-)", wide)[1:]]
    for entry in options:
        assert entry.count("\n") <= 1 and re.search(r"(  |\n) *[^-\s].*[a-z]{3}", entry), entry
    assert len(options) >= 15 and wide.count("(default: ") >= 3
    bare = run_script(script, check=False)  # without arguments
    usage, begin, _ = bare.stderr.splitlines()
    assert bare.returncode == 2 and usage == wide.splitlines()[0] and begin.startswith(f"to begin: python {script} --")
