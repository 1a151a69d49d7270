"""What can be tested of the oldest Python that is supported with a newer one."""

import ast

import pytest
from helpers import REPOSITORY

OLDEST = (3, 10)
FOLDERS = (".", "moco", "preprocess", "tests", "tests/benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).glob("*.py"))


def without_byteorder(tree):
    """The lines that call int.from_bytes or to_bytes with one argument, which needs Python 3.11."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_bytes", "to_bytes")
        and len(node.args) < 2
        and "byteorder" not in {keyword.arg for keyword in node.keywords}
    ]


def test_every_file_is_written_for_the_oldest_python():
    assert {"builder.py", "main_lincls.py", "quilting.py", "helpers.py"} <= {path.name for path in FILES}
    for path in FILES:
        tree = ast.parse(path.read_text(), str(path), feature_version=OLDEST)
        assert not without_byteorder(tree), path


@pytest.mark.parametrize(
    "call, lines",
    [
        ("int.from_bytes(b'x')", [1]),
        ("int.from_bytes(b'x', signed=True)", [1]),
        ("(5).to_bytes(2)", [1]),
        ("int.from_bytes(b'x', 'big')", []),
        ("int.from_bytes(b'x', byteorder='big')", []),
    ],
)
def test_a_missing_byteorder_is_found(call, lines):
    assert without_byteorder(ast.parse(call)) == lines
