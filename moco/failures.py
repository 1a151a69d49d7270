"""How a script ends that cannot go on: one line on stderr, and an exit code. A traceback means a bug of ours.

Exit codes: 2 for wrong input, before anything is built; 1 for a run that cannot go on; 128 + the number of a signal.
"""

import errno
import os
import re
import signal
import sys

import torch
import torch.distributed as dist


WORKER_KILLED = ("a loading process was killed from outside; if that was for lack of memory, use a smaller -j or --batch-size;"
                 " go on with --resume auto")


class BadInput(Exception):
    """What the user gave cannot work. The message names the value, why it is wrong, and one that would work."""


class RunFailed(Exception):
    """The run cannot go on, through no fault of the input. The message says what happened and what to do."""


class PeerLost(RunFailed):
    """Another process of this run has ended. What is wrong is for that one to say."""


def run(main):
    """Call main(), and turn what it raises into one line on stderr and the exit code."""
    try:
        main()
    except BadInput as error:
        if speaks():
            _say(error)
        sys.exit(2)
    except RunFailed as error:
        _say(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        # PyTorch raises a loading process's death from SIGCHLD, once more while this one is being answered.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        failure = explained(error)
        if failure is None:
            raise
        _say(failure)
        sys.exit(1)


def explained(error):
    """The RunFailed that a PyTorch error amounts to, None where it may be a bug. PyTorch has types for few of these."""
    text = str(error)
    if "gloo" in text and re.search("closed by peer|reset by peer|Broken pipe|Connection refused", text):
        return PeerLost("another process of this run has ended, and its message is the one to read;"
                        " go on from the last checkpoint with --resume auto")
    if isinstance(error, dist.DistError):
        return RunFailed(f"the processes cannot reach each other any more ({_first_line(text)}); look for the first message"
                         " of the others, then go on with --resume auto")
    if getattr(error, "errno", None) == errno.ENOSPC:
        return RunFailed(f"no space is left ({error}): /dev/shm is full, or the disk; make room, or use -j 0 if it is /dev/shm")
    if isinstance(error, (ConnectionError, EOFError)):               # in the middle of handing over a batch
        return RunFailed(WORKER_KILLED)
    if "DataLoader worker" in text or "shared memory" in text:
        if any(sign in text for sign in ("Bus error", "shared memory", "No space left", "unable to write", "unable to resize")):
            return RunFailed("there is no shared memory left for the loading processes: /dev/shm is full; make it larger"
                             " (docker: --shm-size), use a smaller -j, or -j 0; go on with --resume auto")
        if "is killed by signal" in text or "exited unexpectedly" in text:
            return RunFailed(WORKER_KILLED)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return RunFailed(f"out of memory ({_first_line(text) or 'MemoryError'});"
                         " use a smaller --batch-size or --moco-k, or --precision bf16")
    return None


def _first_line(text):
    return next(iter(text.strip().splitlines()), "")


def _say(error):
    # A loading process's error arrives with its traceback before the message.
    message = str(error).split(f"{type(error).__name__}: ")[-1]
    sys.stderr.write(one_line(f"{os.path.basename(sys.argv[0])}: error: {message}"))


def one_line(message):
    return " ".join(message.split()) + "\n"


def speaks():
    """All processes of a node find the same wrong input; one of them says so."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
