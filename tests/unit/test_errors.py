import pytest

from moco.errors import first_line, one_line, printable


def test_a_message_is_cut_to_its_first_line_or_printed_as_one():
    assert first_line(ValueError("\n  too large\nat /usr/lib")) == "too large" and first_line("") == ""
    assert one_line("--lr 0:\n  too   small") == "--lr 0: too small\n"


@pytest.mark.parametrize("name, shown", [
    ("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb", r"a\nb"), ("\udcff", r"\udcff"), ("\u202egnp", r"\u202egnp"),
    ("Dvořák 猫 q·k", "Dvořák 猫 q·k")])  # fmt: skip
def test_names_from_outside_cannot_control_a_terminal(name, shown):
    assert printable(name) == shown and ("\n" in name or one_line(name) == shown + "\n")
