"""The exceptions of this project, which the scripts turn into one line on stderr; imports nothing heavy."""


class UsageError(Exception):
    """The user's input cannot work. The message names the value, why it is wrong, and one that would work."""


class RunError(Exception):
    """The run cannot continue, and the input is not to blame. The message says what happened and what to do."""


class Finished(Exception):
    """There is nothing left to do. The message says so on stdout, and the exit code is 0: job scripts can be rerun."""


class PeerError(RunError):
    """Another process of this run has ended; that process reports the cause."""


def first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "")


def printable(text: object) -> str:
    """The text in one line, with control characters and undecodable bytes escaped: names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(message: str) -> str:
    return printable(" ".join(message.split())) + "\n"
