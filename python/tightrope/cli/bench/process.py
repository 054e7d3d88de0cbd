"""A function called in a process of its own, so that its memory holds nothing else and its end is not ours.

The processes are forked from a server that has loaded the code and run none of it: that is quicker than to
load PyTorch each time, and safe, since no thread has been started there.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection

SECONDS = 900
PARTING_SECONDS = 10
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _CONTEXT.set_forkserver_preload(["tightrope.cli.bench.measure"])


class Failed(Exception):
    """The process ended badly; the message is its last word."""


def call(function: Callable, *arguments: object, seconds: float = SECONDS) -> object:
    """What the function returns; it and its arguments are pickled. What it prints is dropped.

    Raises Failed where it raises, dies, or takes more than so many seconds.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    child = _CONTEXT.Process(target=_answer, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise Failed(f"more than {seconds:g} s")
        result, error = receiver.recv()
        child.join(PARTING_SECONDS)
    except EOFError:
        child.join()
        raise Failed(f"exit code {child.exitcode}") from None
    finally:
        receiver.close()
        child.kill()
        child.join()
    if error is not None:
        raise Failed(error)
    return result


def _answer(sender: Connection, function: Callable, arguments: tuple) -> None:
    # Libraries written in C print too, past sys.stdout: the descriptors themselves are pointed away.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        answer = function(*arguments), None
    except Exception as error:  # of a peer's own code: anything
        text = str(error).strip().splitlines() or [""]
        answer = None, f"{type(error).__name__}: {text[0]}"[:200]
    sender.send(answer)
