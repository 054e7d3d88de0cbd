"""Functions called in processes of their own: their memory holds nothing else, and their end is not ours.

The processes are forked from a server that has loaded the code and run none of it: that is quicker than to
load PyTorch each time, and safe, since no thread has been started there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

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
    return call_all(function, [arguments], seconds)[0]


def call_all(function: Callable, calls: Sequence[tuple], seconds: float = SECONDS) -> list[object]:
    """What it returns for each of the calls, which run at the same time, each in a process of its own.

    Raises Failed where one of them fails (the first that does), and ends the others.
    """
    children: dict[Connection, multiprocessing.Process] = {}
    results: dict[Connection, object] = {}
    try:
        for arguments in calls:
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            child = _CONTEXT.Process(target=_answer, args=(sender, function, arguments))
            child.start()
            children[receiver] = child
            sender.close()
        deadline = time.monotonic() + seconds
        while len(results) < len(children):
            silent = [receiver for receiver in children if receiver not in results]
            ready = wait(silent, max(deadline - time.monotonic(), 0))
            if not ready:
                raise Failed(f"more than {seconds:g} s")
            for receiver in ready:
                results[receiver] = _received(receiver, children[receiver])
        for child in children.values():
            child.join(PARTING_SECONDS)
    finally:
        for receiver, child in children.items():
            receiver.close()
            child.kill()
            child.join()
    return [results[receiver] for receiver in children]


def _received(receiver: Connection, child: multiprocessing.Process) -> object:
    try:
        result, error = receiver.recv()
    except EOFError:
        child.join()
        raise Failed(f"exit code {child.exitcode}") from None
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
