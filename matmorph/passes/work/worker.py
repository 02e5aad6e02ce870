"""A worker: a process that does one task after another, on one thread, until its parent is gone.

Frames of eight bytes of length and that many of a pickle come by stdin and go by stdout; what anything else writes to stdout goes to
stderr.
"""

from __future__ import annotations

import os
import signal
import struct
from typing import IO, Any

_HEAD = struct.Struct("<Q")


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream, however it ended."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    (size,) = _HEAD.unpack(head)
    data = stream.read(size)
    return data if len(data) == size else None


def write_frame(stream: IO[bytes], data: bytes) -> None:
    stream.write(_HEAD.pack(len(data)))
    stream.write(data)
    stream.flush()


def main() -> None:
    """Of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")

    import torch

    torch.set_num_threads(1)
    from matmorph.passes.methods import all_methods
    from matmorph.passes.work.wire import pickled, unpickled

    methods = all_methods()
    while (data := read_frame(requests)) is not None:
        answer = pickled(answer_of(unpickled(data), methods))
        try:
            write_frame(answers, answer)
        except OSError:  # the parent is gone, and nobody asks any more
            return


def answer_of(task: Any, methods: Any) -> tuple[str, Any]:
    """("done", the result), or ("raised", what the task raised)."""
    from matmorph.errors import MatmorphError

    try:
        return "done", task.run(methods)
    except MatmorphError as error:
        return "raised", (type(error).__name__, error.message, error.details)
    except Exception as error:
        import traceback

        return "failed", (f"{type(error).__name__}: {error}", traceback.format_exc())
