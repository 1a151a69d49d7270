from moco.errors import first_line, one_line


def test_a_message_is_cut_to_its_first_line_or_printed_as_one():
    assert first_line(ValueError("\n  too large\nat /usr/lib")) == "too large" and first_line("") == ""
    assert one_line("--lr 0:\n  too   small") == "--lr 0: too small\n"
