from moco.errors import Finished, PeerError, RunError, UsageError, first_line, one_line


def test_a_message_is_cut_to_its_first_line_or_printed_as_one():
    assert first_line(ValueError("\n  too large\nat /usr/lib")) == "too large" and first_line("") == ""
    assert one_line("--lr 0:\n  too   small") == "--lr 0: too small\n"


def test_scripts_tell_the_kinds_of_errors_apart():
    kinds = UsageError, RunError, Finished
    assert [sum(issubclass(one, other) for other in kinds) for one in (*kinds, PeerError)] == [1, 1, 1, 1]
