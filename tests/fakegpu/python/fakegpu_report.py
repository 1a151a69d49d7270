"""Report of a process on the fake GPUs: counts, and the Python code that did it."""

import atexit
import collections
import ctypes
import json
import os
import sys
import sysconfig

LIBRARY = None
KINDS = ("context", "sync", "h2d")  # of these the report gives the places
_places = collections.Counter()
_passes = []  # memory reserved at the start of each pass over a DataLoader
_keep = []  # what C calls must stay alive


def install():
    """Whether the fake libraries are there to be watched."""
    global LIBRARY
    LIBRARY = ctypes.CDLL(None)
    if not hasattr(LIBRARY, "fakegpu_watch"):
        return False
    LIBRARY.fakegpu_reserved.restype = ctypes.c_size_t
    LIBRARY.fakegpu_counts.restype = ctypes.c_long
    _keep.append(ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(_seen))
    LIBRARY.fakegpu_watch(_keep[0], ",".join(KINDS).encode())
    atexit.register(_tell)  # registered first, so called last
    return True


def counts():
    """{kind: {name: count}} of this process up to now."""
    size = LIBRARY.fakegpu_counts(None, 0) + 65536  # other threads may add some meanwhile
    text = ctypes.create_string_buffer(size)
    LIBRARY.fakegpu_counts(text, size)
    result = {}
    for line in text.value.decode(errors="replace").splitlines():
        count, _, name = line.partition("\t")
        kind, _, name = name.partition(":")
        result.setdefault(kind, {})[name] = int(count)
    return result


def reserved():
    """{device: GB reserved now} of the devices with a context."""
    return {
        str(device): round(LIBRARY.fakegpu_reserved(device) / 1e9, 4)
        for device in range(16)
        if LIBRARY.fakegpu_has_context(device)
    }


def watch(torch):
    """Note what only Python knows: when a pass over a DataLoader starts, and who asks torch for another stream."""
    import torch.utils.data

    start, make = torch.utils.data.DataLoader.__iter__, torch.cuda.Stream.__new__

    def noted(self):
        _passes.append(round(sum(reserved().values()), 4))
        return start(self)

    def counted(cls, *args, **kwargs):
        if "stream_id" not in kwargs:  # else: one that there is
            LIBRARY.fakegpu_event(b"stream", b"torch.cuda.Stream")
        return make(cls, *args, **kwargs)

    torch.utils.data.DataLoader.__iter__, torch.cuda.Stream.__new__ = noted, counted


def _seen(kind, name):
    _places[(kind.decode(), name.decode(), *_stack())] += 1


def _stack():
    """The innermost frames of the program's own code, and the innermost of all: "file:line function"."""
    frame, own, innermost = sys._getframe(2), [], None
    libraries = (
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        os.path.dirname(os.path.abspath(__file__)),
        "<",
    )
    while frame:
        path = frame.f_code.co_filename
        if not path.startswith(libraries[2]):
            where = f"{_short(path)}:{frame.f_lineno} {frame.f_code.co_name}"
            innermost = innermost or where
            if not path.startswith(libraries):
                own.append(where)
        frame = frame.f_back
    if innermost is None:
        return ("no Python code: a thread of a library, such as autograd's",)
    return (*own[:4],) if own and own[0] == innermost else (innermost, *own[:4])


def _short(path):
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else "/".join(path.split("/")[-2:])


def _tell():
    LIBRARY.fakegpu_watch(None, b"")
    torch = sys.modules.get("torch")
    if torch is None or torch.utils.data.get_worker_info():  # a loading process, started afresh, not forked
        return
    with open(os.environ["FAKEGPU_REPORT"], "a") as file:  # one write: lines of several processes do not mix
        file.write(json.dumps(report()) + "\n")


def report():
    found = counts()
    return {
        "contexts": [device for device in range(16) if LIBRARY.fakegpu_has_context(device)],
        "final_reserved_gb": reserved(),
        "reserved_gb_at_each_pass": _passes,
        "streams": sum(found.get("stream", {}).values()),
        "h2d_pinned": sum(found.get("h2d_pinned", {}).values()),
        "frees": found.get("sync", {}).get("cudaFree", 0),
        "run_time_kernels": found.get("driver", {}),
        "stubs": found.get("stub", {}),  # if a new PyTorch crashes: what it called that does nothing
        "places": [
            {"kind": kind, "what": name, "count": count, "stack": stack}
            for (kind, name, *stack), count in sorted(_places.items(), key=lambda item: (item[0][0], -item[1]))
        ],
    }
