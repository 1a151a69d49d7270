"""--help of the three scripts; that of preprocess/: test_preprocess_start.py."""

import contextlib
import io
import re
import runpy
import sys

import pytest
from helpers import EVALUATE, PRETRAIN, PROBE, REPOSITORY


def help_lines(script, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    return output.getvalue().splitlines()


def entries(lines):
    """The lines of each option: from its name to the next entry, heading or empty line."""
    found, current = [], None
    for line in lines[lines.index("options:") :]:
        if line.startswith("  -"):
            current = [line]
            found.append(current)
        elif current and line.startswith("     "):
            current.append(line)
        else:
            current = None
    return found


@pytest.mark.parametrize("script", [PRETRAIN, PROBE, EVALUATE])
def test_help_fits_the_terminal_and_explains_every_option(script, monkeypatch):
    narrow, wide = (help_lines(script, columns, monkeypatch) for columns in (80, 120))
    assert max(map(len, narrow)) <= 80 and max(map(len, wide)) <= 120
    assert "(default: None)" not in "\n".join(wide) and "(default: False)" not in "\n".join(wide)
    options = entries(wide)
    assert len(options) == len(entries(narrow))
    for entry in options:
        assert len(entry) <= 2, "\n".join(entry)
        text = re.sub(r"^  -\S.*?(  +|$)", "", entry[0]) + "".join(entry[1:])
        assert re.search(r"[a-z]{3}", text), f"no help: {entry[0]}"
    assert len(options) >= 15 and sum("(default: " in " ".join(entry) for entry in options) >= 3
