import pytest

from moco.errors import PeerError, RunError, first_line, one_line


@pytest.mark.parametrize("text, first", [("", ""), ("\n\n a\nb", "a"), (ValueError("a\nb"), "a"), (ValueError(), "")])
def test_the_first_line_of_an_error_is_taken_or_nothing(text, first):
    assert first_line(text) == first


def test_a_message_becomes_one_line():
    assert one_line("two\nlines,\t and  more ") == "two lines, and more\n"


def test_the_end_of_another_process_is_an_error_of_the_run():
    assert issubclass(PeerError, RunError)
