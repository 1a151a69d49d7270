import pytest

from moco.errors import Finished, PeerError, RunError, UsageError, first_line, one_line


def test_the_first_line_of_a_long_reason():
    assert first_line(ValueError("\n  too large\nat /usr/lib")) == "too large" and first_line("") == ""


def test_a_message_of_several_lines_is_printed_as_one():
    assert one_line("--lr 0:\n  too   small") == "--lr 0: too small\n"


@pytest.mark.parametrize("kind", [UsageError, RunError, Finished])
def test_kinds_that_scripts_end_with_differently_are_no_kinds_of_each_other(kind):
    assert [each for each in (UsageError, RunError, Finished) if issubclass(kind, each)] == [kind]
    assert issubclass(PeerError, RunError)
